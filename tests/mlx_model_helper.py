"""Tiny random models with a byte-pair tokenizer, each as lm-eval's own `hf` model and as ours, and lm-eval's public
tasks with inline questions in place of their data sets."""

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import rl.rollouts  # noqa: F401  binds BLAS before mlx loads
from evals import mlx_model
from evals.catalog import lm_eval_tasks
from rl.rollouts import quantized

logging.getLogger("lm_eval").setLevel(logging.ERROR)

CONTEXT = 192
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
GREEDY = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# contexts and continuations
ASKED = [
    ("Tom has 12 apples", " left."),
    ("Tom has 12 apples", " left"),
    ("Tom has 12 apples ", "left and eats 5 of them"),  # the space goes over to the continuation
    ("Tom has 12 apples", " l"),
    ("", "The heron waited by the river"),  # no context: BOS or EOS stands there
    ("Question: ", "a"),
    ("The heron waited by the river until" * 12, " the small fish"),  # longer than CONTEXT
    ("The cork", " floats on water, " * 11),
    ("Tom has 12 apples", " left."),
    ("<bos>The heron", " waited"),  # brings its own BOS
]


def tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 160 tokens over ASCII; with `bos` it puts <bos> before every text, as Llama's does."""
    made = Tokenizer(tokenizer_models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    names = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=160,
        special_tokens=names,
        initial_alphabet=[*map(chr, range(33, 127)), "Ġ", "Ċ"],
        show_progress=False,
    )
    made.train_from_iterator(texts(), trainer)
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    own = {"bos_token": "<bos>"} if bos else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", **own)
    fast.chat_template = TEMPLATE
    return fast


def config(family: str, vocabulary: int) -> PretrainedConfig:
    """A family's own configuration class at the sizes above; Qwen 2 has biases in its attention, Qwen 3 norms."""
    common: dict[str, Any] = {"vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": 2, **SIZES}
    if family == "llama":
        return LlamaConfig(**common, bos_token_id=1, tie_word_embeddings=False)
    if family == "qwen2":
        return Qwen2Config(**common, bos_token_id=None, tie_word_embeddings=True, use_sliding_window=False)
    return Qwen3Config(**common, bos_token_id=None, head_dim=8, tie_word_embeddings=True)


