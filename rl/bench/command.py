"""`nox -s bench`: rollouts, sync and the parts of a GRPO step, against what they replace, on this machine.

Contestants in turns, on a CPU mlx-lm's in a process beside the others; ratios within a repetition. Nothing is timed
before the contestants have agreed on greedy completions with the trainer's own logits, and nothing counts whose lengths
are not the forced ones.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rl import config as configs
from rl import device as devices
from rl import measured
from rl.bench import file as bench_file
from rl.bench import table as tables
from rl.bench.models import Subject, sizes_of, subject
from rl.bench.rollouts import Budget, Setting, agree, contest, said, works
from rl.bench.table import Report, Steps, Sync
from rl.errors import RunFailed

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"rollouts": 8.0, "sync": 1.0, "step": 5.0}  # and their shares of the budget
TORCH_DEVICE = {"cpu": "cpu", "cuda": "cuda", "metal": "mps"}  # of MLX's backends
GPU_BUDGET = 240.0  # seconds a shape, where none is given


def main(
    shapes: Sequence[str] = ("tiny",),
    *,
    quick: bool = False,
    repeats: int | None = None,
    dtype: str | None = None,
    parts: Sequence[str] = tuple(PARTS),
    budget: float | None = None,
    out: Path | None = None,
    root: Path = ROOT,
) -> int:
    """Bench `shapes` and write `bench-<device>.md` and `.json` to `out`, anew after every part. Returns 0.

    out: evals/published, or build where the bench is scaled down. budget: seconds a shape, those of loading included;
    repetitions are fewer where it is short, and what it is not enough for is said to be not run. On a CPU no bound if
    none is given. Raises RunFailed when contestants disagree, a part failed, or torch lacks the device of MLX.
    """
    from rich.console import Console

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before its import: TRL reports every trainer to the hub
    from rl.rollouts import device as mlx_device

    backend = mlx_device.backend()
    device = devices.pick(TORCH_DEVICE[backend]) if TORCH_DEVICE[backend] in devices.available() else None
    if device is None:
        raise RunFailed(f"bench: MLX runs on {backend}, and torch has no such device here: they must share one")
    devices.prepare(device)
    import rl.train

    rl.train.quiet()
    dtype = dtype or ("float32" if backend == "cpu" else "float16")
    repeats = repeats or (2 if quick else 5)
    budget = budget or (None if backend == "cpu" else GPU_BUDGET)
    parts = [part for part in PARTS if part in parts]
    command = f"--repeats {repeats} --dtype {dtype}" + (f" --budget {budget:g}" if budget else "")
    command += "".join(f" --part {part}" for part in parts if len(parts) < len(PARTS))
    path = (out or root / ("build" if quick else "evals/published")) / f"bench-{bench_file.device_name(device)}"
    (root / "build").mkdir(parents=True, exist_ok=True)
    console, failed = Console(), []
    with tempfile.TemporaryDirectory(prefix="bench-", dir=root / "build") as folder, console.status("") as status:
        # in a log a status shows nothing
        say = (
            (lambda text: status.update(f"{text} ..."))
            if console.is_terminal
            else (lambda text: print(text, flush=True))
        )
        setting = Setting(device, dtype, quick, repeats, Path(folder), say)
        for shape in shapes:
            told = f"nox -s bench -- --shape {shape} {'--quick ' if quick else ''}{command}"
            about = measured.about(told, device, root)
            limit = Budget(budget)
            say(f"{shape}: model and prompts")
            found = subject(shape, setting.prompt, setting.folder, root)
            report = bench(
                found,
                setting,
                parts,
                limit,
                lambda report, about=about: bench_file.write(path, report, parts, about),
            )
            failed += [note for note in report.notes if note.startswith("failed")]
    text = path.with_suffix(".md").read_text()
    print(text, end="")
    where = path.relative_to(root) if path.is_relative_to(root) else path
    print(f"\nwritten to {where}.md and .json")
    if failed:
        raise RunFailed(f"bench: {'; '.join(failed)}; the other parts are in {where}.md")
    return 0


def bench(
    subject: Subject, setting: Setting, parts: Sequence[str], budget: Budget, keep: Callable[[Report], None]
) -> Report:
    """`parts` of everything about one model, within `budget`; `keep` is called after each with what there is.

    A part that fails is noted in the report, and the next one begun. Raises RunFailed when contestants disagree.
    """
    import torch

    from rl import models
    from rl.rollouts import bench as contestants
    from rl.rollouts import sampler as samplers

    reference = models.load_policy(subject.base, torch.float32, setting.device)
    never = reference.config.vocab_size  # one past the last token: nothing ends early
    sampler = samplers.build(
        subject.base.path, precision="full", dtype=setting.dtype, eos_ids=[never], context=None, max_batch=256
    )
    setting.say(f"{subject.shape}: agreement")
    sampler.check(reference, never)
    same = setting.dtype == "float32"
    policy = reference if same else models.load_policy(subject.base, setting.dtype, setting.device)
    apart = setting.device.type == "cpu"
    batch = (
        contestants.batch_apart(subject.base.path, setting.dtype) if apart else contestants.batch_here(sampler.model)
    )
    agreements, absent = agree(subject, setting, reference, policy, sampler.engine, batch, never)
    sizes = sizes_of(policy)
    setting.say(f"{subject.shape}: bandwidth, sums and launches of this machine")
    report = Report(
        shape=subject.shape,
        parameters=sum(p.numel() for p in reference.parameters()),
        device=setting.device.type,
        dtype=setting.dtype,
        full=not setting.quick,
        agreements=agreements,
        machine=measure_machine(setting, sampler.model),
        absent=absent,
    )
    keep(report)

    def rollouts(share: Budget) -> None:
        todo = works(setting)
        weights = [work.prompts * work.group if setting.device.type == "cpu" else 1 for work in todo]
        for number, work in enumerate(todo):
            own = share.part(weights[number] / sum(weights[number:]))
            found = contest(
                work, subject, setting, policy, sampler.engine, batch, never, sizes, report.machine, absent, own, budget
            )
            if found is None:
                report.notes.append(f"not run: rollout {work.name}, no time was left in the budget")
            else:
                report.contests.append(found)
            keep(report)

    def sync(_: Budget) -> None:
        report.syncs.extend(sync_times(subject, setting, reference))

    def step(share: Budget) -> None:
        for found in step_times(subject, setting, share):
            if next(iter(found.seconds.values())):
                report.steps.append(found)
            else:
                report.notes.append(f"not run: GRPO step, {found.kind}, no time was left in the budget")
            keep(report)

    left = {name: weight for name, weight in PARTS.items() if name in parts}
    for name, work in (("rollouts", rollouts), ("sync", sync), ("step", step)):
        if name == "sync":
            del policy, batch  # the rollouts' last use of them; a nested function keeps its cell, not the weights
        if name == "step":
            del sampler, reference
            devices.give_back(setting.device)
        if name not in parts:
            continue
        share = budget.part(left.pop(name) / (sum(left.values()) + PARTS[name]))
        if budget.left() <= 0:
            report.notes.append(f"not run: {name}, no time was left in the budget")
        else:
            try:
                work(share)
            except Exception as error:  # hours of other parts must not go with it
                report.notes.append(f"failed: {name}, {said(error)}")
        keep(report)
    return report


def measure_machine(setting: Setting, model: Any) -> tables.Machine:
    """Best of five: a copy larger than any cache, a large product in the bench's dtype, a chain of small operations."""
    import torch

    from rl.rollouts import bench as contestants

    device, dtype = setting.device, getattr(torch, setting.dtype)
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)

    def best(work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(6):
            started = time.perf_counter()
            work()
            wait()
            seconds.append(time.perf_counter() - started)
        return min(seconds[1:])

    source = torch.ones((8 if setting.quick else 64) << 20, device=device)
    target = torch.empty_like(source)
    copied = best(lambda: target.copy_(source))
    size = 512 if setting.quick else 2048 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    product = best(lambda: a @ a)
    rows = 64
    return tables.Machine(
        bandwidth=2 * source.numel() * source.element_size() / copied,
        flops=2 * size**3 / product,
        launch=contestants.launch_seconds(),
        launches=contestants.launches(model, rows),
    )


def sync_times(subject: Subject, setting: Setting, policy: Any) -> list[Sync]:
    """Hand-overs of all weights, then of a LoRA adapter on all layers, from a float32 trainer on the device.

    Wraps `policy` with the adapter, so that it is of no use afterwards.
    """
    from rl import models
    from rl.rollouts import sampler as samplers

    found = []
    for what in ("all weights", f"LoRA rank {configs.Lora().rank}"):
        setting.say(f"{subject.shape}: sync, {what}")
        if what != "all weights":
            policy = models.add_lora(policy, configs.Lora())
        sampler = samplers.build(
            subject.base.path, precision="full", dtype=setting.dtype, eos_ids=[0], context=None, max_batch=256
        )
        reports = [sampler.sync(policy) for _ in range(1 + 2 * setting.repeats)][1:]
        found.append(
            Sync(f"{what}, {reports[0].way}", reports[0].tensors, reports[0].bytes, [r.seconds for r in reports])
        )
    return found


def step_times(subject: Subject, setting: Setting, budget: Budget) -> Iterator[Steps]:
    """GRPO steps of this project and of stock TRL: LoRA on all layers, and for the tiny model all weights too.

    Batches are 8 × 8 where their activations fit: 2 × 4 for SmolLM2 on a CPU, 2 × 8 for 1.7B.
    """
    from rl.algorithms import bench as algorithms

    small = {"smollm2": (2, 4) if setting.device.type == "cpu" else (8, 8), "1.7b": (2, 8)}
    prompts, group = small.get(subject.shape, (8, 8))
    for lora in (configs.Lora(), None) if subject.shape == "tiny" else (configs.Lora(),):
        kind = "all weights" if lora is None else f"LoRA rank {lora.rank}"
        work = algorithms.StepWork(
            prompts=subject.texts[:prompts], group=group, max_tokens=setting.new, lora=lora, sampler_dtype=setting.dtype
        )
        seconds = algorithms.run(
            subject.base,
            subject.tokenizer,
            setting.device,
            setting.folder,
            work,
            setting.repeats,
            lambda text, kind=kind: setting.say(f"{subject.shape}: {text}, {kind}"),
            budget.left,
        )
        yield Steps(kind, prompts, group, setting.prompt, setting.new, seconds)
        devices.give_back(setting.device)
