"""Scores of k samples and over seeds (evals/stats) against scipy, enumeration and all a model could have sampled."""

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as reference

from evals import stats

SCORE = st.floats(-10, 10, allow_subnormal=False)
TABLE = st.integers(1, 4).flatmap(lambda tasks: st.lists(st.lists(SCORE, min_size=tasks, max_size=tasks), min_size=2))
few = settings(max_examples=40, deadline=None)


# k samples


@pytest.mark.parametrize(("n", "right", "k"), [(1, 0, 1), (5, 2, 3), (6, 1, 6), (7, 7, 2), (8, 3, 4), (9, 4, 6)])
def test_pass_at_k_counts_the_subsets_that_hold_a_right_sample(n, right, k):
    subsets = list(itertools.combinations([1] * right + [0] * (n - right), k))
    assert stats.pass_at_k(n, right, k) == pytest.approx(np.mean([any(s) for s in subsets]), abs=1e-15)


def test_pass_at_k_is_chens_product_at_sizes_where_binomials_overflow_floats():
    n, right, k = 2000, 7, 700
    assert stats.pass_at_k(n, right, k) == pytest.approx(1 - np.prod(1 - k / np.arange(n - right + 1, n + 1)), rel=1e-9)


def vote(answers: tuple[str | None, ...]) -> float:
    """1 where "a" has the most votes, the share of the tie where it is one of several."""
    votes = Counter(answer for answer in answers if answer is not None)
    top = [answer for answer, count in votes.items() if count == max(votes.values())]
    return ("a" in top) / len(top) if top else 0.0


@given(st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=8), st.data())
@few
def test_majority_at_k_is_the_mean_vote_of_all_subsets(answers, data):
    k = data.draw(st.integers(1, len(answers)))
    expected = np.mean([vote(subset) for subset in itertools.combinations(answers, k)])
    assert stats.majority_at_k(answers, "a", k) == pytest.approx(expected, abs=1e-12)


def test_both_are_unbiased_over_all_that_a_model_could_have_sampled():
    """Averaged over every sequence of 5 answers they are the chance for 3 fresh ones; 1 − (1 − c/n)^k is not."""
    odds = {"a": 0.3, "b": 0.45, None: 0.25}
    runs = [(run, math.prod(odds[x] for x in run)) for run in itertools.product(odds, repeat=5)]
    expected = sum(vote(t) * math.prod(odds[x] for x in t) for t in itertools.product(odds, repeat=3))
    assert sum(p * stats.majority_at_k(run, "a", 3) for run, p in runs) == pytest.approx(expected, abs=1e-12)
    assert sum(p * stats.pass_at_k(5, run.count("a"), 3) for run, p in runs) == pytest.approx(1 - 0.7**3, abs=1e-12)
    plugged = sum(p * (1 - (1 - run.count("a") / 5) ** 3) for run, p in runs)
    assert abs(plugged - (1 - 0.7**3)) > 0.05


def test_samples_without_an_answer_have_no_vote():
    """Unparsed completions would win as the commonest answer, or worse, count as right."""
    assert stats.majority_at_k(["7", None, None, None], "7", 4) == 1
    assert stats.majority_at_k([None, None], "7", 2) == 0
    with pytest.raises(ValueError, match="cannot be the right one"):
        stats.majority_at_k([None, "7"], None, 1)


@pytest.mark.parametrize("k", [0, 4])
def test_more_tries_than_samples_are_an_error(k):
    with pytest.raises(ValueError, match=f"k = {k} of 3 samples"):
        stats.pass_at_k(3, 1, k)
    with pytest.raises(ValueError, match=f"k = {k} of 3 samples"):
        stats.majority_at_k("aab", "a", k)


# seeds


@given(TABLE)
@few
def test_the_interquartile_mean_is_scipys_trimmed_mean_of_all_scores(scores):
    expected = reference.trim_mean(np.array(scores), 0.25, axis=None)
    assert stats.iqm(scores) == pytest.approx(expected, abs=1e-12)