def write(folder: Path, family: str, steps: int = 40) -> Path:
    """Model and tokenizer of a family, taught for a second, so that some answers are right."""
    made = tokenizer(bos=family == "llama")
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config(family, len(made))).float()
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.5)  # else they are 0, and nobody would miss them
    rows = made([f"{text}{made.eos_token}" for text in texts()], padding=True, return_tensors="pt")
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(**rows, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def write_quantized(folder: Path, whole: Path) -> tuple[Path, Path]:
    """A 4-bit base of the model `whole` as `rl.rollouts.quantized` makes it, and a LoRA adapter of rank 4 on it."""
    folder.mkdir()
    base, adapter = folder / "4bit", folder / "adapter"
    quantized.build(whole, None, 4, 32, base, source="test")
    lora = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    model.save_pretrained(adapter)
    return base, adapter


def hf(folder: Path, adapter: Path | None = None, **options: Any) -> HFLM:
    """lm-eval's own model of a folder, on the CPU in float32."""
    options = {"batch_size": 3, **options}
    peft = str(adapter) if adapter else None
    return HFLM(pretrained=str(folder), peft=peft, device="cpu", dtype="float32", **options)


def ours(folder: Path, adapter: Path | None = None, **options: Any) -> mlx_model.MLXModel:
    """The same in MLX."""
    return mlx_model.build(folder, adapter=adapter, **{"batch_size": 3, **options})


def instances(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    """Requests as lm-eval hands them over."""
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]  # type: ignore[arg-type]


def told(prompts: Sequence[str], **settings: Any) -> list[Instance]:
    """Generation requests: greedy, 12 new tokens, to the next empty line, unless told otherwise."""
    return instances("generate_until", [(prompt, GREEDY | settings) for prompt in prompts])


@cache
def task(name: str, **changes: Any) -> dict[str, Any]:
    """The definition that lm-eval ships under this path, with inline questions."""
    spec = load_yaml(lm_eval_tasks() / f"{name}.yaml")
    for key in ("dataset_path", "dataset_name", "tag", "include"):
        spec.pop(key, None)
    docs = DOCS[spec["task"]]
    splits = {
        key: spec[key] for key in ("training_split", "validation_split", "test_split", "fewshot_split") if spec.get(key)
    }
    return (
        spec | {"custom_dataset": lambda **_: {split: Dataset.from_list(docs) for split in splits.values()}} | changes
    )


def _arc(question: str, right: int, *choices: str) -> dict[str, Any]:
    labels = ["A", "B", "C", "D"][: len(choices)]
    return {"question": question, "choices": {"text": list(choices), "label": labels}, "answerKey": labels[right]}


DOCS: dict[str, list[dict[str, Any]]] = {
    "arc_easy": [
        _arc("Which of these floats on water?", 1, "a stone", "a cork", "an iron nail", "a coin"),
        _arc("What do plants take in?", 0, "light", "a great many small stones", "wool"),
        _arc("When is it dark?", 2, "at noon", "in the morning", "at night", "in July"),
        _arc("What is 12 - 5?", 1, "5", "7", "12", "17"),
        _arc("Where do fish live?", 0, "in the river", "on the moon", "in trees", "in the light"),
        _arc("What has feathers?", 3, "a cat", "the river", "an apple", "the heron by the river"),
    ],
    "lambada_openai": [
        {"text": "The heron waited by the river until the small fish came back into the light"},
        {"text": "Tom has apples and Ann has pears, and when Tom is hungry he eats his apples"},
        {"text": "The cork floats and the stone sinks to the bottom of the river"},
        {"text": "Answer the question"},
    ],
    "gsm8k": [
        {
            "question": f"Tom has {a} apples and eats {b}. How many are left?",
            "answer": f"{a} - {b} = {a - b}\n#### {a - b}",
        }
        for a, b in ((12, 5), (9, 4), (30, 11), (8, 8), (7, 1))
    ],
    "wikitext": [
        {"page": " = Heron = \n The heron waited by the river until the small fish came back . " * 5},
        {"page": "Tom 's apples , 12 @,@ 000 of them"},
        {"page": 'The cork floats " and " the stone sinks ; ' * 14},
    ],
    "piqa": [
        {
            "goal": "Keep a cork under water",
            "sol1": "Tie the cork to a stone and sink both.",
            "sol2": "Wait.",
            "label": 0,
        },
        {
            "goal": "Catch fish",
            "sol1": "Shout at the river.",
            "sol2": "Stand still by the river in the light.",
            "label": 1,
        },
        {"goal": "Count apples", "sol1": "One by one.", "sol2": "Eat them one by one until 7 are left.", "label": 0},
        {"goal": "Peel an apple ", "sol1": " Use a knife", "sol2": "Use a cork", "label": 0},
    ],
    "blimp_adjunct_island": [
        {"sentence_good": "Who does Tom see before eating apples?", "sentence_bad": "Who does Tom eat before seeing?"},
        {"sentence_good": "The heron waited.", "sentence_bad": "The heron waiteds until."},
        {"sentence_good": "Fish float in the light.", "sentence_bad": "Fish floats in light the."},
    ],
}


def texts() -> list[str]:
    """Most questions with their right answers, as the tasks put them: the others are for the models to get wrong."""
    chosen = [(d["question"], d["choices"]["text"]["ABCD".index(d["answerKey"])]) for d in DOCS["arc_easy"][:3]]
    chosen += [(d["question"], d["answer"]) for d in DOCS["gsm8k"][:3]]
    chosen += [(d["goal"], d["sol2" if d["label"] else "sol1"]) for d in DOCS["piqa"][:2]]
    return [
        *(f"Question: {question}\nAnswer: {answer}" for question, answer in chosen),
        *(d["text"] for d in DOCS["lambada_openai"][:2]),
        *(d["sentence_good"] for d in DOCS["blimp_adjunct_island"]),
    ]
