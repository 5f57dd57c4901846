"""evals/stats against scipy, closed forms and enumeration; intervals by how often they hold the truth."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import optimize
from scipy import stats as reference

from evals import stats
from evals.stats.quantiles import critical, normal_tail, student_tail

SCORE = st.floats(-10, 10, allow_subnormal=False)
SCORES = st.lists(SCORE, min_size=2, max_size=30)
EIGHTHS = st.integers(-8, 8).map(lambda k: k / 8)
MARKS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)
few = settings(max_examples=40, deadline=None)


def marks(both: int, gained: int, lost: int, neither: int) -> tuple[list[float], list[float]]:
    """Marks before and after with the four counts of a paired table."""
    before = [1.0] * both + [0.0] * gained + [1.0] * lost + [0.0] * neither
    return before, [1.0] * (both + gained) + [0.0] * (lost + neither)


def two_sources(rows: list[tuple[float, int]]) -> bool:
    return len({source for _, source in rows}) > 1


# quantiles


@pytest.mark.parametrize("degrees", [0.7, 1, 1.3, 2, 5, 30, 99, 199.9, 201, 1e5, 1e7, 1e12, math.inf])
def test_students_tails_and_quantiles_are_those_of_scipy_from_one_degree_to_the_normal(degrees):
    for t in (0, 0.01, 0.5, 1, 1.96, 5):
        assert student_tail(t, degrees) == pytest.approx(reference.t.sf(t, degrees), rel=2e-9)
        assert student_tail(-t, degrees) == pytest.approx(reference.t.cdf(t, degrees), rel=1e-9)
    for confidence in (0.5, 0.9, 0.95, 0.999):
        assert critical(confidence, degrees) == pytest.approx(reference.t.ppf((1 + confidence) / 2, degrees), rel=1e-9)


def test_the_tail_far_out_is_small_but_not_zero():
    """1 − cdf cancels to 0 from z = 8.3 on, and a p-value of 0 is none."""
    assert normal_tail(12) == pytest.approx(reference.norm.sf(12), rel=1e-12)
    assert student_tail(200, 3) == pytest.approx(reference.t.sf(200, 3), rel=1e-10)


@pytest.mark.parametrize(("confidence", "degrees"), [(0, 3), (1, 3), (95, 3), (0.95, 0), (0.95, -1), (0.95, math.nan)])
def test_a_percentage_for_a_confidence_and_no_degrees_are_errors(confidence, degrees):
    with pytest.raises(ValueError, match=r"confidence|degrees"):
        critical(confidence, degrees)


# one model


@given(SCORES)
def test_a_mean_and_its_error_are_those_of_scipy(values):
    found = stats.mean(values)
    assert (found.value, found.stderr) == pytest.approx((np.mean(values), reference.sem(values)), abs=1e-12)
    assert found.high - found.value == pytest.approx(reference.norm.ppf(0.975) * found.stderr, abs=1e-12)


@given(st.lists(st.tuples(SCORE, st.integers(0, 4)), min_size=2, max_size=30).filter(two_sources))
@few
def test_a_clustered_error_is_the_sum_over_all_pairs_within_a_source(rows):
    """The double sum as printed by Miller, where the code takes squared sums."""
    values = [value for value, _ in rows]
    sources = [source for _, source in rows]
    n, centre = len(values), np.mean(values)
    pairs = sum(
        (values[i] - centre) * (values[j] - centre)
        for i, j in itertools.permutations(range(n), 2)
        if sources[i] == sources[j]
    )
    expected = math.sqrt(max(0.0, reference.sem(values) ** 2 + pairs / n**2))
    found = stats.mean(values, clusters=sources)
    assert found.stderr == pytest.approx(expected, abs=1e-7)
    assert found.degrees == len(set(sources)) - 1


@given(SCORES)
def test_one_question_per_source_gives_the_plain_error(values):
    clustered = stats.mean(values, clusters=range(len(values)))
    assert clustered.stderr == pytest.approx(stats.mean(values).stderr, abs=1e-7)


def test_copies_of_questions_do_not_shrink_the_error():
    """Four copies of each question halve the plain error, and say nothing new."""
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    copied = stats.mean(values * 4, clusters=[*range(10)] * 4)
    assert stats.mean(values * 4).stderr < 0.52 * stats.mean(values).stderr
    assert copied.stderr == pytest.approx(stats.mean(values).stderr, rel=0.06)


def test_one_question_or_one_source_has_no_error_rather_than_none():
    """The formula gives almost 0 for a single source: false certainty."""
    for found in (stats.mean([0.5]), stats.mean([0.0, 1.0, 1.0], clusters="aaa")):
        assert math.isnan(found.stderr)
        assert math.isnan(found.low)


@pytest.mark.parametrize(
    ("values", "clusters", "says"),
    [([], None, "no values"), ([1.0, math.nan], None, "score 1 of 2 is nan"), ([1.0, 0.0], "a", "sources of 1")],
)
def test_scores_that_cannot_be_averaged_are_errors(values, clusters, says):
    with pytest.raises(ValueError, match=says):
        stats.mean(values, clusters=clusters)


# two models


@given(st.lists(st.tuples(SCORE, SCORE), min_size=3, max_size=30))
def test_unpaired_differences_are_welchs(rows):
    before, after = [x for x, _ in rows], [y for _, y in rows][1:]
    found = stats.unpaired_difference(before, after)
    if min(np.std(before), np.std(after)) > 1e-6:
        expected = reference.ttest_ind(after, before, equal_var=False)
        low, high = expected.confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6, abs=1e-9)
        assert stats.normal_test(found).p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)


def test_the_normal_p_value_is_that_of_the_paired_difference():
    before, after = marks(30, 14, 5, 51)
    found = stats.normal_test(stats.paired_difference(before, after))
    z = 0.09 / reference.sem(np.subtract(after, before))
    assert found == stats.Test(pytest.approx(2 * reference.norm.sf(z)), "normal", 100)
    clustered = stats.paired_difference(before, after, clusters=[i % 10 for i in range(100)])
    z = clustered.value / clustered.stderr
    assert stats.normal_test(clustered).p == pytest.approx(2 * reference.t.sf(z, 9))
    assert stats.normal_test(clustered).method == "Student's t, 9 degrees"


def test_no_spread_is_no_p_value_of_zero():
    """Five questions that all gained 1 have a stderr of 0: dividing by it would give p = 0."""
    assert math.isnan(stats.normal_test(stats.paired_difference([0.0] * 5, [1.0] * 5)).p)
    assert stats.sign_flip([0.0] * 5, [1.0] * 5).p == 2 / 32
    assert stats.normal_test(stats.paired_difference([1.0] * 5, [1.0] * 5)).p == 1
    assert stats.sign_flip([1.0] * 5, [1.0] * 5) == stats.Test(1.0, "sign-flip, exact", 0)


@given(MARKS)
def test_mcnemar_is_scipys_binomial_test_and_the_sign_flip_test_of_marks(rows):
    before, after = [float(x) for x, _ in rows], [float(y) for _, y in rows]
    gained, lost = sum(y > x for x, y in rows), sum(y < x for x, y in rows)
    found = stats.mcnemar(before, after)
    expected = reference.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert found.p == pytest.approx(expected, rel=1e-9)
    assert stats.sign_flip(before, after).p == found.p
    assert found.n == gained + lost


@given(st.lists(st.one_of(EIGHTHS, st.sampled_from([1 / 3, -1 / 3, 2 / 3]), SCORE), min_size=1, max_size=9))
@few
def test_sign_flips_are_all_counted_with_ties_by_value_not_by_rounding(differences):
    """1/3 + 1/3 + 1/3 and 1 must tie although floats differ; enumerated here with a tolerance."""
    signs = list(itertools.product((1, -1), repeat=len(differences)))
    sums = [abs(math.fsum(s * d for s, d in zip(row, differences, strict=True))) for row in signs]
    # scores so small that the tolerance would decide are not of this test
    if sums and 0 < max(sums) < 1e-3:
        return
    expected = sum(total >= sums[0] - 1e-9 for total in sums) / len(sums)
    found = stats.sign_flip([0.0] * len(differences), differences)
    assert found.method == "sign-flip, exact"
    near = {total for total in sums if 0 < abs(total - sums[0]) < 1e-8}
    if not any(abs(total - sums[0]) > 1e-13 for total in near):
        assert found.p == expected


def test_sampled_sign_flips_come_near_the_paired_t_test_and_repeat():
    chance = random.Random(3)
    before = [chance.gauss(0, 1) for _ in range(60)]
    after = [x + chance.gauss(0.3, 1) for x in before]
    found = stats.sign_flip(before, after, draws=4000)
    p = reference.ttest_rel(after, before).pvalue
    assert found.method == "sign-flip, 4000 draws"
    assert found.p == pytest.approx(p, abs=4 * math.sqrt(p / 4000))
    assert found == stats.sign_flip(before, after, draws=4000)
    # all gained: none of 99 draws is as far, which is no p of 0
    assert stats.sign_flip([0.0] * 60, [9 + abs(x) for x in after], draws=99).p == 0.01


def test_questions_of_a_source_flip_together():
    """20 gains look certain, yet come from 4 sources: 2 of 2⁴ patterns are as extreme."""
    before, after = [0.0] * 20, [1.0] * 20
    assert stats.sign_flip(before, after).p == pytest.approx(2 / 2**20)
    assert stats.sign_flip(before, after, clusters=[i // 5 for i in range(20)]).p == 2 / 16


@given(st.lists(st.floats(0, 1), max_size=7))
def test_holm_is_the_closed_test_of_all_subsets_by_bonferroni(p_values):
    """Independent of the step-down rule: the largest Bonferroni p over all subsets that hold the hypothesis."""
    places = range(len(p_values))
    subsets = [s for size in range(1, len(p_values) + 1) for s in itertools.combinations(places, size)]
    expected = [max(min(1, len(s) * min(p_values[j] for j in s)) for s in subsets if i in s) for i in places]
    assert stats.holm(p_values) == expected


def test_a_p_value_that_is_none_is_an_error_to_holm():
    for wrong in (math.nan, -0.1, 1.1):
        with pytest.raises(ValueError, match="not a p-value"):
            stats.holm([0.5, wrong])


# equivalence


def score_z(gained: int, lost: int, n: int, difference: float) -> float:
    """Tango's score with the nuisance share found by numerical search instead of his quadratic."""

    def unlikely(share: float) -> float:
        cells = (gained, share + difference), (lost, share), (n - gained - lost, 1 - 2 * share - difference)
        return -sum(count * math.log(max(p, 1e-300)) for count, p in cells if count)

    bounds = max(0.0, -difference), (1 - difference) / 2
    share = optimize.minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    return (gained - lost - n * difference) / math.sqrt(n * (2 * share + difference * (1 - difference)))


