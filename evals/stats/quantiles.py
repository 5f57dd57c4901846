"""Tails and quantiles of the normal and of Student's distribution, for any real degrees of freedom."""

import math
from statistics import NormalDist


def normal_tail(z: float) -> float:
    """P(Z > z), exact far out too: by erfc, as 1 − P(Z ≤ z) is 0 from z = 8.3 on."""
    return math.erfc(z / math.sqrt(2)) / 2


def student_tail(t: float, degrees: float) -> float:
    """P(T > t) of Student's distribution; `degrees` > 0 need not be whole, infinity is the normal.

    ½ I_x(ν/2, ½) with x = ν/(ν + t²) (Abramowitz & Stegun 26.7.1), I by its continued fraction (DLMF 8.17.22).
    ValueError for degrees that are not positive.
    """
    if not degrees > 0:
        raise ValueError(f"{degrees} degrees of freedom")
    if math.isinf(degrees):
        return normal_tail(t)
    if t < 0:
        return 1 - student_tail(-t, degrees)
    square = t * t
    if math.isinf(square):
        return 0.0
    if degrees > 1e5:
        # the fraction takes √ν steps; Peizer & Pratt 1968 is right to 1e-9 of the tail at t = 5
        return normal_tail(
            (degrees - 2 / 3 + 0.1 / degrees) * math.sqrt(math.log1p(square / degrees) / (degrees - 5 / 6))
        )
    a = degrees / 2
    x, rest = degrees / (degrees + square), square / (degrees + square)
    # each of the two fractions converges fast on its own side of the mean of the beta distribution
    if x < (a + 1) / (a + 2.5):
        return _beta_fraction(a, 0.5, x, rest) / 2
    return (1 - _beta_fraction(0.5, a, rest, x)) / 2


def critical(confidence: float, degrees: float = math.inf) -> float:
    """The t with the share `confidence` of the distribution between −t and t. ValueError outside (0, 1)."""
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence of {confidence}, one between 0 and 1 is needed")
    if math.isinf(degrees):
        return NormalDist().inv_cdf((1 + confidence) / 2)
    tail, low, high = (1 - confidence) / 2, 0.0, 1.0
    while student_tail(high, degrees) > tail:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if student_tail(middle, degrees) > tail else (low, middle)
    return (low + high) / 2


def _beta_fraction(a: float, b: float, x: float, rest: float) -> float:
    """The regularized incomplete beta I_x(a, b) where a or b is ½, with rest = 1 − x free of cancellation."""
    if x == 0:
        return 0.0
    # near 1 the logarithm is taken of what is missing, or many degrees would magnify the rounding of x
    logs = [math.log(part) if part < 0.5 else math.log1p(-other) for part, other in ((x, rest), (rest, x))]
    front = math.exp(a * logs[0] + b * logs[1] - _log_beta_half(a if b == 0.5 else b)) / a
    # Lentz's method; on this side of the mean no denominator comes near 0
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 2_000):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + step * d)
            c = 1 + step / c
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * value


def _log_beta_half(a: float) -> float:
    """log B(a, ½); Stirling's series of Γ(a + ½)/Γ(a) above 100, where two lgammas would cancel."""
    if a < 100:
        return math.lgamma(a) + math.lgamma(0.5) - math.lgamma(a + 0.5)
    return math.lgamma(0.5) - math.log(a) / 2 + 1 / (8 * a) - 1 / (192 * a**3) + 1 / (640 * a**5)
