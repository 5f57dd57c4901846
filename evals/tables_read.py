"""Result files of lm-eval with our provenance block, read and checked: scores, marks by question, where they are from.

A *mark* is what one question scored in one metric under one filter. Marks are kept where their mean is the value that
lm-eval reports; perplexities and the like, which are no means over questions, have none and cannot be paired.
"""

import gzip
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals import runs, stats
from evals.stats.estimates import estimate
from rl.config.reading import nearest
from rl.errors import UserError

type Key = tuple[str, str]  # metric and filter

ABSENT = "–"


@dataclass(frozen=True)
class Row:
    """One metric of one model on one task; `low` and `high` bound its 95 % interval, NaN is not known.

    role: "run", or "base" for what the run started from. clusters: how many sources the questions come from, None
    where each stands for itself. peak_memory_bytes and tokens_per_s are those of the whole measurement.
    """

    run: str
    role: str
    task: str
    version: str
    filter: str
    n_shot: int
    n: int
    clusters: int | None
    metric: str
    higher_is_better: bool
    value: float
    stderr: float
    low: float
    high: float
    tokens_per_s: float | None
    peak_memory_bytes: int | None

    @property
    def model(self) -> str:
        return self.run if self.role == "run" else f"{self.run} (base)"

    @property
    def key(self) -> Key:
        return self.metric, self.filter


@dataclass(frozen=True)
class Result:
    """A result file with its samples.

    marks: by metric and filter, each question's mark; a question is the hash of its document, numbered where it
    repeats. sources: the source each question shares with others, empty where none does. `made` is the provenance
    block, `sha256` that of the result file.
    """

    path: Path
    run: str
    role: str
    task: str
    rows: list[Row]
    marks: dict[Key, dict[str, float]]
    sources: dict[str, str]
    made: dict[str, Any]
    sha256: str

    def told(self, key: str) -> str:
        """One entry of the provenance block as text, hashes and commits shortened; a dash where it is missing."""
        value = self.made.get(key)
        if value is None or isinstance(value, dict | list):
            return ABSENT
        return str(value)[:12] if key in ("commit", "task_sha256", "model_sha256") else str(value)


def read(root: Path, names: Sequence[str] = (), tasks: Sequence[str] = ()) -> list[Result]:
    """Results below evals/results/ (of `names` and `tasks` alone, where given), by run and task, each base first.

    Raises UserError for a broken file, a name without results, or none at all.
    """
    folder = root / "evals" / "results"
    known = sorted(path.name for path in folder.glob("[!.]*") if path.is_dir()) if folder.is_dir() else []
    found = [(name, path) for name in known for path in result_files(folder / name)]
    if not found:
        raise UserError("evals/results holds no result; measure a run first: nox -s eval")
    with_results = sorted({name for name, _ in found})
    for name in names:
        if name not in with_results:
            raise UserError(f"{name}: no result in evals/results; {nearest(name, with_results)}")
    for task in tasks:
        if task not in (measured := sorted({path.stem for _, path in found})):
            raise UserError(f"{task}: no result of this task in evals/results; {nearest(task, measured)}")
    return load(
        [(name, path) for name, path in found if (not names or name in names) and (not tasks or path.stem in tasks)]
    )


def result_files(folder: Path) -> list[Path]:
    """Result files of one model: its own and those of its base."""
    return sorted([*folder.glob("*.json"), *folder.glob("base/*.json")])


def load(files: Iterable[tuple[str, Path]]) -> list[Result]:
    """Results from (name of the model, file), in an order that only names decide. Raises UserError for a broken one."""
    results = [_result(name, path) for name, path in files]
    return sorted(results, key=lambda result: (result.run, result.task, result.role))