@pytest.mark.parametrize(("gained", "lost", "n"), [(40, 20, 160), (3, 9, 50), (0, 7, 40), (5, 0, 30), (1, 1, 300)])
def test_tangos_interval_ends_where_the_searched_score_is_1_96(gained, lost, n):
    low, high = stats.tango(*marks(n - gained - lost, gained, lost, 0))
    assert score_z(gained, lost, n, low) == pytest.approx(1.959964, abs=1e-4)
    assert score_z(gained, lost, n, high) == pytest.approx(-1.959964, abs=1e-4)


@given(MARKS, st.floats(0.01, 0.6), st.floats(0.01, 0.2))
@few
def test_equivalence_of_marks_agrees_with_its_interval(rows, margin, alpha):
    before, after = [float(x) for x, _ in rows], [float(y) for _, y in rows]
    found = stats.equivalence(before, after, margin, alpha)
    assert -1 <= found.low <= found.value <= found.high <= 1
    if abs(found.p - alpha) > 1e-9:
        assert found.equivalent == (-margin < found.low and found.high < margin)


def test_ten_equal_answers_do_not_prove_two_models_equal():
    """Without one question that differs the usual stderr is 0 and any margin would be met."""
    found = stats.equivalence([1.0] * 10, [1.0] * 10, 0.05)
    assert not found.equivalent
    assert found.p == pytest.approx(reference.norm.sf(math.sqrt(10 * 0.05 / 0.95)))
    assert stats.equivalence([1.0] * 100, [1.0] * 100, 0.05).equivalent
    for found in (
        stats.equivalence([0.5] * 10, [0.5] * 10, 0.05),
        stats.equivalence([0.0, 1.0], [1.0, 1.0], 0.05, clusters="aa"),
        stats.equivalence_unpaired([1.0] * 10, [1.0] * 10, 0.05),
    ):
        assert (found.equivalent, math.isnan(found.p)) == (False, True)


