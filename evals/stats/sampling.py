"""Scores of k tries at a question, from n ≥ k samples of it: the mean over all subsets of k, without bias.

Both are U-statistics: averaged over the n samples' randomness they equal the chance that k fresh samples succeed, which
the plug-in 1 − (1 − c/n)^k does not. Per question; `mean` over questions gives the score and its error.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from fractions import Fraction


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that at least one of k samples is right, where `right` of n are: 1 − C(n − c, k)/C(n, k).

    Chen et al. 2021, "Evaluating Large Language Models Trained on Code" (arXiv:2107.03374), eq. 1, in whole numbers
    instead of their running product, so exact at any n. ValueError unless 1 ≤ k ≤ n and 0 ≤ right ≤ n.
    """
    _check_k(n, k)
    if not 0 <= right <= n:
        raise ValueError(f"{right} right of {n} samples")
    whole = math.comb(n, k)
    return (whole - math.comb(n - right, k)) / whole


def majority_at_k(answers: Sequence[Hashable | None], right: Hashable, k: int) -> float:
    """Chance that the most frequent answer of k samples is `right`, ties broken at random with equal odds.

    answers: the n extracted answers, already brought to one form ("4" and "4.0" are two answers here); None, where no
    answer was found, has no vote. k samples without any vote are wrong. The vote is that of self-consistency (Wang et
    al. 2022, arXiv:2203.11171); the mean over all C(n, k) subsets is exact, by counting the subsets in which `right`
    has j votes and no other answer more. ValueError unless 1 ≤ k ≤ n, or where `right` is None.
    """
    _check_k(len(answers), k)
    if right is None:
        raise ValueError("None stands for no answer and cannot be the right one")
    votes = Counter(answers)
    silent, good = votes.pop(None, 0), votes.pop(right, 0)
    won = Fraction(0)
    for top in range(1, min(good, k) + 1):
        room = k - top
        # (samples drawn, answers tied at the top) -> number of ways
        ways = {(drawn, 0): math.comb(silent, drawn) for drawn in range(min(silent, room) + 1)}
        for count in votes.values():
            grown: Counter[tuple[int, int]] = Counter()
            for (drawn, tied), number in ways.items():
                for more in range(min(count, top, room - drawn) + 1):
                    grown[drawn + more, tied + (more == top)] += number * math.comb(count, more)
            ways = grown
        shares = (Fraction(number, tied + 1) for (drawn, tied), number in ways.items() if drawn == room)
        won += math.comb(good, top) * sum(shares, Fraction(0))
    return float(won / math.comb(len(answers), k))


def _check_k(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k = {k} of {n} samples; between 1 and {n} is needed")
