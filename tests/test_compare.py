"""`python -m evals compare`: numbers against scipy, and what is refused."""

import math
from pathlib import Path

import numpy as np
import pytest
from evals_helper import put_result
from scipy import stats as reference

from evals import __main__ as cli
from evals.compare import compare
from rl.errors import UserError

# 30 both right, 12 only B, 4 only A, 14 neither
A = [1] * 30 + [0] * 12 + [1] * 4 + [0] * 14
B = [1] * 30 + [1] * 12 + [0] * 4 + [0] * 14


def test_marks_by_mcnemar_connor_and_discordant_counts(tmp_path: Path) -> None:
    put_result(tmp_path, "one", A)
    put_result(tmp_path, "two", B)
    (found,) = compare(tmp_path, "one", "two", see=0.1)
    gain = found.difference
    assert (gain.n, gain.lost, gain.gained) == (60, 4, 12)
    assert gain.value == pytest.approx(8 / 60)
    assert gain.p == pytest.approx(reference.binomtest(4, 16).pvalue)
    # Connor 1987 with a share of 16/60 that differs
    z = reference.norm.ppf([0.975, 0.8])
    spread = z[0] * math.sqrt(16 / 60) + z[1] * math.sqrt(16 / 60 - 0.1**2)
    assert found.needed == math.ceil((spread / 0.1) ** 2)
    assert not found.least
    assert not found.equivalence.equivalent
    assert 0.1 < found.detectable < 16 / 60


def test_a_difference_above_the_share_that_differs_takes_at_least_so_many(tmp_path: Path) -> None:
    """Trap: Connor's formula has no answer there, and an answer for the observed share would be too small."""
    put_result(tmp_path, "one", [1] * 50 + [0] * 50)
    put_result(tmp_path, "two", [1] * 51 + [0] * 49)
    (found,) = compare(tmp_path, "one", "two", see=0.2)
    assert found.needed == math.ceil(reference.norm.ppf(0.975) ** 2 / 0.2 + 2 * _cross(0.2) + _tail(0.2))
    assert found.least


def _cross(see: float) -> float:
    z = reference.norm.ppf([0.975, 0.8])
    return float(z[0] * z[1] * math.sqrt(see * (see - see**2)) / see**2)


def _tail(see: float) -> float:
    return float(reference.norm.ppf(0.8) ** 2 * (see - see**2) / see**2)


def test_the_same_answers_are_equivalent_with_enough_questions(tmp_path: Path) -> None:
    put_result(tmp_path, "one", [1, 0] * 100)
    put_result(tmp_path, "two", [1, 0] * 100)
    (few,) = compare(tmp_path, "one", "two", margin=0.01)
    (found,) = compare(tmp_path, "one", "two", margin=0.05)
    assert (few.equivalence.equivalent, found.equivalence.equivalent) == (False, True)
    assert found.difference.p == 1
    assert found.needed is None  # no question differs, so nothing is known of how many do


def test_scores_of_sources_by_students_t_and_their_error(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    before, after = chance.normal(0, 1, 40), chance.normal(0.3, 1, 40)
    sources = [f"s{i // 4}" for i in range(40)]
    put_result(tmp_path, "one", list(before), metric="bleu", sources=sources)
    put_result(tmp_path, "two", list(after), metric="bleu", sources=sources)
    (found,) = compare(tmp_path, "one", "two", margin=0.5, see=0.25)
    off = (after - before) - (after - before).mean()
    pairs = sum(off[i] * off[j] for i in range(40) for j in range(40) if i != j and sources[i] == sources[j])
    stderr = math.sqrt(off.var(ddof=40 / 40) / 40 + pairs / 40**2)
    assert found.difference.stderr == pytest.approx(stderr)
    assert found.needed == math.ceil((sum(reference.norm.ppf([0.975, 0.8])) * stderr * math.sqrt(40) / 0.25) ** 2)
    value = (after - before).mean()
    p = max(reference.t.sf((0.5 + side * value) / stderr, 9) for side in (1, -1))
    assert found.equivalence.p == pytest.approx(p)
    assert (found.difference.gained, found.difference.lost) == (None, None)


def test_the_base_of_a_run_goes_by_its_own_name(tmp_path: Path) -> None:
    put_result(tmp_path, "one", A, "base")
    put_result(tmp_path, "one", B)
    (found,) = compare(tmp_path, "one/base", "one")
    assert found.difference.value == pytest.approx(8 / 60)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["one", "tow"], "tow: no result in evals/results; did you mean 'two'"),
        (["one", "two/base"], "two/base: no result in evals/results"),
        (["one", "two", "--task", "gdc"], "--task gdc: not measured for both one and two; did you mean 'gcd'"),
        (["one", "other"], "no task in common"),
        (["one", "shifted"], "59 questions shared, 1 only of the first, 1 only of the second"),
        (["one", "short"], "2 questions shared, 58 only of the first, 0 only of the second"),
        (["one", "newer"], "version 2.0"),
        (["one", "two", "--margin", "0"], "--margin 0.0"),
        (["one", "two", "--see", "1.5"], "strict scores 0 or 1 a question"),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path: Path, argv: list[str], words: str) -> None:
    """Trap: pairing by place compares different questions without a word."""
    for name, marks in (("one", A), ("two", B)):
        put_result(tmp_path, name, marks)
        put_result(tmp_path, name, marks, task="gcd")
    put_result(tmp_path, "other", A, task="sums")
    put_result(tmp_path, "shifted", A, first=1)
    put_result(tmp_path, "short", [1, 0])
    put_result(tmp_path, "newer", A, version=2.0)
    with pytest.raises(UserError) as error:
        cli.main(["compare", *argv], tmp_path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_terminal_shows_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, marks in (("one", A), ("two", B)):
        put_result(tmp_path, name, marks)
        put_result(tmp_path, name, marks, task="gcd")
    cli.main(["compare", "one", "two", "--margin", "0.3"], tmp_path)
    said = capsys.readouterr().out
    p = reference.binomtest(4, 16).pvalue
    assert f"p           {p:.4f} (McNemar, exact), {2 * p:.4f} by Holm over 2\n" in said
    assert said.count("  differ      only A right 4, only B right 12\n") == 2
    assert "  equivalent  yes within ±0.3: p " in said
    assert "questions needed to see 0.3; 60 show 0." in said
    assert max(map(len, said.splitlines())) <= 80
    cli.main(["compare", "one", "one", "--task", "gcd"], tmp_path)
    assert "  power       no spread between the questions to plan from\n" in capsys.readouterr().out