@given(st.lists(st.tuples(SCORE, SCORE), min_size=3, max_size=25), st.floats(0.1, 5))
@few
def test_equivalence_is_the_larger_of_two_one_sided_t_tests(rows, margin):
    before, after = np.array([x for x, _ in rows]), np.array([y for _, y in rows])
    if np.std(after - before) < 1e-6 or np.std(before) < 1e-6 or np.std(after) < 1e-6:
        return
    found = stats.equivalence(before.tolist(), after.tolist(), margin)
    worse = reference.ttest_rel(after + margin, before, alternative="greater").pvalue
    better = reference.ttest_rel(after - margin, before, alternative="less").pvalue
    assert found.p == pytest.approx(max(worse, better), rel=1e-6, abs=1e-12)
    found = stats.equivalence_unpaired(before.tolist(), after.tolist(), margin)
    worse = reference.ttest_ind(after + margin, before, equal_var=False, alternative="greater").pvalue
    better = reference.ttest_ind(after - margin, before, equal_var=False, alternative="less").pvalue
    assert found.p == pytest.approx(max(worse, better), rel=1e-6, abs=1e-12)


def test_equivalence_of_sources_has_as_many_degrees_as_sources_less_one():
    before, after = marks(20, 3, 2, 15)
    found = stats.equivalence(before, after, 0.2, clusters=[i % 8 for i in range(40)])
    assert found.method == "two one-sided t tests, 7 degrees"
    error = stats.paired_difference(before, after, clusters=[i % 8 for i in range(40)]).stderr
    assert found.p == pytest.approx(reference.t.sf((0.2 - 0.025) / error, 7))


