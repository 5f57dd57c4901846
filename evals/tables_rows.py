"""What the tables say beyond each result's own score: paired differences to the base, and scores over seeds.

Pure functions of results. p-values are Holm's, corrected within the table they stand in.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from evals import stats
from evals.tables_read import Key, Result, paired, questions_differ

SEED = re.compile(r"-seed\d+$")


@dataclass(frozen=True)
class Difference:
    """What one model scores over another on the same questions; 95 % interval, `test` names where p is from.

    gained and lost: questions that only `after` and only `before` has right; None where marks are not all 0 or 1.
    """

    run: str
    task: str
    filter: str
    metric: str
    n: int
    before: float
    after: float
    value: float
    stderr: float
    low: float
    high: float
    p: float
    p_holm: float
    test: str
    gained: int | None
    lost: int | None

    @property
    def key(self) -> Key:
        return self.metric, self.filter


@dataclass(frozen=True)
class Pooled:
    """One experiment's scores in one metric over its seeds: 95 % intervals over the seeds, NaN is not known.

    n: questions a seed was asked, the fewest. The IQM and its stratified bootstrap need three seeds; a row over several
    tasks weighs them alike. `difference` is the mean of the seeds' own paired differences.
    """

    experiment: str
    task: str
    filter: str
    metric: str
    higher_is_better: bool
    seeds: int
    n: int
    mean: float
    low: float
    high: float
    iqm: float
    iqm_low: float
    iqm_high: float
    difference: float
    difference_low: float
    difference_high: float
    p: float
    p_holm: float


def difference(before: Result, after: Result, key: Key) -> Difference:
    """`after` − `before` in one metric, on the same questions; p_holm is p until `corrected`.

    Marks of 0 and 1 take Tango's interval and McNemar's exact test; other scores the normal interval, and questions
    that share a source Student's with sources − 1 degrees, both with the sign-flip test.
    ValueError unless both were asked the same questions.
    """
    old, new, sources = paired(before, after, key)
    found = stats.paired_difference(old, new, clusters=sources)
    marks = set(old) | set(new) <= {0, 1}
    low, high = stats.tango(old, new) if marks and sources is None else (found.low, found.high)
    test = stats.mcnemar(old, new) if marks and sources is None else stats.sign_flip(old, new, sources)
    changed = [b - a for a, b in zip(old, new, strict=True)] if marks else None
    return Difference(
        run=after.run,
        task=after.task,
        filter=key[1],
        metric=key[0],
        n=found.n,
        before=math.fsum(old) / found.n,
        after=math.fsum(new) / found.n,
        value=found.value,
        stderr=found.stderr,
        low=low,
        high=high,
        p=test.p,
        p_holm=test.p,
        test=test.method,
        gained=None if changed is None else changed.count(1),
        lost=None if changed is None else changed.count(-1),
    )


def corrected[Tested: (Difference, Pooled)](rows: Sequence[Tested]) -> list[Tested]:
    """Rows with Holm's p-values over all of them that have one."""
    tested = [row for row in rows if not math.isnan(row.p)]
    adjusted = iter(stats.holm([row.p for row in tested]))
    return [row if math.isnan(row.p) else replace(row, p_holm=next(adjusted)) for row in rows]


def compare(results: Sequence[Result]) -> tuple[list[Difference], list[str]]:
    """Paired differences of runs to their bases, and the names of those measured on other questions."""
    bases = {(result.run, result.task): result for result in results if result.role == "base"}
    differences, unlike = [], []
    for result in results:
        base = bases.get((result.run, result.task))
        if result.role != "run" or base is None:
            continue
        if questions_differ(base, result):
            unlike.append(f"{result.run} on {result.task}")
            continue
        differences += [difference(base, result, row.key) for row in result.rows if shared(base, result, row.key)]
    return corrected(differences), unlike


def shared(before: Result, after: Result, key: Key) -> bool:
    """Whether both have marks of this metric and filter."""
    return key in before.marks and key in after.marks


def pooled(results: Sequence[Result], differences: Sequence[Difference]) -> list[Pooled]:
    """A row for each task and metric of each experiment (runs `<name>-seed<N>`) with two seeds or more.

    Where all seeds answered several tasks, also a row over those: its bootstrap draws whole seeds, since one trained
    run answered all tasks.
    """
    of_key: dict[tuple[str, Key], dict[str, dict[str, Result]]] = {}
    for result in results:
        if result.role == "run" and SEED.search(result.run):
            for row in result.rows:
                tasks = of_key.setdefault((SEED.sub("", result.run), row.key), {})
                tasks.setdefault(result.task, {})[result.run] = result
    gains = {(gain.run, gain.task, gain.key): gain.value for gain in differences}
    rows = []
    for (experiment, key), tasks in sorted(of_key.items()):
        several = [(task, runs) for task, runs in sorted(tasks.items()) if len(runs) > 1]
        rows += [_pooled(experiment, key, [task], runs, tasks, gains) for task, runs in several]
        asked = [set(runs) for runs in tasks.values()]
        if len(tasks) > 1 and len(asked[0]) > 1 and all(runs == asked[0] for runs in asked):
            rows.append(_pooled(experiment, key, sorted(tasks), asked[0], tasks, gains))
    # a row over several tasks comes after theirs
    return corrected(sorted(rows, key=lambda row: (row.experiment, row.filter, row.metric, " tasks" in row.task)))


def _pooled(
    experiment: str,
    key: Key,
    tasks: Sequence[str],
    runs: Iterable[str],
    results: dict[str, dict[str, Result]],
    gains: dict[tuple[str, str, Key], float],
) -> Pooled:
    names = sorted(runs)
    rows = [[next(row for row in results[task][run].rows if row.key == key) for task in tasks] for run in names]
    scores = [[row.value for row in of_seed] for of_seed in rows]
    mean = _over_seeds([math.fsum(of_seed) / len(tasks) for of_seed in scores])
    iqm = stats.iqm_estimate(scores, whole_seeds=len(tasks) > 1) if len(names) > 2 else None
    changes = [[gains.get((run, task, key), math.nan) for task in tasks] for run in names]
    gain = _over_seeds([math.fsum(of_seed) / len(tasks) for of_seed in changes])
    p = stats.normal_test(gain).p
    return Pooled(
        experiment=experiment,
        task=tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks",
        filter=key[1],
        metric=key[0],
        higher_is_better=rows[0][0].higher_is_better,
        seeds=len(names),
        n=min(row.n for of_seed in rows for row in of_seed),
        mean=mean.value,
        low=mean.low,
        high=mean.high,
        iqm=iqm.value if iqm else math.nan,
        iqm_low=iqm.low if iqm else math.nan,
        iqm_high=iqm.high if iqm else math.nan,
        difference=gain.value,
        difference_low=gain.low,
        difference_high=gain.high,
        p=p,
        p_holm=p,
    )


def _over_seeds(values: Sequence[float]) -> stats.Estimate:
    """Mean with Student's interval, seeds − 1 degrees; all NaN where a seed lacks the score."""
    if any(math.isnan(value) for value in values):
        return stats.Estimate(math.nan, math.nan, math.nan, math.nan, len(values))
    return stats.mean(values, clusters=range(len(values)))
