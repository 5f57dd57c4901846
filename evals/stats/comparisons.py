"""Two models against each other: differences, their p-values, equivalence, and how many questions they take."""

import math
import random
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist, fmean, variance

from evals.stats.estimates import Estimate, check_scores, cluster_sums, estimate, mean
from evals.stats.quantiles import critical, normal_tail, student_tail

EXACT_WORK = 2**20  # steps of an exact sign-flip test, half a second, before signs are sampled instead


@dataclass(frozen=True)
class Test:
    """A two-sided p-value, the method it is from, and `n`, the questions (or sources) that carry it: no ties."""

    __test__ = False  # pytest would collect it by its name

    p: float
    method: str
    n: int


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests: `equivalent` where p < alpha, that is, low and high (1 − 2 alpha) lie within ± margin."""

    equivalent: bool
    p: float
    value: float
    low: float
    high: float
    margin: float
    method: str


def paired_difference(
    before: Sequence[float],
    after: Sequence[float],
    confidence: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
) -> Estimate:
    """Mean of after − before over the same questions in the same order (Miller's paired differences).

    The stderr is that of the per-question differences: what both models find hard cancels out, so it is smaller than
    the two separate errors suggest. Normal interval, so mind it below some thirty questions, and where hardly any
    question differs (`tango` is the interval for marks of 0 and 1). With `clusters`, the source of each question: as
    `mean` has it. ValueError where the lengths differ or a score is not finite.
    """
    return mean(_differences(before, after), confidence, clusters)


def unpaired_difference(before: Sequence[float], after: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean of after − mean of before on different questions: Welch's t with Satterthwaite's degrees (Welch 1947).

    `n` is the smaller number of questions. NaN error where a side has one question; ValueError as for `mean`.
    """
    check_scores(before)
    check_scores(after)
    value, n = fmean(after) - fmean(before), min(len(before), len(after))
    if n == 1:
        return Estimate(value, math.nan, math.nan, math.nan, 1)
    squares = [variance(values) / len(values) for values in (before, after)]
    below = sum(square**2 / (len(values) - 1) for square, values in zip(squares, (before, after), strict=True))
    degrees = sum(squares) ** 2 / below if below else math.inf
    return estimate(value, math.sqrt(sum(squares)), n, confidence, degrees)


def normal_test(difference: Estimate) -> Test:
    """p-value of a difference being 0 by value/stderr; Student's where the estimate has finite degrees of freedom.

    NaN where the stderr is NaN, or is 0 beside a difference: no spread says nothing of the error. The exact tests can.
    """
    method = "normal" if math.isinf(difference.degrees) else f"Student's t, {difference.degrees:.4g} degrees"
    if difference.stderr > 0:
        p = 2 * student_tail(abs(difference.value) / difference.stderr, difference.degrees)
    else:
        p = 1.0 if difference.stderr == 0 == difference.value else math.nan
    return Test(p, method, difference.n)


def mcnemar(before: Sequence[float], after: Sequence[float]) -> Test:
    """Exact test for marks of 0 and 1 on the same questions: the questions that differ go either way at even odds.

    McNemar 1947, two-sided: p = min(1, 2 P(X ≤ min(b, c))), X binomial(b + c, ½). Equals `sign_flip` on such marks;
    conservative, as exact tests of counts are. ValueError for other marks than 0 and 1, or different lengths.
    """
    gained, lost = _discordant(before, after)
    n = gained + lost
    ways = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return Test(min(1.0, 2 * ways / 2**n), "McNemar, exact", n)


def sign_flip(
    before: Sequence[float],
    after: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    draws: int = 10_000,
    seed: int = 0,
) -> Test:
    """Fisher's randomization test of paired scores: under no difference each after − before has either sign.

    p is the share of sign patterns whose sum is as far from 0 as the observed one. All 2^n patterns are counted where
    the sums are few (n ≤ 19, or scores on a lattice such as shares of 8 samples), method "sign-flip, exact"; else
    `draws` patterns from `seed`, and p = (found + 1)/(draws + 1), never 0 (Phipson & Smyth 2010), "sign-flip, N draws".
    With `clusters`, a source's differences keep their signs together. ValueError as for `paired_difference`.
    """
    differences = _differences(before, after)
    if clusters is not None:
        differences = cluster_sums(differences, clusters)
    units, slack = _whole([difference for difference in differences if difference])
    units = [unit for unit in units if unit]
    n, far = len(units), abs(sum(units)) - slack
    sums = _signed_sums(units)
    if sums is not None:
        return Test(sum(ways for total, ways in sums.items() if abs(total) >= far) / 2**n, "sign-flip, exact", n)
    if draws < 1:
        raise ValueError(f"{draws} draws")
    chance = random.Random(seed)
    # eight questions to a table: one look-up per byte of random signs
    tables = [_signed_table(units[at : at + 8]) for at in range(0, n, 8)]
    found = 0
    for _ in range(draws):
        signs = chance.randbytes(len(tables))
        found += abs(sum(table[byte] for table, byte in zip(tables, signs, strict=True))) >= far
    return Test((found + 1) / (draws + 1), f"sign-flip, {draws} draws", n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down p-values (1979), in the order given: each below α holds with all others at family error α.

    The i-th smallest of m times m − i + 1, made monotone, at most 1. ValueError for a p-value outside [0, 1] or NaN.
    """
    for p in p_values:
        if not 0 <= p <= 1:
            raise ValueError(f"{p} is not a p-value")
    adjusted, reached = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        reached = max(reached, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = reached
    return adjusted


def tango(before: Sequence[float], after: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of after − before for marks of 0 and 1 on the same questions (Tango 1998, Stat. Med. 17, 891).

    What `wilson` is to a share: within [−1, 1], and not empty where no question differs. Errors as `mcnemar`.
    """
    gained, lost = _discordant(before, after)
    n, z = len(before), critical(confidence)
    value = (gained - lost) / n
    ends = []
    for inner, outer, level in ((value, -1.0, z), (value, 1.0, -z)):
        for _ in range(60):
            middle = (inner + outer) / 2
            inside = abs(_tango_z(gained, lost, n, middle)) < abs(level)
            inner, outer = (middle, outer) if inside else (inner, middle)
        ends.append(inner)
    return ends[0], ends[1]


def equivalence(
    before: Sequence[float],
    after: Sequence[float],
    margin: float,
    alpha: float = 0.05,
    clusters: Sequence[Hashable] | None = None,
) -> Equivalence:
    """Whether two models' mean scores on the same questions differ by less than `margin`, by two one-sided tests.

    Schuirmann 1987: both "worse by margin or more" and "better by margin or more" are rejected at alpha; p is the
    larger. Marks of 0 and 1 without clusters take Tango's score test, which stays honest where no question differs:
    ten equal answers do not prove two models equal. Other scores, and clusters (the source of each question), take
    Student's t with questions − 1 or sources − 1 degrees; with no spread, or one question or source, p is NaN and
    nothing is proven. ValueError unless margin > 0 (< 1 for marks) and 0 < alpha < ½, or as `paired_difference`.
    """
    differences = _differences(before, after)
    if clusters is None and set(before) | set(after) <= {0, 1}:
        return _tango_equivalence(before, after, margin, alpha)
    found = mean(differences, 0.5, clusters)
    return _student_equivalence(found, len(differences) - 1 if clusters is None else found.degrees, margin, alpha)


def equivalence_unpaired(
    before: Sequence[float], after: Sequence[float], margin: float, alpha: float = 0.05
) -> Equivalence:
    """`equivalence` of scores on different questions, by Welch's t; NaN and not proven where there is no spread."""
    found = unpaired_difference(before, after)
    return _student_equivalence(found, found.degrees, margin, alpha)


def questions_needed(difference: float, discordance: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Questions, asked of both models, for a two-sided paired test of marks to see `difference` with this power.

    discordance: the share of questions that one model has right and the other wrong, at least |difference|.
    Connor 1987 (Biometrics 43, 207): n = ((z_α √ψ + z_β √(ψ − δ²)) / δ)², rounded up. It is that of the normal test;
    the exact test wants some more (about 2/|δ|). ValueError for shares that cannot be.
    """
    if not 0 < abs(difference) <= discordance <= 1:
        raise ValueError(f"a difference of {difference} with {discordance} of the questions differing cannot be")
    at_alpha, at_power = _levels(power, alpha)
    spread = at_alpha * math.sqrt(discordance) + at_power * math.sqrt(discordance - difference**2)
    # the least whole number, and not one more where rounding pushes a whole number up
    return max(1, math.ceil((spread / difference) ** 2 * (1 - 1e-12)))


def questions_needed_spread(difference: float, deviation: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """`questions_needed` for scores of any kind, from the standard deviation of the questions' differences.

    Miller 2024 (arXiv:2411.00640), power analysis, one sample a question: n = ((z_α + z_β) σ / δ)², rounded up. With
    clusters, give stderr · √n as the deviation. ValueError for a difference of 0, or a deviation below 0 or not finite.
    """
    if not (difference and math.isfinite(difference) and math.isfinite(deviation) and deviation >= 0):
        raise ValueError(f"a difference of {difference} with a deviation of {deviation}")
    at_alpha, at_power = _levels(power, alpha)
    return max(1, math.ceil(((at_alpha + at_power) * deviation / difference) ** 2 * (1 - 1e-12)))


def detectable_difference(n: int, discordance: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest difference that n questions show with this power, `questions_needed` solved for it.

    From δ √n = z_α √ψ + z_β √(ψ − δ²), a quadratic in δ. NaN where even the largest, δ = ψ, would not show.
    ValueError for shares that cannot be.
    """
    if n < 1 or not 0 < discordance <= 1:
        raise ValueError(f"{n} questions with {discordance} of them differing")
    at_alpha, at_power = _levels(power, alpha)
    first, rest = at_alpha * math.sqrt(discordance), at_power**2
    root = rest * (discordance * (n + rest) - first**2)
    found = (first * math.sqrt(n) + math.sqrt(root)) / (n + rest) if root >= 0 else math.nan
    # squaring also lets in roots below the significant difference: three questions never show anything
    return found if found <= discordance and found * math.sqrt(n) >= first * (1 - 1e-12) else math.nan


def detectable_spread(n: int, deviation: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest difference that n questions show with this power, `questions_needed_spread` solved for it.

    ValueError for no question, or a deviation below 0 or not finite.
    """
    if n < 1 or not (math.isfinite(deviation) and deviation >= 0):
        raise ValueError(f"{n} questions with a deviation of {deviation}")
    return sum(_levels(power, alpha)) * deviation / math.sqrt(n)


def _levels(power: float, alpha: float) -> tuple[float, float]:
    if not (0.5 <= power < 1 and 0 < alpha < 1):
        raise ValueError(f"a power of {power} at a level of {alpha}; 0.5 ≤ power < 1 and 0 < alpha < 1 are needed")
    return critical(1 - alpha), NormalDist().inv_cdf(power)


def _differences(before: Sequence[float], after: Sequence[float]) -> list[float]:
    if len(before) != len(after):
        raise ValueError(f"{len(before)} questions before, {len(after)} after: not the same questions")
    check_scores(before)
    check_scores(after)
    return [b - a for a, b in zip(before, after, strict=True)]


def _discordant(before: Sequence[float], after: Sequence[float]) -> tuple[int, int]:
    """Questions gained and lost."""
    differences = _differences(before, after)
    strange = (set(before) | set(after)) - {0, 1}
    if strange:
        raise ValueError(f"a mark of {min(strange)}; marks of 0 and 1 are needed")
    return differences.count(1), differences.count(-1)


def _whole(values: Sequence[float]) -> tuple[list[int], int]:
    """Values as whole multiples of one unit, and how many units their sums may be off by rounding.

    Scores such as thirds are no exact floats, yet sums of them that are equal on paper must count as equal.
    """
    if not values:
        return [], 0
    largest = max(abs(value) for value in values)
    shares = [Fraction(value / largest).limit_denominator(1000) for value in values]
    if all(abs(float(share) - value / largest) < 1e-12 for share, value in zip(shares, values, strict=True)):
        common = math.lcm(*(share.denominator for share in shares))
        return [int(share * common) for share in shares], 0
    return [round(value / largest * 2**40) for value in values], len(values)


def _signed_sums(units: Sequence[int]) -> dict[int, int] | None:
    """How many of the 2^n sign patterns give each sum; None where that takes more than EXACT_WORK steps."""
    sums, work = {0: 1}, 0
    for size, count in Counter(abs(unit) for unit in units).items():
        work += len(sums) * (count + 1)
        if work > EXACT_WORK:
            return None
        grown: Counter[int] = Counter()
        for positive in range(count + 1):
            ways, shift = math.comb(count, positive), size * (2 * positive - count)
            for total, number in sums.items():
                grown[total + shift] += ways * number
        sums = grown
    return sums


def _signed_table(units: Sequence[int]) -> list[int]:
    """The sums of up to eight units under the signs in a byte's bits."""
    return [sum(unit if byte >> bit & 1 else -unit for bit, unit in enumerate(units)) for byte in range(256)]


def _tango_z(gained: int, lost: int, n: int, difference: float) -> float:
    """Tango's score of a true difference of shares: 0 at the observed one, falling; his eq. 5 with the closed root."""
    b = (2 * n - gained + lost) * difference - gained - lost
    c = -lost * difference * (1 - difference)
    # the share of questions lost, most likely under this difference
    share = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
    square = n * (2 * share + difference * (1 - difference))
    off = gained - lost - n * difference
    return off / math.sqrt(square) if square > 0 else math.copysign(math.inf, off) if off else 0.0


def _tango_equivalence(before: Sequence[float], after: Sequence[float], margin: float, alpha: float) -> Equivalence:
    _check_margin(margin, alpha)
    if margin >= 1:
        raise ValueError(f"a margin of {margin} of marks between 0 and 1 claims nothing")
    gained, lost = _discordant(before, after)
    n = len(before)
    p = max(normal_tail(_tango_z(gained, lost, n, -margin)), normal_tail(-_tango_z(gained, lost, n, margin)))
    low, high = tango(before, after, 1 - 2 * alpha)
    return Equivalence(p < alpha, p, (gained - lost) / n, low, high, margin, "two one-sided score tests (Tango)")


def _student_equivalence(found: Estimate, degrees: float, margin: float, alpha: float) -> Equivalence:
    _check_margin(margin, alpha)
    if not found.stderr > 0:
        return Equivalence(False, math.nan, found.value, math.nan, math.nan, margin, "no spread to test by")
    p = max(student_tail((margin + side * found.value) / found.stderr, degrees) for side in (1, -1))
    half = critical(1 - 2 * alpha, degrees) * found.stderr
    method = f"two one-sided t tests, {degrees:.4g} degrees"
    return Equivalence(p < alpha, p, found.value, found.value - half, found.value + half, margin, method)


def _check_margin(margin: float, alpha: float) -> None:
    if not (margin > 0 and math.isfinite(margin) and 0 < alpha < 0.5):
        raise ValueError(f"a margin of {margin} at a level of {alpha}; margin > 0 and 0 < alpha < 0.5 are needed")
