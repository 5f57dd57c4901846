"""What is committed for readers: records of finished runs in evals/published/runs/, and tables made from them alone.

lm-eval's results go with them (`evals.published_evals`), also those of models that are no run.

`python -m evals publish RUN ...` copies runs there, `published` makes the tables again, byte for byte the same, and
`check` says whether they still follow from the files. An *experiment* is a run's name without `-seed<N>`.
"""

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evals import published_evals, runs, tables_read
from evals.published_table import AGAIN, INTRO, fill, groups, section, seeds
from rl import files, record, report
from rl.config.reading import nearest
from rl.errors import UserError

COMMANDS = ("publish", "published", "check")
COPIED = ("run.json", "metrics.jsonl", "curves.png", "samples.jsonl")
SEED = re.compile(r"-seed\d+$")
# a place on some machine: absolute, home or Windows; what every Unix has (lm-eval names libraries there) is none
PLACE = re.compile(
    r"(?<![\w.~<>{}\])/-])/(?!(?:usr|lib\w*|etc|proc|dev|sys|bin)/)[\w.+-]+(?:/[\w.+-]+)+"
    r"|(?<![\w.])~/\w[\w./+-]*|file:/+\S+|\b[A-Za-z]:\\\w\S*"
)
FOLDERS = {"base", "id", "path", "heldout_path", "from", "reference"}  # here also `/model` alone is one


@dataclass(frozen=True)
class Published:
    """One run as it is published: `run` is its record under the published name, `raw` its run.json as an object."""

    run: record.Record
    raw: dict[str, Any]
    folder: Path
    note: str
    answers: tuple[str, ...]
    results: Path  # folder of lm-eval's results, which need not be there
    measured: tuple[Path, ...]  # those results, relative to it

    @property
    def experiment(self) -> str:
        return SEED.sub("", self.run.name)


# --- reading


def read(root: Path) -> list[Published]:
    """All published runs, by experiment and seed. Raises UserError for one that is broken or contradicts itself."""
    folders = sorted(path.parent for path in (root / "evals" / "published" / "runs").glob("*/run.json"))
    found = [_load(folder, folder.name, folder / "results") for folder in folders if not folder.name.startswith(".")]
    return sorted(found, key=lambda one: (one.experiment, one.run.seed, one.run.name))


def _load(folder: Path, name: str, results: Path, tasks: Sequence[str] = ()) -> Published:
    """A run's folder, checked: finished, measured, whole, its scores those of its samples, no place of a machine.

    tasks: the results that go with it, where given; else all.
    """
    path = folder / "run.json"
    run, raw = record.read(folder), runs.read_json(path, "train the run again")
    if run.status != "finished":
        raise UserError(f"{path}: status is {run.status!r}, only a finished run is published; train it to the end")
    missing = [file for file in COPIED if not (folder / file).is_file()]
    if missing:
        raise UserError(f"{folder}: {', '.join(missing)} missing; copy the whole folder of the run, weights aside")
    if not record.read_metrics(folder / "metrics.jsonl"):
        raise UserError(f"{folder / 'metrics.jsonl'}: no step in it; copy it again from the run's folder")
    # the command decides nothing and is in no hash: what stands before configs/ is only where the checkout was
    raw["command"] = run.command and re.sub(r"(?<!\S)/\S*/(?=configs/)", "", run.command)
    answers = _answers(folder / "samples.jsonl", path, run)
    _check_places(path, raw)
    measured = _measured(results, tasks)
    note = (folder / "note.md").read_text(encoding="utf-8").strip() if (folder / "note.md").is_file() else ""
    return Published(replace(run, name=name, command=raw["command"]), raw, folder, note, answers, results, measured)


def _measured(results: Path, tasks: Sequence[str]) -> tuple[Path, ...]:
    """Result files relative to their folder, those of `tasks` where given; UserError for one that names a place."""
    found = tables_read.result_files(results)
    for task in tasks:
        if task not in (known := {path.stem for path in found}):
            asked = f"--tasks {task}: no result of it in {results}"
            raise UserError(f"{asked}; {nearest(task, known)}" if known else f"{asked}; measure it first: nox -s eval")
    found = [path for path in found if not tasks or path.stem in tasks]
    for path in found:
        _check_places(path, runs.read_json(path, "measure again"))
    return tuple(sorted(path.relative_to(results) for path in found))


