"""`python -m evals table`: evals/tables/ from the files in evals/results/ alone; same files, same bytes."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from evals import tables_read, tables_text
from evals.tables_read import Result, read
from evals.tables_rows import compare
from rl.files import write_text

__all__ = ["Result", "build", "compare", "main", "read", "show"]
PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}
NAMES = ("results.md", "results.csv", "results.tex", "results.json", "seeds.csv", "seeds.tex")


def build(root: Path, names: Sequence[str] = (), tasks: Sequence[str] = (), folder: Path | None = None) -> list[Path]:
    """Write the tables of all results, or of those named, to evals/tables/ or `folder`; their paths.

    Raises UserError, with nothing written, for a broken file and for two versions of one task.
    """
    results = read(root, names, tasks)
    tables_read.check_versions(results)
    texts = tables_text.files(tables_text.tables(results), lambda path: path.relative_to(root).as_posix())
    folder = folder or root / "evals" / "tables"
    for name, text in texts.items():
        write_text(folder / name, text)
    for name in set(NAMES) - texts.keys():  # what an earlier set of results had
        (folder / name).unlink(missing_ok=True)
    return [folder / name for name in texts]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m evals table",
        description="Write results.{md,csv,tex,json} and, where runs differ in their seed alone, seeds.{csv,tex} from "
        "the files in evals/results/.",
    )
    made.add_argument("runs", nargs="*", metavar="RUN", help="names in evals/results; all when none is given")
    made.add_argument("--task", "--tasks", default="", metavar="A,B", help="these tasks alone")
    made.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: evals/tables)")
    return made


def main(argv: Sequence[str], root: Path) -> None:
    """Write the tables and show the gist. Raises UserError as `build`."""
    args = parser().parse_args(list(argv))
    names, tasks = [Path(name).name for name in args.runs], [task for task in args.task.split(",") if task]
    paths = build(root, names, tasks, args.out)
    console = Console()
    show(console, read(root, names, tasks))
    shown = [str(path.relative_to(root) if path.is_relative_to(root) else path) for path in paths]
    console.print(f"tables: {', '.join(shown)}", **PLAIN)


def show(console: Console, results: Sequence[Result]) -> None:
    """A line for each paired difference, which is what one ran this for; else the plain scores."""
    differences, unlike = compare(results)
    for gain in differences:
        bounds = tables_text.interval(gain.value, gain.low, gain.high, "+.3f")
        console.print(
            f"{gain.run} on {gain.task}, {gain.metric}: {gain.before:.3f} → {gain.after:.3f}, {bounds}, "
            f"p {tables_text.p_value(gain.p_holm)} (n = {gain.n})",
            **PLAIN,
        )
    compared = {(gain.run, gain.task) for gain in differences}
    for result in results:
        if result.role == "run" and (result.run, result.task) not in compared:
            scores = ", ".join(f"{row.metric} {row.value:.3f} ± {row.stderr:.3f}" for row in result.rows)
            other = f"{result.run} on {result.task}" in unlike
            why = "asked other questions than its start" if other else "its start is not here"
            console.print(f"{result.run} on {result.task}: {scores} (n = {result.rows[0].n}; {why})", **PLAIN)
