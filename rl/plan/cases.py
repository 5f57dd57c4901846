"""The runs whose peaks hold the memory model to account: model, method, algorithm and sizes of each."""

from dataclasses import dataclass, field
from typing import Any, Literal

Method = Literal["full", "lora", "q8", "q4"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measured run. `model` is a name of `architecture.KNOWN`, whose sizes get random weights, or
    "tiny-<hidden>x<layers>"; `prompt` and `completion` in tokens, `rows` in one micro-batch."""

    name: str
    model: str
    method: Method
    algorithm: str = "grpo"
    rows: int
    accumulation: int = 1
    prompt: int
    completion: int
    engine: Literal["mlx", "torch"] = "mlx"
    trainer: dict[str, Any] = field(default_factory=dict)


SMOL, SMOL_360M, SMOL_1_7B = (f"HuggingFaceTB/SmolLM2-{size}-Instruct" for size in ("135M", "360M", "1.7B"))
QWEN_0_6B, QWEN_1_7B = "Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B"
LLAMA_1B = "meta-llama/Llama-3.2-1B-Instruct"
CHECKPOINTED = {"gradient_checkpointing": True}
HALF = {"bf16": True}

# small enough for two CPU cores
SMALL = (
    Case(name="1m-full-grpo", model="tiny-128x4", method="full", rows=16, prompt=24, completion=32),
    Case(name="1m-lora-grpo", model="tiny-128x4", method="lora", rows=16, prompt=24, completion=32),
    Case(name="1m-q4-grpo", model="tiny-128x4", method="q4", rows=16, prompt=24, completion=32),
    Case(name="1m-full-sft", model="tiny-128x4", method="full", algorithm="sft", rows=16, prompt=24, completion=32),
    Case(name="10m-full-dpo", model="tiny-384x6", method="full", algorithm="dpo", rows=4, prompt=48, completion=48),
    Case(name="10m-full-ppo", model="tiny-384x6", method="full", algorithm="ppo", rows=8, prompt=32, completion=32),
    Case(name="10m-lora-orpo", model="tiny-384x6", method="lora", algorithm="orpo", rows=4, prompt=48, completion=48),
    Case(
        name="38m-full-grpo-accumulated",
        model="tiny-640x8",
        method="full",
        rows=8,
        accumulation=2,
        prompt=64,
        completion=64,
    ),
    Case(
        name="38m-full-grpo-checkpointed",
        model="tiny-640x8",
        method="full",
        rows=16,
        prompt=96,
        completion=96,
        trainer=CHECKPOINTED,
    ),
    Case(name="38m-full-rloo", model="tiny-640x8", method="full", algorithm="rloo", rows=8, prompt=64, completion=64),
    Case(name="135m-full-sft", model=SMOL, method="full", algorithm="sft", rows=4, prompt=64, completion=64),
    Case(name="135m-full-grpo", model=SMOL, method="full", rows=8, prompt=48, completion=16),
    Case(name="135m-lora-grpo", model=SMOL, method="lora", rows=8, prompt=64, completion=24),
    Case(name="135m-q4-grpo", model=SMOL, method="q4", rows=8, prompt=64, completion=16),
    Case(name="135m-q8-dpo", model=SMOL, method="q8", algorithm="dpo", rows=4, prompt=64, completion=64),
    Case(
        name="135m-lora-sft-bf16",
        model=SMOL,
        method="lora",
        algorithm="sft",
        rows=4,
        prompt=64,
        completion=64,
        trainer=HALF,
    ),
    Case(name="360m-lora-grpo", model=SMOL_360M, method="lora", rows=4, prompt=64, completion=8),
    Case(
        name="600m-lora-sft-checkpointed",
        model=QWEN_0_6B,
        method="lora",
        algorithm="sft",
        rows=2,
        prompt=64,
        completion=64,
        trainer=CHECKPOINTED,
        engine="torch",
    ),
    Case(
        name="1.7b-lora-sft",
        model=SMOL_1_7B,
        method="lora",
        algorithm="sft",
        rows=2,
        prompt=48,
        completion=16,
        engine="torch",
    ),
)

# what a GPU is for, the most telling first: bases held as codes, which no CPU run holds
LARGE = (
    Case(name="135m-q4-grpo-256", model=SMOL, method="q4", rows=32, prompt=256, completion=256),
    Case(name="600m-q4-grpo", model=QWEN_0_6B, method="q4", rows=32, prompt=256, completion=128),
    Case(name="1.7b-q4-grpo", model=QWEN_1_7B, method="q4", rows=16, prompt=256, completion=128),
    Case(name="600m-full-grpo", model=QWEN_0_6B, method="full", rows=16, prompt=256, completion=128),
    Case(name="600m-lora-grpo", model=QWEN_0_6B, method="lora", rows=32, prompt=256, completion=128),
    Case(name="1.7b-lora-grpo", model=QWEN_1_7B, method="lora", rows=16, prompt=256, completion=128),
    Case(name="1.7b-full-sft", model=SMOL_1_7B, method="full", algorithm="sft", rows=8, prompt=256, completion=256),
    Case(
        name="600m-full-grpo-checkpointed",
        model=QWEN_0_6B,
        method="full",
        rows=32,
        prompt=256,
        completion=256,
        trainer=CHECKPOINTED,
    ),
    Case(name="135m-full-grpo-256", model=SMOL, method="full", rows=32, prompt=256, completion=256),
    Case(name="135m-lora-grpo-256", model=SMOL, method="lora", rows=32, prompt=256, completion=256),
    Case(name="360m-full-dpo", model=SMOL_360M, method="full", algorithm="dpo", rows=8, prompt=128, completion=128),
    Case(name="135m-full-sft-512", model=SMOL, method="full", algorithm="sft", rows=16, prompt=256, completion=256),
    Case(name="135m-full-grpo-bf16", model=SMOL, method="full", rows=32, prompt=128, completion=128, trainer=HALF),
    Case(name="1.2b-lora-grpo", model=LLAMA_1B, method="lora", rows=16, prompt=256, completion=128),
    Case(
        name="1.7b-full-grpo-accumulated",
        model=SMOL_1_7B,
        method="full",
        rows=8,
        accumulation=2,
        prompt=256,
        completion=128,
    ),
)
