"""The runs a study asks for: one job a run and seed, each written out as a config of its own.

A run that others build on lies beside them under `build/papers/<slug>/`, so that `rl` finds it by its file. A job is
*made* where a finished run has its inputs: the resolved config but for name and device, the inputs of the runs it
builds on, and the versions of the packages that compute.
"""

import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from papers.study import RunSpec, Study
from rl import config as configs
from rl import files
from rl.config.reading import Source, place, plain, read
from rl.config.text import to_toml
from rl.errors import UserError
from rl.record import COMPUTING, Record

FILES = ("path", "heldout_path")  # of [data]: places relative to the config's folder
ROUND, QUICK_ROUND = 10, 2  # max_steps of `as_long_as` is a multiple of it: no run ends between two rollouts


@dataclass(frozen=True)
class Job:
    """One run to make. `name` is its folder in models/final; `parents` maps a place in the config to another job."""

    name: str
    run: str
    seed: int
    config: Path
    overrides: tuple[str, ...]
    parents: dict[str, str] = field(default_factory=dict)
    timed: tuple[str, str] | None = None  # jobs: whose speed, whose time

    @property
    def needs(self) -> tuple[str, ...]:
        """Jobs that must be finished first."""
        return (*dict.fromkeys((*self.parents.values(), *(self.timed or ()))),)

    @property
    def stem(self) -> str:
        """Its config's file name below build/papers/."""
        return f"{self.run}-seed{self.seed}"


def prefix(study: Study, quick: bool) -> str:
    """What names of runs and folders under build/ begin with: toy runs never meet real ones."""
    return f"{study.slug}-quick" if quick else study.slug


def plan(study: Study, quick: bool = False) -> list[Job]:
    """Every job of the study, what others need first, then seed by seed: cut short, all runs have as many seeds.

    Raises UserError where a parent run has neither the seed nor a single one.
    """
    wanted = list(study.quick.runs if quick and study.quick.runs else (spec.name for spec in study.runs))
    for name in wanted:  # grows as it is read
        spec = study.run(name)
        needed = (*spec.builds_on.values(), *((spec.like, spec.as_long_as) if spec.as_long_as else ()))
        wanted += [other for other in needed if other and other not in wanted]
    specs = [study.run(spec.name) for spec in study.runs if spec.name in wanted]
    seeds = {spec.name: _seeds(study, spec, quick) for spec in specs}
    made: dict[str, Job] = {}

    def add(spec: RunSpec, seed: int) -> str:
        name = f"{prefix(study, quick)}.{spec.name}-seed{seed}"
        if name in made:
            return name
        by_name = {other.name: other for other in specs}
        parents = {
            role: add(by_name[other], _matching(study, spec, other, seed, seeds[other]))
            for role, other in spec.builds_on.items()
        }
        timed = None
        if spec.as_long_as is not None and spec.like is not None:
            speed, time = (
                add(by_name[other], _matching(study, spec, other, seed, seeds[other]))
                for other in (spec.like, spec.as_long_as)
            )
            timed = (speed, time)
        overrides = [*study.set, *spec.set, *((*study.quick.set, *spec.quick) if quick else ())]
        made[name] = Job(
            name=name,
            run=spec.name,
            seed=seed,
            config=Path(str(spec.config)),
            overrides=(*overrides, f"run.name={name}", f"run.seed={seed}"),
            parents=parents,
            timed=timed,
        )
        return name

    for seed in dict.fromkeys(seed for own in _by_place(seeds.values()) for seed in own):
        for spec in specs:
            if seed in seeds[spec.name]:
                add(spec, seed)
    return list(made.values())


def _seeds(study: Study, spec: RunSpec, quick: bool) -> tuple[int, ...]:
    own = spec.seeds if spec.seeds is not None else study.seeds
    if not quick:
        return own
    return own[:1] if len(own) == 1 else study.quick.seeds


def _by_place(lists: Iterable[Sequence[int]]) -> list[list[int]]:
    """First seeds of all, then second seeds of all, ..."""
    lists = list(lists)
    return [[own[i] for own in lists if i < len(own)] for i in range(max(map(len, lists), default=0))]


def _matching(study: Study, spec: RunSpec, other: str, seed: int, seeds: Sequence[int]) -> int:
    if seed in seeds:
        return seed
    if len(seeds) == 1:
        return seeds[0]
    raise UserError(f"{study.path}: run '{spec.name}' has seed {seed}, which '{other}' that it needs has not: {seeds}")


# --- configs


def folder(study: Study, root: Path, quick: bool = False) -> Path:
    """Where the jobs' configs and logs go."""
    return root / "build" / "papers" / prefix(study, quick)


