"""DPO: Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290), through TRL's DPOTrainer.

With the implicit reward r(x, y) = beta * log(pi(y|x) / pi_ref(y|x)) of the policy against its start, equation 7 is
minimised: -log sigmoid(r(x, chosen) - r(x, rejected)). `[trainer] loss_type` chooses among its relatives: "hinge"
(Zhao et al. 2023, 2305.10425), "ipo" (Azar et al. 2023, 2310.12036), "robust", "apo_zero", and so on.

Departures from the paper:
- the pairs are the start policy's own completions, graded by its verifier (`rl.pairs`), unless the data has pairs;
- completions of a file are tokenised by TRL, which closes each with EOS; sampled ones keep their very tokens;
- "ipo" divides the log-ratios by the completion's length, as TRL does after asking its authors.
"""

import copy
from dataclasses import fields
from typing import Any

import datasets
from trl import DPOConfig, DPOTrainer

from rl.algorithms import offline
from rl.algorithms.base import Job, Outcome, arguments
from rl.algorithms.guard import Watched
from rl.algorithms.learner import score_completions_only
from rl.data import preferences
from rl.errors import UserError


class DuetDPOTrainer(Watched, DPOTrainer):
    """TRL's trainer, with the batch kept for the guard and sampled tokens left as they are."""

    def _prepare_dataset(self, dataset: datasets.Dataset, *args: Any, **kwargs: Any) -> datasets.Dataset:
        return dataset if "chosen_ids" in dataset.column_names else super()._prepare_dataset(dataset, *args, **kwargs)


def train(job: Job) -> Outcome:
    """Run DPO to the end of `job`; raises UserError when its rows are no pairs."""
    rows = preference_rows(job, "dpo")
    settings = DPOConfig(**arguments(job, {f.name for f in fields(DPOConfig)}))
    score_completions_only()
    return offline.run(job, settings, DuetDPOTrainer, rows, ref_model=reference(job, settings))


def preference_rows(job: Job, algorithm: str) -> list[dict[str, Any]]:
    """The columns that TRL needs of `job`'s rows; raises UserError naming those a row lacks."""
    columns = ("prompt", *preferences.COLUMNS[algorithm])
    if "prompt_ids" in job.train[0]:  # sampled by this run
        columns = (*preferences.IDS[algorithm], *(c for c in columns if c == "label"))
    for row in job.train:
        if missing := [f"'{column}'" for column in columns if column not in row]:
            raise UserError(
                f"{job.config.path}: [data] row '{row.get('id')}' has no column {', '.join(missing)}; "
                f"{algorithm} needs {', '.join(columns)}"
            )
    return [{column: row[column] for column in columns} for row in job.train]


def reference(job: Job, settings: Any) -> Any:
    """The policy of [model] reference, or the frozen start, a copy made before training; None where TRL needs none.

    With an adapter TRL keeps a second one with the start's values on the same base; with `precompute_ref_log_probs` it
    scores all rows before the first step.
    """
    if job.reference is not None:
        return job.reference
    if job.config.model.lora is not None or settings.precompute_ref_log_probs:
        return None
    return copy.deepcopy(job.model).eval().requires_grad_(False)
