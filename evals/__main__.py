"""`python -m evals [RUN ...]`: measure finished runs, then build the tables. `nox -s eval -- ...` runs it."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from evals import measure, published, runs, table
from rl.config_read import nearest
from rl.errors import RunFailed, UserError

ROOT = Path(__file__).resolve().parent.parent


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m evals",
        description="Measure finished runs with lm-eval, beside the model each started from, and write "
        "evals/tables/results.md. `python -m evals table` only builds the tables again; `publish RUN ...`, `published` "
        "and `check` keep evals/published/, what is committed for readers (each has its own --help).",
    )
    made.add_argument("runs", nargs="*", metavar="RUN", help="names in models/final; all when none is given")
    made.add_argument("--tasks", default="heldout", help="task names, separated by commas (default: heldout)")
    made.add_argument("--limit", type=_positive, metavar="N", help="ask only the first N questions")
    made.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="sequences at once (default: 32)")
    made.add_argument("--device", choices=["auto", "mps", "cuda", "cpu"], default="auto")
    made.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="default: float32")
    made.add_argument("--again", action="store_true", help="measure again what is up to date")
    made.add_argument("--list", action="store_true", help="list runs and tasks, and measure nothing")
    return made


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> None:
    """Run the command line. Raises UserError for a wrong name or a broken file, before anything is written."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in published.COMMANDS:
        published.main(argv, root)
        return
    args = parser().parse_args(argv)
    console = Console()
    if args.list:
        _list(console, root)
        return
    if args.runs != ["table"]:
        wanted = [runs.load(root, name) for name in args.runs or _all(root)]
        tasks = [_task(name) for name in args.tasks.split(",")]
        # every run is looked at before the first is measured: a broken one costs no minutes
        jobs = [(run, subject, task) for run in wanted for subject in _checked(root, run) for task in tasks]
        settings = measure.Settings(
            device=args.device, dtype=args.dtype, batch_size=args.batch_size, limit=args.limit, again=args.again
        )
        for run, subject, task in jobs:
            name = run.name if subject.role == "run" else f"{run.name} (base)"
            console.print(f"{name} on {task} …", highlight=False)
            path, made = measure.measure(root, run, subject, task, settings)
            console.print(f"  {'wrote' if made else 'up to date:'} {path.relative_to(root)}", highlight=False)
    paths = table.build(root)
    _show(console, root)
    console.print(f"tables: {', '.join(str(path.relative_to(root)) for path in paths)}", highlight=False)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def _all(root: Path) -> list[str]:
    names = runs.finished(root)
    if not names:
        raise UserError("models/final holds no finished run; make one: nox -s train -- configs/grpo.toml")
    return names


def _task(name: str) -> str:
    if name not in measure.tasks():
        raise UserError(f"--tasks: unknown task {name!r}, {nearest(name, measure.tasks())}")
    return name


def _checked(root: Path, run: runs.Run) -> list[runs.Subject]:
    runs.heldout(run)
    return runs.subjects(root, run)


def _list(console: Console, root: Path) -> None:
    made = Table("run", "algorithm", "base", "held-out rows", title="models/final")
    for name in runs.finished(root):
        run = runs.load(root, name)
        config = run.record["config"]
        base = (run.record.get("base") or {}).get("id")
        made.add_row(
            name, str(config.get("trainer", {}).get("algorithm", "?")), str(base or "?"), str(len(runs.heldout(run)))
        )
    console.print(made)
    console.print(f"tasks: {', '.join(measure.tasks())}")


def _show(console: Console, root: Path) -> None:
    """The paired differences, which is what one ran this for; else the plain scores."""
    results = table.read(root)
    differences, unlike = table.compare(results)
    made = Table("run", "task")
    for column in ("metric", "n", "before", "after", "gain", "95 % interval"):
        made.add_column(column, no_wrap=True)
    for gain in differences:
        made.add_row(
            *(gain.run, gain.task, gain.metric, str(gain.n), f"{gain.before:.3f}", f"{gain.after:.3f}"),
            *(f"{gain.value:+.3f}", f"{gain.low:+.3f} … {gain.high:+.3f}"),
        )
    if differences:
        console.print(made)
    compared = {gain.run for gain in differences}
    for result in results:
        if result.role == "run" and result.run not in compared:
            scores = ", ".join(f"{row.metric} {row.value:.3f} ± {row.stderr:.3f}" for row in result.rows)
            why = "asked other questions than its start" if unlike else "its start is not here"
            console.print(f"{result.run}: {scores} (n = {result.rows[0].n}; {why})", highlight=False)


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)  # what transformers and PEFT have to settle between them
    try:
        main()
    except UserError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except RunFailed as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 1)
    except KeyboardInterrupt:
        sys.exit(130)