def resolved(
    job: Job, where: Path, root: Path, jobs: Mapping[str, Job], max_steps: int | None = None
) -> dict[str, Any]:
    """The job's config in full, as `rl.config.resolved` gives it, for the folder `where`; parents by their file names.

    `max_steps` is that of a timed job. Raises UserError where the config or an override is wrong.
    """
    more = [] if max_steps is None else [f"trainer.max_steps={max_steps}"]
    config = configs.load(root / job.config, [*job.overrides, *more])
    tables = configs.resolved(config)
    for key in FILES:
        if key in tables["data"]:
            tables["data"][key] = os.path.relpath(root / job.config.parent / tables["data"][key], where)
    missing = [role for role in configs.builds_on(config) if role not in job.parents]
    if missing:
        raise UserError(f"{job.config}: builds on another run at '{missing[0]}': name one in builds_on of '{job.run}'")
    for role, other in job.parents.items():
        *way, last = place(role)
        table: Any = tables
        for step in way:
            table = table[step]
        table[last] = f"{jobs[other].stem}.toml"
    return tables


def write(job: Job, where: Path, root: Path, jobs: Mapping[str, Job], max_steps: int | None = None) -> Path:
    """Write the job's config into the folder `where`; its path. The files of its parents must lie there."""
    path = where / f"{job.stem}.toml"
    text = f"# {job.config} as a study asks for it\n" + to_toml(resolved(job, where, root, jobs, max_steps))
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        files.write_text(path, text)
    configs.load(path)
    return path


def steps(speed: "Timing", time: "Timing", multiple: int = ROUND) -> int:
    """Steps with which a run as fast as `speed` takes as long, all in all, as `time` took.

    What is not a step (loading, sampling of pairs, the two held-out checks) takes what it took: N = n + (T - t)/s, with
    n steps in t seconds, s seconds a step; rounded down to a multiple, at least one of it.
    """
    more = (time.wall_s - speed.wall_s) / speed.step_s
    return max(multiple, int(speed.steps + more) // multiple * multiple)


@dataclass(frozen=True)
class Timing:
    """A finished run's steps, seconds in all, and seconds of a step, from the first logged step to the last."""

    steps: int
    wall_s: float
    step_s: float


def timing(record: Record, logged: Sequence[tuple[int, float]]) -> Timing:
    """`logged`: (step, wall_s) of metrics.jsonl. Raises UserError for fewer than two logged steps."""
    if len(logged) < 2:
        raise UserError(f"{record.name}: fewer than two logged steps, so its speed is not known; train it for longer")
    (first, began), (last, ended) = logged[0], logged[-1]
    return Timing(record.steps, record.wall_s, (ended - began) / (last - first))


# --- whether a run is the one a job asks for


def essence(config: Mapping[str, Any], roles: Iterable[str]) -> dict[str, Any]:
    """What decides a result: no name, no device, and no file names at `roles`, where the parents' own inputs count."""
    run = {key: value for key, value in config.get("run", {}).items() if key not in ("name", "device")}
    kept: dict[str, Any] = {**config, "run": run}
    for role in roles:
        *way, last = place(role)
        kept = _without(kept, [*way, last])
    return kept


def _without(value: Any, way: Sequence[str | int]) -> Any:
    if isinstance(value, list):
        return [_without(item, way[1:]) if i == way[0] else item for i, item in enumerate(value)]
    if not isinstance(value, dict) or way[0] not in value:
        return value
    if len(way) == 1:
        return {key: item for key, item in value.items() if key != way[0]}
    return {**value, way[0]: _without(value[way[0]], way[1:])}


def changed(wanted: Mapping[str, Any], found: Mapping[str, Any], roles: Sequence[str]) -> list[str]:
    """`key: found → wanted` of each setting in which a recorded config is not the one asked for.

    A setting that came after the record was written has its default there: that is what the run was made with.
    """
    before, after = (_flat(essence(config, roles)) for config in (_today(found), wanted))
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return [f"{key}: {before.get(key)} → {after.get(key)}" for key in keys]


def _today(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recorded config with the settings of today; as it is where today knows one of its settings no more."""
    try:
        return plain(read(configs.Config, config, Source("run.json"), also={"path": Path("run.json")}))
    except UserError:
        return config


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict | list) or not value:
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for name, child in items for key, leaf in _flat(child, f"{prefix}.{name}".lstrip(".")).items()}


def locked(root: Path) -> dict[str, str]:
    """The versions in uv.lock of the packages that compute; {} without a lock."""
    path = root / "uv.lock"
    if not path.is_file():
        return {}
    packages = tomllib.loads(path.read_text(encoding="utf-8")).get("package", [])
    return {package["name"]: package.get("version", "") for package in packages if package["name"] in COMPUTING}
