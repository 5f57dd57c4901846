"""The language of claims and their outcomes, against values by hand and by scipy."""

import math
import random
from statistics import fmean, stdev

import pytest
from scipy import stats as reference

from papers import claims, expression, tables
from papers.results import Kept
from papers.study import Claim
from rl.errors import UserError
from tests import papers_helper

RUNS = ["a", "b", "grpo", "grpo-full", "start"]


def several(name: str, tables: list[list[int]], **fields) -> list[Kept]:
    """Seeds of a run from their marks by question."""
    return [papers_helper.kept(name, seed, marks, **fields) for seed, marks in enumerate(tables)]


def logged(name: str, values: list[float]) -> list[Kept]:
    """Seeds of a run that differ in tokens a second."""
    found = several(name, [[0, 1]] * len(values))
    for kept, value in zip(found, values, strict=True):
        kept.record.rollout = {"tokens_per_s": value}
    return found


def judged(test: str, **found: list[Kept]) -> claims.Verdict:
    claim = Claim(name="c", say="s", source="p", test=test)
    return claims.judge(claim, {name.replace("_", "-"): kept for name, kept in found.items()}, RUNS)


# --- the language


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os').system('x') > 0", "no function"),
        ("accuracy(a).real > 0", "is not in the language"),
        ("accuracy(a) > 0 > 1", "one comparison is needed"),
        ("accuracy(a) ** 9 > 0", "is not in the language"),
        ("acuracy(a) > 0", "no function 'acuracy', did you mean 'accuracy'?"),
        ("accuracy(grpo-ful) > 0", "accuracy takes a run, found"),
        ("accuracy('x') > 0", "no run 'x'"),
        ("accuracy(a, b) > 0", "accuracy takes 1 argument, found 2"),
        ("mean(a) > 0", "mean takes 2 arguments, found 1"),
        ("part(a, 'kl', 0.5, 0.2) > 0", "part takes two shares of the steps"),
        ("part(a, 'kl') > 0", "part takes 4 arguments, found 2"),
        ("iqm(accuracy(a) - accuracy(b)) > 0", "iqm takes expressions of one run each"),
        ("1 > 0", "names no run"),
        ("accuracy(a) > 0 at 20 %", "valid: a confidence from 50 %"),
        ("(lambda: 1)() > 0", "no function"),
        ("accuracy(a) > True", "is not in the language"),
    ],
)
def test_what_is_not_in_the_language_is_refused(text: str, message: str) -> None:
    """A paper.toml from elsewhere must not be able to do anything but compute."""
    with pytest.raises(UserError) as caught:
        expression.parse_test(text, RUNS)
    assert message in str(caught.value)


def test_a_run_with_a_hyphen_is_no_difference() -> None:
    test = expression.parse_test("accuracy(grpo-full) - accuracy( grpo ) > -0.02 at 90 %", RUNS)
    assert expression.names(test.left) == {"grpo-full", "grpo"}
    assert (test.sign, test.confidence) == (">", 0.9)


def test_functions_of_a_run_give_what_its_files_say() -> None:
    metrics = {"kl": [float(i) for i in range(40)]}
    found = {"a": [papers_helper.kept("a", seed, [1, 1, 0, 1], metrics, wall_s=10.0 + seed) for seed in (0, 1)]}

    def value(text: str) -> float:
        return expression.value(expression.parse(text, RUNS), expression.View(found))

    assert value("accuracy(a)") == 0.75
    assert value("start(a)") == 0.0
    assert value("wall_s(a)") == 10.5
    assert value("step_s(a)") == 0.5  # the helper's rows are half a second apart
    assert value("mean(a, 'kl')") == 19.5
    assert (value("early(a, 'kl')"), value("late(a, 'kl')")) == (1.5, 37.5)
    assert value("peak(a, 'kl')") == 37.5
    assert value("part(a, 'kl', 0.2, 0.4)") == 11.5  # steps 8 to 15
    assert value("part(a, 'kl', 0, 0.1)") == value("early(a, 'kl')")
    assert value("part(a, 'kl', 0.99, 1)") == 39.0  # never none
    assert value("abs(-sqrt(4 * accuracy(a) - 2)) / 2") == 0.5
    with pytest.raises(expression.Missing):
        value("mean(a, 'nothing')")


# --- the error


