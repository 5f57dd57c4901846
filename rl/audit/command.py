"""`python -m rl audit`: does MPS have every operator that training dispatches? Asked on any machine, without a Mac.

One real optimizer step of each algorithm runs on the CPU (forward, backward, clipping, optimizer, and what the trainer
does around them) while every ATen operator is recorded (rl/audit/record.py), and each is held against torch's own list
of MPS kernels (rl/audit/kernels.py). It says that an operator exists there, not that it is right or fast: that takes a
Mac and `nox -s mps_smoke`.
"""

import functools
import importlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from rl import config as configs
from rl import files, record
from rl.algorithms import ALGORITHMS
from rl.audit import kernels
from rl.config.reading import nearest
from rl.errors import RunFailed, UserError
from rl.smoke import steps

ROOT = Path(__file__).resolve().parents[2]
PAGE = Path("docs", "operators.md")
SMALL = configs.TinyModel(hidden=32, layers=1, heads=2, intermediate=64)
HOW = {"kernel": "own kernel", "composite": "made of others", "cpu fallback": "runs on the CPU", "missing": "missing"}

Step = Callable[[Path], "Found"]


@dataclass(frozen=True)
class Found:
    """What one step dispatched: operators by name, and tensors of types that MPS lacks ("add.Tensor -> float64")."""

    operators: frozenset[str]
    absent: frozenset[str]

    @property
    def wrong(self) -> list[str]:
        """The operators that MPS cannot run itself, and the tensors it cannot hold."""
        return [
            *sorted(name for name in self.operators if kernels.status(name) in ("missing", "cpu fallback")),
            *sorted(self.absent),
        ]


def main(algorithms: Sequence[str] = (), *, write: bool = False, root: Path = ROOT) -> int:
    """Audit these algorithms, or everything; with `write` the page docs/operators.md is made anew.

    Raises UserError for an unknown algorithm, RunFailed naming each operator that MPS lacks and who needs it.
    """
    from rich.console import Console
    from rich.table import Table

    if unknown := next((name for name in algorithms if name not in ALGORITHMS), None):
        raise UserError(f"audit: no algorithm '{unknown}', {nearest(unknown, ALGORITHMS)}")
    if write and algorithms:
        raise UserError("audit: --write is for the page of all algorithms: give no algorithm with it")
    console = Console()
    found = {}
    with console.status("") as status:
        for name, case in audit(algorithms):
            status.update(f"{name} ...")
            found[name] = case()
    table = Table("step", "operators", "own kernel", "made of others", "MPS lacks")
    for name, case in found.items():
        counts = [sum(kernels.status(o) == s for o in case.operators) for s in ("kernel", "composite")]
        table.add_row(name, str(len(case.operators)), *map(str, counts), ", ".join(case.wrong) or "nothing")
    console.print(table)
    if write:
        files.write_text(root / PAGE, page(found))
        console.print(f"written: {PAGE}")
    wrong = [f"{what} ({name})" for name, case in found.items() for what in case.wrong]
    if wrong:
        raise RunFailed(f"audit: MPS lacks what these steps need: {'; '.join(wrong)}")
    console.print("MPS has every operator that these steps dispatched; nothing here was run on MPS")
    return 0


def audit(algorithms: Sequence[str] = ()) -> Iterator[tuple[str, Callable[[], Found]]]:
    """Names of steps and functions that take one and say what it dispatched; no `algorithms` = all, and variants."""
    import rl.train

    rl.train.quiet()
    for name in algorithms or ALGORITHMS:  # before the garbage is set aside
        importlib.import_module(f"rl.algorithms.{name}")
    chosen = cases() if not algorithms else {name: case for name, case in cases().items() if name in algorithms}
    with tempfile.TemporaryDirectory(prefix="duet-audit-") as folder, steps.without_garbage():
        for name, case in chosen.items():
            yield name, functools.partial(case, Path(folder))


def cases() -> dict[str, Step]:
    """Every algorithm, training all weights; then what adds operators of its own to a step."""
    found: dict[str, Step] = {name: functools.partial(step, algorithm=name) for name in ALGORITHMS}
    for name in ("sft", "grpo", "ppo"):
        found[f"{name}, LoRA on a 4-bit base"] = functools.partial(step, algorithm=name, lora=True, shared=True)
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    found["sft, gradient checkpointing"] = functools.partial(step, algorithm="sft", **checkpointing)
    found["sft, bfloat16 autocast"] = functools.partial(step, algorithm="sft", bf16=True)
    return found | PARTS


