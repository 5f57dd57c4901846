"""Whether claims hold, with the numbers.

*Estimate.* θ is the expression on all seeds and questions. Its variance is the sum of two jackknives, V = V_S + V_Q:
leaving out one seed of all runs at once (runs of the same seeds are paired by seed), and one question of all runs at
once (paired over questions): V = (n - 1)/n Σ (θ_(i) - mean θ_(·))². Of a mean this is s²/n; the noise that seeds and
questions share is counted in both, so V errs to the safe side. The interval is Student's with Satterthwaite's degrees.
Where no question makes a difference at all, the standard error is 1.5/n, the rule of three. A statistic over seeds
(iqm, improvement) takes the bootstrap over whole seeds of `evals.stats`, from 4 seeds on at 95 %.

*Outcome.* `x > t` holds where the whole two-sided interval lies above t, does not hold where it lies below, else it is
undecided. `abs(x) < t` is equivalence by two one-sided tests: it holds where the 1 - 2α interval lies within ± t, does
not hold where it lies outside. Needed numbers are for a power of 80 %, if the true value were the one observed.
"""

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist, fmean

from evals import stats
from evals.stats.estimates import Estimate, estimate
from papers import machine
from papers.expression import (
    Missing,
    Test,
    View,
    by_seed,
    clocked,
    names,
    over_seeds,
    parse,
    parse_test,
    questions,
    value,
)
from papers.results import Kept
from papers.study import Claim, Study
from rl.errors import UserError

POWER = 0.8
HOLDS, FAILS, UNDECIDED, NOT_RUN = "holds", "does not hold", "undecided", "not run"
OUTCOMES = (HOLDS, FAILS, UNDECIDED, NOT_RUN)


@dataclass(frozen=True)
class Measured:
    """θ with its error, the two parts of its variance, and how many seeds and questions they are from (0: no part)."""

    estimate: Estimate
    over_seeds: float
    over_questions: float
    seeds: int
    questions: int
    method: str


@dataclass(frozen=True)
class Verdict:
    """A claim's outcome. `need`: what would decide it; `why`: what was not run; `outdated`: runs of stale results;
    `mixed`: where its times are from, if from several machines or commits."""

    claim: Claim
    outcome: str
    measured: Measured | None = None
    threshold: float = math.nan
    need: str = ""
    why: str = ""
    outdated: tuple[str, ...] = field(default=())
    mixed: str = ""


def check(study: Study) -> None:
    """UserError for a claim, table or figure that is not in the language: said before anything is trained."""
    runs = [spec.name for spec in study.runs]
    for claim in study.claims:
        _named(study, f"claim '{claim.name}'", parse_test, claim.test, runs)
    texts = {f"table '{one.name}'": list(one.columns.values()) for one in study.tables}
    texts |= {f"figure '{one.name}'": list(one.y) for one in study.figures if one.x is None}
    for what, expressions in texts.items():
        for text in expressions:
            _named(study, what, parse, text, [*runs, "x"])


def _named(study: Study, what: str, read: Callable[[str, Sequence[str]], object], text: str, runs: list[str]) -> None:
    try:
        read(text, runs)
    except UserError as error:
        raise UserError(f"papers/{study.slug}/{study.path.name}: {what}: {error}") from None


def judge(
    claim: Claim,
    found: Mapping[str, Sequence[Kept]],
    runs: Sequence[str],
    single: Sequence[str] = (),
    outdated: Mapping[str, str] | None = None,
) -> Verdict:
    """Test a claim on the results `found` (run -> its seeds, in the order of their numbers).

    `single`: runs that the study makes once, whose seed is no source of error. UserError for a wrong test, or questions
    that differ between runs.
    """
    test = parse_test(claim.test, runs)
    used = sorted(names(test.left) | names(test.right))
    stale = tuple(name for name in used if name in (outdated or {}))
    if absent := [name for name in used if not found.get(name)]:
        return Verdict(claim, NOT_RUN, why=f"no result of {', '.join(absent)}", outdated=stale)
    x, threshold = _subject(test)
    try:
        if math.isnan(threshold):
            threshold = value(test.right, View(found))
        measured = measure(x, found, single, _level(test))
    except Missing as missing:
        return Verdict(claim, NOT_RUN, why=str(missing), outdated=stale)
    outcome = _outcome(test, measured.estimate, threshold)
    need = _need(test, measured, threshold) if outcome == UNDECIDED else ""
    return Verdict(claim, outcome, measured, threshold, need, outdated=stale, mixed=_mixed(test, found, used))


