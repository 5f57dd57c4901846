"""What can be asked: our own tasks, BIG-bench files that a user fetched, lm-eval's own by name. Imports nothing heavy.

lm-eval's index reads and parses 14,000 YAML files; the one here takes the names by pattern and is kept in build/.
"""

import difflib
import fnmatch
import glob
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from evals import bigbench
from rl.errors import UserError
from rl.files import sha256_file, sha256_json, write_text

TASKS = Path(__file__).parent / "tasks"
# what `load_dataset` reads from files that the task names itself
BUILDERS = ("json", "csv", "parquet", "text", "arrow", "pandas", "imagefolder", "audiofolder")
SAMPLED = re.compile(r"(.+)@(\d+)")  # a task of ours, asked so many times a question
MOST_SAMPLES = 1024
_KEY = re.compile(r"^[\"']?(task|group|class|tag|include)[\"']?:[ \t]*(.*(?:\n[ \t]*- .*)*)", re.MULTILINE)
_FUNCTION = re.compile(r"!function\s+([\w.]+)\.\w+")


@dataclass(frozen=True)
class Task:
    """One task by name: the YAML file it is built from, and for BIG-bench its data file.

    `samples` answers are drawn for each question, where there are more than one; else the answer is the greedy one.
    """

    name: str
    kind: Literal["ours", "bigbench", "lm-eval"]
    path: Path
    data: Path | None = None
    samples: int = 1

    @property
    def of_runs(self) -> bool:
        """Whether it asks the questions that each run kept, and so has none without a run."""
        return self.path.name == "heldout.yaml" and self.kind == "ours"

    @property
    def config(self) -> dict[str, Any]:
        """The YAML with what it includes; a function is its name, as text."""
        return _config(self.path)

    @property
    def sha256(self) -> str:
        """Digest of all that describes the task: YAML, what it includes, its functions' modules, BIG-bench's data."""
        parts: list[Any] = [_texts(self.path), sha256_file(self.data) if self.data else ""]
        if self.samples > 1:
            parts += [self.samples, (TASKS.parent / "stats" / "sampling.py").read_text(encoding="utf-8")]
        return sha256_json(parts)


@dataclass(frozen=True)
class Index:
    """lm-eval's names: tasks and groups with their YAML below the package, tags with their tasks."""

    tasks: dict[str, str] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    tags: dict[str, list[str]] = field(default_factory=dict)


def ours(root: Path) -> dict[str, Task]:
    """The tasks in evals/tasks/ and those of BIG-bench files in data/raw/bigbench/, by name."""
    found = {path.stem: Task(path.stem, "ours", path) for path in sorted(TASKS.glob("*.yaml"))}
    for name, (kind, file) in bigbench.tasks(root).items():
        found[name] = Task(name, "bigbench", TASKS / f"_bigbench_{kind}", file)
    return found


def find(root: Path, names: str) -> list[Task]:
    """The tasks that `names` (separated by commas) mean: tasks, groups, tags or patterns such as gym_*.

    NAME@8 is our task NAME (or pattern) with eight samples a question, for pass@k and majority@k.

    Raises:
        UserError: an unknown name, with the nearest ones; a group that changes its tasks; samples of another task.
    """
    known = ours(root)
    found: dict[str, Task] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        if several := SAMPLED.fullmatch(name):
            found |= {task.name: task for task in _sampled(root, several[1], int(several[2]))}
        elif name in known:
            found[name] = known[name]
        elif matching := fnmatch.filter(known, name):
            found |= {match: known[match] for match in matching}
        else:
            found |= {task.name: task for task in _lm_eval(root, name, known)}
    if not found:
        raise UserError("--tasks: no task given; `nox -s eval -- --list` shows them")
    return list(found.values())


