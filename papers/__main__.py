"""`python -m papers`: make a study's runs, check its claims, build its report. `nox -s paper -- ...` runs it.

Exit codes: 0 done, 1 a run failed or time was up, 2 bad input (one line), 130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rl.errors import RunFailed, UserError

ROOT = Path(__file__).resolve().parent.parent


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run one command; returns the exit code (argparse itself exits with 2)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["run"]:
            return _run(argv[1:], root)
        raise UserError("give a command: run")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(argv: Sequence[str], root: Path) -> int:
    from papers import machine, runner, study

    made = argparse.ArgumentParser(
        prog="python -m papers run", description="Make a study's missing runs, several at a time, and no report."
    )
    made.add_argument("study", metavar="STUDY", help="papers/<slug>")
    made.add_argument("--jobs", type=_count, metavar="N", help="runs at once (default: as many as the cores allow)")
    made.add_argument("--threads", type=_count, default=2, metavar="N", help="cores of each run (default: 2)")
    made.add_argument("--budget", type=_count, metavar="SECONDS", help="stop then; finished runs are kept")
    made.add_argument("--device", choices=["auto", "mps", "cuda", "cpu"], help="of every run (default: the config's)")
    made.add_argument("--out", type=Path, metavar="DIR", help="also copy each finished run there, weights aside")
    made.add_argument("--only", default="", metavar="A,B", help="these runs alone, with those they build on")
    made.add_argument("--quick", action="store_true", help="at toy size")
    args = made.parse_args(list(argv))
    found = study.load(study.find(root, args.study), root)
    settings = runner.Settings(
        jobs=args.jobs or max(1, len(machine.cores()) // args.threads),
        threads=args.threads,
        budget=args.budget,
        device=args.device,
        out=args.out,
        quick=args.quick,
        only=tuple(name for name in args.only.split(",") if name),
    )
    return _report(runner.make(found, root, settings))


def _report(failed: dict[str, str]) -> int:
    for name, why in failed.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    return 1 if failed else 0


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"found {text!r}, valid: a whole number ≥ 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
