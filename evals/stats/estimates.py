"""One model's score with its error. After Miller 2024, "Adding Error Bars to Evals" (arXiv:2411.00640)."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from evals.stats.quantiles import critical


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` questions with its standard error and interval; `stderr` is NaN where n = 1.

    The interval is Student's with `degrees` degrees of freedom, the normal one where that is infinite.
    """

    value: float
    stderr: float
    low: float
    high: float
    n: int
    degrees: float = math.inf


def binomial_stderr(successes: int, n: int) -> float:
    """Standard error √(p(1 − p)/n) of a share of `n` questions, Miller's formula for right-or-wrong scores."""
    _check_count(successes, n)
    share = successes / n
    return math.sqrt(share * (1 - share) / n)


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927), which stays inside [0, 1] and is not empty at 0 % and 100 %.

    ValueError where the count is not within 0 … n, n is 0, or the confidence not between 0 and 1.
    """
    _check_count(successes, n)
    z = critical(confidence)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # rounding puts the exact 0 and 1 of the two ends a hair outside
    return max(0.0, centre - half), min(1.0, centre + half)


def mean(values: Sequence[float], confidence: float = 0.95, clusters: Sequence[Hashable] | None = None) -> Estimate:
    """Mean of per-question scores `values` (length n) and its error.

    Without clusters: stderr = s/√n with the sample deviation (n − 1), as lm-eval reports it, and the normal interval,
    so mind it below some thirty questions.

    With `clusters`, the source of each question (length n): Miller's clustered standard error, which adds to the
    squared stderr the products of all pairs of deviations within a source, over n². It never turns negative, and with
    one question per source it is the plain one. Two departures from Miller: the interval is Student's with
    sources − 1 degrees of freedom, as the normal one covers too little with few sources; a single source gives NaN,
    where the formula would give almost 0.

    ValueError for no values, one that is not finite, or clusters of another length.
    """
    check_scores(values)
    value, n = fmean(values), len(values)
    if n == 1:
        return Estimate(value, math.nan, math.nan, math.nan, 1)
    variance, degrees = stdev(values) ** 2 / n, math.inf
    if clusters is not None:
        sums = cluster_sums([x - value for x in values], clusters)
        degrees = len(sums) - 1
        if degrees == 0:
            return Estimate(value, math.nan, math.nan, math.nan, n, 0)
        squares = math.fsum((x - value) ** 2 for x in values)
        # a source's products of different questions: the square of its sum less the squares
        within = math.fsum(total * total for total in sums) - squares
        variance = max(0.0, variance + within / (n * n))
    return estimate(value, math.sqrt(variance), n, confidence, degrees)


def estimate(value: float, stderr: float, n: int, confidence: float, degrees: float = math.inf) -> Estimate:
    """`value` with the interval that its standard error and degrees of freedom give; NaN from a NaN error."""
    half = math.nan if math.isnan(stderr) else critical(confidence, degrees) * stderr
    return Estimate(value, stderr, value - half, value + half, n, degrees)


def cluster_sums(values: Sequence[float], clusters: Sequence[Hashable]) -> list[float]:
    """Sum of the values of each cluster, in the order of first appearance. ValueError where the lengths differ."""
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} scores with the sources of {len(clusters)}")
    members: dict[Hashable, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        members.setdefault(cluster, []).append(value)
    return [math.fsum(found) for found in members.values()]


def check_scores(values: Sequence[float]) -> None:
    """ValueError for an empty list or a score that is NaN or infinite."""
    if not values:
        raise ValueError("no values to average")
    for place, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(f"score {place} of {len(values)} is {value}, not a finite number")


def _check_count(successes: int, n: int) -> None:
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is not a share")
