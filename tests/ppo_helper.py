"""PPO's jobs and trainers on the tiny model."""

from pathlib import Path
from typing import Any

import torch
from online_helper import make_job

from rl import models
from rl.algorithms import base, ppo
from rl.algorithms.guard import Guard
from rl.algorithms.ppo_settings import PPOConfig


def ppo_job(tiny: models.Base, folder: Path, **changes: Any) -> base.Job:
    """A job whose step holds whole rollouts unless told otherwise; GRPO's arguments of the shared helper taken out."""
    job = make_job(tiny, folder, "ppo", **({"num_ppo_epochs": 1} | changes))
    for name in ("num_generations", "steps_per_generation"):
        del job.config.trainer.args[name]
    return job


def build(job: base.Job) -> ppo.PPOTrainer:
    """The trainer of `job`, not started."""
    settings = PPOConfig(**base.arguments(job, set(PPOConfig.__dataclass_fields__)))
    trainer = ppo.PPOTrainer(job, Guard(lambda text: None), base.Timer(), settings)
    trainer.model.train()
    return trainer


def off_policy(trainer: ppo.PPOTrainer) -> None:
    """Leave start, old policy and zero values, as later steps do."""
    torch.manual_seed(4)
    with torch.no_grad():
        for p in trainer.model.trained().values():
            p.add_(0.05 * torch.randn_like(p))


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}
