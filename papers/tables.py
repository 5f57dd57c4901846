"""A study's tables: a row a run, a column an expression of it, with its interval; as Markdown, LaTeX, CSV and JSON."""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.stats.estimates import Estimate
from papers import claims
from papers.claims import Verdict
from papers.expression import Missing, parse
from papers.results import Kept
from papers.study import Study, Table
from rl import files
from rl.record import finite

NONE = "–"
LATEX = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "±": r"$\pm$", "−": "$-$", "Δ": r"$\Delta$"}
LATEX |= {"<": "$<$", ">": "$>$", "–": "--", "→": r"$\to$"}


@dataclass(frozen=True)
class Made:
    """A table: `rows` hold the label, then a text for each column; `values` the numbers behind it."""

    name: str
    caption: str
    head: list[str]
    rows: list[list[str]]
    values: list[dict[str, Any]]


def expression(text: str, run: str) -> str:
    """An expression of `x` as one of a run."""
    return re.sub(r"(?<=[(,])(\s*)x(?=\s*[,)])", rf"\g<1>{run}", text)


def make(study: Study, table: Table, found: Mapping[str, Sequence[Kept]], single: Sequence[str]) -> Made:
    """One table of a study from its results. UserError for an expression that is none."""
    known = [spec.name for spec in study.runs]
    rows, values = [], []
    for run in table.runs:
        row, numbers = [study.label(run)], {"run": run, "seeds": len(found.get(run, ()))}
        for title, text in table.columns.items():
            estimate = measured(expression(text, run), known, found, single)
            row.append(NONE if estimate is None else shown(estimate))
            numbers[title] = None if estimate is None else [estimate.value, estimate.low, estimate.high]
        rows.append([*row, str(len(found.get(run, ())))])
        values.append(numbers)
    return Made(table.name, table.caption, ["", *table.columns, "seeds"], rows, values)


def measured(
    text: str, runs: Sequence[str], found: Mapping[str, Sequence[Kept]], single: Sequence[str]
) -> Estimate | None:
    """An expression with its interval; None where a run has no result or no such value."""
    try:
        return claims.measure(parse(text, runs), found, single).estimate
    except Missing:
        return None


def number(value: float) -> str:
    """Three significant digits, without exponents where they can be spared."""
    if math.isnan(value):
        return NONE
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    places = 3 if size < 10 else 1 if size < 1000 else 0
    return f"{value:,.{places}f}".replace("-", "−")


def shown(estimate: Estimate) -> str:
    """Value and interval; the value alone where it has no error, or has it exactly."""
    if math.isnan(estimate.low) or estimate.low == estimate.high:
        return number(estimate.value)
    return f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"


def verdicts(found: Sequence[Verdict]) -> Made:
    """The claims as a table."""
    rows, values = [], []
    for one in found:
        estimate = one.measured.estimate if one.measured else None
        rows.append([one.claim.say, one.claim.source, NONE if estimate is None else shown(estimate), outcome(one)])
        values.append(
            {
                "name": one.claim.name,
                "outcome": one.outcome,
                "value": estimate and estimate.value,
                "test": one.claim.test,
            }
        )
    return Made("claims", "Claims and what became of them.", ["claim", "source", "measured", "outcome"], rows, values)


def outcome(one: Verdict) -> str:
    """An outcome in words, with what it lacks."""
    if one.outcome == claims.UNDECIDED:
        few = one.need and not one.need.startswith(("no ", "a "))
        words = f"undecided (n too small: need {one.need})" if few else f"undecided ({one.need})"
    elif one.outcome == claims.NOT_RUN:
        words = f"not run ({one.why})"
    else:
        words = one.outcome
    words += f"; {one.mixed}" if one.mixed else ""
    return f"{words}; outdated" if one.outdated else words


def markdown(made: Made) -> str:
    """The table as Markdown, its caption above."""
    cells = [[cell.replace("|", r"\|") for cell in row] for row in made.rows]
    lines = [made.caption, "", f"| {' | '.join(made.head)} |", f"|{'---|' * len(made.head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells), ""])


def latex(made: Made) -> str:
    """The table as a LaTeX table of booktabs."""

    def safe(text: str) -> str:
        return re.sub("|".join(map(re.escape, LATEX)), lambda found: LATEX[found[0]], text)

    body = [" & ".join(map(safe, row)) + r" \\" for row in made.rows]
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{safe(made.caption)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(made.head) - 1)}}}",
            r"\toprule",
            " & ".join(map(safe, made.head)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def write(made: Made, folder: Path) -> None:
    """The table in its four forms below `folder`."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([made.head, *made.rows])
    files.write_text(folder / f"{made.name}.md", markdown(made))
    files.write_text(folder / f"{made.name}.tex", latex(made))
    files.write_text(folder / f"{made.name}.csv", text.getvalue())
    files.write_json(folder / f"{made.name}.json", finite(vars(made)))
