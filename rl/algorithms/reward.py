"""Reward model: Bradley-Terry preferences (Bradley and Terry 1952; Ouyang et al. 2022, arXiv 2203.02155, equation 1),
through TRL's RewardTrainer.

A sequence classifier with one output r(x, y), read at the last token, learns from pairs:

    loss = -log sigmoid(r(x, chosen) - r(x, rejected) - margin) + c * (r(x, chosen) + r(x, rejected))^2

The margin is the column of that name, where the rows have it (Touvron et al. 2023, 2307.09288, equation 2). `[trainer]
center_rewards_coefficient` is c, which keeps the mean near 0 (Eisenstein et al. 2023, 2312.09244, equation 2); .01 is
usual.

Departures from the papers:
- the pairs are the start policy's own completions, graded by its verifier (`rl.pairs`), unless the data has pairs;
- one pair a prompt and one pass over a ranking of two, where InstructGPT ranked 4 to 9 completions;
- rows are tokenised as they will be in the loop, prompt, completion and EOS (`rl.rewards.learned`), not as one text:
  sampled completions keep their very tokens.
"""

import math
from dataclasses import fields
from typing import Any

import datasets
from trl import RewardConfig, RewardTrainer

from rl.algorithms import offline
from rl.algorithms.base import Job, Outcome, arguments
from rl.algorithms.guard import Watched
from rl.data import preferences
from rl.errors import UserError
from rl.rewards import learned


class DuetRewardTrainer(Watched, RewardTrainer):
    """TRL's trainer, with the batch kept for the guard and its rows taken as they are."""

    def _prepare_dataset(self, dataset: datasets.Dataset, *args: Any, **kwargs: Any) -> datasets.Dataset:
        return dataset


def train(job: Job) -> Outcome:
    """Train the classifier in `job.model` to the end of `job`; raises UserError when its rows are no pairs."""
    settings = RewardConfig(**arguments(job, {f.name for f in fields(RewardConfig)}))
    return offline.run(job, settings, DuetRewardTrainer, training_rows(job, settings.max_length))


def training_rows(job: Job, longest: int | None) -> list[dict[str, Any]]:
    """Rows {chosen_ids, rejected_ids[, margin]}: token ids of prompt and completion; none over `longest` tokens.

    Raises UserError for a row that is no pair, a margin that some rows have or that is no number, and where no row is
    short enough.
    """
    where = f"{job.config.path}: [data]"
    needed = ("prompt", *preferences.COLUMNS["reward"])
    margins = [row["margin"] for row in job.train if "margin" in row]
    if margins and len(margins) < len(job.train):
        without = next(row for row in job.train if "margin" not in row)
        raise UserError(f"{where} row '{without.get('id')}' has no 'margin', which others have: give all one, or none")
    made = []
    for row in job.train:
        if missing := [f"'{column}'" for column in needed if column not in row]:
            raise UserError(
                f"{where} row '{row.get('id')}' has no column {', '.join(missing)}; reward needs {', '.join(needed)}"
            )
        chosen, rejected = learned.pair_ids(job.tokenizer, row)
        pair = {"chosen_ids": chosen, "rejected_ids": rejected}
        if margins:
            pair["margin"] = _margin(row, where)
        if longest is None or max(len(chosen), len(rejected)) <= longest:
            made.append(pair)
    if not made:
        raise UserError(f"{where}: each of {len(job.train)} pairs is longer than [trainer] max_length = {longest}")
    if left_out := len(job.train) - len(made):
        job.hooks.warn(f"{left_out} of {len(job.train)} pairs left out: longer than [trainer] max_length = {longest}")
    return made


def _margin(row: dict[str, Any], where: str) -> float:
    found = row["margin"]
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise UserError(f"{where} row '{row.get('id')}': 'margin' must be a number, found {found!r:.40}")
    return float(found)
