"""Errors of scores: never a score without one. After Miller 2024, "Adding Error Bars to Evals" (arXiv:2411.00640).

Plain Python over lists; all intervals are two-sided at `confidence`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` questions with its standard error and interval; `stderr` is NaN where n = 1."""

    value: float
    stderr: float
    low: float
    high: float
    n: int


def binomial_stderr(successes: int, n: int) -> float:
    """Standard error √(p(1 − p)/n) of a share of `n` questions, Miller's formula for right-or-wrong scores."""
    _check_count(successes, n)
    share = successes / n
    return math.sqrt(share * (1 - share) / n)


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927), which stays inside [0, 1] and is not empty at 0 % and 100 %."""
    _check_count(successes, n)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # rounding puts the exact 0 and 1 of the two ends a hair outside
    return max(0.0, centre - half), min(1.0, centre + half)


def mean(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean of per-question scores, stderr = s/√n with the sample deviation (n − 1), as lm-eval reports it."""
    if not values:
        raise ValueError("no values to average")
    value = fmean(values)
    stderr = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    half = NormalDist().inv_cdf((1 + confidence) / 2) * stderr
    return Estimate(value, stderr, value - half, value + half, len(values))


def paired_difference(before: Sequence[float], after: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean of after − before over the same questions in the same order (Miller's paired differences).

    The stderr is that of the per-question differences: what both models find hard cancels out, so it is smaller than
    the two separate errors suggest. Normal interval, so mind it below some thirty questions.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} questions before, {len(after)} after: not the same questions")
    return mean([b - a for a, b in zip(before, after, strict=True)], confidence)


def _check_count(successes: int, n: int) -> None:
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is not a share")
