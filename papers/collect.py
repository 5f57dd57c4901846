"""Results of a study out of run folders: those made here, those of another machine, those that are published.

A run is known by its inputs, not by its name: a finished one of the same config, seed and parents serves, whoever made
it and whatever it is called.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from papers import jobs as plans
from papers import machine, results
from papers.jobs import Job
from papers.results import Kept
from papers.study import Study
from rl import record
from rl.errors import UserError
from rl.record import Record


@dataclass(frozen=True)
class Candidate:
    """A finished run's folder and record."""

    folder: Path
    record: Record


@dataclass(frozen=True)
class Brought:
    """What became of runs that were looked at: jobs that got a result, that had one, and why others fit none."""

    made: list[str]
    there: list[str]
    refused: dict[str, str]


def here(study: Study, root: Path, quick: bool = False) -> list[str]:
    """Keep what lies finished in models/final, or published, with the inputs that jobs without a result ask for.

    Returns the jobs that got a result. Runs of a study were noted with their machine by the runner; others are said to
    be from the machine of their record.
    """
    plan = plans.plan(study, quick)
    valid = set(results.here(plan, study, root, quick))
    published = candidates(root / "evals" / "published" / "runs") if not quick else []
    lock = plans.locked(root)
    fit = [one for one in published if all(one.record.packages.get(name) == lock[name] for name in lock)]
    own = [Candidate(folder, record.read(folder)) for job in plan if job.name in valid
           and (folder := root / "models" / "final" / job.name)]  # fmt: skip
    return keep(study, root, plan, [*own, *fit], quick).made


def bring(study: Study, root: Path, folder: Path, quick: bool = False, again: bool = False) -> Brought:
    """Keep the runs in `folder` that the study asks for. A result that is valid stays, unless `again`.

    `machine.json` in a run's folder or in `folder` says where they were made. UserError where none fits.
    """
    found = candidates(folder)
    if not found:
        raise UserError(f"{folder}: holds no finished run (a folder with run.json, metrics.jsonl, samples.jsonl)")
    done = keep(study, root, plans.plan(study, quick), found, quick, again)
    if not done.made and not done.there:
        why = f": {next(iter(done.refused.values()))}" if done.refused else ""
        raise UserError(f"{folder}: none of its {len(found)} runs is one that papers/{study.slug} asks for{why}")
    return done


def candidates(folder: Path) -> list[Candidate]:
    """Finished runs below a folder, by path."""
    found = [Candidate(path.parent, record.read(path.parent)) for path in sorted(folder.rglob("run.json"))]
    return [one for one in found if one.record.status == "finished" and not one.folder.name.startswith(".")]


def keep(
    study: Study,
    root: Path,
    plan: Sequence[Job],
    found: Sequence[Candidate],
    quick: bool = False,
    again: bool = False,
) -> Brought:
    """Write a result of each job without one, or with an outdated one (`again`: each), from the first run that fits."""
    kept = results.load(study, root, plan, quick)
    old = results.outdated(plan, kept, study, root, quick)
    where, by_name, done = plans.folder(study, root, quick), {job.name: job for job in plan}, Brought([], [], {})
    names = {one.record.name for one in found}
    for job in plan:
        if job.name in kept and job.name not in old and not again:
            done.there.extend([job.name] if job.name in names else [])
            continue
        steps = _steps(job, kept, quick)
        if job.timed is not None and steps is None:
            if job.name in names:
                done.refused[job.name] = f"no result of {' or '.join(job.timed)}, whose time it follows"
            continue
        wanted, shas = plans.resolved(job, where, root, by_name, steps), results.weights(plan, kept)
        records = {name: one.record for name, one in kept.items()}
        why = {one.folder: _unlike(job, wanted, one.record, records, shas) for one in found}
        chosen = next((one for one in _by_name_first(found, job) if not why[one.folder]), None)
        if chosen is None:
            own = [why[one.folder] for one in found if one.record.name == job.name]
            done.refused.update({job.name: "; ".join(own[0][:3])} if own else {})
            continue
        about = _machine(chosen, root, job)
        lock = about.pop("lock", None) or plans.locked(root)
        kept[job.name] = results.distil(chosen.folder, study.metrics, about, lock, about.pop("weights", None))
        results.save(kept[job.name], results.folder(study, root, quick) / "results" / f"{job.stem}.json")
        done.made.append(job.name)
    return done


def _by_name_first(found: Iterable[Candidate], job: Job) -> list[Candidate]:
    return sorted(found, key=lambda one: one.record.name != job.name)


def _steps(job: Job, kept: Mapping[str, Kept], quick: bool) -> int | None:
    if job.timed is None or any(name not in kept for name in job.timed):
        return None
    speed, time = (plans.timing(kept[name].record, kept[name].logged) for name in job.timed)
    return plans.steps(speed, time, plans.QUICK_ROUND if quick else plans.ROUND)


def _unlike(
    job: Job, wanted: Mapping[str, Any], own: Record, made: Mapping[str, Record], shas: Mapping[str, str]
) -> list[str]:
    """In what a run is not the one the job asks for."""
    seed = [] if own.seed == job.seed else [f"seed {own.seed} → {job.seed}"]
    return [*seed, *plans.changed(wanted, own.config, list(job.parents)), *results.parents(job, own, made, shas)]


def _machine(one: Candidate, root: Path, job: Job) -> dict[str, Any]:
    """Where a run was made: as the runner noted, else as its record has it."""
    noted = root / "build" / "papers" / "machines" / f"{job.name}.json"
    for path in (one.folder / "machine.json", one.folder.parent / "machine.json", noted):
        if path.is_file():
            about = json.loads(path.read_text(encoding="utf-8"))
            machine.in_words(about)
            return about
    return {"system": one.record.platform, "cpu": one.record.device, "cores": None, "memory_gib": None, "gpu": None}
