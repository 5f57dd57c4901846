"""`python -m evals [MODEL ...]`: measure, then build the tables. `nox -s eval -- ...` runs it."""

import argparse
import importlib
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from evals import catalog, harness, measure, published, runs
from rl.arguments import count
from rl.display import Display
from rl.errors import RunFailed, UserError

ROOT = Path(__file__).resolve().parent.parent
# word -> module whose main(argv, root) does it
COMMANDS = dict.fromkeys(published.COMMANDS, "published")
COMMANDS |= {"table": "table", "compare": "compare", "plot": "plot", "bench": "bench", "fetch": "bigbench"}
COMMANDS |= {"study": "study"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m evals",
        description="Measure models with lm-eval and write evals/tables/. A run of models/final is measured beside the "
        "model it started from. What was measured before with the same weights, task and settings is not measured "
        "again, and a killed measurement goes on where it stopped.",
        epilog=f"Other commands, each with its own --help: {', '.join(sorted(COMMANDS))}.",
    )
    made.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="a run in models/final, a model folder or a hub id (org/name); all runs when none is given",
    )
    made.add_argument(
        "--tasks",
        help="tasks, groups or patterns, separated by commas: ours (--list) or lm-eval's by name; TASK@8 draws "
        "8 samples a question for pass@k and majority@k (ours); default: heldout for runs, sums for other models",
    )
    made.add_argument("--limit", type=count, metavar="N", help="ask only the first N questions of each task")
    made.add_argument(
        "--backend",
        choices=["auto", "mlx", "hf"],
        default="auto",
        help="auto: mlx where the engine knows the family and no --device is given, else hf",
    )
    made.add_argument("--batch-size", type=count, default=32, metavar="N", help="sequences at once (default: 32)")
    made.add_argument("--device", choices=["auto", "mps", "cuda", "cpu"], default="auto", help="of the hf backend")
    made.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="default: float32")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="of what lm-eval draws (default: 0)")
    made.add_argument("--again", action="store_true", help="measure again what is up to date")
    made.add_argument("--list", action="store_true", help="list runs and tasks (of lm-eval's those of --tasks)")
    return made


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> None:
    """Run the command line. Raises UserError for a wrong name or a broken file, before anything is measured."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        given = argv if COMMANDS[argv[0]] == "published" else argv[1:]
        importlib.import_module(f"evals.{COMMANDS[argv[0]]}").main(given, root)
        return
    args = parser().parse_args(argv)
    console = Console()
    if args.list:
        _list(console, root, args.tasks)
        return
    settings = measure.Settings(
        backend=args.backend,
        device=args.device,
        dtype=args.dtype,
        batch_size=args.batch_size,
        limit=args.limit,
        seed=args.seed,
        again=args.again,
    )
    # all is looked at before the first is measured: a broken one costs no minutes
    chosen = catalog.find(root, args.tasks) if args.tasks is not None else None
    known = catalog.ours(root)
    jobs = []
    for target in [runs.target(root, name) for name in args.models or _all(root)]:
        tasks = chosen if chosen is not None else [known["heldout" if target.run else "sums"]]
        jobs += [measure.job(root, target, subject, task, settings) for subject in target.subjects for task in tasks]
    _run(root, jobs, settings)
    from evals import table

    table.main([], root)


def _run(root: Path, jobs: list[measure.Job], settings: measure.Settings) -> None:
    """Measure what is not there yet; a model stays loaded for all its tasks."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # of packages that are imported from here on
    display = Display()
    loaded, holds = None, None
    checked: set[str] = set()
    for todo in jobs:
        done = measure.kept(root, todo, settings)
        where = todo.path.relative_to(root)
        if done:
            how = "up to date:" if done == "up to date" else "same weights, task and settings were measured, copied to"
            display.note(f"{todo.title}: {how} {where}")
            continue
        if todo.task.name not in checked:
            harness.ensure_data(todo.task)
            checked.add(todo.task.name)
        if loaded is None or holds != (todo.target.name, todo.subject, todo.backend):
            loaded = None  # before the next comes in: both may not fit
            loaded, holds = measure.load(todo, settings), (todo.target.name, todo.subject, todo.backend)
        display.stage(f"{todo.title} ({todo.backend}, {loaded.device})")
        started = time.monotonic()
        done = measure.measure(
            root, todo, loaded, settings, lambda total: display.eval_progress(total, title="requests")
        )
        seconds = time.monotonic() - started
        display.note(f"{'went on, ' if done == 'resumed' else ''}wrote {where} ({seconds:.1f} s)")


def _all(root: Path) -> list[str]:
    names = runs.finished(root)
    if not names:
        raise UserError("models/final holds no finished run; make one: nox -s train -- configs/grpo.toml")
    return names


def _list(console: Console, root: Path, wanted: str | None) -> None:
    """Runs, then tasks with the number of questions, metrics, and whether their data is here."""
    made = Table("run", "algorithm", "base", "held-out rows", title="models/final", title_justify="left")
    for name in runs.finished(root):
        run = runs.load(root, name)
        config = run.record["config"]
        base = (run.record.get("base") or {}).get("id")
        made.add_row(
            name, str(config.get("trainer", {}).get("algorithm", "?")), str(base or "?"), str(len(runs.heldout(run)))
        )
    console.print(made)
    tasks = catalog.find(root, wanted) if wanted else list(catalog.ours(root).values())
    table = Table(title="tasks", title_justify="left")
    table.add_column("task", no_wrap=True)
    for column in ("questions", "metrics", "data"):
        table.add_column(column)
    for task in tasks:
        size, lost = catalog.size(task), catalog.missing(task)
        questions = "each run's" if task.of_runs else "–" if size is None else str(size)
        here = "each run keeps it" if task.of_runs else "here" if lost is None else "not here"
        table.add_row(task.name, questions, ", ".join(catalog.metrics(task)) or "lm-eval's default", here)
    console.print(table)
    names = catalog.index(root)
    console.print(
        f"and lm-eval's by name, {len(names.tasks)} tasks and {len(names.groups) + len(names.tags)} groups, where "
        "their data is here or can be fetched: --list --tasks 'arc_*' shows some\n"
        "BIG-bench, evaluate only: .venv/bin/python -m evals fetch bigbench:NAME",
        highlight=False,
        markup=False,
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)  # what transformers and PEFT have to settle between them
    try:
        main()
    except UserError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except RunFailed as error:
        sys.exit(print(f"failed: {error}", file=sys.stderr) or 1)
    except KeyboardInterrupt:
        sys.exit(print("interrupted", file=sys.stderr) or 130)
