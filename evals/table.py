"""evals/tables/results.{md,csv}, from the files in evals/results/ alone: the same files give the same bytes."""

import csv
import hashlib
import io
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from evals import runs, stats
from rl.errors import UserError
from rl.files import write_text


@dataclass(frozen=True)
class Row:
    """One metric of one model on one task; `low` and `high` bound its 95 % interval."""

    run: str
    task: str
    version: str
    filter: str
    n_shot: int
    n: int
    metric: str
    value: float
    stderr: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """What a run gained over the model it started from, on the same questions."""

    run: str
    task: str
    metric: str
    n: int
    before: float
    after: float
    value: float
    stderr: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """A result file with its samples: per metric, the marks by question (its hash)."""

    path: Path
    run: str
    role: str
    task: str
    rows: list[Row]
    marks: dict[str, dict[str, float]]
    sha256: str


def build(root: Path) -> list[Path]:
    """Write the tables of all results; their paths. Raises UserError, with nothing written, for a broken file."""
    results = read(root)
    differences, unlike = compare(results)
    text = _markdown(root, results, differences, unlike)
    rows = [row for result in results for row in result.rows]
    tables = root / "evals" / "tables"
    paths = [tables / "results.md", tables / "results.csv", tables / "differences.csv"]
    for path, content in zip(paths, (text, _csv(Row, rows), _csv(Difference, differences)), strict=True):
        write_text(path, content)
    return paths


def read(root: Path) -> list[Result]:
    """All results below evals/results/, by run, each base before its run. Raises UserError for a broken file."""
    folder = root / "evals" / "results"
    paths = sorted([*folder.glob("*/*.json"), *folder.glob("*/base/*.json")])
    if not paths:
        raise UserError("evals/results holds no result; measure a run first: nox -s eval")
    results = [_result(path, root) for path in paths]
    return sorted(results, key=lambda result: (result.run, result.task, result.role))


def compare(results: list[Result]) -> tuple[list[Difference], list[str]]:
    """Paired differences of runs to their bases, and the names of those measured on other questions."""
    bases = {(result.run, result.task): result for result in results if result.role == "base"}
    differences, unlike = [], []
    for result in results:
        base = bases.get((result.run, result.task))
        if result.role != "run" or base is None:
            continue
        for metric, after in result.marks.items():
            before = base.marks.get(metric, {})
            if before.keys() != after.keys():
                unlike.append(f"{result.run} on {result.task}")
                break
            questions = sorted(after)
            marks = [before[question] for question in questions], [after[question] for question in questions]
            gain = stats.paired_difference(*marks)
            means = [stats.mean(values).value for values in marks]
            differences.append(
                Difference(
                    result.run, result.task, metric, gain.n, *means, gain.value, gain.stderr, gain.low, gain.high
                )
            )
    return differences, unlike


def _result(path: Path, root: Path) -> Result:
    """A result file and its samples, checked against each other."""
    remedy = f"measure it again: nox -s eval -- {path.relative_to(root / 'evals' / 'results').parts[0]} --again"
    found = runs.read_json(path, remedy)
    try:
        made = found["duet"]
        run, role, task = made["run"], made["role"], path.stem
        metrics = sorted(name for name, up in found["higher_is_better"][task].items() if up is not None)
        n = found["n-samples"][task]["effective"]
        rows = [_row(found, run if role == "run" else f"{run} (base)", task, metric, n) for metric in metrics]
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise UserError(f"{path}: not a result of this project ({error!r}); {remedy}") from None
    samples = path.with_name(f"{task}.samples.jsonl")
    content = samples.read_bytes() if samples.is_file() else b""
    if hashlib.sha256(content).hexdigest() != made["samples_sha256"]:
        raise UserError(f"{samples}: not the samples that {path.name} was made with; {remedy}")
    marks: dict[str, dict[str, float]] = {metric: {} for metric in metrics}
    for line in content.decode().splitlines():
        sample = json.loads(line)
        for metric in metrics:
            marks[metric][f"{sample['doc_id']}:{sample['prompt_hash']}"] = float(sample[metric])
    return Result(path, run, role, task, rows, marks, hashlib.sha256(path.read_bytes()).hexdigest())


def _row(found: dict[str, Any], name: str, task: str, metric: str, n: int) -> Row:
    """One metric of lm-eval's result object; its filter is the part after the comma of the key."""
    scores = found["results"][task]
    key = next(key for key in sorted(scores) if key.partition(",")[0] == metric)
    chosen = key.partition(",")[2]
    value = float(scores[key])
    stderr = scores.get(f"{metric}_stderr,{chosen}")
    # every metric here is a share of right answers; its count is whole
    low, high = stats.wilson(round(value * n), n)
    return Row(
        run=name,
        task=task,
        version=str(found["versions"][task]),
        filter=chosen,
        n_shot=int(found["n-shot"][task]),
        n=n,
        metric=metric,
        value=value,
        stderr=stderr if isinstance(stderr, float) else math.nan,
        low=low,
        high=high,
    )


def _markdown(root: Path, results: list[Result], differences: list[Difference], unlike: list[str]) -> str:
    """Both tables and the files they were made from."""
    lines = ["# Results", "", "lm-eval on the questions each run kept; intervals are 95 %, Wilson's.", ""]
    head = ["Run", "Tasks", "Version", "Filter", "n-shot", "n", "Metric", "", "Value", "", "Stderr", "Interval"]
    lines += _table(
        head,
        [
            [
                *(row.run, row.task, row.version, row.filter, str(row.n_shot), str(row.n), row.metric, "↑"),
                *(_number(row.value), "±", _number(row.stderr), f"{_number(row.low)} – {_number(row.high)}"),
            ]
            for result in results
            for row in result.rows
        ],
    )
    lines += ["", "## Gained over the start", "", "On the same questions, paired; intervals are 95 %, normal.", ""]
    head = ["Run", "Tasks", "n", "Metric", "Before", "After", "Difference", "", "Stderr", "Interval"]
    lines += _table(
        head,
        [
            [
                *(gain.run, gain.task, str(gain.n), gain.metric, _number(gain.before), _number(gain.after)),
                *(f"{gain.value:+.4f}", "±", _number(gain.stderr), f"{gain.low:+.4f} – {gain.high:+.4f}"),
            ]
            for gain in differences
        ],
    )
    lines += [
        f"\n{name}: not compared, start and run were not asked the same questions; measure again." for name in unlike
    ]
    lines += ["", "Made from:", ""]
    lines += [f"- {result.path.relative_to(root).as_posix()} `{result.sha256[:12]}`" for result in results]
    return "\n".join(lines) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _number(value: float) -> str:
    return "N/A" if math.isnan(value) else f"{value:.4f}"


def _csv(kind: type, rows: list[Any]) -> str:
    """All digits of every field, for other programs."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = [field.name for field in fields(kind)]
    writer.writerow(names)
    writer.writerows([getattr(row, name) for name in names] for row in rows)
    return file.getvalue()
