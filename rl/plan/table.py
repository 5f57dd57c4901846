"""docs/memory.md: what fits where, and the predictions beside the measured peaks they are held against."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl import files
from rl.algorithms import defaults
from rl.config import Config, Data, Lora, Model, Quantization, Rollout, Run, Trainer
from rl.device import GIB
from rl.plan import architecture, machine, memory, workload
from rl.plan.architecture import Architecture
from rl.plan.workload import Workload

PAGE = Path("docs/memory.md")
RECORDS = Path("evals/published/plan")
SIZES = (16, 32, 64, 128)
MODELS = (
    *("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen3-0.6B", "google/gemma-3-1b-it", "meta-llama/Llama-3.2-1B-Instruct"),
    *("Qwen/Qwen2.5-1.5B-Instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct", "Qwen/Qwen3-1.7B"),
    *("HuggingFaceTB/SmolLM3-3B", "Qwen/Qwen2.5-3B-Instruct", "meta-llama/Llama-3.2-3B-Instruct"),
    *("google/gemma-3-4b-it", "Qwen/Qwen3-4B", "Qwen/Qwen2.5-7B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
    *("Qwen/Qwen3-8B", "Qwen/Qwen3-14B", "Qwen/Qwen3-32B", "meta-llama/Llama-3.3-70B-Instruct"),
)
METHODS = {"full": (None, None), "LoRA": (Lora(), None), "4-bit LoRA": (Lora(), Quantization(bits=4))}
ROWS, PROMPT, COMPLETION = 8, 256, 256


@dataclass(frozen=True)
class Checked:
    """One measured run and what is predicted for it, in bytes."""

    name: str
    device: str
    parameters: int
    method: str
    algorithm: str
    measured: tuple[int, int]  # torch, MLX
    predicted: tuple[float, float]

    @property
    def ratio(self) -> float:
        """Predicted over measured, both sides together."""
        return sum(self.predicted) / sum(self.measured)


def main() -> int:
    """Write the page."""
    files.write_text(PAGE, page(RECORDS))
    print(f"written to {PAGE}")
    return 0


def page(records: Path) -> str:
    """The whole page, a pure function of the code and of the records."""
    return "\n".join([*_head(), *_fits(), *_checks(checks(records))]) + "\n"


def checks(records: Path) -> list[Checked]:
    """Every measured run in a folder of records, by size."""
    found = [_checked(json.loads(path.read_text())) for path in sorted(records.glob("*.json"))]
    return sorted(found, key=lambda c: (c.parameters, c.device, c.name))


def standard(method: str, rows: int, decoded: int = 64) -> Workload:
    """The workload of the table of what fits: GRPO with `rows` of 512 tokens in a micro-batch, checkpointed, and
    `decoded` completions sampled at once."""
    lora, quantization = METHODS[method]
    args: dict[str, Any] = {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 64 // rows,
        "num_generations": 8,
        "gradient_checkpointing": True,
    }
    config = Config(
        path=Path("memory.toml"),
        run=Run(name="memory"),
        model=Model(base="any", lora=lora, quantization=quantization),
        data=Data(source="hub", name="any/any", train_size=1000),
        rollout=Rollout(
            max_completion_length=COMPLETION, max_batch=decoded, precision="shared" if quantization else "full"
        ),
        trainer=Trainer(algorithm="grpo", args=defaults("grpo") | args),
    )
    return workload.of(config, prompt=PROMPT)


def _head() -> list[str]:
    return [
        "# Memory",
        "",
        "Made by `python -m rl plan --table`; a test compares. Nothing here was measured on a Mac: what fits is "
        "predicted, and the predictions are held against runs on other machines, below.",
        "",
    ]


def _fits() -> list[str]:
    kept = machine.named("m4-max", "16GB").reserve
    lines = [
        "## What fits in 16, 32, 64 and 128 GB",
        "",
        f"GRPO on a Mac: 64 completions a step of at most {COMPLETION} tokens to prompts of {PROMPT}, in micro-batches "
        f"of {ROWS} rows, gradient checkpointing, AdamW. Trainer in float32, sampler (MLX) in float16, or at 4 bits in "
        f"groups of 64, of which the trainer holds the codes and a layer's values at a time. LoRA of rank "
        "16 on all linear modules.",
        "",
        "`GiB` is what it needs, with what the allocators keep for themselves. `yes`: it fits. `small`: it fits in "
        f"micro-batches of one row with 16 completions sampled at once. A run may take {kept}.",
        "",
        "| model | parameters | method | GiB | " + " | ".join(f"{size} GB" for size in SIZES) + " |",
        "| --- | ---: | --- | ---: |" + " --- |" * len(SIZES),
    ]
    for name in MODELS:
        shape = architecture.known(name)
        for method in METHODS:
            lines.append(_fit_row(name, shape, method))
    return [*lines, ""]


def _fit_row(name: str, shape: Architecture, method: str) -> str:
    peaks = {"yes": memory.predict(shape, standard(method, ROWS), "mps")}
    peaks["small"] = memory.predict(shape, standard(method, 1, 16), "mps")

    def verdict(size: int) -> str:
        where = machine.named("m4-max", f"{size}GB")
        for word, peak in peaks.items():
            needed, own = where.needs(peak.torch, peak.mlx)
            if needed <= where.usable and own <= where.torch_limit:
                return word
        return "no"

    needed = machine.named("m4-max", "16GB").needs(peaks["yes"].torch, peaks["yes"].mlx)[0] / GIB
    cells = " | ".join(verdict(size) for size in SIZES)
    return f"| {name.split('/')[1]} | {shape.parameters / 1e9:.2f} B | {method} | {needed:.1f} | {cells} |"


def _checks(found: Iterable[Checked]) -> list[str]:
    lines = [
        "## Predicted and measured peaks",
        "",
        "Each row is a run of two optimizer steps with its evaluation before and after, on random weights "
        "(`python -m rl plan --measure`, records in `evals/published/plan/`). torch: on a GPU "
        "`torch.cuda.max_memory_allocated`, on a CPU the bytes of all tensor storages alive at once, seen by a "
        "dispatch mode. MLX: its own counter. A prediction is never below the measured sum and at most 30 % above it. "
        "Sizes in MB (10^6 bytes).",
        "",
        "| case | device | parameters | method | algorithm | torch | predicted | MLX | predicted | ratio |",
        "| --- | --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for c in found:
        sides = " | ".join(
            f"{was / 1e6:,.0f} | {said / 1e6:,.0f}" if was else " | "
            for was, said in zip(c.measured, c.predicted, strict=True)
        )
        lines.append(
            f"| {c.name} | {c.device} | {c.parameters / 1e6:,.1f} M | {c.method} | {c.algorithm} | {sides} "
            f"| {c.ratio:.2f} |"
        )
    return lines


def _checked(record: dict[str, Any]) -> Checked:
    case, peaks = record["case"], record["peaks"]
    shape = Architecture(**record["architecture"])
    told = record["workload"] | {"lora_targets": tuple(record["workload"]["lora_targets"])}
    made = memory.predict(shape, Workload(**told), record["device"])
    return Checked(
        name=case["name"],
        device=record["device"],
        parameters=shape.parameters,
        method={"full": "full", "lora": "LoRA", "q8": "8-bit LoRA", "q4": "4-bit LoRA"}[case["method"]],
        algorithm=case["algorithm"],
        measured=(peaks["torch"], peaks["mlx"]),
        predicted=(made.torch, made.mlx),
    )