def test_the_error_of_a_difference_is_that_of_seeds_and_questions() -> None:
    """Both parts by hand: s²/n of the seeds' paired differences, and of the questions' mean differences."""
    draw = random.Random(1)
    a, b = ([[int(draw.random() < p) for _ in range(40)] for _ in range(5)] for p in (0.7, 0.5))
    found = {"a": several("a", a), "b": several("b", b)}
    made = claims.measure(expression.parse("accuracy(a) - accuracy(b)", RUNS), found)
    by_seed = [fmean(x) - fmean(y) for x, y in zip(a, b, strict=True)]
    by_question = [fmean(x[i] for x in a) - fmean(y[i] for y in b) for i in range(40)]
    parts = stdev(by_seed) ** 2 / 5, stdev(by_question) ** 2 / 40
    assert made.estimate.value == pytest.approx(fmean(by_seed))
    assert (made.over_seeds, made.over_questions) == pytest.approx(parts)
    degrees = sum(parts) ** 2 / (parts[0] ** 2 / 4 + parts[1] ** 2 / 39)
    half = reference.t.ppf(0.975, degrees) * math.sqrt(sum(parts))
    assert (made.estimate.low, made.estimate.high) == pytest.approx((fmean(by_seed) - half, fmean(by_seed) + half))


def test_without_questions_the_interval_is_scipys_paired_t() -> None:
    x, y = [103.0, 98.0, 110.0, 105.0], [80.0, 79.0, 95.0, 84.0]
    test = "tokens_per_s(a) - tokens_per_s(b) > 0"
    made = judged(test, a=logged("a", x), b=logged("b", y)).measured
    wanted = reference.ttest_rel(x, y).confidence_interval(0.95)
    assert made is not None
    assert (made.estimate.low, made.estimate.high) == pytest.approx((wanted.low, wanted.high))


def test_seeds_are_pairs_by_their_number_not_their_place() -> None:
    a, b = logged("a", [1.0, 2.0, 3.0]), logged("b", [1.0, 2.0, 3.0])
    made = claims.measure(expression.parse("tokens_per_s(a) - tokens_per_s(b)", RUNS), {"a": a, "b": b[1:]})
    assert (made.seeds, made.estimate.value, made.over_seeds) == (2, 0.0, 0.0)


def test_questions_that_never_differ_still_leave_an_error() -> None:
    """Trap: all answers alike have no spread, and ten of them would prove two models equal."""
    same = [[1] * 10] * 3
    verdict = judged("abs(accuracy(a) - accuracy(b)) < 0.05", a=several("a", same), b=several("b", same))
    assert verdict.outcome == claims.UNDECIDED
    many = [[1] * 1000] * 3
    verdict = judged("abs(accuracy(a) - accuracy(b)) < 0.05", a=several("a", many), b=several("b", many))
    assert verdict.outcome == claims.HOLDS


def test_models_asked_other_questions_are_not_compared() -> None:
    with pytest.raises(UserError, match="measured on different questions"):
        judged("accuracy(a) - accuracy(b) > 0", a=several("a", [[1, 0]] * 2), b=several("b", [[1, 0, 1]] * 2))


# --- outcomes


SPEEDS = [100.0, 104.0, 98.0, 102.0, 96.0]


@pytest.mark.parametrize(
    ("test", "outcome"),
    [
        ("tokens_per_s(a) / tokens_per_s(b) >= 2", claims.HOLDS),
        ("tokens_per_s(a) / tokens_per_s(b) >= 3", claims.FAILS),
        ("tokens_per_s(a) / tokens_per_s(b) <= 3", claims.HOLDS),
        ("tokens_per_s(a) < 90", claims.FAILS),
        ("tokens_per_s(a) > 99", claims.UNDECIDED),
        ("abs(tokens_per_s(a) - 100) < 5", claims.HOLDS),
        ("abs(tokens_per_s(a) - 90) < 5", claims.FAILS),
        ("abs(tokens_per_s(a) - 100) < 1", claims.UNDECIDED),
        ("tokens_per_s(start) > 0", claims.NOT_RUN),
        ("mean(a, 'nothing') > 0", claims.NOT_RUN),
        ("iqm(tokens_per_s(a)) > 90", claims.HOLDS),
        ("improvement(tokens_per_s(a), tokens_per_s(b)) > 0.5", claims.HOLDS),
        ("improvement(tokens_per_s(b), tokens_per_s(a)) > 0.5", claims.FAILS),
    ],
)
def test_each_outcome(test: str, outcome: str) -> None:
    assert judged(test, a=logged("a", SPEEDS), b=logged("b", [40.0, 41.0, 39.0, 40.5, 39.5])).outcome == outcome


def test_equivalence_is_two_one_sided_tests() -> None:
    """At 95 % the interval is that of 90 %, as Schuirmann has it."""
    low, high = reference.t.interval(0.9, 4, fmean(SPEEDS), stdev(SPEEDS) / math.sqrt(5))
    verdict = judged("abs(tokens_per_s(a)) < 200", a=logged("a", SPEEDS))
    assert verdict.measured is not None
    assert (verdict.measured.estimate.low, verdict.measured.estimate.high) == pytest.approx((low, high))


