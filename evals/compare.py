"""`python -m evals compare A B`: two models on the same questions, and what their difference can and cannot show."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from evals import stats
from evals.table import PLAIN
from evals.tables_read import Result, check_versions, load, paired, questions_differ, result_files
from evals.tables_rows import Difference, corrected, difference, shared
from evals.tables_text import number, p_value
from rl.config.reading import nearest
from rl.errors import UserError


@dataclass(frozen=True)
class Comparison:
    """B − A in one metric; `needed` questions would show a true difference of `see` four times in five.

    None and NaN where the differences have no spread to plan from; `least`: more may be needed.
    """

    difference: Difference
    equivalence: stats.Equivalence
    see: float
    needed: int | None
    least: bool
    detectable: float


def compare(
    root: Path, first: str, second: str, tasks: Sequence[str] = (), margin: float = 0.02, see: float | None = None
) -> list[Comparison]:
    """Every metric of the tasks that both names were measured on (of `tasks` alone, where given), p-values by Holm.

    A name is one in evals/results, or NAME/base for what that run started from. see: the difference of which the number
    of questions is asked, by default the margin.

    Raises:
        UserError: no such result, none in common, other questions, another version of a task, a margin that cannot be.
    """
    see = margin if see is None else see
    for option, value in (("--margin", margin), ("--see", see)):
        if not 0 < value < math.inf:
            raise UserError(f"{option} {value}: a difference of scores above 0 is needed, for example 0.02")
    before, after = (_named(root, name) for name in (first, second))
    common = sorted(before.keys() & after.keys())
    for task in tasks:
        if task not in common:
            known = f"; {nearest(task, common)}" if common else ""
            raise UserError(f"--task {task}: not measured for both {first} and {second}{known}")
    if not common:
        raise UserError(
            f"{first} was measured on {', '.join(sorted(before))}, {second} on {', '.join(sorted(after))}: no task in "
            "common; measure both on one: nox -s eval -- RUN --tasks NAME"
        )
    pairs = [(before[task], after[task]) for task in tasks or common]
    for old, new in pairs:
        check_versions([old, new])
        if unlike := questions_differ(old, new):
            raise UserError(
                f"{old.task}: {first} and {second} were asked other questions ({unlike}); measure both with the same "
                "--limit on the same rows, or choose another task with --task"
            )
    asked = [(old, new, row.key) for old, new in pairs for row in new.rows if shared(old, new, row.key)]
    if not asked:
        raise UserError(f"{first} and {second}: no metric in common that scores questions one by one")
    differences = corrected([difference(*one) for one in asked])
    return [
        _comparison(found, *paired(*one), margin=margin, see=see) for found, one in zip(differences, asked, strict=True)
    ]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m evals compare",
        description="Compare two measured models question by question: difference, p-value, equivalence within a "
        "margin, and how many questions a given difference takes.",
    )
    for name in ("A", "B"):
        made.add_argument(name, help="a name in evals/results, or NAME/base for what that run started from")
    made.add_argument("--task", "--tasks", default="", metavar="A,B", help="these tasks alone (default: all in common)")
    made.add_argument("--margin", type=float, default=0.02, metavar="D", help="equivalent within ± D (default: 0.02)")
    made.add_argument("--see", type=float, metavar="D", help="questions needed to see D (default: the margin)")
    return made


def main(argv: Sequence[str], root: Path) -> None:
    """Print the comparison. Raises UserError as `compare`."""
    args = parser().parse_args(list(argv))
    found = compare(root, args.A, args.B, [task for task in args.task.split(",") if task], args.margin, args.see)
    console = Console()
    console.print(f"A = {args.A}, B = {args.B}; differences are B − A, intervals 95 %, power 80 %", **PLAIN)
    for one in found:
        for line in lines(one, family=len(found)):
            console.print(line, **PLAIN)


def lines(one: Comparison, family: int) -> list[str]:
    """One comparison for a terminal of 80 columns; `family` is the number of p-values that Holm corrected for."""
    gain, same = one.difference, one.equivalence
    chosen = "" if gain.filter == "none" else f" ({gain.filter})"
    corrected_p = "" if family == 1 else f", {p_value(gain.p_holm)} by Holm over {family}"
    counts = [] if gain.gained is None else [f"  differ      only A right {gain.lost}, only B right {gain.gained}"]
    verdict = "yes" if same.equivalent else "not shown"
    within = "" if math.isnan(same.low) else f", 90 % [{number(same.low, '+.4f')}, {number(same.high, '+.4f')}]"
    needed = "no spread between the questions to plan from"
    if one.needed is not None:
        needed = f"{'at least ' if one.least else ''}{one.needed:,} questions needed to see {one.see:g}"
    seen = "" if math.isnan(one.detectable) else f"; {gain.n:,} show {one.detectable:.4f}"
    return [
        "",
        f"{gain.task}, {gain.metric}{chosen}, n = {gain.n}",
        f"  scores      A {gain.before:.4f}, B {gain.after:.4f}",
        f"  difference  {number(gain.value, '+.4f')} [{number(gain.low, '+.4f')}, {number(gain.high, '+.4f')}]",
        f"  p           {p_value(gain.p)} ({gain.test}){corrected_p}",
        *counts,
        f"  equivalent  {verdict} within ±{same.margin:g}: p {p_value(same.p)}{within}",
        f"  power       {needed}{seen}",
    ]


def _comparison(
    found: Difference, old: list[float], new: list[float], sources: list[str] | None, *, margin: float, see: float
) -> Comparison:
    if found.gained is not None and max(margin, see) >= 1:
        raise UserError(f"{found.metric} scores 0 or 1 a question: a difference of {max(margin, see):g} says nothing")
    same = stats.equivalence(old, new, margin, clusters=sources)
    if found.gained is not None and found.lost is not None and sources is None:
        share = (found.gained + found.lost) / found.n
        # a true difference cannot exceed the share of questions that differ: where it is to, the share is larger too
        needed = stats.questions_needed(see, max(share, see)) if share else None
        shown = stats.detectable_difference(found.n, share) if share else math.nan
        return Comparison(found, same, see, needed, share < see, shown)
    if not found.stderr > 0:
        return Comparison(found, same, see, None, False, math.nan)
    # of independent questions with this error, where the real ones share sources
    deviation = found.stderr * math.sqrt(found.n)
    shown = stats.detectable_spread(found.n, deviation)
    return Comparison(found, same, see, stats.questions_needed_spread(see, deviation), False, shown)


def _named(root: Path, name: str) -> dict[str, Result]:
    """Results of one model by task. Raises UserError with the nearest name where there are none."""
    results = root / "evals" / "results"
    run, _, role = name.removesuffix("/").partition("/")
    files = result_files(results / run)
    found = load([(run, path) for path in files if (path.parent.name == "base") == (role == "base")])
    if not found or role not in ("", "base"):
        made = sorted(path.relative_to(results) for path in results.glob("[!.]*/**/*.json"))
        known = sorted({path.parent.as_posix() for path in made})
        if not known:
            raise UserError(f"{name}: evals/results holds no result; measure a run first: nox -s eval")
        raise UserError(f"{name}: no result in evals/results; {nearest(name, known)}")
    return {result.task: result for result in found}