def check_versions(results: Sequence[Result]) -> None:
    """Raise UserError where two results of one task were made by different versions or texts of it."""
    first: dict[str, Result] = {}
    for result in results:
        other = first.setdefault(result.task, result)
        versions = [one.rows[0].version for one in (other, result)]
        hashes = [one.told("task_sha256") for one in (other, result)]
        # an old file that lacks the hash is judged by its version
        if versions[0] != versions[1] or (hashes[0] != hashes[1] and ABSENT not in hashes):
            raise UserError(
                f"{result.path}: {result.task} version {versions[1]} ({hashes[1]}), but {other.path} has version "
                f"{versions[0]} ({hashes[0]}), and no table compares two; {remedy(other.path, other.run)}"
            )


def questions_differ(before: Result, after: Result) -> str:
    """How the questions of two results differ, in words; empty where both were asked the same."""
    asked = [{question for marks in one.marks.values() for question in marks} for one in (before, after)]
    if asked[0] == asked[1]:
        return ""
    return (
        f"{len(asked[0] & asked[1])} questions shared, {len(asked[0] - asked[1])} only of the first, "
        f"{len(asked[1] - asked[0])} only of the second"
    )


def paired(before: Result, after: Result, key: Key) -> tuple[list[float], list[float], list[str] | None]:
    """Marks of both on the same questions in one order, and the questions' sources where some share one.

    ValueError unless both have marks of `key` on the same questions.
    """
    old, new = before.marks[key], after.marks[key]
    if old.keys() != new.keys():
        raise ValueError(f"{before.path} and {after.path} are not of the same questions")
    questions = sorted(new)
    sources = [after.sources[question] for question in questions] if after.sources else None
    return [old[question] for question in questions], [new[question] for question in questions], sources


def samples_bytes(path: Path) -> bytes:
    """The samples beside a result file, packed (as published) or not; empty where there are none."""
    plain = path.with_name(f"{path.stem}.samples.jsonl")
    packed = plain.with_name(f"{plain.name}.gz")
    if plain.is_file():
        return plain.read_bytes()
    try:
        return gzip.decompress(packed.read_bytes()) if packed.is_file() else b""
    except (OSError, EOFError):
        return b""


def remedy(path: Path, run: str) -> str:
    """What to do about a result that cannot be used."""
    if "/evals/published/" in path.as_posix():
        return f"publish it again: python -m evals publish {run}"
    task = path.stem
    return f"measure it again: nox -s eval -- {run} --tasks {task} --again"


def _result(run: str, path: Path) -> Result:
    """A result file and its samples, checked against each other."""
    cure = remedy(path, run)
    found = runs.read_json(path, cure)
    role = "base" if path.parent.name == "base" else "run"
    try:
        made, task = found["duet"], path.stem
        digest, better = made["samples_sha256"], found["higher_is_better"][task]
        # "metric,filter"; lm-eval writes "N/A" where a metric has no value
        keys = [key for key in found["results"][task] if "," in key and "_stderr," not in key]
        pairs = [(metric, chosen) for metric, _, chosen in (key.partition(",") for key in keys)]
        pairs = sorted((pair for pair in pairs if better.get(pair[0]) is not None), key=lambda pair: pair[::-1])
        if not pairs:
            raise ValueError(f"no metric of {task}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: not a result of this project ({error!r}); {cure}") from None
    content = samples_bytes(path)
    if hashlib.sha256(content).hexdigest() != digest:
        raise UserError(f"{path.with_suffix('.samples.jsonl')}: not the samples {path.name} was made with; {cure}")
    try:
        samples = sorted(map(json.loads, content.decode().splitlines()), key=lambda sample: sample["doc_id"])
        sources = _sources(samples, found.get("configs", {}).get(task, {}))
        marks = {pair: _marks(samples, *pair, found, task) for pair in pairs}
        rows = [_row(found, made, (run, role, task), pair, marks[pair], sources) for pair in pairs]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: not a result of this project ({error!r}); {cure}") from None
    made = {"commit": found.get("git_hash"), "lm_eval": found.get("lm_eval_version"), **made}
    marks = {pair: found for pair, found in marks.items() if found}
    return Result(path, run, role, task, rows, marks, sources, made, hashlib.sha256(path.read_bytes()).hexdigest())


