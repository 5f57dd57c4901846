"""KTO: Kahneman-Tversky Optimization (Ethayarajh et al. 2024, arXiv 2402.01306), through TRL's KTOTrainer.

Each completion counts by itself, good or bad: with r = log(pi(y|x) / pi_ref(y|x)) and z the KL of the policy to its
start, equation 7 gives the loss weight * (1 - sigmoid(beta * (r - z))) for a good one and
weight * (1 - sigmoid(beta * (z - r))) for a bad one. "apo_zero_unpaired" (D'Oosterlinck et al. 2024, 2408.06266)
leaves z out.

Departures from the paper:
- the completions are the start policy's own, as many right as wrong ones (`rl.pairs`), unless the data has labels;
- z is estimated on each prompt with its batch neighbour's completion, at least 0 (the paper's own estimate); TRL makes
  these pairings once, so the rows are shuffled by the seed once and every epoch has the same batches.
"""

import random
from dataclasses import fields
from typing import Any

import datasets
from trl import KTOConfig, KTOTrainer

from rl.algorithms import offline
from rl.algorithms.base import Job, Outcome, arguments
from rl.algorithms.dpo import preference_rows, reference
from rl.algorithms.guard import Watched
from rl.algorithms.learner import score_completions_only


class DuetKTOTrainer(Watched, KTOTrainer):
    """TRL's trainer, with the batch kept for the guard and sampled tokens left as they are."""

    def _prepare_dataset(
        self, dataset: datasets.Dataset, processing_class: Any, args: KTOConfig, dataset_name: str
    ) -> datasets.Dataset:
        if "completion_ids" not in dataset.column_names:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if not self.calculate_KL:
            return dataset

        def neighbours(rows: dict[str, list]) -> dict[str, list]:
            return {"KL_completion_ids": rows["completion_ids"][-1:] + rows["completion_ids"][:-1]}

        return dataset.map(neighbours, batched=True, batch_size=args.per_device_train_batch_size)


def train(job: Job) -> Outcome:
    """Run KTO to the end of `job`; raises UserError when its rows are no labelled completions."""
    rows = preference_rows(job, "kto")
    # beside each other, the two rows of one question would lend each other their completion for the KL term
    random.Random(job.config.run.seed).shuffle(rows)
    settings = KTOConfig(**arguments(job, {f.name for f in fields(KTOConfig)}))
    score_completions_only()
    return offline.run(job, settings, DuetKTOTrainer, rows, ref_model=reference(job, settings))
