"""`python -m evals study A B ...`: experiments of several seeds against the first, from their run records alone.

Made for the precision study (configs/study/): what the sampler's precision costs in learning, in time, and in how far
sampler and trainer are apart. All runs must have asked the same held-out questions, with the same seeds and steps.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evals import stats
from evals.tables_text import interval, number, p_value
from rl import files, record
from rl.errors import UserError
from rl.report import smoothed

APART, ESS = "sampling/sampling_logp_difference/mean", "sampling/ess"
QUARTERS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Run:
    """One seed. `marks`: {question's id: right after training}; `rows`: metrics.jsonl."""

    record: record.Record
    marks: dict[str, float]
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Summary:
    """One experiment. Shares between 0 and 1, times in seconds, NaN where nothing was logged.

    `by_step` and `by_time`: the mean reward of its seeds (each a trailing mean over a tenth of the steps) at quarters
    of the steps, and at quarters of the shortest experiment's training time.
    """

    name: str
    seeds: tuple[int, ...]
    steps: int
    device: str
    before: float
    after: stats.Estimate
    by_step: tuple[float, ...]
    by_time: tuple[float, ...]
    step_s: float
    sync_s: float
    sync_bytes: float
    apart: float
    apart_most: float
    ess: float
    ess_least: float


@dataclass(frozen=True)
class Against:
    """An experiment minus the first one.

    `questions`: each question's mean mark over the seeds, paired by question: what these seeds' policies do on other
    questions. `seeds`: the seeds' scores, paired by seed: what other seeds would do on these questions.
    """

    name: str
    questions: stats.Equivalence
    seeds: stats.Equivalence

    @property
    def equivalent(self) -> bool:
        """Both say so."""
        return self.questions.equivalent and self.seeds.equivalent


@dataclass(frozen=True)
class Study:
    """Summaries in the order asked for; comparisons with the first; `times` are the seconds of `by_time`."""

    summaries: tuple[Summary, ...]
    against: tuple[Against, ...]
    margin: float
    questions: int
    times: tuple[float, ...]


def study(folder: Path, names: Sequence[str], margin: float = 0.02) -> Study:
    """Read `<name>` and `<name>-seed<N>` in `folder` for each name, and compare.

    Raises UserError for an experiment without runs, and for runs that cannot be compared.
    """
    if len(set(names)) != len(names) or len(names) < 2:
        raise UserError(f"study: found {', '.join(names)}, valid: two or more different experiments")
    found = {name: _runs(folder, name) for name in names}
    _check(found)
    seconds = {name: min(_seconds(run)[-1] for run in runs) for name, runs in found.items()}
    times = tuple(q * min(seconds.values()) for q in QUARTERS)
    summaries = [_summary(name, runs, times) for name, runs in found.items()]
    first = found[names[0]]
    questions = sorted(first[0].marks)
    against = []
    for name in names[1:]:
        pooled = [[statistics.mean(run.marks[q] for run in runs) for q in questions] for runs in (first, found[name])]
        scores = [[statistics.mean(run.marks.values()) for run in runs] for runs in (first, found[name])]
        # one source a seed: Student's t, also where all scores happen to be 0 or 1
        by_seed = stats.equivalence(*scores, margin, clusters=[run.record.seed for run in first])
        against.append(Against(name, stats.equivalence(*pooled, margin, clusters=questions), by_seed))
    return Study(tuple(summaries), tuple(against), margin, len(questions), times)


def _runs(folder: Path, name: str) -> list[Run]:
    paths = [path for path in [folder / name, *folder.glob(f"{name}-seed*")] if (path / "run.json").is_file()]
    paths = [
        path for path in paths if path.name.removeprefix(name).removeprefix("-seed").isdigit() or path.name == name
    ]
    if not paths:
        raise UserError(f"study: no run of {name!r} in {folder}; train it: nox -s train -- CONFIG --seeds 0,1,2")
    runs = []
    for path in paths:
        told = record.read(path)
        if told.status != "finished":
            raise UserError(f"{path}: status is {told.status!r}; go on with --resume")
        try:
            rows = [json.loads(line) for line in (path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
            marks = {str(row["id"]): float(row["right"][1]) for row in rows}
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(
                f"{path / 'samples.jsonl'}: not what a run writes ({error!r}); copy the run again"
            ) from None
        metrics = [row for row in record.read_metrics(path / "metrics.jsonl") if "reward" in row]
        if not marks or not metrics:
            raise UserError(f"{path}: no held-out questions or no rewards in it; copy the run again")
        runs.append(Run(told, marks, metrics))
    return sorted(runs, key=lambda run: run.record.seed)


def _check(found: dict[str, list[Run]]) -> None:
    (first, runs), *others = found.items()
    for what, of in (
        ("seeds", lambda each: [run.record.seed for run in each]),
        ("steps", lambda each: sorted({run.record.steps for run in each})),
        ("data", lambda each: sorted({run.record.data["fingerprint"] for run in each})),
        ("held-out questions", lambda each: sorted({tuple(sorted(run.marks)) for run in each})),
    ):
        for name, each in others:
            if of(each) != of(runs):
                told = "" if what == "held-out questions" else f": {of(each)} against {of(runs)}"
                raise UserError(f"study: {name} and {first} differ in their {what}{told}; train both alike")


def _seconds(run: Run) -> list[float]:
    """Time of every logged step since the first one was done: the first process of a machine compiles kernels in it."""
    return [row["wall_s"] - run.rows[0]["wall_s"] for row in run.rows]


def _summary(name: str, runs: list[Run], times: Sequence[float]) -> Summary:
    rewards = [smoothed([row["reward"] for row in run.rows], max(1, len(run.rows) // 10)) for run in runs]
    at_step = [[values[math.ceil(q * len(values)) - 1] for values in rewards] for q in QUARTERS]
    at_time = [
        [values[sum(s <= time for s in _seconds(run)) - 1] for run, values in zip(runs, rewards, strict=True)]
        for time in times
    ]
    scores = [statistics.mean(run.marks.values()) for run in runs]
    rows = [row for run in runs for row in run.rows]
    apart, ess = _logged(rows, APART), _logged(rows, ESS)
    steps_s = [b - a for run in runs for a, b in zip(_seconds(run), _seconds(run)[1:], strict=False)]
    nothing = [math.nan]
    return Summary(
        name=name,
        seeds=tuple(run.record.seed for run in runs),
        steps=runs[0].record.steps,
        device=" / ".join(sorted({run.record.device for run in runs})),
        before=statistics.mean(run.record.result["strict"]["before"]["value"] for run in runs if run.record.result),
        after=stats.mean(scores, clusters=range(len(scores))),
        by_step=tuple(map(statistics.mean, at_step)),
        by_time=tuple(map(statistics.mean, at_time)),
        step_s=statistics.median(steps_s or nothing),
        sync_s=statistics.median(_logged(rows, "time/sync") or nothing),
        sync_bytes=statistics.median(_logged(rows, "sync/bytes") or nothing),
        apart=statistics.mean(apart or nothing),
        apart_most=max(apart or nothing),
        ess=statistics.mean(ess or nothing),
        ess_least=min(ess or nothing),
    )


def _logged(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [float(row[key]) for row in rows if isinstance(row.get(key), int | float)]


# --- table


def markdown(found: Study, title: str, where: str) -> str:
    """The file; `where` names the folder of the run records."""
    first = found.summaries[0]
    percent = f"{100 * found.margin:g}"
    lines = [f"# {title}", "", f"Made by `python -m evals study` from the run records in `{where}` alone."]
    lines += [
        f"{first.steps} steps, seeds {', '.join(map(str, first.seeds))}, {found.questions:,} held-out questions, "
        f"greedy, the same for all; brackets are 95 % intervals over the seeds (Student's t). Device: "
        f"{'; '.join(sorted({one.device for one in found.summaries}))}.",
        "",
        "## Learning",
        "",
    ]
    head = ["experiment", "right before", "right after", *(f"reward at {q:.0%} of the steps" for q in QUARTERS)]
    head += [f"at {time:.0f} s" for time in found.times]
    rows = [
        [one.name, number(one.before, ".3f"), interval(one.after.value, one.after.low, one.after.high, ".3f")]
        + [number(value, ".3f") for value in (*one.by_step, *one.by_time)]
        for one in found.summaries
    ]
    lines += [*_table(head, rows), ""]
    lines += [
        "Rewards are means over the seeds of a trailing mean over a tenth of the steps. Seconds count from the end of "
        "each run's first step, in which kernels compile.",
        "",
        f"## Against {first.name}: equivalent within ± {percent} points?",
        "",
    ]
    head = ["experiment", "difference [90 %], over questions", "p", "difference [90 %], over seeds", "p", "verdict"]
    rows = []
    for one in found.against:
        cells = [
            cell
            for e in (one.questions, one.seeds)
            for cell in (interval(e.value, e.low, e.high, "+.3f"), p_value(e.p))
        ]
        rows.append([one.name, *cells, f"equivalent within ± {percent}" if one.equivalent else "**not shown**"])
    lines += [*_table(head, rows), ""]
    lines += [
        "Two one-sided tests at 5 % (Schuirmann 1987), paired: over questions, each with its mean over the seeds, for "
        "these policies on other questions; over seeds, for other seeds on these questions. Both must say so.",
        "",
        "## Sampler and trainer",
        "",
    ]
    head = [
        "experiment",
        "mean |Δlogp|",
        "largest step's",
        "mean ESS",
        "least step's",
        "s a step",
        "sync, ms",
        "sync, MB",
    ]
    rows = [
        [
            *(one.name, f"{one.apart:.1e}", f"{one.apart_most:.1e}", number(one.ess), number(one.ess_least)),
            *(number(one.step_s, ".2f"), number(1e3 * one.sync_s, ".1f"), number(one.sync_bytes / 1e6, ",.1f")),
        ]
        for one in found.summaries
    ]
    return "\n".join([*lines, *_table(head, rows), ""])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in (head, rule, *rows)]


# --- command line


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m evals study",
        description="Compare experiments of several seeds with the first one: learning, equivalence, |Δlogp|, ESS.",
    )
    made.add_argument("experiments", nargs="+", metavar="EXPERIMENT", help="a run's name without -seed<N>")
    made.add_argument(
        "--from",
        dest="source",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder of the runs' folders (default: evals/published/runs)",
    )
    made.add_argument("--name", default="precision", help="of the files, evals/published/study-NAME.md and .json")
    made.add_argument(
        "--margin", type=_margin, default=0.02, metavar="SHARE", help="what counts as equal (default: 0.02, 2 points)"
    )
    return made


def main(argv: Sequence[str], root: Path) -> None:
    """Run the command line and write evals/published/study-<name>.md and .json."""
    args = parser().parse_args(argv)
    given = args.source or Path("evals", "published", "runs")
    found = study(root / given, args.experiments, args.margin)
    path = root / "evals" / "published" / f"study-{Path(args.name).name}.md"
    where = f"{given.name}/" if given.is_absolute() else str(given)  # no place on this machine
    text = markdown(found, f"Study: {Path(args.name).name}", where)
    files.write_text(path, text)
    files.write_json(path.with_suffix(".json"), record.finite(asdict(found)))
    print(text, end="")
    print(f"\nwritten to {path.relative_to(root)} and .json")


def _margin(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"found {text}, valid: a share between 0 and 1")
    return value