def missing(task: Task) -> str | None:
    """What data the task lacks on this machine and how to get it, None where nothing does; asks no network."""
    if task.kind != "lm-eval":
        return None
    config = task.config
    source, subset = config.get("dataset_path"), config.get("dataset_name")
    if not isinstance(source, str) or "custom_dataset" in config or Path(source).is_dir():
        return None
    options = config.get("dataset_kwargs") or {}
    if source in BUILDERS:
        lost = [name for name in _files(options.get("data_files")) if "://" not in name and not Path(name).is_file()]
        return f"file {lost[0]} is missing: put it there, relative to the folder the command runs in" if lost else None
    if cached(source, subset):
        return None
    folder = datasets_cache() / _cache_name(source)
    given = f"'{source}'" + (f", '{subset}'" if subset else "")
    return (
        f"data set {source}{f' ({subset})' if subset else ''} is not on this machine: where the hub can be reached run "
        f'`.venv/bin/python -c "import datasets; datasets.load_dataset({given})"` and bring {_home(folder)} here'
    )


def cached(source: str, subset: str | None) -> list[Path]:
    """The folders of the data set in the cache of `datasets`, newest last; only of the subset where one is named."""
    folder = datasets_cache() / _cache_name(source)
    made = folder.glob(f"{glob.escape(subset) if subset else '*'}/*/*/dataset_info.json")
    return [path.parent for path in sorted(made, key=lambda path: path.stat().st_mtime)]


