"""Jobs and trainers on the tiny model for the tests of the algorithms that sample."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch

from rl import config, data, models, rewards, start
from rl.algorithms import base, online, seam
from rl.algorithms.guard import Guard

ARGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "steps_per_generation": 1,
    "learning_rate": 1e-2,
    "save_steps": 100,
}


def sevens(prompts: list, completions: list, **columns: Any) -> list[float]:
    return [float(c.count("7")) for c in completions]


def make_job(
    tiny: models.Base,
    folder: Path,
    algorithm: str,
    *,
    lora: bool = False,
    engine: str = "mlx",
    reward: Callable[..., list] = sevens,
    rollout: dict[str, Any] | None = None,
    **args: Any,
) -> base.Job:
    """A job on random weights; `reward` is a batch function in TRL's convention."""
    settings = config.Config(
        path=folder / "x.toml",
        run=config.Run(name="test"),
        model=config.Model(base="tiny", lora=config.Lora(rank=4, alpha=8.0) if lora else None),
        data=config.Data(source="arithmetic", form="char", train_size=32, max_a=9),
        rollout=config.Rollout(**{"engine": engine, "precision": "full", "max_completion_length": 3} | (rollout or {})),
        trainer=config.Trainer(algorithm=algorithm, args=ARGS | args),
        eval=config.Eval(size=8),
    )
    begin = start.Start(tiny, tiny.sha256)
    policy = start.load_policy(settings, begin, torch.device("cpu"))
    tokenizer = models.load_tokenizer(tiny)
    stop = seam.stop_ids(tokenizer, ())
    return base.Job(
        config=settings,
        folder=folder / "run",
        device=torch.device("cpu"),
        model=policy,
        tokenizer=tokenizer,
        train=data.build(settings).train,
        rewards=[rewards.functions.RewardFunction("own", 1.0, reward)],
        sampler=start.load_sampler(settings, begin, policy, tokenizer, stop) if engine == "mlx" else None,
        fresh_adapter=lora,
        stop_ids=stop,
    )


def make_trainer(job: base.Job, trainer_class: Any, config_class: Any) -> Any:
    """The trainer of `job`, in training mode, not started."""
    args = base.arguments(job, set(config_class.__dataclass_fields__)) | online.sampling_arguments(job)
    if job.toolbox is not None:
        args["max_tool_calling_iterations"] = job.config.rollout.max_turns - 1
    trainer = trainer_class(
        job,
        Guard(lambda text: None),
        base.Timer(),
        model=job.model,
        reward_funcs=list(job.rewards),
        args=config_class(**args),
        train_dataset=datasets.Dataset.from_list(job.train),
        processing_class=job.tokenizer,
        **online._tools(job),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def inputs(job: base.Job, prompts: int) -> list[dict[str, Any]]:
    """The first rows of the training data, each G times, as TRL's loader gives them."""
    group = job.config.trainer.args["num_generations"]
    return [row for row in job.train[:prompts] for _ in range(group)]


def logged(job: base.Job) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    job.hooks = base.Hooks(metrics=lambda step, values: rows.append(values))
    return rows
