"""What every algorithm shares: the job, TRL's arguments from a config, and the callbacks that record and stop."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rl import processes, reporting
from rl.algorithms import defaults
from rl.algorithms.guard import Guard
from rl.checkpoints import disk_guard
from rl.config import Config
from rl.device import check_half, empty_cache, trainer_defaults


@dataclass
class Hooks:
    """What the run wants to hear of; every function may be left as it is."""

    metrics: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    saved: Callable[[int, Path, bool], None] = lambda step, folder, good: None
    total: Callable[[int], None] = lambda steps: None
    warn: Callable[[str], None] = lambda text: None
    # step, round of dynamic sampling, rows (rl.completions)
    completions: Callable[[int, int, list[dict[str, Any]]], None] = lambda step, sampling_round, rows: None


@dataclass
class Job:
    """Everything an algorithm needs to train; `sampler` is None when torch generates."""

    config: Config
    folder: Path  # models/checkpoints/<run>
    device: torch.device
    model: Any
    tokenizer: Any
    train: list[dict[str, Any]]
    rewards: list[Any] = field(default_factory=list)
    sampler: Any = None
    stop_ids: list[int] = field(default_factory=list)
    resume: Path | None = None
    fresh_adapter: bool = False  # without its adapter the policy is what training started from
    toolbox: Any = None  # rl.tools.toolbox.Toolbox of a run whose policy calls tools
    reference: Any = None  # the frozen policy of [model] reference; None where the start is the reference
    tokens: dict[str, int] = field(default_factory=lambda: {"prompt": 0, "completion": 0})
    hooks: Hooks = field(default_factory=Hooks)


@dataclass(frozen=True)
class Outcome:
    """How training ended: steps done, interrupted by the user, or why it had to stop."""

    steps: int
    interrupted: bool
    skipped: int
    causes: list[str]
    failure: str | None


def arguments(job: Job, known: set[str]) -> dict[str, Any]:
    """TRL's arguments: per-device defaults, ours that make runs recordable, the recipe's, then the config's own."""
    args = {k: v for k, v in trainer_defaults(job.device).items() if k in known}
    args |= {
        "output_dir": str(job.folder),
        "seed": job.config.run.seed,
        "logging_steps": 1,
        "save_strategy": "steps",
        "disable_tqdm": True,
        "report_to": [],
        "run_name": job.folder.name,  # what trackers call the run
        "logging_nan_inf_filter": False,  # the filter hides a NaN loss behind the mean of the others
        "save_total_limit": None,  # the run keeps and removes checkpoints itself: only whole ones count
    }
    args |= defaults(job.config.trainer.algorithm) | job.config.trainer.args
    check_half(job.device, args, str(job.config.path))
    return args


class Recorder(TrainerCallback):
    """Hands metrics and finished checkpoints to the run, and stops at a generation boundary when asked to."""

    def __init__(self, job: Job, guard: Guard, period: int):
        self.job, self.guard, self.period = job, guard, max(1, period)
        self.interrupted = threading.Event()
        self.alike: Callable[[], bool] = lambda: False
        self.extra: Callable[[], dict[str, float]] = lambda: {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tell how many steps there will be."""
        self.job.hooks.total(state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save and stop at the first step after which a resume is exact; hand MPS's unused blocks back."""
        empty_cache(self.job.device)
        # asked once: a signal that comes between two looks would stop one process and leave the others waiting
        stop = processes.anywhere(self.interrupted.is_set())
        boundary = state.global_step % self.period == 0
        if stop:
            self.interrupted.set()
        if stop and boundary:
            control.should_save = control.should_training_stop = True
        if self.guard.health.reason is not None:
            control.should_save, control.should_training_stop = False, True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **_: Any
    ) -> None:
        """One record per logged step; the summary that Trainer logs at the end is not a step."""
        logs = {} if logs is None else logs
        if "train_runtime" in logs:
            return
        logs.update(self.extra())  # in place: trackers hear it after us
        metrics = {k: v for k, v in logs.items() if isinstance(v, int | float)}
        metrics = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in metrics.items()}
        metrics["skipped_steps"] = self.guard.health.skipped
        self.guard.watch_collapse(metrics, self.alike(), control)
        self.job.hooks.metrics(state.global_step, metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Trainer has written a checkpoint folder: let the run seal it."""
        processes.wait()  # each writes a part of it
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.job.hooks.saved(state.global_step, folder, self.guard.health.good)


@contextmanager
def stop_on_signal(event: threading.Event, warn: Callable[[str], None]) -> Iterator[None]:
    """First Ctrl-C (or SIGTERM): finish the step and save. Second: leave at once, the last checkpoint stands."""

    def handle(_number: int, _frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        warn("stopping after this step to save a checkpoint; press Ctrl-C again to leave at once")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_trainer(job: Job, trainer: Any, guard: Guard, recorder: Recorder) -> Outcome:
    """Train to the end, an interrupt or a failure."""
    guard.trainer = trainer
    trainer.remove_callback(PrinterCallback)  # the run's display prints what was logged
    with stop_on_signal(recorder.interrupted, job.hooks.warn), disk_guard(job.folder):
        reporting.prepare(trainer, job.folder, int(job.resume.name.rpartition("-")[2]) if job.resume else None)
        try:
            trainer.train(resume_from_checkpoint=str(job.resume) if job.resume else None)
        finally:
            reporting.close(trainer)
    steps, wanted = trainer.state.global_step, trainer.state.max_steps
    health = guard.health
    return Outcome(
        steps=steps,
        interrupted=recorder.interrupted.is_set() and steps < wanted,
        skipped=health.skipped,
        causes=health.causes,
        failure=health.reason,
    )


class Timer:
    """Seconds spent in named parts of a step since the last `take`."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """`{"time/<part>": seconds}`, and start again from zero."""
        out = {f"time/{name}": seconds for name, seconds in self.parts.items()}
        self.parts = {}
        return out
