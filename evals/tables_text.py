"""Tables as Markdown, CSV, LaTeX and JSON. The same results give the same bytes, whatever order they were read in."""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evals.tables_read import ABSENT, Result, Row
from evals.tables_rows import Difference, Pooled, compare, pooled

NOTE = """lm-eval scores, ± one standard error over the questions; n (k) means that the questions come from k sources
and the error is clustered by them. A difference is to the model the run started from, paired by question, in 95 %
brackets (Tango's score interval for right and wrong answers); p is two-sided (McNemar exact, else sign-flip) and
Holm-corrected over this table. tokens/s and peak memory are those of the measurement."""
SEEDS_NOTE = """Runs of one config with several seeds; brackets are 95 % over the seeds: Student's t for means, the
stratified bootstrap for the IQM (Agarwal et al. 2021; from three seeds on, and too short with so few). p is Student's t
over the seeds' paired differences, Holm-corrected over this table."""
HEAD = ("Model", "Tasks", "Version", "Filter", "n-shot", "Metric", "", "Value", "", "Stderr", "n")
HEAD += ("Difference", "p", "tokens/s", "Peak memory")
SEEDS_HEAD = ("Model", "Tasks", "Filter", "Metric", "", "Seeds", "n", "Mean", "IQM", "Difference", "p")
LATEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}"}
LATEX |= {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", "↑": r"$\uparrow$"}
LATEX |= {"↓": r"$\downarrow$", "−": "$-$", "<": "$<$", "[": "{[}", "]": "{]}"}


@dataclass(frozen=True)
class Tables:
    """All that one set of tables says; `unlike` names what was asked other questions than its base."""

    results: list[Result]
    differences: list[Difference]
    unlike: list[str]
    pooled: list[Pooled]


def tables(results: Sequence[Result]) -> Tables:
    """Everything the results say together; they are put in order of task, model and role."""
    ordered = sorted(results, key=lambda result: (result.task, result.run, result.role))
    differences, unlike = compare(ordered)
    return Tables(ordered, differences, unlike, pooled(ordered, differences))


def files(made: Tables, where: Callable[[Path], str]) -> dict[str, str]:
    """Text by file name; `where` gives a result file's name as the tables shall print it."""
    texts = {
        "results.md": markdown(made, where),
        "results.csv": _csv(_flat(made)),
        "results.tex": latex(made, where),
        "results.json": _json(made, where),
    }
    if made.pooled:
        texts["seeds.csv"] = _csv([asdict(row) for row in made.pooled])
        texts["seeds.tex"] = _tabular(SEEDS_HEAD, [_seed_cells(row) for row in made.pooled], _sources(made, where))
    return texts


def markdown(made: Tables, where: Callable[[Path], str]) -> str:
    """Both tables, then a line for each result file: where its numbers come from."""
    lines = ["# Results", "", NOTE, "", *_piped(HEAD, _cells(made))]
    if made.pooled:
        rows = [_seed_cells(row) for row in made.pooled]
        lines += ["", "## Over seeds", "", SEEDS_NOTE, "", *_piped(SEEDS_HEAD, rows)]
    for name in made.unlike:
        lines += ["", f"{name}: not compared, start and run were not asked the same questions; measure again."]
    return "\n".join([*lines, "", "Made from:", "", *(f"- {line}" for line in _sources(made, where))]) + "\n"


def latex(made: Tables, where: Callable[[Path], str]) -> str:
    r"""A `tabular` for \input, with \hline alone: it needs no package."""
    return _tabular(HEAD, _cells(made), _sources(made, where))


# --- cells


def _cells(made: Tables) -> list[list[str]]:
    gains = {(gain.run, gain.task, gain.key): gain for gain in made.differences}
    rows = [row for result in made.results for row in result.rows]
    return [_row_cells(row, gains.get((row.run, row.task, row.key)) if row.role == "run" else None) for row in rows]


def _row_cells(row: Row, gain: Difference | None) -> list[str]:
    n = str(row.n) if row.clusters is None else f"{row.n} ({row.clusters})"
    return [
        *(row.model, row.task, row.version, row.filter, str(row.n_shot), row.metric, _arrow(row.higher_is_better)),
        *(number(row.value), "±", number(row.stderr), n),
        *((interval(gain.value, gain.low, gain.high, "+.4f"), p_value(gain.p_holm)) if gain else (ABSENT, ABSENT)),
        ABSENT if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}",
        ABSENT if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**30:.2f} GiB",
    ]