def _mixed(test: Test, found: Mapping[str, Sequence[Kept]], used: Sequence[str]) -> str:
    """Where times are compared that were taken on several machines or of several commits: how many of each."""
    if not (clocked(test.left) or clocked(test.right)):
        return ""
    kept = [one for name in used for one in found[name]]
    commits = {(one.record.git or {}).get("commit") for one in kept}
    machines = {machine.in_words(one.machine) for one in kept}
    parts = [(len(machines), "machines"), (len(commits), "commits")]
    several = " and ".join(f"{n} {what}" for n, what in parts if n > 1)
    return f"times of {several}" if several else ""


def _subject(test: Test) -> tuple[ast.expr, float]:
    """What is estimated and what it is compared with: left against a number, else left - right against 0."""
    if test.equivalence is not None:
        return test.equivalence, math.nan
    if not names(test.right):
        return test.left, math.nan
    return ast.BinOp(test.left, ast.Sub(), test.right), 0.0


def _level(test: Test) -> float:
    """The confidence of the interval: two one-sided tests at α take that of 1 - 2α."""
    return test.confidence if test.equivalence is None else 2 * test.confidence - 1


def measure(
    x: ast.expr, found: Mapping[str, Sequence[Kept]], single: Sequence[str] = (), confidence: float = 0.95
) -> Measured:
    """θ and its error; NaN where a run that should have several seeds has one. Raises Missing, UserError."""
    used = sorted(names(x))
    many = [name for name in used if name not in single]
    view = View(_common(found, used, many))
    counts = {len(view.of(name)) for name in many}
    seeds = min(counts) if counts else 0
    asked = questions(x, view)
    if len(asked) > 1:
        raise UserError(f"{', '.join(used)}: measured on different questions, which cannot be compared")
    many_asked = len(asked[0]) if asked else 0
    if over_seeds(x):
        return _bootstrapped(x, view, many, confidence, seeds)
    theta = value(x, view)
    # made once on purpose: what is uncertain is the questions alone
    of_seeds = 0.0 if asked and not many else math.nan
    if seeds > 1:
        of_seeds = _jackknife([value(x, _without_seed(view, many, i)) for i in range(seeds)])
    without = [value(x, replace(view, without=i)) for i in range(many_asked)] if many_asked > 1 else []
    of_questions = _jackknife(without) if without else 0.0
    if asked and of_questions == 0.0:
        of_questions = (1.5 / many_asked) ** 2
    parts = [(of_seeds, seeds - 1), (of_questions, many_asked - 1)]
    variance = math.fsum(part for part, _ in parts)
    below = math.fsum(part**2 / degrees for part, degrees in parts if part and degrees > 0)
    degrees = variance**2 / below if below else math.inf
    made = estimate(theta, math.sqrt(variance) if variance >= 0 else math.nan, seeds or many_asked, confidence, degrees)
    return Measured(made, of_seeds, of_questions, seeds, many_asked, "jackknife")


def _bootstrapped(x: ast.expr, view: View, many: Sequence[str], confidence: float, seeds: int) -> Measured:
    """Over whole seeds, the runs drawn independently of each other."""
    method = "bootstrap over seeds"
    theta = value(x, view)
    if seeds < least_seeds(confidence):
        nothing = Estimate(theta, math.nan, math.nan, math.nan, seeds)
        return Measured(nothing, math.nan, 0.0, seeds, 0, method)
    tables = [[[float(i)] for i in range(len(view.of(name)))] for name in many]

    def statistic(*drawn: Sequence[Sequence[float]]) -> float:
        runs = {name: [view.of(name)[int(row[0])] for row in rows] for name, rows in zip(many, drawn, strict=True)}
        return value(x, View({**view.runs, **runs}))

    made = stats.bootstrap(statistic, *tables, confidence=confidence, whole_seeds=True)
    return Measured(made, made.stderr**2, 0.0, seeds, 0, method)


