"""What is kept of a run: `papers/<slug>/results/<run>-seed<N>.json`, committed, from which all else is made.

One file holds run.json as it was, the logged values that the study names, the marks of the held-out questions, the
machine, and the locked versions at that time. Weights, texts and the other logged values stay in the run's folder.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from papers import jobs as plans
from papers.jobs import Job
from papers.study import Study
from rl import files, record
from rl.errors import UserError
from rl.record import COMPUTING, Record

ALWAYS = ("step", "wall_s")  # kept of every logged row
DIGITS = 6  # of other logged values
FROM = "model.from"  # the parent whose weights a run goes on from: it records their hash


@dataclass(frozen=True, eq=False)  # one is itself alone, so what is computed of it can be remembered
class Kept:
    """One run's result. `metrics` are columns of equal length; `before` and `after` are marks, 0 or 1, by question."""

    record: Record
    machine: dict[str, Any]
    lock: dict[str, str]
    metrics: dict[str, list[float | None]]
    ids: list[str]
    before: list[int]
    after: list[int]
    scores: dict[str, dict[str, float]] = field(default_factory=dict)  # lm-eval's, by task: question -> mark
    weights: str | None = None  # sha256 of what was trained, where the runner noted it

    @property
    def logged(self) -> list[tuple[int, float]]:
        """(step, seconds since the run began) of every logged row."""
        return [(int(s or 0), float(t or 0.0)) for s, t in zip(*(self.metrics[name] for name in ALWAYS), strict=True)]


def folder(study: Study, root: Path, quick: bool = False) -> Path:
    """Where a study's results, tables, figures and report go: its own folder, under build/ at toy size."""
    return plans.folder(study, root, True) if quick else study.folder


def distil(
    run: Path, metrics: Sequence[str], machine: dict[str, Any], lock: Mapping[str, str], weights: str | None = None
) -> Kept:
    """What is kept of the finished run in the folder `run`.

    Raises UserError for one that is unfinished or not whole, or whose scores are not those of its samples.
    """
    found = record.read(run)
    if found.status != "finished":
        raise UserError(f"{run}: status is {found.status!r}; only a finished run is kept")
    rows = record.read_metrics(run / "metrics.jsonl")
    try:
        samples = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
        ids = [str(row["id"]) for row in samples]
        before, after = ([int(bool(row["right"][i])) for row in samples] for i in range(2))
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{run}: samples.jsonl is not what a run writes ({error!r}); copy the folder again") from None
    said: Any = (found.result or {}).get("strict", {}).get("after", {}).get("value")
    if not samples or not rows or said is None or abs(said - sum(after) / len(after)) > 1e-9:
        raise UserError(f"{run}: run.json, metrics.jsonl and samples.jsonl do not belong together; copy them again")
    columns = {name: [row.get(name) for row in rows] for name in ALWAYS}
    for name in metrics:
        if any(name in row for row in rows):
            columns[name] = [_short(row.get(name)) for row in rows]
    # what stands before build/ is only where the checkout was; it decides nothing
    command = found.command and re.sub(r"(?<!\S)/\S*/(?=(?:build|configs)/)", "", found.command)
    found = replace(found, command=command)
    return Kept(found, machine, dict(lock), columns, ids, before, after, weights=weights)


def save(kept: Kept, path: Path) -> None:
    """Write one result, a logged value to a line, so that a change shows as one."""
    raw = {
        "record": record.finite(vars(kept.record)),
        "machine": kept.machine,
        "lock": kept.lock,
        "weights": kept.weights,
        "questions": {
            "ids": " ".join(kept.ids) if not any(" " in one for one in kept.ids) else kept.ids,
            "before": "".join(map(str, kept.before)),
            "after": "".join(map(str, kept.after)),
        },
        "scores": kept.scores,
    }
    lines = [f'  "{key}": {json.dumps(value, ensure_ascii=False, allow_nan=False)},' for key, value in raw.items()]
    columns = [f"    {json.dumps(name)}: {json.dumps(column)}" for name, column in kept.metrics.items()]
    files.write_text(path, "\n".join(["{", *lines, '  "metrics": {', ",\n".join(columns), "  }", "}", ""]))


