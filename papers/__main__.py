"""`python -m papers`: make a study's runs, check its claims, build its report. `nox -s paper -- ...` runs it.

Exit codes: 0 done, 1 a run failed or time was up, 2 bad input (one line), 130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rl.arguments import count
from rl.errors import RunFailed, UserError

if TYPE_CHECKING:
    from papers.results import Kept
    from papers.runner import Settings
    from papers.study import Study

ROOT = Path(__file__).resolve().parent.parent


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run one command; returns the exit code (argparse itself exits with 2)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        commands = {"run": _run, "new": _new, "index": _index}
        if argv and argv[0] in commands:
            return commands[argv[0]](argv[1:], root)
        return _paper(argv, root)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _paper(argv: Sequence[str], root: Path) -> int:
    """Make what is missing, judge the claims, set the report, renew the index."""
    from papers import claims, study

    made = argparse.ArgumentParser(
        prog="python -m papers",
        description="Make a study's missing runs, judge its claims and set its report. Other commands, each with "
        "its own --help: run, new, index.",
    )
    made.add_argument("study", metavar="STUDY", help="papers/<slug>")
    how = made.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="train nothing: judge the results that are there")
    how.add_argument("--quick", action="store_true", help="all of it at toy size, below build/papers/<slug>-quick/")
    how.add_argument("--import", dest="source", type=Path, metavar="DIR", help="take the run folders in DIR first")
    _speed(made)
    args = made.parse_args(list(argv))
    found = study.load(study.find(root, args.study), root)
    claims.check(found)
    failed: dict[str, str] = {}
    if args.source is not None:
        from papers import collect

        done = collect.bring(found, root, args.source, again=args.again)
        for name in done.made:
            print(f"imported: {name}")
        for name, why in done.refused.items():
            print(f"not taken: {name}: {why}", file=sys.stderr)
        if done.there:
            print(f"{len(done.there)} runs have a valid result already; --again takes those in {args.source} instead")
        if found.evaluations:
            from papers import evaluate

            evaluate.take(found, root, args.source)
    elif not args.check:
        failed = _make(found, root, args)
        if found.evaluations:
            from papers import evaluate

            failed |= evaluate.measure(found, root, args.quick)
    from papers import build, index, results, tables

    verdicts = build.build(found, root, args.quick)
    for one in verdicts:
        print(f"{tables.outcome(one)}: {one.claim.say}")
    if not args.quick:
        index.write(root)
    where = results.folder(found, root, args.quick)
    print(f"{sum(one.outcome == claims.HOLDS for one in verdicts)} of {len(verdicts)} claims hold; "
          f"{(where / 'report.pdf').relative_to(root)}")  # fmt: skip
    return _report(failed)


def _make(found: "Study", root: Path, args: argparse.Namespace) -> dict[str, str]:
    """Train what has no result or an outdated one, and keep it."""
    from papers import collect, runner

    collect.here(found, root, args.quick)
    wanted, known = _lacking(found, root, args.quick, args.again)
    if not wanted:
        return {}
    try:
        return runner.make(found, root, _settings(args), wanted, known)
    finally:  # also of what time or a failure cut short
        collect.here(found, root, args.quick)


def _lacking(found: "Study", root: Path, quick: bool, again: bool) -> "tuple[list[str], dict[str, Kept]]":
    """Jobs without a result that is up to date, and the results that are; all jobs if `again`."""
    from papers import jobs, results

    plan = jobs.plan(found, quick)
    if again:
        return [job.name for job in plan], {}
    kept = results.load(found, root, plan, quick)
    old = results.outdated(plan, kept, found, root, quick)
    known = {name: one for name, one in kept.items() if name not in old}
    return [job.name for job in plan if job.name not in known], known


def _new(argv: Sequence[str], root: Path) -> int:
    from papers import template

    made = argparse.ArgumentParser(prog="python -m papers new", description="Start a study from the template.")
    made.add_argument("slug", help="lower case, digits and hyphens")
    for path in template.write(root, made.parse_args(list(argv)).slug):
        print(path.relative_to(root))
    return 0


def _index(argv: Sequence[str], root: Path) -> int:
    from papers import index

    argparse.ArgumentParser(prog="python -m papers index", description="Write papers/README.md.").parse_args(list(argv))
    print("papers/README.md: " + ("written" if index.write(root) else "up to date"))
    return 0


def _run(argv: Sequence[str], root: Path) -> int:
    from papers import runner, study

    made = argparse.ArgumentParser(
        prog="python -m papers run",
        description="Make the runs without a valid result, several at a time, and no report.",
    )
    made.add_argument("study", metavar="STUDY", help="papers/<slug>")
    _speed(made)
    made.add_argument("--out", type=Path, metavar="DIR", help="also copy each finished run there, weights aside")
    made.add_argument("--only", default="", metavar="A,B", help="these runs alone, with those they build on")
    made.add_argument("--quick", action="store_true", help="at toy size")
    args = made.parse_args(list(argv))
    found = study.load(study.find(root, args.study), root)
    wanted, known = _lacking(found, root, args.quick, args.again)
    return _report(runner.make(found, root, _settings(args), wanted, known))


def _speed(made: argparse.ArgumentParser) -> None:
    made.add_argument("--jobs", type=count, metavar="N", help="runs at once (default: as many as the cores allow)")
    made.add_argument("--threads", type=count, default=2, metavar="N", help="cores of each run (default: 2)")
    made.add_argument("--budget", type=count, metavar="SECONDS", help="stop then; finished runs are kept")
    made.add_argument("--device", choices=["auto", "mps", "cuda", "cpu"], help="of every run (default: the config's)")
    made.add_argument("--again", action="store_true", help="also what has a valid result, which is replaced")


def _settings(args: argparse.Namespace) -> "Settings":
    from papers import machine, runner

    return runner.Settings(
        jobs=args.jobs or max(1, len(machine.cores()) // args.threads),
        threads=args.threads,
        budget=args.budget,
        device=args.device,
        out=getattr(args, "out", None),
        quick=args.quick,
        only=tuple(name for name in getattr(args, "only", "").split(",") if name),
    )


def _report(failed: dict[str, str]) -> int:
    for name, why in failed.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