def _answers(samples: Path, path: Path, run: record.Record) -> tuple[str, ...]:
    """The held-out answers. Raises UserError unless run.json's strict scores are those of the samples beside it."""
    try:
        rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
        marks = [[float(row["right"][i]) for row in rows] for i in range(2)]
        answers = tuple(str(row["answer"]) for row in rows)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{samples}: not what a run writes ({error!r}); copy it again from the run's folder") from None
    try:
        result: Any = run.result
        for metric in report.METRICS:
            _ = report.plus_minus(result[metric]["before"]), report.interval(result[metric]["difference"])
            _ = report.plus_minus(result[metric]["after"]), result[metric]["after"]["n"]
        _ = f"{result['wellformed']['before']:.3f} {result['wellformed']['after']:.3f} {result['metric']}"
        strict = result["strict"]
        said = (
            strict["before"]["value"],
            strict["after"]["value"],
            strict["difference"]["value"],
            strict["after"]["n"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: `result` is no measurement ({error!r}); train the run to its end") from None
    if not rows:
        raise UserError(f"{samples}: no rows; copy it again from the run's folder")
    means = [sum(column) / len(column) for column in marks]
    counted = (*means, means[1] - means[0], len(rows))
    if any(abs(a - b) > 1e-9 for a, b in zip(said, counted, strict=True)):
        raise UserError(
            f"{path}: strict {said[0]:.4f} → {said[1]:.4f} on {said[3]} questions, but {samples.name} has "
            f"{means[0]:.4f} → {means[1]:.4f} on {len(rows)}; copy both again from the run's folder"
        )
    return answers


def _check_places(path: Path, value: Any) -> None:
    """Raise UserError where a JSON file's value names a place on some machine."""
    if place := _place(value):
        raise UserError(
            f"{path}: {place[0]} names {place[1]!r}, a place on one machine; "
            "name it relative to the repository's folder and make the run again from there"
        )


def _place(value: Any, key: str = "") -> tuple[str, str] | None:
    """The first (key, text) in a JSON value that names a place on some machine."""
    if isinstance(value, dict):
        children = [(f"{key}.{name}".lstrip("."), child) for name, child in value.items()]
    elif isinstance(value, list):
        children = [(f"{key}[{number}]", child) for number, child in enumerate(value)]
    else:
        found = PLACE.search(value) if isinstance(value, str) else None
        if found is None and isinstance(value, str) and key.rpartition(".")[2] in FOLDERS:
            found = re.fullmatch(r"/.*", value)
        return (key, found[0]) if found else None
    return next((found for name, child in children if (found := _place(child, name))), None)


# --- publishing


def publish(
    root: Path,
    names: Sequence[str],
    source: Path | None = None,
    alias: str | None = None,
    note: str | None = None,
    tasks: Sequence[str] = (),
) -> list[Path]:
    """Copy finished runs from models/final (or `source`) into evals/published/runs/; the folders made.

    lm-eval's results go with them, all or those of `tasks`. A name that is no run but has results (a hub model) goes to
    evals/published/results/. `alias` replaces the experiment's name and keeps each `-seed<N>`. What is published under
    the same name is replaced whole, the note kept unless another (or an empty one) is given. Raises UserError, with
    nothing written, for a run that is unfinished or not whole, or that differs from its experiment's others in more
    than the seed, and for results that make no table with the published ones.
    """
    if alias is not None and (not re.fullmatch(r"\w[\w.-]*", alias) or SEED.search(alias)):
        raise UserError(
            f"--as {alias}: name an experiment: letters, digits, `.`, `_`, `-`, without -seed<N> at its end"
        )
    others = [name for name in dict.fromkeys(names) if source is None and _only_measured(root, name)]
    if others and (alias is not None or note is not None):
        raise UserError(f"{others[0]}: no run but a measured model, which has neither --as nor --note; leave them out")
    new: dict[str, Published] = {}
    for folder in [_source(root, name, source) for name in names if name not in others]:
        suffix = SEED.search(folder.name)
        target = folder.name if alias is None else alias + (suffix[0] if suffix else "")
        if target in new:
            raise UserError(f"{target}: two of the runs named would be published under this name; publish one of them")
        results = root / "evals" / "results" / folder.name if source is None else folder / "results"
        new[target] = _load(folder, target, results, tasks)
        if source is None and new[target].measured:
            _same_weights(root, folder.name, new[target])
    folders = {name: root / "evals" / "results" / name for name in others}
    bare = {name: (folder, _measured(folder, tasks)) for name, folder in folders.items()}
    _check_results(root, {**bare, **{name: (one.results, one.measured) for name, one in new.items()}})
    kept = read(root)
    together = [one for one in kept if one.run.name not in new] + list(new.values())
    try:
        for experiment in sorted({one.experiment for one in new.values()}):
            seeds([one for one in together if one.experiment == experiment])
    except UserError as error:
        raise UserError(f"{error}; or publish it as another experiment: --as NAME") from None
    fill(_readme(root), together)  # a broken README is found before anything is copied
    notes = {one.run.name: one.note for one in kept}
    made = [_copy(root, one, notes.get(name, one.note) if note is None else note) for name, one in new.items()]
    for name, (folder, measured) in bare.items():
        made.append(root / "evals" / "published" / "results" / name)
        _write_folder(made[-1], published_evals.packed(folder, measured))
    build(root)
    return made


def _source(root: Path, name: str, source: Path | None) -> Path:
    parent = source or root / "models" / "final"
    folder = parent / Path(name).name
    if (folder / "run.json").is_file():
        return folder
    begun = root / "models" / "checkpoints" / folder.name
    if source is None and (begun / "run.json").is_file():
        raise UserError(
            f"{begun.relative_to(root)}: status is {record.read(begun).status!r}, not finished; go on with --resume"
        )
    known = sorted(path.parent.name for path in parent.glob("*/run.json") if not path.parent.name.startswith("."))
    where = parent.relative_to(root) if parent.is_relative_to(root) else parent
    raise UserError(f"{where}: no run {folder.name!r}; {nearest(folder.name, known) if known else 'it holds no run'}")


def _only_measured(root: Path, name: str) -> bool:
    """Whether a name has results, and no run here or among the published ones goes by it."""
    runs_ = [root / "models" / part / name for part in ("final", "checkpoints")]
    runs_.append(root / "evals" / "published" / "runs" / name)
    if Path(name).name != name or any((folder / "run.json").is_file() for folder in runs_):
        return False
    return bool(tables_read.result_files(root / "evals" / "results" / name))


def _check_results(root: Path, new: dict[str, tuple[Path, tuple[Path, ...]]]) -> None:
    """Raise UserError unless `new` results (folder and files by name) make tables with the published ones that stay."""
    found = [(name, path) for name, path in published_evals.files(root) if name not in new]
    found += [(name, folder / path) for name, (folder, measured) in new.items() for path in measured]
    published_evals.check(found)


def _same_weights(root: Path, name: str, one: Published) -> None:
    """Raise UserError when a result was measured on other weights: a run made anew keeps its name."""
    digests = {subject.role: runs.weights_sha256(subject) for subject in runs.subjects(root, runs.load(root, name))}
    for path in one.measured:
        made = runs.read_json(one.results / path, "measure again").get("duet", {})
        if made.get("weights_sha256") != digests.get(made.get("role")):
            raise UserError(f"{one.results / path}: measured on other weights than {name} has; nox -s eval -- {name}")


def _copy(root: Path, one: Published, note: str) -> Path:
    """One run into its folder."""
    final = root / "evals" / "published" / "runs" / one.run.name
    content = {Path(file): (one.folder / file).read_bytes() for file in COPIED}
    if json.loads(content[Path("run.json")]) != one.raw:
        content[Path("run.json")] = (json.dumps(one.raw, indent=2, ensure_ascii=False) + "\n").encode()
    content |= {"results" / path: text for path, text in published_evals.packed(one.results, one.measured).items()}
    if note.strip():
        content[Path("note.md")] = f"{' '.join(note.split())}\n".encode()
    _write_folder(final, content)
    return final


def _write_folder(final: Path, content: dict[Path, bytes]) -> None:
    """A folder of these files, which appears whole: written beside it under a hidden name, then renamed."""
    stage, old = final.with_name(f".{final.name}.tmp"), final.with_name(f".{final.name}.old.tmp")
    shutil.rmtree(stage, ignore_errors=True)
    try:
        for path, text in content.items():
            files.write_bytes(stage / path, text)
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        stage.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


# --- tables


def outputs(root: Path) -> tuple[dict[Path, str], list[str]]:
    """Every generated file's text by path, and the README's blocks that no published run belongs to.

    Raises UserError for a broken published run or README block.
    """
    found = read(root)
    made = published_evals.texts(root)
    about = [published_evals.ABOUT] if made else []
    benches = published_evals.bench_texts(root)
    about += [published_evals.bench_about(benches)] if benches else []
    made |= benches
    path = root / "evals" / "published" / "README.md"
    if found or made or path.exists():
        made[path] = "\n".join([INTRO, *(section(group) for group in groups(found)), *about])
    text, unmatched = fill(_readme(root), found)
    if text:
        made[root / "README.md"] = text
    return made, unmatched


def build(root: Path) -> list[Path]:
    """Write the generated files that are not as they should be; their paths."""
    stale = _stale(root)
    for path, text in stale.items():
        if text is None:
            path.unlink()
        else:
            files.write_text(path, text)
    return list(stale)


def _stale(root: Path) -> dict[Path, str | None]:
    """What generated files should hold and do not; None for a table that should not be there."""
    made = outputs(root)[0]
    stale: dict[Path, str | None] = {
        path: text for path, text in made.items() if not path.is_file() or path.read_bytes() != text.encode()
    }
    tables = sorted((root / "evals" / "published" / "tables").glob("[!.]*"))
    return stale | dict.fromkeys(path for path in tables if path not in made)


def check(root: Path) -> int:
    """The number of published runs. Raises UserError naming the generated files that do not follow from them."""
    if stale := [str(path.relative_to(root)) for path in _stale(root)]:
        raise UserError(f"{', '.join(stale)}: not what the published runs and results give; {AGAIN}")
    return len(read(root))


def _readme(root: Path) -> str:
    path = root / "README.md"
    return path.read_bytes().decode() if path.is_file() else ""


# --- command line


def parser(command: str) -> argparse.ArgumentParser:
    """The command line of one of `COMMANDS`."""
    about = {
        "publish": "Copy finished runs into evals/published/, weights aside, and make the tables again.",
        "published": "Make evals/published/README.md and the README's blocks again from the published files alone.",
        "check": "Say whether the published tables still follow from the published files; exit 2 when not.",
    }
    made = argparse.ArgumentParser(prog=f"python -m evals {command}", description=about[command])
    if command == "publish":
        made.add_argument(
            "runs", nargs="+", metavar="RUN", help="names in models/final, or of other measured models in evals/results"
        )
        made.add_argument("--from", dest="source", type=Path, metavar="DIR", help="folder that holds the runs' folders")
        made.add_argument(
            "--tasks", default="", metavar="A,B", help="lm-eval's results to publish with them (default: all there are)"
        )
        made.add_argument(
            "--as", dest="alias", metavar="NAME", help="the experiment's published name, without -seed<N>"
        )
        made.add_argument("--note", metavar="TEXT", help="a sentence under the table, kept until another is given")
    return made


def main(argv: Sequence[str], root: Path) -> None:
    """Run `publish`, `published` or `check`. Raises UserError for anything that is not as it should be."""
    command, *rest = argv
    args = parser(command).parse_args(rest)
    if command == "publish":
        tasks = [task for task in args.tasks.split(",") if task]
        for path in publish(root, args.runs, args.source, args.alias, args.note, tasks):
            print(f"published: {path.relative_to(root)}")
    if command == "published":
        print(
            f"wrote: {', '.join(str(path.relative_to(root)) for path in build(root)) or 'nothing, all is up to date'}"
        )
    print(f"the tables follow from {check(root)} published runs")
    for name in outputs(root)[1]:
        print(f"README.md: no published run belongs to the block {name!r}")