def _questions(samples: Sequence[dict[str, Any]]) -> list[str]:
    """What each sample asks: the hash of its document, with a number from its second occurrence on."""
    seen: Counter[str] = Counter()
    names = []
    for sample in samples:
        digest = str(sample.get("doc_hash") or sample.get("prompt_hash") or sample["doc_id"])
        seen[digest] += 1
        names.append(digest if seen[digest] == 1 else f"{digest} {seen[digest]}")
    return names


def _marks(
    samples: Sequence[dict[str, Any]], metric: str, chosen: str, found: dict[str, Any], task: str
) -> dict[str, float]:
    """Marks by question; none where the reported value is not their mean. ValueError where it should have been."""
    of_filter = [sample for sample in samples if sample.get("filter", chosen) == chosen and metric in sample]
    values = [sample[metric] for sample in of_filter]
    if not values or not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        return {}
    n, reported = found["n-samples"][task]["effective"], float(found["results"][task][f"{metric},{chosen}"])
    mean = math.fsum(values) / len(values)
    if len(values) == n and math.isclose(mean, reported, abs_tol=1e-9):
        return dict(zip(_questions(of_filter), map(float, values), strict=True))
    listed = found.get("configs", {}).get(task, {}).get("metric_list") or []
    if any(one.get("metric") == metric and one.get("aggregation") == "mean" for one in listed):
        raise ValueError(f"{metric} is {reported} on {n} questions, its samples give {mean} on {len(values)}")
    return {}


def _sources(samples: Sequence[dict[str, Any]], config: dict[str, Any]) -> dict[str, str]:
    """The source of each question: the document's field that the task names as `metadata.cluster`, else `cluster`."""
    field = (config.get("metadata") or {}).get("cluster", "cluster")
    chosen = samples[0].get("filter") if samples else None
    of_filter = [sample for sample in samples if sample.get("filter") == chosen]
    docs = [sample["doc"] if isinstance(sample.get("doc"), dict) else {} for sample in of_filter]
    named = [str(doc[field]) for doc in docs if doc.get(field) is not None]
    if named and len(named) < len(docs):
        raise ValueError(f"{len(docs) - len(named)} of {len(docs)} questions name no {field!r}")
    # a source for each question is no clustering
    return dict(zip(_questions(of_filter), named, strict=True)) if 0 < len(set(named)) < len(named) else {}


def _row(
    found: dict[str, Any],
    made: dict[str, Any],
    of: tuple[str, str, str],
    key: Key,
    marks: dict[str, float],
    sources: dict[str, str],
) -> Row:
    """One metric of lm-eval's result object, with our own error where there are marks."""
    run, role, task = of
    metric, chosen = key
    scores, n = found["results"][task], int(found["n-samples"][task]["effective"])
    value, stderr = float(scores[f"{metric},{chosen}"]), scores.get(f"{metric}_stderr,{chosen}")
    stderr = float(stderr) if isinstance(stderr, int | float) else math.nan
    low = high = math.nan
    if marks:
        clusters = [sources[question] for question in marks] if sources else None
        mean = stats.mean(list(marks.values()), clusters=clusters)
        stderr, low, high = mean.stderr, mean.low, mean.high
        if not sources and set(marks.values()) <= {0, 1}:
            low, high = stats.wilson(round(value * n), n)
    elif not math.isnan(stderr):
        normal = estimate(value, stderr, n, 0.95)
        low, high = normal.low, normal.high
    speed, memory = made.get("tokens_per_s"), made.get("peak_memory_bytes")
    return Row(
        run=run,
        role=role,
        task=task,
        version=str(found["versions"][task]),
        filter=chosen,
        n_shot=int(found["n-shot"][task]),
        n=n,
        clusters=len(set(sources.values())) if marks and sources else None,
        metric=metric,
        higher_is_better=bool(found["higher_is_better"][task][metric]),
        value=value,
        stderr=stderr,
        low=low,
        high=high,
        tokens_per_s=None if speed is None else float(speed),
        peak_memory_bytes=None if memory is None else int(memory),
    )
