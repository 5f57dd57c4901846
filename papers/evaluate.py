"""A study's evaluations: lm-eval's tasks on its runs, measured by `python -m evals` and kept with each run's result."""

import subprocess
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from evals import tables_read
from papers import jobs as plans
from papers import results
from papers.study import Study
from rl.errors import UserError


def wanted(study: Study, root: Path, quick: bool = False) -> list[tuple[str, str]]:
    """(job, task) of each evaluation that a kept run lacks."""
    plan = plans.plan(study, quick)
    kept = results.load(study, root, plan, quick)
    pairs = [(job, one.task) for one in study.evaluations for job in plan if job.run in one.runs and job.name in kept]
    return [(job.name, task) for job, task in pairs if task not in kept[job.name].scores]


def measure(study: Study, root: Path, quick: bool = False) -> dict[str, str]:
    """Measure what is lacking on runs of models/final, and keep it; what failed, with the reason, by job."""
    failed: dict[str, str] = {}
    by_task: dict[str, list[str]] = {}
    for name, task in wanted(study, root, quick):
        if (root / "models" / "final" / name / "run.json").is_file():
            by_task.setdefault(task, []).append(name)
        else:
            failed[name] = f"{task}: the run's weights are not here; measure it where they are, and import it again"
    for task, names in by_task.items():  # one process each: it takes longer to start than a small run's questions
        print(f"{task}: {len(names)} runs", flush=True)
        done = subprocess.run([sys.executable, "-m", "evals", *names, "--tasks", task], cwd=root)
        if done.returncode == 130:
            raise KeyboardInterrupt
        if done.returncode:  # what lies there may be of an earlier run of that name
            for name in names:
                failed[name] = f"{task}: `python -m evals {name} --tasks {task}` ended with {done.returncode}"
    take(study, root, root / "evals" / "results", quick, failed)
    return failed


def take(study: Study, root: Path, folder: Path, quick: bool = False, without: Collection[str] = ()) -> None:
    """Keep the results in `folder`/<run>/<task>.json, or `folder`/<run>/results/<task>.json, of all jobs but some."""
    plan = plans.plan(study, quick)
    kept = results.load(study, root, plan, quick)
    lacking = wanted(study, root, quick)
    for job in plan:
        own = dict(kept[job.name].scores) if job.name in kept else {}
        for task in [task for name, task in lacking if name == job.name]:
            places = [folder / job.name / f"{task}.json", folder / job.name / "results" / f"{task}.json"]
            path = next((path for path in places if path.is_file()), None)
            if path is not None and job.name not in without:
                own[task] = _marks(job.name, path)
        if job.name in kept and own != kept[job.name].scores:
            where = results.folder(study, root, quick) / "results" / f"{job.stem}.json"
            results.save(replace(kept[job.name], scores=own), where)


def _marks(name: str, path: Path) -> dict[str, float]:
    """The marks of the result's first metric by question. UserError for a metric that is no mean of marks."""
    (found,) = tables_read.load([(name, path)])
    marks = found.marks.get(found.rows[0].key) if found.rows else None
    if not marks:
        raise UserError(f"{path}: {found.task} has no marks by question, which a claim needs")
    return marks
