"""ORPO: Odds Ratio Preference Optimization (Hong et al. 2024, arXiv 2403.07691), by TRL's experimental ORPOTrainer.

Fine-tuning on the chosen completions and preferring them in one, without a reference. With the length-normalised
log P(y|x) = 1/m sum_t log p(y_t | x, y_<t) (eq. 3) and odds(y|x) = P / (1 - P) (eq. 4),

    loss = -log P(chosen|x) + lambda * -log sigmoid(log odds(chosen|x) - log odds(rejected|x))        eq. 6 and 7

lambda is `[trainer] beta`.

Departures from the paper:
- the pairs are the start policy's own completions, graded by its verifier (`rl.pairs`), unless the data has pairs; the
  paper starts from a base model and a set of preferences;
- the odds of a completion of mean logprob above -1e-6 are held there: they are infinite at probability 1.
TRL's cross-entropy is over prompt and completion; here it is the paper's (`rl.algorithms.reference_free`).
"""

from dataclasses import fields

from rl.algorithms import offline
from rl.algorithms.base import Job, Outcome, arguments
from rl.algorithms.dpo import preference_rows
from rl.algorithms.reference_free import KEEP_COLUMNS, DuetORPOTrainer, ORPOConfig


def train(job: Job) -> Outcome:
    """Run ORPO to the end of `job`; raises UserError when its rows are no pairs."""
    rows = preference_rows(job, "orpo")
    args = arguments(job, {f.name for f in fields(ORPOConfig)}) | KEEP_COLUMNS
    settings = ORPOConfig(**args)
    return offline.run(job, settings, DuetORPOTrainer, rows)
