"""One optimizer step of any algorithm on a random character-level Llama, as runs take it: for the smoke test, which
judges its numbers, and for the operator audit, which listens to what it dispatches."""

import gc
import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl import config as configs
from rl.algorithms import GROUPED, ONLINE

if TYPE_CHECKING:
    import torch

    from rl.algorithms.base import Job, Outcome

SEED = 0
SMALL = configs.TinyModel(hidden=64, layers=2, heads=4, intermediate=128)


@dataclass(frozen=True)
class Sides:
    """What a run loads: the policy in torch, the sampler that follows it, the tokenizer and the ids that end a text."""

    policy: Any
    sampler: Any
    tokenizer: Any
    stop_ids: list[int]


@dataclass(frozen=True)
class Step:
    """A finished step: the job, how it ended, its first logged record, and the names of trained and moved tensors."""

    job: "Job"
    outcome: "Outcome"
    logged: dict[str, float]
    trained: set[str]
    moved: set[str]

    def number(self, name: str) -> float:
        """A logged value; NaN where the recorder wrote None for what was not finite, or nothing."""
        value = self.logged.get(name)
        return math.nan if value is None else float(value)


def make_config(
    device: "torch.device",
    algorithm: str,
    *,
    lora: bool = False,
    shared: bool = False,
    dtype: Any = None,
    tiny: configs.TinyModel = SMALL,
    **args: Any,
) -> configs.Config:
    """A run of one step; `dtype` of the sampler (None for the backend's own), `args` of the trainer."""
    given: dict[str, Any] = {
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "save_strategy": "no",
    }
    if algorithm in GROUPED:
        given["num_generations"] = 4
    return configs.Config(
        path=Path("smoke test"),
        run=configs.Run(name="smoke", seed=SEED, device=device.type),
        model=configs.Model(
            base="tiny",
            tiny=tiny,
            lora=configs.Lora(rank=4, alpha=8.0) if lora else None,
            quantization=configs.Quantization(bits=4, group_size=32) if shared else None,
        ),
        data=configs.Data(source="arithmetic", form="char", train_size=32, max_a=99),
        rollout=configs.Rollout(
            precision="shared" if shared else "full",
            dtype=dtype,
            max_completion_length=8,
            max_batch=8,
            samples=4 if algorithm == "online_dpo" else None,
            correction="sequence_truncate" if algorithm == "rloo" else "token_truncate",
        ),
        trainer=configs.Trainer(algorithm=algorithm, args=given | args),
        eval=configs.Eval(size=8),
    )


def both_sides(config: configs.Config, folder: Path, device: "torch.device") -> Sides:
    """Policy and sampler as a run of `config` loads them; bases are made below `folder`."""
    from rl import models, start
    from rl.algorithms import seam

    begin = start.find(config, folder, None)
    tokenizer = models.load_tokenizer(begin.base)
    policy = start.load_policy(config, begin, device)
    stop_ids = seam.stop_ids(tokenizer, ())
    return Sides(policy, start.load_sampler(config, begin, policy, tokenizer, stop_ids), tokenizer, stop_ids)


def make_job(config: configs.Config, folder: Path, device: "torch.device") -> "Job":
    """The job of one step, with rows as `rl.pairs` would have sampled them and a reward that differs in every group."""
    from rl import data, models, rewards, start
    from rl.algorithms import base
    from rl.rewards import learned

    algorithm, train = config.trainer.algorithm, data.build(config).train

    def differing(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [float(sum(map(ord, text)) % 11) for text in completions]

    if algorithm == "reward":
        begin = start.find(config, folder, None)
        tokenizer = learned.with_own_pad(models.load_tokenizer(begin.base))
        sides = Sides(start.load_scorer(config, begin, tokenizer, device), None, tokenizer, [])
    else:
        sides = both_sides(config, folder, device)
    return base.Job(
        config=config,
        folder=folder / "run",
        device=device,
        model=sides.policy,
        tokenizer=sides.tokenizer,
        train=train if algorithm in ("sft", *ONLINE) else _sampled(train, algorithm, sides.tokenizer),
        rewards=[rewards.RewardFunction("differing", 1.0, differing)],
        sampler=sides.sampler,
        stop_ids=sides.stop_ids,
        fresh_adapter=config.model.lora is not None,
    )


def take(job: "Job") -> Step:
    """Train `job` to its end, one step unless its config says otherwise."""
    import torch

    before = {name: weight.detach().clone() for name, weight in job.model.named_parameters()}
    trained = {name for name, weight in job.model.named_parameters() if weight.requires_grad}
    logged: dict[str, float] = {}
    job.hooks.metrics = lambda step, values: logged.update(values)
    outcome = trainer_of(job)(job)
    after = dict(job.model.named_parameters())  # TRL may have added an adapter of its own
    moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    return Step(job, outcome, logged, trained, moved)


def trainer_of(job: "Job") -> Callable[["Job"], "Outcome"]:
    """The algorithm's `train`."""
    return importlib.import_module(f"rl.algorithms.{job.config.trainer.algorithm}").train


@contextmanager
def without_garbage() -> Iterator[None]:
    """Set aside what is loaded: accelerate collects garbage after each training, a second with all these packages."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _sampled(rows: list[dict[str, Any]], algorithm: str, tokenizer: Any) -> list[dict[str, Any]]:
    """Rows with the tokens of a right and a wrong completion, or one of the two with its label."""

    def ids(text: str) -> list[int]:
        return [*tokenizer(text).input_ids, tokenizer.eos_token_id]

    made: list[dict[str, Any]] = []
    for i, row in enumerate(rows):
        right, wrong = row["completion"], row["completion"][::-1] + "0"  # another text of another length
        prompt = {"id": str(i), "prompt": row["prompt"], "prompt_ids": tokenizer(row["prompt"]).input_ids}
        if algorithm in ("kto", "bon"):
            said = right if i % 2 or algorithm == "bon" else wrong
            made.append(prompt | {"completion": said, "completion_ids": ids(said), "label": said == right})
        else:
            pair = {"chosen": right, "rejected": wrong, "chosen_ids": ids(right), "rejected_ids": ids(wrong)}
            made.append(prompt | pair)
    return made
