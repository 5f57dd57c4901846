"""`paper.toml`: a study's runs, evaluations and claims, read and checked. Nothing heavy is imported."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rl.config.reading import Source, about, key, nearest, read, read_toml
from rl.errors import UserError

FILE = "paper.toml"
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
CLAIMS = "claim"


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """[[run]]: one config with overrides, trained once per seed."""

    name: str = key("what claims call it: lower case, digits and hyphens")
    config: str | None = key("a config, relative to the repository's root; unset = that of `like`", None)
    like: str | None = key("another run of the study, whose config, overrides and parents this one starts from", None)
    label: str | None = key("how tables and figures call it; unset = the name", None)
    set: tuple[str, ...] = key("overrides, table.key=value", ())
    seeds: tuple[int, ...] | None = key("unset = the study's", None)
    builds_on: dict[str, str] = field(
        default_factory=dict,
        metadata=about("where the config names another (model.from, reward.0.model, ...): a run of this study instead"),
    )
    as_long_as: str | None = key(
        "a run of the study: max_steps is chosen so that this one, at the speed of `like`, takes as long as that", None
    )
    quick: tuple[str, ...] = key("more overrides under --quick", ())


@dataclass(frozen=True, kw_only=True)
class Quick:
    """[quick]: the study at toy size, to see that all of it works; its numbers mean nothing."""

    runs: tuple[str, ...] = key("the runs to make; those they build on come too", ())
    seeds: tuple[int, ...] = key("in place of the study's", (0, 1))
    set: tuple[str, ...] = key("overrides of every run, after its own", ())


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """[[evaluation]]: an lm-eval task measured on runs, beside the held-out check that every run makes itself."""

    task: str = key("a task of evals/tasks, or one of lm-eval's")
    runs: tuple[str, ...] = key("the runs it is measured on")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """[[claim]]: a sentence, where it is from, and the test that decides it (papers/expression.py has its language)."""

    name: str = key("how it is referred to: lower case, digits and hyphens")
    say: str = key("the claim in words")
    source: str = key("the paper it is from, with section or figure")
    test: str = key('e.g. "accuracy(a) - accuracy(b) > -0.02 at 95 %"')


@dataclass(frozen=True, kw_only=True)
class Table:
    """[[table]]: rows are runs, columns are expressions of one run, written `x`."""

    name: str = key("file name below tables/")
    caption: str = key("one sentence")
    runs: tuple[str, ...] = key("the rows")
    columns: dict[str, str] = field(default_factory=dict, metadata=about('title -> expression, e.g. "accuracy(x)"'))


@dataclass(frozen=True, kw_only=True)
class Figure:
    """[[figure]]: points with intervals of an expression over runs, or a logged value along training."""

    name: str = key("file name below figures/")
    caption: str = key("one sentence")
    runs: tuple[str, ...] = key("what is drawn")
    y: tuple[str, ...] = key("an expression of a run `x` (points), or names logged in metrics.jsonl (curves)")
    x: str | None = key("a name logged in metrics.jsonl, `step`, or `sqrt(kl)`; unset = points, one a run", None)
    ylabel: str = key("the axis in words")
    xlabel: str = key("the axis in words", "")


@dataclass(frozen=True, kw_only=True)
class Study:
    """The whole file. `path` is papers/<slug>/paper.toml."""

    path: Path
    title: str = key("the title of the report")
    question: str = key("what is asked, in one sentence")
    seeds: tuple[int, ...] = key("seeds of every run that names none", (0, 1, 2, 3, 4))
    set: tuple[str, ...] = key("overrides of every run, before its own", ())
    metrics: tuple[str, ...] = key(
        "names in metrics.jsonl that are kept of each run, beside step and wall_s", ("reward",)
    )
    quick: Quick = field(default_factory=Quick)
    runs: tuple[RunSpec, ...] = field(default=(), metadata={"toml": "run"})
    evaluations: tuple[Evaluation, ...] = field(default=(), metadata={"toml": "evaluation"})
    claims: tuple[Claim, ...] = field(default=(), metadata={"toml": CLAIMS})
    tables: tuple[Table, ...] = field(default=(), metadata={"toml": "table"})
    figures: tuple[Figure, ...] = field(default=(), metadata={"toml": "figure"})

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def slug(self) -> str:
        return self.path.parent.name

    def run(self, name: str) -> RunSpec:
        """The run of this name with what it inherits from `like` filled in."""
        spec = next(spec for spec in self.runs if spec.name == name)
        if spec.like is None:
            return spec
        start = self.run(spec.like)
        given: dict[str, Any] = {**vars(spec)}
        given["config"] = spec.config or start.config
        given["set"] = (*start.set, *spec.set)
        given["quick"] = (*start.quick, *spec.quick)
        given["seeds"] = spec.seeds if spec.seeds is not None else start.seeds
        given["builds_on"] = {**start.builds_on, **spec.builds_on}
        return RunSpec(**given)

    def label(self, name: str) -> str:
        """How a run is called where people read."""
        return next(spec for spec in self.runs if spec.name == name).label or name


def find(root: Path, text: str) -> Path:
    """The paper.toml that "papers/<slug>", "<slug>" or the file itself means. UserError where there is none."""
    slug = Path(text).parent.name if Path(text).name == FILE else Path(text).name
    path = root / "papers" / slug / FILE
    if not path.is_file():
        known = slugs(root)
        raise UserError(f"papers/{slug}: no study; {nearest(slug, known) if known else 'there is none yet'}")
    return path


def slugs(root: Path) -> list[str]:
    """The studies there are."""
    return sorted(path.parent.name for path in (root / "papers").glob(f"*/{FILE}"))


def load(path: Path, root: Path) -> Study:
    """Read and check a study; its configs are loaded too. UserError names file, table, key and what is valid."""
    shown = path.relative_to(root) if path.is_relative_to(root) else path
    source = Source(str(shown))
    study = read(Study, read_toml(path), source, also={"path": path})
    _check_names(study, source)
    for number, spec in enumerate(study.runs):
        _check_run(study, spec, source, number)
    known = {spec.name for spec in study.runs}
    users = [("quick", None, study.quick.runs)]
    for kind, entries in (
        ("evaluation", study.evaluations),
        ("table", study.tables),
        ("figure", study.figures),
    ):
        users += [(kind, number, entry.runs) for number, entry in enumerate(entries)]
    for kind, number, names in users:
        for name in names:
            if name not in known:
                where = (kind, "runs") if number is None else (kind, number, "runs")
                raise source.error(where, f"found '{name}', {nearest(name, known)}")
    return study


def _check_names(study: Study, source: Source) -> None:
    """Every name in its form, and once."""
    for kind, entries in (
        ("run", study.runs),
        (CLAIMS, study.claims),
        ("table", study.tables),
        ("figure", study.figures),
    ):
        seen: set[str] = set()
        for number, entry in enumerate(entries):
            if not NAME.fullmatch(entry.name):
                raise source.error(
                    (kind, number, "name"), f"found '{entry.name}', valid: lower case, digits, single hyphens"
                )
            if entry.name in seen:
                raise source.error((kind, number, "name"), f"found '{entry.name}' twice, valid: each name once")
            seen.add(entry.name)


def _check_run(study: Study, spec: RunSpec, source: Source, number: int) -> None:
    """What a run refers to is there, and stands before it: so there is no circle."""
    earlier = [other.name for other in study.runs[:number]]
    named = {"like": spec.like, "as_long_as": spec.as_long_as}
    named |= {f"builds_on.{role}": name for role, name in spec.builds_on.items()}
    for where, name in named.items():
        if name is not None and name not in earlier:
            hint = nearest(name, earlier) if earlier else "this is the first run"
            raise source.error(("run", number, where), f"found '{name}', valid: a run that stands before; {hint}")
    if spec.config is None and spec.like is None:
        raise source.error(("run", number, "config"), "missing, valid: a config, or `like` a run that has one")
    if spec.as_long_as is not None and spec.like is None:
        raise source.error(("run", number, "as_long_as"), "needs `like`, the run whose speed tells how many steps")