@pytest.mark.parametrize("margin", [0, -0.1, 1, math.nan, math.inf])
def test_a_margin_that_claims_nothing_is_an_error(margin):
    with pytest.raises(ValueError, match="margin"):
        stats.equivalence([0.0, 1.0], [1.0, 1.0], margin)


# power


def test_the_questions_needed_show_the_difference_four_times_in_five():
    """δ = 0.05 with 20 % differing: Connor's 626 questions. The exact test reaches a little less there."""
    n = stats.questions_needed(0.05, 0.2)
    assert n == 626
    gained = np.random.default_rng(0).multinomial(n, [0.125, 0.075, 0.8], size=20_000)
    difference = (gained[:, 0] - gained[:, 1]) / n
    z = difference / np.sqrt((gained[:, 0] + gained[:, 1]) / n / n)
    assert np.mean(np.abs(z) > 1.959964) == pytest.approx(0.8, abs=0.01)


@given(st.floats(0.01, 1), st.floats(0.05, 1), st.sampled_from([0.5, 0.8, 0.95]))
@example(1.0, 1.0, 0.95)  # a root of the squared equation alone, at 3 questions
def test_the_detectable_difference_undoes_the_questions_needed(share, discordance, power):
    n = stats.questions_needed(share * discordance, discordance, power)
    assert stats.detectable_difference(n, discordance, power) <= share * discordance * (1 + 1e-9)
    if n > 1:
        fewer = stats.detectable_difference(n - 1, discordance, power)
        assert math.isnan(fewer) or fewer >= share * discordance * (1 - 1e-9)