@given(TABLE, st.integers(2, 5), st.randoms(use_true_random=False))
@few
def test_the_chance_of_improvement_is_the_mean_mann_whitney_share(before, seeds, chance):
    after = [[chance.choice([0.0, 1.0, before[0][0]]) for _ in before[0]] for _ in range(seeds)]
    shares = [
        reference.mannwhitneyu(new, old).statistic / (len(new) * len(old))
        for old, new in zip(zip(*before, strict=True), zip(*after, strict=True), strict=True)
    ]
    assert stats.improvement(before, after) == pytest.approx(np.mean(shares), abs=1e-12)
    assert stats.improvement(after, before) == pytest.approx(1 - np.mean(shares), abs=1e-12)


def test_the_bootstrap_is_the_distribution_over_all_draws_of_seeds_within_tasks():
    """3 seeds of 2 tasks have 27 · 27 draws: enumerated, against the sampled ones."""
    scores = [[0.1, 0.9], [0.4, 0.7], [0.8, 0.2]]
    columns = [list(itertools.product(column, repeat=3)) for column in zip(*scores, strict=True)]
    exact = [np.mean(first + second) for first, second in itertools.product(*columns)]
    found = stats.bootstrap(np.mean, scores, draws=10_000)
    assert found.stderr == pytest.approx(np.std(exact), rel=0.03)
    assert (found.low, found.high) == pytest.approx(np.quantile(exact, [0.025, 0.975]), abs=0.02)
    assert found.n == 3


def test_a_runs_luck_shared_by_its_tasks_is_no_noise_that_averages_out():
    """Four tasks that only repeat the run's own luck: drawing by task would halve the error."""
    scores = [[luck] * 4 for luck in (0.1, 0.3, 0.4, 0.6, 0.9)]
    by_task = stats.bootstrap(np.mean, scores).stderr
    whole = stats.bootstrap(np.mean, scores, whole_seeds=True).stderr
    assert whole == pytest.approx(np.std([0.1, 0.3, 0.4, 0.6, 0.9]) / math.sqrt(5), rel=0.06)
    assert by_task == pytest.approx(whole / 2, rel=0.1)


def test_the_same_seed_gives_the_same_interval_and_percentiles_are_numpys():
    chance = random.Random(0)
    scores = [[chance.random() for _ in range(3)] for _ in range(4)]
    drawn: list[float] = []
    found = stats.bootstrap(lambda table: drawn.append(stats.iqm(table)) or drawn[-1], scores, draws=200)
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn[1:], [0.025, 0.975]), abs=1e-12)
    assert found == stats.iqm_estimate(scores, draws=200)
    assert found != stats.iqm_estimate(scores, draws=200, seed=1)


def test_one_seed_has_no_interval():
    """Drawing the only seed again and again gives an interval of no width."""
    found = stats.improvement_estimate([[0.1, 0.2]], [[0.3, 0.2], [0.4, 0.5]])
    assert found.value == pytest.approx(0.875)
    assert math.isnan(found.stderr)
    assert math.isnan(found.low)


def test_tables_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="every seed needs all tasks"):
        stats.iqm([[1.0, 2.0], [1.0]])
    with pytest.raises(ValueError, match="every seed"):
        stats.bootstrap(np.mean, [])
    with pytest.raises(ValueError, match="not the same tasks"):
        stats.improvement_estimate([[1.0, 2.0]], [[1.0]])
    with pytest.raises(ValueError, match="not a finite number"):
        stats.iqm([[1.0], [math.nan]])


def test_bootstrap_intervals_over_seeds_and_tasks_hold_the_truth():
    """10 seeds of 4 tasks; percentile intervals are a little short, as their docstring says."""
    chance = np.random.default_rng(2)
    found = [stats.bootstrap(_mean, chance.normal(size=(10, 4)).tolist(), draws=200) for _ in range(250)]
    assert 0.88 < np.mean([one.low <= 0 <= one.high for one in found]) < 0.98


def _mean(table: list[list[float]]) -> float:
    return sum(map(sum, table)) / (len(table) * len(table[0]))