def test_times_of_several_machines_or_commits_are_said() -> None:
    """Trap: a sampler that became faster between two visits of a machine passes for one that quantization sped up."""
    a, b = logged("a", SPEEDS), logged("b", SPEEDS)
    for kept in (*a, *b):
        kept.record.git = {"commit": "1"}
    assert judged("tokens_per_s(a) / tokens_per_s(b) > 0.5", a=a, b=b).mixed == ""
    for kept in b:
        kept.record.git = {"commit": "2"}
    b[0].machine["cores"] = 9
    verdict = judged("tokens_per_s(a) / tokens_per_s(b) > 0.5", a=a, b=b)
    assert verdict.mixed == "times of 2 machines and 2 commits"
    assert tables.outcome(verdict) == "holds; times of 2 machines and 2 commits"
    assert judged("accuracy(a) - accuracy(b) > -0.5", a=a, b=b).mixed == ""


def test_one_seed_says_nothing_of_others() -> None:
    verdict = judged("accuracy(a) > 0.1", a=several("a", [[1] * 30]))
    assert (verdict.outcome, verdict.need) == (claims.UNDECIDED, "2 seeds")


def test_a_run_made_once_on_purpose_has_no_seeds_to_vary() -> None:
    found = {"a": several("a", [[1] * 20 + [0] * 20] * 3), "start": several("start", [[0] * 40])}
    claim = Claim(name="c", say="s", source="p", test="accuracy(a) - accuracy(start) > 0.2")
    assert claims.judge(claim, found, RUNS).outcome == claims.UNDECIDED
    assert claims.judge(claim, found, RUNS, single=["start"]).outcome == claims.HOLDS


def test_three_seeds_that_all_win_prove_nothing_at_95_percent() -> None:
    """Trap: the bootstrap of 3 against 3 that never cross is a point; by chance that comes up in 2 of 20 orders."""
    a, b = logged("a", [5.0, 6.0, 7.0]), logged("b", [1.0, 2.0, 3.0])
    verdict = judged("improvement(tokens_per_s(a), tokens_per_s(b)) > 0.5", a=a, b=b)
    assert (verdict.outcome, verdict.need) == (claims.UNDECIDED, "4 seeds")


def test_the_seeds_needed_would_decide_with_the_power_promised() -> None:
    """(z_α + z_β)² s² / δ² by hand; with s² = 10 and δ = 1: 78.5 → 79."""
    verdict = judged("tokens_per_s(a) > 99", a=logged("a", SPEEDS))
    wanted = (reference.norm.ppf(0.975) + reference.norm.ppf(0.8)) ** 2 * stdev(SPEEDS) ** 2
    assert verdict.need == f"{math.ceil(wanted)} seeds"


def test_where_questions_are_too_few_no_number_of_seeds_helps() -> None:
    marks = [[1] * 11 + [0] * 9] * 4  # all seeds alike: what is uncertain is the questions
    verdict = judged("accuracy(a) > 0.5", a=several("a", marks))
    assert verdict.need.endswith("questions")
    share = reference.norm.ppf(0.975) + reference.norm.ppf(0.8)
    wanted = share**2 * stdev(marks[0]) ** 2 / 0.05**2
    assert int(verdict.need.split()[-2]) == math.ceil(wanted)


def test_a_score_of_lm_eval_is_paired_by_its_questions() -> None:
    """In whatever order the two files hold them; a task that was not measured is not run."""
    draw = random.Random(2)
    a, b = several("a", [[1]] * 3), several("b", [[1]] * 3)
    for left, right in zip(a, b, strict=True):
        names = [f"h{i}" for i in range(30)]
        left.scores["gcd"] = {name: float(draw.random() < 0.7) for name in names}
        right.scores["gcd"] = {name: 1.0 - left.scores["gcd"][name] for name in reversed(names)}
    verdict = judged("score(a, 'gcd') - score(b, 'gcd') > 0", a=a, b=b)
    by_seed = [fmean(x.scores["gcd"].values()) - fmean(y.scores["gcd"].values()) for x, y in zip(a, b, strict=True)]
    assert verdict.measured is not None
    assert verdict.measured.estimate.value == pytest.approx(fmean(by_seed))
    by_question = [fmean(2 * x.scores["gcd"][f"h{i}"] - 1 for x in a) for i in range(30)]
    assert verdict.measured.over_questions == pytest.approx(stdev(by_question) ** 2 / 30)
    assert judged("score(a, 'else') > 0", a=a).outcome == claims.NOT_RUN
    with pytest.raises(UserError, match="different questions"):
        judged("score(a, 'gcd') - accuracy(a) > 0", a=a)