@given(st.floats(0.01, 1), st.floats(0.05, 5), st.sampled_from([0.5, 0.8, 0.95]))
def test_questions_of_any_score_have_the_power_asked_of_the_normal_test(difference, deviation, power):
    n = stats.questions_needed_spread(difference, deviation, power)

    def shown(count: int) -> float:
        """Chance that |value| passes 1.96 errors on the right side, by scipy's normal distribution."""
        return float(reference.norm.sf(reference.norm.ppf(0.975) - difference * math.sqrt(count) / deviation))

    assert shown(n) >= power - 1e-9
    assert n == 1 or shown(n - 1) < power + 1e-9
    assert stats.detectable_spread(n, deviation, power) <= difference * (1 + 1e-9)


@pytest.mark.parametrize(("difference", "deviation"), [(0, 1), (0.1, -1), (0.1, math.nan), (math.inf, 1)])
def test_a_spread_that_cannot_be_plans_nothing(difference, deviation):
    with pytest.raises(ValueError, match="deviation of"):
        stats.questions_needed_spread(difference, deviation)


def test_no_difference_exceeds_the_share_of_questions_that_differ():
    for difference in (0, 0.3, math.nan):
        with pytest.raises(ValueError, match="cannot be"):
            stats.questions_needed(difference, 0.2)
    assert math.isnan(stats.detectable_difference(3, 0.2))


# how often 95 % intervals hold the truth


def covered(intervals: list[tuple[float, float]], truth: float) -> float:
    return float(np.mean([low <= truth <= high for low, high in intervals]))


def test_wilson_holds_the_truth_where_the_normal_interval_loses_it():
    """A share of 0.05 of 40 questions: counted exactly over all outcomes, no simulation."""
    odds = reference.binom.pmf(range(41), 40, 0.05)
    wilson = [stats.wilson(k, 40) for k in range(41)]
    normal = [(k / 40 - half, k / 40 + half) for k in range(41) for half in [1.96 * stats.binomial_stderr(k, 40)]]
    inside = [sum(p * (a <= 0.05 <= b) for p, (a, b) in zip(odds, found, strict=True)) for found in (wilson, normal)]
    assert 0.93 < inside[0] < 0.98
    assert inside[1] < 0.88


def test_clustered_intervals_hold_the_truth_where_plain_ones_lose_it():
    """12 sources of 5 questions that share half of their variance."""
    chance = np.random.default_rng(0)
    plain, clustered, sources = [], [], [i // 5 for i in range(60)]
    for _ in range(600):
        values = (np.repeat(chance.normal(size=12), 5) + chance.normal(size=60)).tolist()
        found = stats.mean(values), stats.mean(values, clusters=sources)
        plain.append((found[0].low, found[0].high))
        clustered.append((found[1].low, found[1].high))
    assert covered(plain, 0) < 0.8
    assert covered(clustered, 0) == pytest.approx(0.95, abs=0.025)


def test_paired_intervals_of_few_differing_questions_by_tango_not_by_the_stderr():
    """40 questions of which 5 % differ, one way as often as the other: often none does, and the stderr is 0."""
    chance = np.random.default_rng(1)
    tables = [
        marks(40 - gained - lost, gained, lost, 0)
        for gained, lost, _ in chance.multinomial(40, [0.04, 0.01, 0.95], 600)
    ]
    normal = [stats.paired_difference(*table) for table in tables]
    assert covered([(found.low, found.high) for found in normal], 0.03) < 0.9
    assert 0.93 < covered([stats.tango(*table) for table in tables], 0.03) <= 1


def test_equivalence_at_the_margin_is_claimed_once_in_twenty():
    """Two models exactly the margin apart, of 100 questions of which 20 % differ."""
    chance = np.random.default_rng(3)
    tables = [marks(100 - a - b, a, b, 0) for a, b, _ in chance.multinomial(100, [0.15, 0.05, 0.8], 1500)]
    claimed = np.mean([stats.equivalence(*table, 0.1).equivalent for table in tables])
    assert claimed == pytest.approx(0.05, abs=0.02)
