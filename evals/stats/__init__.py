"""Errors, intervals and tests of scores: never a score without its error. Plain Python over lists.

- `estimates`: one model's mean or share with its error, clustered where questions share a source.
- `comparisons`: two models: paired and unpaired differences, p-values, Holm, equivalence, questions needed.
- `sampling`: pass@k and majority@k from more samples than k.
- `seeds`: runs that differ in their seed alone: IQM, stratified bootstrap, probability of improvement.

Intervals are two-sided at `confidence`. Where an error cannot be known (one question, one source, one seed) it is NaN,
never 0. Scores must be finite, else ValueError.
"""

from evals.stats.comparisons import (
    Equivalence,
    Test,
    detectable_difference,
    detectable_spread,
    equivalence,
    equivalence_unpaired,
    holm,
    mcnemar,
    normal_test,
    paired_difference,
    questions_needed,
    questions_needed_spread,
    sign_flip,
    tango,
    unpaired_difference,
)
from evals.stats.estimates import Estimate, binomial_stderr, mean, wilson
from evals.stats.sampling import majority_at_k, pass_at_k
from evals.stats.seeds import bootstrap, improvement, improvement_estimate, iqm, iqm_estimate

__all__ = [
    "Equivalence",
    "Estimate",
    "Test",
    "binomial_stderr",
    "bootstrap",
    "detectable_difference",
    "detectable_spread",
    "equivalence",
    "equivalence_unpaired",
    "holm",
    "improvement",
    "improvement_estimate",
    "iqm",
    "iqm_estimate",
    "majority_at_k",
    "mcnemar",
    "mean",
    "normal_test",
    "paired_difference",
    "pass_at_k",
    "questions_needed",
    "questions_needed_spread",
    "sign_flip",
    "tango",
    "unpaired_difference",
    "wilson",
]