def _seed_cells(row: Pooled) -> list[str]:
    return [
        *(row.experiment, row.task, row.filter, row.metric, _arrow(row.higher_is_better), str(row.seeds), str(row.n)),
        interval(row.mean, row.low, row.high),
        interval(row.iqm, row.iqm_low, row.iqm_high),
        interval(row.difference, row.difference_low, row.difference_high, "+.4f"),
        p_value(row.p_holm),
    ]


def number(value: float, form: str = ".4f") -> str:
    """Four digits, a dash for NaN; a rounded 0 has no sign."""
    text = ABSENT if math.isnan(value) else f"{value:{form}}"
    return text.replace("-", "+", 1) if text.startswith("-") and not text.strip("-0.") else text


def interval(value: float, low: float, high: float, form: str = ".4f") -> str:
    """`+0.3720 [+0.3010, +0.4430]`, without the brackets where the interval is not known."""
    bounds = "" if math.isnan(low) else f" [{number(low, form)}, {number(high, form)}]"
    return number(value, form) + bounds


def p_value(p: float) -> str:
    return ABSENT if math.isnan(p) else "<0.0001" if p < 0.0001 else f"{p:.4f}"


def _arrow(higher_is_better: bool) -> str:
    return "↑" if higher_is_better else "↓"


def _sources(made: Tables, where: Callable[[Path], str]) -> list[str]:
    """For each result file its hash, the run, and what it was measured with."""
    lines = []
    for result in made.results:
        parts = [result.told("backend"), result.told("dtype"), f"on {result.told('device')}"]
        measured = " ".join(part for part in parts if not part.endswith(ABSENT)) or ABSENT
        lines.append(
            f"{where(result.path)} (sha256 {result.sha256[:12]}): {result.rows[0].model}, weights "
            f"{result.told('model_sha256')}, task {result.task} {result.told('task_sha256')}, "
            f"lm-eval {result.told('lm_eval')}, commit {result.told('commit')}, {measured}"
        )
    return lines


# --- forms


def _piped(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [[cell.replace("|", "\\|") for cell in cells] for cells in (head, ["---"] * len(head), *rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _tabular(head: Sequence[str], rows: Sequence[Sequence[str]], sources: Sequence[str]) -> str:
    texts = [[_escaped(cell) for cell in cells] for cells in (head, *rows)]
    body = [f"{' & '.join(cells)} \\\\" for cells in texts]
    begin, end = f"\\begin{{tabular}}{{{'l' * len(head)}}}", "\\end{tabular}"
    table = [begin, "\\hline", body[0], "\\hline", *body[1:], "\\hline", end]
    return "\n".join([*(f"% made from {source}" for source in sources), *table, ""])


def _escaped(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


def _flat(made: Tables) -> list[dict[str, Any]]:
    """A dictionary for each row: its own fields, then those of its difference to the base, None where it has none."""
    gains = {(gain.run, gain.task, gain.key): gain for gain in made.differences}
    empty = {f"difference_{name}": None for name in ("value", "stderr", "low", "high")}
    empty |= dict.fromkeys(("p", "p_holm", "test", "gained", "lost"))
    rows = []
    for row in (row for result in made.results for row in result.rows):
        gain = gains.get((row.run, row.task, row.key)) if row.role == "run" else None
        named = {name: getattr(gain, name.removeprefix("difference_")) for name in empty} if gain else empty
        rows.append({**asdict(row), **named})
    return rows


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    """All digits of every field; empty for what is not known."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _known(value, "") for name, value in row.items()} for row in rows)
    return file.getvalue()


def _json(made: Tables, where: Callable[[Path], str]) -> str:
    """Everything, for programs: NaN is null."""
    told = ("run", "role", "backend", "device", "dtype", "model_sha256", "task_sha256", "commit", "lm_eval", "seconds")
    content = {
        "rows": _flat(made),
        "seeds": [asdict(row) for row in made.pooled],
        "not_compared": made.unlike,
        "sources": [
            {"file": where(one.path), "sha256": one.sha256, **{key: one.made.get(key) for key in told}}
            for one in made.results
        ],
    }
    return json.dumps(_plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    return [_plain(child) for child in value] if isinstance(value, list) else _known(value, None)


def _known(value: Any, absent: Any) -> Any:
    return absent if value is None or (isinstance(value, float) and not math.isfinite(value)) else value