def step(folder: Path, *, algorithm: str, lora: bool = False, shared: bool = False, **args: Any) -> Found:
    """One optimizer step of `algorithm` on a tiny random Llama; `args` are the trainer's."""
    import torch

    cpu = torch.device("cpu")
    config = steps.make_config(
        cpu, algorithm, lora=lora, shared=shared, dtype="float32", tiny=SMALL, max_grad_norm=0.1, **args
    )
    job = steps.make_job(config, folder, cpu)
    train = steps.trainer_of(job)  # its module is loaded before anything in it is replaced
    return listen(lambda: train(job))


def listen(work: Callable[[], Any]) -> Found:
    """What `work` dispatches."""
    from rl.audit.record import listening

    with listening() as recorder:
        work()
    return Found(frozenset(recorder.operators), frozenset(recorder.absent))


def loss_scaling(folder: Path) -> Found:
    """A step of fp16 training as accelerate takes it: scaled loss, unscaled gradient, clipping, fused Adam."""
    import torch

    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer, scaler = torch.optim.AdamW([weight], fused=True), torch.amp.GradScaler("cpu")

    def work() -> None:
        with torch.autocast("cpu", torch.float16):
            loss = torch.nn.functional.linear(weight, weight).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        scaler.step(optimizer)
        scaler.update()

    # torch inverts the scale in float64, but not on MPS
    with mock.patch.object(torch.Tensor, "double", lambda scale: scale):
        return listen(work)


def packed_layers(folder: Path) -> Found:
    """Forward and backward of an embedding and a linear layer over packed 4-bit codes (rl/packed.py)."""
    import torch

    from rl import packed

    codes = torch.arange(8 * 4, dtype=torch.int32).view(8, 4)
    weight = packed.packed(codes, torch.ones(8, 1), torch.zeros(8, 1), 4)
    embed = packed.PackedEmbedding(weight, None, torch.float32)
    linear = packed.PackedLinear(weight, None, torch.float32)
    ids, shift = torch.tensor([0, 3, 7]), torch.zeros(32, requires_grad=True)
    return listen(lambda: linear(embed(ids) + shift).sum().backward())


PARTS: dict[str, Step] = {"fp16 loss scaling": loss_scaling, "packed 4-bit layers": packed_layers}


def page(found: dict[str, Found]) -> str:
    """docs/operators.md: every operator, what MPS has for it, and the steps that dispatched it."""
    users: dict[str, list[str]] = {}
    for name, case in found.items():
        for operator in case.operators:
            users.setdefault(operator, []).append(name)
    counts = {s: sum(kernels.status(o) == s for o in users) for s in HOW}
    absent = sorted({a for case in found.values() for a in case.absent})
    lines = [
        "# Operators that training dispatches, and what MPS has for them",
        "",
        "Generated by `python -m rl audit --write`; a test holds it against the code. **Nothing on this page was run",
        "on MPS.** One optimizer step of each algorithm was recorded on a CPU, with the choices that torch's code",
        f"makes on MPS (`rl/audit/record.py`), and each operator was looked up in torch {_torch()}'s list of kernels",
        "(`native_functions.yaml`). It says that an operator exists on MPS, not that it is right or fast there:",
        "`nox -s mps_smoke` on a Mac measures that.",
        "",
        f"{len(users)} operators: {counts['kernel']} with a kernel of their own on MPS, {counts['composite']} made of",
        f"others of this list, {counts['cpu fallback']} that run on the CPU, {counts['missing']} missing. Tensors of",
        f"types that MPS lacks (float64, complex128), made on the device: {', '.join(absent) or 'none'}.",
        "",
        f"Steps: {'; '.join(name for name in found if name not in PARTS)}. Parts of a step, alone: {'; '.join(PARTS)}.",
        "",
        "| operator | on MPS | dispatched by |",
        "| --- | --- | --- |",
    ]
    for operator in sorted(users):
        lines.append(f"| `{operator}` | {HOW[kernels.status(operator)]} | {_who(users[operator], list(found))} |")
    return "\n".join(lines) + "\n"


def _torch() -> str:
    return str(record.versions(("torch",))["torch"])


def _who(names: list[str], everyone: list[str]) -> str:
    """The shorter of which steps do and which do not; then the parts that do."""
    steps = [name for name in everyone if name not in PARTS]
    having = [name for name in steps if name in names]
    lacking = [name for name in steps if name not in names]
    but = f"every step but {'; '.join(lacking)}" if lacking else "every step"
    told = [but if len(lacking) < len(having) else "; ".join(having)]
    return "; ".join(part for part in [*told, *(name for name in PARTS if name in names)] if part)
