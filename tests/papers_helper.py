"""Results of a study without training: marks and logged values drawn from what a test says of each run."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from papers import jobs, results, study
from papers.results import Kept
from rl import files, record
from tests import run_helper

ROOT = Path(__file__).resolve().parent.parent
MACHINE = {"system": "Linux", "cpu": "Some CPU", "cores": 8, "memory_gib": 16.0, "gpu": None}
MACHINE |= {"slots": 4, "cores_a_run": 2}


def kept(name: str, seed: int, after: list[int], metrics: dict[str, list[float]] | None = None, **fields) -> Kept:
    """One result; `fields` go into its record."""
    found = run_helper.fresh(ROOT, name=name, seed=seed)
    vars(found).update(status="finished", finished="2026-01-02T03:04:05+00:00", **fields)
    steps = len(next(iter((metrics or {"": [0.0, 0.0]}).values())))
    columns = {"step": list(range(1, steps + 1)), "wall_s": [5.0 + 0.5 * i for i in range(steps)]}
    ids = [f"q{i}" for i in range(len(after))]
    return Kept(found, dict(MACHINE), {}, columns | (metrics or {}), ids, [0] * len(after), after)


def house(root: Path, *slugs: str) -> Path:
    """A repository of configs, lock and these studies' sources, to build in."""
    (root / "configs").symlink_to(ROOT / "configs")
    shutil.copy(ROOT / "uv.lock", root)
    for slug in slugs:
        (root / "papers" / slug).mkdir(parents=True)
        for name in ("paper.toml", "report.typ"):
            shutil.copy(ROOT / "papers" / slug / name, root / "papers" / slug)
    if slugs:
        shutil.copy(ROOT / "papers" / "report.typ", root / "papers")
    return root


def fill(
    root: Path, one: study.Study, share: Callable[[str, int], float], steps: int = 30, questions: int = 64
) -> None:
    """A result for every job: each question is right with the chance `share(run, seed)`."""
    for job, found in made(root, one, jobs.plan(one), share, steps, questions):
        results.save(found, one.folder / "results" / f"{job.stem}.json")


def made(
    root: Path,
    one: study.Study,
    plan: list[jobs.Job],
    share: Callable[[str, int], float],
    steps: int = 30,
    questions: int = 64,
) -> list[tuple[jobs.Job, Kept]]:
    """What `fill` keeps, of these jobs."""
    by_name, found = {job.name: job for job in plan}, {}
    for job in plan:
        draw = random.Random(job.name)
        chance = share(job.run, job.seed)
        timed = None if job.timed is None else [jobs.timing(found[n].record, found[n].logged) for n in job.timed]
        most = None if timed is None else jobs.steps(timed[0], timed[1])
        after = [int(draw.random() < chance) for _ in range(questions)]
        metrics = {
            name: [chance * i / steps + draw.gauss(0, 0.02) for i in range(1, steps + 1)] for name in one.metrics
        }
        own = kept(job.name, job.seed, after, metrics, wall_s=20 + 5 * draw.random(), steps=steps)
        own.lock.update(jobs.locked(root))
        own.record.config = jobs.resolved(job, jobs.folder(one, root), root, by_name, most)
        own.record.parents = [
            {"role": role, "name": name, "inputs_sha256": found[name].record.inputs_sha256}
            for role, name in job.parents.items()
        ]
        own.record.tokens = {"prompt": 1000, "completion": draw.randint(30_000, 50_000)}
        own.record.rollout = {"tokens_per_s": 900.0, "mean_abs_dlogp": 1e-6, "ess": 1.0, "sync_s": 0.01}
        own.record.inputs_sha256 = record.inputs_hash(own.record)
        found[job.name] = own
    return [(job, found[job.name]) for job in plan]


def write_run(folder: Path, one: Kept, name: str) -> None:
    """A run's folder as training leaves it, weights aside."""
    one.record.name = name
    one.record.result = {"strict": {"after": {"value": sum(one.after) / len(one.after)}}}
    record.save(one.record, folder / name)
    rows = [dict(zip(one.metrics, row, strict=True)) for row in zip(*one.metrics.values(), strict=True)]
    files.write_text(folder / name / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    samples = [{"id": i, "right": [bool(b), bool(a)]} for i, b, a in zip(one.ids, one.before, one.after, strict=True)]
    files.write_text(folder / name / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in samples))
