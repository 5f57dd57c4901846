"""The parts of a GRPO step, this project's and stock TRL's, timed by the same stopwatch on the same batch.

Both train a copy of the same float32 weights on the same prompts and complete to the same length (the id that ends a
completion is one that no token has). Stock TRL is `GRPOTrainer` as it comes, generating with transformers, but for two
of its defaults that would slow it down or change its numbers: bf16 autocast and gradient checkpointing are off.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any

import datasets
import torch
import trl.trainer.utils
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rl import config as configs
from rl import start
from rl.algorithms import base, grpo, learner
from rl.errors import RunFailed
from rl.models import Base
from rl.rewards import RewardFunction
from rl.rollouts.parity import TOLERANCE

OURS, STOCK = "this project", "stock TRL"
PARTS = ("rollout", "sync", "reward", "logprobs and loss", "backward", "KL to the start", "rest")
# methods of both trainers and the part that their own time counts to
METHODS = {
    "_generate_single_turn": "rollout",
    "_calculate_rewards": "reward",
    "_get_per_token_logps_and_entropies": "logprobs and loss",
    "compute_loss": "logprobs and loss",
    "_measure_kl": "KL to the start",
}


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """One step: every prompt is completed `group` times by `max_tokens` tokens, all in one batch."""

    prompts: list[str]
    group: int
    max_tokens: int
    lora: configs.Lora | None
    sampler_dtype: Any
    seed: int = 0


class Stopwatch:
    """Seconds of named parts between `start` and `stop`; time in a part inside another counts to the inner one only.

    `wait` blocks until the device is idle, so that work is charged to the part that queued it.
    """

    def __init__(self, wait: Callable[[], None], clock: Callable[[], float] = time.perf_counter):
        self.wait, self.clock = wait, clock
        self.parts: dict[str, float] = {}
        self.stack: list[str] = []
        self.mark = 0.0

    def start(self) -> None:
        """From here time counts to "rest"."""
        self.wait()
        self.parts, self.stack, self.mark = {}, ["rest"], self.clock()

    def stop(self) -> dict[str, float]:
        """`{part: seconds}`; they add up to the time since `start`."""
        self._charge()
        self.stack = []
        return self.parts

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The block's time counts to `name`; outside of start and stop to nothing."""
        if not self.stack:
            yield
            return
        self._charge()
        self.stack.append(name)
        try:
            yield
        finally:
            if self.stack:
                self._charge()
                self.stack.pop()

    def _charge(self) -> None:
        self.wait()
        now = self.clock()
        self.parts[self.stack[-1]] = self.parts.get(self.stack[-1], 0.0) + now - self.mark
        self.mark = now


class _Window(TrainerCallback):
    """Runs the stopwatch from a step's begin to its end, and keeps what was logged of it."""

    def __init__(self, watch: Stopwatch):
        self.watch = watch
        self.parts: dict[str, float] = {}
        self.logged: dict[str, float] = {}

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.watch.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.parts = self.watch.stop()

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        self.logged |= logs or {}


@dataclass
class _Side:
    """One trainer, ready to train one step again and again."""

    trainer: Any
    window: _Window
    train: Callable[[], Any]


def run(
    found: Base,
    tokenizer: Any,
    device: torch.device,
    folder: Path,
    work: StepWork,
    repeats: int,
    say: Callable[[str], None] = lambda text: None,
    left: Callable[[], float] = lambda: float("inf"),
) -> dict[str, list[dict[str, float]]]:
    """`{contestant: one {part: seconds} a repetition}`, taken in turns after one step of each to warm up.

    left: seconds that remain; repetitions stop before one that would take longer than the last did, and there are none
    where nothing is left after the warm-up. Raises RunFailed when a contestant's completions have another length, or
    the sampler is not the policy.
    """
    stock_triton = trl.trainer.utils._use_triton
    seconds: dict[str, list[dict[str, float]]] = {OURS: [], STOCK: []}
    try:
        sides = {
            OURS: _ours(found, tokenizer, device, folder / "ours", work),
            STOCK: _stock(found, tokenizer, device, folder / "stock", work),
        }
        for repeat in range(-1, repeats):
            last = sum(sum(parts[-1].values()) for parts in seconds.values() if parts)
            if repeat >= 0 and left() <= last:
                break
            for name, side in sides.items():
                say(f"GRPO step, {name}, {'warm-up' if repeat < 0 else f'{repeat + 1} of {repeats}'}")
                if name == OURS:
                    learner.score_completions_only()
                else:  # what the line above changes is part of this project, not of stock TRL
                    trl.trainer.utils._use_triton = stock_triton
                side.train()
                _check(name, side, work)
                if repeat >= 0:
                    seconds[name].append(side.window.parts)
    finally:
        trl.trainer.utils._use_triton = stock_triton
    return seconds