def size(task: Task) -> int | None:
    """How many questions the task asks, None where only its data would tell and is not here."""
    if task.kind == "bigbench":
        return len(bigbench.read(task.data)["examples"]) if task.data else None
    config = task.config
    if task.kind == "ours":
        return (config.get("dataset_kwargs") or {}).get("questions")
    source, split = config.get("dataset_path"), config.get("test_split") or config.get("validation_split")
    folders = cached(source, config.get("dataset_name")) if isinstance(source, str) else []
    if not folders or not split:
        return None
    try:
        return json.loads((folders[-1] / "dataset_info.json").read_text())["splits"][split]["num_examples"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def metrics(task: Task) -> list[str]:
    """Names of the metrics as the YAML lists them, and where samples are drawn those over them."""
    more = [f"{what}@{k}" for k in ks(task.samples) for what in ("pass", "maj")]
    return more + [
        str(entry.get("metric")) for entry in task.config.get("metric_list") or [] if isinstance(entry, dict)
    ]


def _sampled(root: Path, name: str, samples: int) -> Iterator[Task]:
    for task in find(root, name):
        if task.kind != "ours":
            raise UserError(f"--tasks {task.name}@{samples}: samples are drawn for the tasks in evals/tasks/ alone")
        if not 2 <= samples <= MOST_SAMPLES:
            asked = f"--tasks {task.name}@{samples}"
            raise UserError(f"{asked}: valid are 2 to {MOST_SAMPLES} samples, or {task.name} for the greedy answer")
        yield replace(task, name=f"{task.name}@{samples}", samples=samples)


def ks(samples: int) -> list[int]:
    """The k of pass@k and maj@k: powers of two from 2 on, and the number of samples itself."""
    return sorted({2**power for power in range(1, samples.bit_length()) if 2**power <= samples} | {samples} - {1})


def datasets_cache() -> Path:
    """Where `datasets` keeps what it has loaded, by its own environment variables."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(home) / "datasets").expanduser()


def index(root: Path) -> Index:
    """lm-eval's names, from build/ where this version's were read before. Raises UserError without the package."""
    package = lm_eval_tasks()
    path = root / "build" / f"lm-eval-tasks-{version('lm-eval')}.json"
    try:
        return Index(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        pass
    made = Index()
    for file in sorted(package.rglob("*.yaml")):
        keys = _top(file)
        relative = file.relative_to(package).as_posix()
        if "group" in keys and "class" not in keys:
            made.groups.setdefault(keys["group"], relative)
        elif "task" in keys and keys["task"] not in made.tasks:
            made.tasks[keys["task"]] = relative
            for tag in _words(keys.get("tag", "")):
                made.tags.setdefault(tag, []).append(keys["task"])
    write_text(path, json.dumps(vars(made)))
    return made


def lm_eval_tasks() -> Path:
    """The folder of lm-eval's task files. Raises UserError when the package is not installed."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise UserError("lm-eval is not installed: run `uv sync --locked`")
    return Path(spec.origin).parent / "tasks"


def _lm_eval(root: Path, name: str, known: dict[str, Task]) -> Iterator[Task]:
    """The tasks lm-eval means by a name or pattern of tasks; groups and tags are opened, each task once."""
    names = index(root)
    if name in names.tasks:
        yield Task(name, "lm-eval", lm_eval_tasks() / names.tasks[name])
    elif name in names.groups:
        for member in _config(lm_eval_tasks() / names.groups[name]).get("task") or []:
            if not isinstance(member, str):
                raise UserError(f"--tasks: group '{name}' changes the settings of its tasks; name the tasks instead")
            yield from _lm_eval(root, member, known)
    elif name in names.tags:
        for member in names.tags[name]:
            yield from _lm_eval(root, member, known)
    elif any(letter in name for letter in "*?[") and (matching := fnmatch.filter(names.tasks, name)):
        for member in matching:
            yield from _lm_eval(root, member, known)
    else:
        every = [*known, *names.tasks, *names.groups, *names.tags]
        near = difflib.get_close_matches(name, every, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"valid are {', '.join(known)}"
        more = bigbench.hint(name)
        raise UserError(f"--tasks: unknown task {name!r}, {more or hint} (`nox -s eval -- --list` shows all)")


@cache
def _top(file: Path) -> dict[str, str]:
    """Top-level keys of a task file that name things, as written; its own go before those of the files it includes."""
    own: dict[str, str] = {}
    for key, value in _KEY.findall(file.read_text(encoding="utf-8")):
        own.setdefault(key, re.sub(r"(?:^|\s)#.*", "", value).strip("\"' \t"))
    found: dict[str, str] = {}
    for name in _words(own.pop("include", "")):
        if (file.parent / name).is_file():
            found |= _top((file.parent / name).resolve())
    return found | own


def _words(text: str) -> list[str]:
    """The words of a YAML value: one, or a list in either form."""
    return re.findall(r"[^\s\[\],\"'-][^\s\[\],\"']*", text)


@cache
def _config(path: Path) -> dict[str, Any]:
    """A task's YAML; keys of the file itself go before those it includes."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: str(node.value))
    try:
        own = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(own, dict):
        raise UserError(f"{path}: not a task: the file must hold keys such as task, doc_to_text")
    merged: dict[str, Any] = {}
    for name in _list(own.pop("include", None)):
        merged |= _config(path.parent / name)
    return merged | own


def _texts(path: Path) -> dict[str, str]:
    """Name -> text of the file, of what it includes, and of the Python files beside it that its functions are in."""
    import yaml

    text = path.read_text(encoding="utf-8")
    found = {path.name: text}
    for line in re.findall(r"^include:.*(?:\n[ \t]*-.*)*", text, re.MULTILINE):
        for name in _list(yaml.safe_load(line)["include"]):
            found |= _texts(path.parent / name)
    for module in _FUNCTION.findall(text):
        file = path.parent / f"{module.replace('.', '/')}.py"
        if file.is_file():
            found[file.name] = file.read_text(encoding="utf-8")
    return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _files(value: Any) -> list[str]:
    """All names in `data_files`, which may be a name, a list, or either by split."""
    if isinstance(value, dict):
        return [name for entry in value.values() for name in _files(entry)]
    return [str(name) for name in _list(value)]


def _cache_name(source: str) -> str:
    """The folder that `datasets` gives a hub id: "Org/MyData" -> "Org___my_data"."""
    *owner, name = source.split("/")
    name = re.sub(r"([a-z\d])([A-Z])", r"\1_\2", re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)).lower()
    return "___".join([*owner, name])


def _home(path: Path) -> str:
    """A path with the user's own folder as ~: such lines end in bug reports."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)
