"""A tiny random Llama, its character tokenizer and the folder of an arithmetic run, for tests of evals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ALPHABET = "0123456789+-= "
QUESTIONS = [(a, b) for a in (3, 7, 12, 40) for b in (2, 5, 8)]  # prompts of 4 and 5 characters: padding matters


def put_tokenizer(folder: Path) -> int:
    """A character tokenizer with <pad> and <eos>, written to `folder`; the size of its vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder)
    return len(vocabulary)


def put_llama(folder: Path, seed: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = put_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.6,  # wide, so that greedy paths differ by prompt and some end early
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def put_run(root: Path, name: str, base: str) -> Path:
    """models/final/<name>: run.json and heldout.jsonl of an arithmetic run."""
    folder = root / "models" / "final" / name
    folder.mkdir(parents=True)
    record = {
        "name": name,
        "status": "finished",
        "base": {"id": base, "sha256": "0"},
        "parents": [],
        "config": {
            "model": {"base": base},
            "rollout": {"max_completion_length": 6, "stop": []},
            "reward": [{"name": "exact", "weight": 1.0, "extract": "plain"}],
            "trainer": {"algorithm": "grpo"},
        },
    }
    (folder / "run.json").write_text(json.dumps(record))
    rows = [{"id": f"{a}+{b}", "prompt": f"{a}+{b}=", "answer": str(a + b), "task": "arithmetic"} for a, b in QUESTIONS]
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def answering(rule: Callable[[str], str]) -> Any:
    """A model for lm-eval that answers a generation by a rule and finds the longest choice most likely."""
    from lm_eval.api.model import LM

    class Fake(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [(float(len(request.args[1])), False) for request in requests]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise AssertionError("not asked")

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [rule(request.args[0]) for request in requests]

    return Fake()
