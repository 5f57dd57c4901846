"""The trainers' side of the completions log (`rl.completions`): one rollout as rows."""

from collections.abc import Sequence
from typing import Any

import torch

from rl import completions
from rl.algorithms.base import Job


def is_due(job: Job, step: int, period: int) -> bool:
    """Whether the rollout made after `step` optimizer steps is to be logged."""
    return completions.due(job.config.run.completions_every, step, period)


def of_tokens(values: torch.Tensor, mask_B_T: torch.Tensor) -> list[float]:
    """Advantages (B,) as they are, those of tokens (B, T) as their mean over the mask."""
    if values.ndim == 2:
        mask = mask_B_T.to(values.dtype)
        values = (values * mask).sum(1) / mask.sum(1).clamp(min=1)
    return values.float().cpu().tolist()


def columns(job: Job, rewards_B_F: torch.Tensor) -> dict[str, Sequence[float | None]]:
    """Each reward function's values, NaN where it gave none."""
    return {f.name: rewards_B_F[:, i].float().cpu().tolist() for i, f in enumerate(job.rewards)}


def note(
    job: Job,
    step: int,
    sampling_round: int,
    asked: Sequence[dict[str, Any]],
    ids: Sequence[list[int]],
    rewards: dict[str, Sequence[float | None]],
    **more: Any,
) -> None:
    """Hand one rollout made after `step` optimizer steps to the run. `more` as `rl.completions.rows_of` takes it."""
    texts = [job.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    stops = job.config.rollout.stop
    rows = completions.rows_of(
        [row["prompt"] for row in asked],
        texts,
        rewards,
        {f.name: f.weight for f in job.rewards},
        asked,
        [len(row) for row in ids],
        [
            bool(row) and (row[-1] in job.stop_ids or any(stop in text for stop in stops))
            for row, text in zip(ids, texts, strict=True)
        ],
        **more,
    )
    job.hooks.completions(step + 1, sampling_round, list(rows))