def least_seeds(confidence: float) -> int:
    """The fewest seeds of two runs whose best separation is improbable enough under chance: 2/C(2n, n) ≤ α."""
    return next(n for n in range(2, 100) if 2 / math.comb(2 * n, n) <= 1 - confidence + 1e-12)


def _common(found: Mapping[str, Sequence[Kept]], used: Sequence[str], many: Sequence[str]) -> dict[str, list[Kept]]:
    """The results by run, of the seeds that all runs of several have, so that seeds are pairs."""
    seeds = [{kept.record.seed for kept in found.get(name, ())} for name in many]
    shared = set.intersection(*seeds) if seeds else set()
    return {
        name: [kept for kept in found.get(name, ()) if name not in many or kept.record.seed in shared] for name in used
    }


def _without_seed(view: View, many: Sequence[str], i: int) -> View:
    runs = {name: [*kept[:i], *kept[i + 1 :]] if name in many else kept for name, kept in view.runs.items()}
    return View(runs, view.without)


def _jackknife(values: Sequence[float]) -> float:
    """(n - 1)/n times the sum of squares about the mean of the n leave-one-out values."""
    middle, n = fmean(values), len(values)
    return (n - 1) / n * math.fsum((one - middle) ** 2 for one in values)


def _outcome(test: Test, found: Estimate, threshold: float) -> str:
    low, high = found.low, found.high
    if math.isnan(low) or math.isnan(high):
        return UNDECIDED
    if test.equivalence is not None:
        if -threshold < low and high < threshold:
            return HOLDS
        return FAILS if low > threshold or high < -threshold else UNDECIDED
    above = test.sign in (">", ">=")
    equal = test.sign.endswith("=")
    if above:
        good, bad = (
            low > threshold or (equal and low == threshold),
            high < threshold or (not equal and high == threshold),
        )
    else:
        good, bad = (
            high < threshold or (equal and high == threshold),
            low > threshold or (not equal and low == threshold),
        )
    # a value known exactly may lie on the threshold
    return HOLDS if good else FAILS if bad else UNDECIDED


def _need(test: Test, found: Measured, threshold: float) -> str:
    """How many seeds, or questions too, would decide with a power of 80 %."""
    if math.isnan(found.estimate.stderr):
        least = least_seeds(test.confidence) if found.method.startswith("bootstrap") else 2
        return f"{least} seeds" if found.seeds < least else "a value that is a number"
    theta = found.estimate.value
    gap = abs(abs(theta) - threshold) if test.equivalence is not None else abs(theta - threshold)
    if gap == 0:
        return "no number of seeds would decide a value on the threshold"
    alpha = 1 - test.confidence
    one_sided = test.equivalence is not None
    z = NormalDist().inv_cdf(1 - (alpha if one_sided else alpha / 2)) + NormalDist().inv_cdf(POWER)
    budget = (gap / z) ** 2
    room = budget - found.over_questions
    if found.seeds and room > 0:
        return f"{max(found.seeds + 1, math.ceil(found.over_seeds * found.seeds / room))} seeds"
    share = (
        (math.fsum((found.over_seeds, found.over_questions))) / budget if found.seeds else found.over_questions / budget
    )
    questions = f"{max(found.questions + 1, math.ceil(found.questions * share))} questions"
    if not found.seeds:
        return questions
    return f"{max(found.seeds + 1, math.ceil(found.seeds * share))} seeds and {questions}"


def per_seed(x: ast.expr, kept: Sequence[Kept]) -> list[float]:
    """An expression of one run for each seed, for tables and points."""
    return by_seed(x, View({next(iter(names(x))): kept}))