def _check(name: str, side: _Side, work: StepWork) -> None:
    length = side.window.logged.get("completions/mean_length")
    if length != work.max_tokens:
        raise RunFailed(f"bench: {name} completed to {length} tokens on average, not {work.max_tokens}")
    apart = side.window.logged.get("sampling/sampling_logp_difference/mean")
    if name == OURS and not (apart is not None and apart <= TOLERANCE[side.trainer.job.sampler.dtype]):
        raise RunFailed(f"bench: trainer and sampler are not the same policy: mean |dlogp| {apart}")


def _reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 11) for text in completions]  # no group is all alike


def _arguments(work: StepWork) -> dict[str, Any]:
    return {
        "max_steps": 1,
        "per_device_train_batch_size": len(work.prompts) * work.group,
        "steps_per_generation": 1,
        "num_generations": work.group,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
    }


def _job(found: Base, tokenizer: Any, device: torch.device, folder: Path, work: StepWork, engine: Any) -> base.Job:
    config = configs.Config(
        path=Path("bench"),
        run=configs.Run(name="bench", seed=work.seed, device=device.type),
        model=configs.Model(base=found.id, lora=work.lora),
        data=configs.Data(source="arithmetic", train_size=len(work.prompts)),
        rollout=configs.Rollout(
            engine=engine,
            precision="full",
            dtype=work.sampler_dtype,
            max_completion_length=work.max_tokens,
            max_batch=max(256, len(work.prompts) * work.group),
        ),
        trainer=configs.Trainer(algorithm="grpo", args=_arguments(work)),
    )
    begin = start.Start(found, found.sha256)
    policy = start.load_policy(config, begin, device)
    never = [int(policy.config.vocab_size)]  # one past the last token: nothing ends early
    return base.Job(
        config=config,
        folder=folder,
        device=device,
        model=policy,
        tokenizer=tokenizer,
        train=[
            {"id": str(i), "prompt": prompt, "answer": "", "task": "bench"} for i, prompt in enumerate(work.prompts)
        ],
        rewards=[RewardFunction("differing", 1.0, _reward)],
        sampler=start.load_sampler(config, begin, policy, tokenizer, never) if engine == "mlx" else None,
        stop_ids=never,
        fresh_adapter=work.lora is not None,
    )


def _ours(found: Base, tokenizer: Any, device: torch.device, folder: Path, work: StepWork) -> _Side:
    """The trainer that `rl.algorithms.grpo.train` builds for a run, caught before its first step."""
    caught: list[Any] = []

    class Caught(grpo.DuetGRPOTrainer):
        def train(self, *_: Any, **__: Any) -> None:
            caught.append(self)

    grpo.train(_job(found, tokenizer, device, folder, work, "mlx"), Caught)
    trainer = caught[0]

    def train() -> None:
        trainer._last_loaded_step = -1  # each step is the trainer's first: TRL would think the weights are loaded
        grpo.DuetGRPOTrainer.train(trainer)

    return _Side(trainer, _watch(trainer, device), train)


def _stock(found: Base, tokenizer: Any, device: torch.device, folder: Path, work: StepWork) -> _Side:
    job = _job(found, tokenizer, device, folder, work, "torch")
    known = {f.name for f in fields(GRPOConfig)}
    trainer = GRPOTrainer(
        model=job.model,
        reward_funcs=list(job.rewards),
        args=GRPOConfig(**base.arguments(job, known), max_completion_length=work.max_tokens),
        train_dataset=datasets.Dataset.from_list(job.train),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.eos_token_ids = job.stop_ids
    trainer.generation_config.eos_token_id = job.stop_ids
    trainer.generation_kwargs["eos_token_id"] = job.stop_ids
    return _Side(trainer, _watch(trainer, device), trainer.train)


def _watch(trainer: Any, device: torch.device) -> _Window:
    """Put the stopwatch around the trainer's methods."""
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    watch = Stopwatch(wait)
    window = _Window(watch)
    trainer.add_callback(window)
    for method, part in METHODS.items():
        if hasattr(trainer, method):
            _time(watch, trainer, method, part)
    _time(watch, trainer.accelerator, "backward", "backward")
    if getattr(trainer, "vllm_generation", None) is not None:
        _time(watch, trainer.vllm_generation, "sync_weights", "sync")
    return window


def _time(watch: Stopwatch, owner: Any, method: str, part: str) -> None:
    inner = getattr(owner, method)

    @wraps(inner)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with watch.part(part):
            return inner(*args, **kwargs)

    setattr(owner, method, timed)