def read(path: Path) -> Kept:
    """One result. UserError for a file that is none."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        found = Record(**{key.name: raw["record"][key.name] for key in fields(Record) if key.name in raw["record"]})
        asked = raw["questions"]
        return Kept(
            found,
            raw["machine"],
            raw["lock"],
            raw["metrics"],
            asked["ids"].split(" ") if isinstance(asked["ids"], str) else asked["ids"],
            [int(mark) for mark in asked["before"]],
            [int(mark) for mark in asked["after"]],
            raw.get("scores", {}),
            raw.get("weights"),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no result of a study ({error!r}); remove it and make or import it again") from None


def load(study: Study, root: Path, jobs: Sequence[Job], quick: bool = False) -> dict[str, Kept]:
    """The results there are, by job."""
    where = folder(study, root, quick) / "results"
    return {job.name: read(path) for job in jobs if (path := where / f"{job.stem}.json").is_file()}


def outdated(
    jobs: Sequence[Job], kept: Mapping[str, Kept], study: Study, root: Path, quick: bool = False
) -> dict[str, str]:
    """Why results are no longer those that the study asks for, by job: its config, its parents or the lock changed."""
    by_name = {job.name: job for job in jobs}
    lock, where, found = plans.locked(root), plans.folder(study, root, quick), {}
    records, shas = {name: one.record for name, one in kept.items()}, weights(jobs, kept)
    for job in jobs:
        if job.name not in kept:
            continue
        own, why = kept[job.name], []
        steps = None
        if job.timed is not None:
            if any(name not in kept for name in job.timed):
                why.append("the runs whose time it follows are gone")
            else:
                speed, time = (plans.timing(kept[name].record, kept[name].logged) for name in job.timed)
                steps = plans.steps(speed, time, plans.QUICK_ROUND if quick else plans.ROUND)
        wanted = plans.resolved(job, where, root, by_name, steps)
        why += plans.changed(wanted, own.record.config, list(job.parents))
        why += [
            f"uv.lock: {name} {own.lock.get(name)} → {lock.get(name)}"
            for name in sorted(own.lock.keys() | lock.keys())
            if own.lock.get(name) != lock.get(name)
        ]
        why += parents(job, own.record, records, shas)
        why += [f"{name} it builds on is outdated" for name in job.needs if name in found]
        if why:
            found[job.name] = "; ".join(why[:3])
    return found


def parents(job: Job, own: Record, made: Mapping[str, Record], shas: Mapping[str, str]) -> list[str]:
    """What of a run's parents is not as it was when the run was made.

    Where it goes on from weights whose hash is known (`shas`, as `weights` gives it) that hash decides: they may be
    made again, on another machine too, as long as the same come out. Of other parents the inputs decide.
    """
    inputs = {parent["role"]: parent["inputs_sha256"] for parent in own.parents}
    why = []
    for role, name in job.parents.items():
        if name not in made:
            why.append(f"{name}, which it builds on, is not there")
        elif role == FROM and name in shas and _whole(own):
            if own.base.get("sha256") != shas[name]:
                why.append(f"it went on from other weights than those of {name}")
        elif inputs.get(role) != made[name].inputs_sha256:
            why.append(f"{name}, which it builds on, was made again")
    return why


def weights(jobs: Sequence[Job], kept: Mapping[str, Kept]) -> dict[str, str]:
    """The sha256 of each run's weights, by job: as noted, else as most runs that went on from it recorded."""
    told: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for job in jobs:
        name = job.parents.get(FROM)
        if name is None or name not in kept or job.name not in kept or not _whole(own := kept[job.name].record):
            continue
        if (FROM, kept[name].record.inputs_sha256) in {(one["role"], one["inputs_sha256"]) for one in own.parents}:
            told[name][own.base.get("sha256")] += 1
    noted = {name: one.weights for name, one in kept.items() if one.weights}
    return {name: counts.most_common(1)[0][0] for name, counts in told.items()} | noted


def _whole(record: Record) -> bool:
    """Whether the base's hash is of the parent's own weights, not of a quantized form of them."""
    return not record.config.get("model", {}).get("quantization")


def here(
    jobs: Sequence[Job], study: Study, root: Path, quick: bool = False, known: Mapping[str, Kept] | None = None
) -> dict[str, Record]:
    """Jobs whose run lies finished in models/final with the inputs it would have now, on this machine.

    `known` are results that tell the time of runs that are not there themselves.
    """
    by_name, found = {job.name: job for job in jobs}, {}
    versions = record.versions(COMPUTING)
    for job in jobs:
        path = root / "models" / "final" / job.name
        needed = [name for name in job.needs if name in job.parents.values() or name not in (known or {})]
        if not (path / "run.json").is_file() or any(name not in found for name in needed):
            continue
        own = record.read(path)
        same = {name: own.packages.get(name) for name in COMPUTING} == versions
        if own.status != "finished" or not same or parents(job, own, found, {}):
            continue
        steps = max_steps(job, root, quick, known)
        wanted = plans.resolved(job, plans.folder(study, root, quick), root, by_name, steps)
        if not plans.changed(wanted, own.config, list(job.parents)):
            found[job.name] = own
    return found


def max_steps(job: Job, root: Path, quick: bool = False, known: Mapping[str, Kept] | None = None) -> int | None:
    """The steps of a timed job, from the runs whose time it follows: `known` ones, else those in models/final.

    None for any other job.
    """
    if job.timed is None:
        return None
    times = []
    for name in job.timed:
        if known and name in known:
            times.append(plans.timing(known[name].record, known[name].logged))
            continue
        path = root / "models" / "final" / name
        rows = record.read_metrics(path / "metrics.jsonl")
        times.append(plans.timing(record.read(path), [(row["step"], row["wall_s"]) for row in rows]))
    return plans.steps(times[0], times[1], plans.QUICK_ROUND if quick else plans.ROUND)


def _short(value: Any) -> float | None:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, int | float) and not isinstance(value, bool) else None
