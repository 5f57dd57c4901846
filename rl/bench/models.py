"""The models of `nox -s bench`, their sizes, and prompts of an exact number of tokens for them."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl import config as configs
from rl.bench.table import Sizes
from rl.errors import RunFailed

if TYPE_CHECKING:
    from rl.models import Base

SEED = 0
PROMPTS = 16
# config.json of SmolLM2-1.7B, as far as it differs from the 135M one's
SMOLLM2_1_7B = {
    **{"hidden": 2048, "intermediate": 8192, "layers": 24, "heads": 32, "kv_heads": 32, "head_dim": 64},
    "rope_theta": 130000.0,
}


@dataclass(frozen=True)
class Subject:
    """A model to bench: its folder, tokenizer, and prompts as text and as tokens."""

    shape: str
    base: "Base"
    tokenizer: Any
    texts: list[str]
    prompts: list[list[int]]


def subject(shape: str, prompt: int, folder: Path, root: Path) -> Subject:
    """The model of `shape` with prompts of `prompt` tokens; what is made for this bench alone goes into `folder`.

    "tiny" is the random character-level model, "smollm2" the packaged one, "1.7b" a random Llama as large as that.
    """
    from rl import models

    name = "tiny" if shape == "tiny" else models.PACKAGED
    config = configs.Config(
        path=Path("bench"),
        run=configs.Run(name="bench", seed=SEED),
        model=configs.Model(base=name),
        data=configs.Data(source="arithmetic", train_size=1),
        trainer=configs.Trainer(algorithm="grpo"),
    )
    base = models.resolve_base(config, root)
    if shape == "1.7b":
        base = random_base(base, folder / "random-1.7b", SMOLLM2_1_7B)
    tokenizer = models.load_tokenizer(base)
    texts = prompt_texts(tokenizer, PROMPTS, prompt)
    return Subject(shape, base, tokenizer, texts, tokenizer(texts)["input_ids"])


def random_base(like: "Base", folder: Path, sizes: dict[str, Any]) -> "Base":
    """A Llama of `sizes` (fields of LlamaShape) with weights drawn as transformers draws them, else as `like`."""
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    from rl.hf_folder import LlamaShape, llama_config, weight_files, weights_sha256, write_llama
    from rl.models import Base

    told = json.loads((like.path / "config.json").read_text())
    shape = LlamaShape(
        vocab=told["vocab_size"],
        context=told["max_position_embeddings"],
        rms_eps=told["rms_norm_eps"],
        tied=True,
        **{key: told.get(f"{key}_token_id") for key in ("bos", "eos", "pad")},
        **sizes,
    )
    made = LlamaConfig(**llama_config(shape))
    with torch.device("meta"):  # names and sizes only: its own start values would take a minute
        names = {name: value.shape for name, value in LlamaForCausalLM(made).state_dict().items()}
    tensors = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"  # which draws them fast
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        for name, size in names.items():
            if name == "lm_head.weight":
                continue
            norm = name.endswith("norm.weight")
            flat = torch.ones(size) if norm else torch.randn(size, device=device) * made.initializer_range
            tensors[name] = flat.half().cpu().numpy()  # half the bytes to write, hash and read
    write_llama(folder, shape, tensors, Tokenizer.from_file(str(like.path / "tokenizer.json")), template=None)
    return Base(folder.name, folder, weights_sha256(weight_files(folder, str(folder))))


def prompt_texts(tokenizer: Any, count: int, length: int) -> list[str]:
    """`count` texts of random words (digits, where the vocabulary has no words) of exactly `length` tokens each.

    Raises RunFailed when the tokenizer does not give the words back as they were put together.
    """
    import numpy as np

    decoded = [tokenizer.decode([i]) for i in range(min(len(tokenizer), 20_000))]
    pieces = [t for t in decoded if re.fullmatch(r" [a-z]{3,}", t)] or [t for t in decoded if re.fullmatch(r"\d", t)]
    generator = np.random.default_rng(SEED)
    texts = ["".join(generator.choice(pieces, length)) for _ in range(count)]
    lengths = {len(ids) for ids in tokenizer(texts)["input_ids"]}
    if lengths != {length} or len(set(texts)) < count:
        raise RunFailed(f"bench: prompts should have {length} tokens and have {sorted(lengths)}")
    return texts


def sizes_of(policy: Any) -> Sizes:
    """Of a Llama-like torch model: weights in its layers' products and its head, bytes of one cached token."""
    import torch

    config, itemsize = policy.config, next(policy.parameters()).element_size()
    linear = {n: m.weight.numel() for n, m in policy.named_modules() if isinstance(m, torch.nn.Linear)}
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * width * itemsize
    return Sizes(sum(n for name, n in linear.items() if name != "lm_head"), linear["lm_head"], cached, itemsize)
