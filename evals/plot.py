"""`python -m evals plot`: bars with intervals of measured models, and training curves with bands over seeds.

Each figure as SVG, PDF and PNG; legible in grey by hatches, line styles and markers. The same files give the same bytes
with one version of matplotlib: no dates, and ids in the SVG from a fixed salt.
"""

import argparse
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals import stats
from evals.tables_read import Key, Result, check_versions, read
from evals.tables_rows import SEED
from rl.config.reading import nearest
from rl.errors import UserError
from rl.files import write_bytes
from rl.record import read_metrics
from rl.report import PANELS, smoothed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("svg", "pdf", "png")
# without these a file would hold the time it was made at
UNDATED: dict[str, dict[str, None]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}
STYLE: dict[str, Any] = {"svg.hashsalt": "duet", "font.family": "DejaVu Sans", "font.size": 8, "hatch.linewidth": 0.6}
# of falling lightness, so that also the greys differ (Okabe and Ito's colours, which most eyes can tell apart)
COLOURS = ("#f0e442", "#56b4e9", "#e69f00", "#cc79a7", "#009e73", "#d55e00", "#0072b2", "#000000")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "---", "+++", "ooo")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "x", "P", "*")


@dataclass(frozen=True)
class Curve:
    """One experiment's logged value over its seeds, at the steps that all of them logged.

    low and high: 95 % Student interval of the mean over seeds, NaN with one seed.
    """

    experiment: str
    seeds: int
    window: int  # steps of the trailing mean that each seed was smoothed with
    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


# --- bars


def bars(results: Sequence[Result], key: Key) -> "Figure":
    """A group of bars for each task, a bar for each model that has `key`, with its 95 % interval.

    ValueError where no result has it.
    """
    from matplotlib.figure import Figure

    rows = [row for result in results for row in result.rows if row.key == key]
    if not rows:
        raise ValueError(f"no result has {key}")
    tasks = sorted({row.task for row in rows})
    models = sorted({(row.run, row.role) for row in rows})  # a base before its run
    width = 0.8 / len(models)
    figure = Figure(figsize=(max(3.2, 0.9 + 0.32 * len(models) * len(tasks)), 2.8), layout="constrained")
    axes = figure.add_subplot()
    for number, model in enumerate(models):
        own = [row for row in rows if (row.run, row.role) == model]
        places = [tasks.index(row.task) + (number - (len(models) - 1) / 2) * width for row in own]
        axes.bar(
            places,
            [row.value for row in own],
            width,
            label=own[0].model,
            color=COLOURS[number % len(COLOURS)],
            edgecolor="black",
            linewidth=0.6,
            hatch=HATCHES[(number + number // len(HATCHES)) % len(HATCHES)],
        )
        known = [(place, row) for place, row in zip(places, own, strict=True) if math.isfinite(row.low)]
        axes.errorbar(
            [place for place, _ in known],
            [row.value for _, row in known],
            # an end of the interval may lie a rounding inside
            yerr=[
                [max(0.0, row.value - row.low) for _, row in known],
                [max(0.0, row.high - row.value) for _, row in known],
            ],
            fmt="none",
            ecolor="black",
            elinewidth=1,
            capsize=2.5,
        )
    axes.set_xticks(range(len(tasks)), tasks)
    chosen = "" if key[1] == "none" else f", {key[1]}"
    axes.set_ylabel(f"{key[0]}{chosen} ({'higher' if rows[0].higher_is_better else 'lower'} is better)")
    axes.yaxis.grid(visible=True, alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=min(3, len(models)), frameon=False)
    return figure


# --- curves


def curve(folders: Sequence[Path], key: str) -> Curve | None:
    """`key` of metrics.jsonl over runs that differ in their seed, each smoothed by a trailing mean over a tenth of it.

    None where a run logged nothing of that name, or the runs have no step in common.
    """
    logged = []
    for folder in folders:
        rows = read_metrics(folder / "metrics.jsonl")
        points = {row["step"]: float(row[key]) for row in rows if _number(row, "step") and _number(row, key)}
        if not points:
            return None
        logged.append(points)
    steps = sorted(set.intersection(*map(set, logged)))
    if not steps:
        return None
    window = max(1, len(steps) // 10)
    smooth = [smoothed([points[step] for step in steps], window) for points in logged]
    over = [stats.mean(values, clusters=range(len(values))) for values in zip(*smooth, strict=True)]
    return Curve(
        experiment=SEED.sub("", folders[0].name),
        seeds=len(folders),
        window=window,
        steps=steps,
        mean=[point.value for point in over],
        low=[point.low for point in over],
        high=[point.high for point in over],
    )


def curves(found: Sequence[Curve], label: str) -> "Figure":
    """The experiments' means against the step, with bands where there are several seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 2.6 + 0.17 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    for number, one in enumerate(found):
        colour = COLOURS[-1 - number % len(COLOURS)]  # the dark ones first: lines are thin
        seeds = f"{one.seeds} seeds" if one.seeds > 1 else "1 seed"
        axes.plot(
            one.steps,
            one.mean,
            color=colour,
            linestyle=LINES[number % len(LINES)],
            marker=MARKERS[number % len(MARKERS)],
            markevery=max(1, len(one.steps) // 8),
            markersize=3.5,
            linewidth=1.2,
            label=f"{one.experiment} ({seeds}, mean of {one.window})",
        )
        if one.seeds > 1:
            axes.fill_between(one.steps, one.low, one.high, color=colour, alpha=0.2, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(visible=True, alpha=0.3)
    figure.legend(loc="outside lower center", ncols=1, frameon=False)
    return figure


def save(draw: "Figure", stem: Path) -> list[Path]:
    """The figure as `stem`.svg, .pdf and .png, each written whole; their paths."""
    import matplotlib

    paths = []
    with matplotlib.rc_context(STYLE):
        for form in FORMATS:
            file = io.BytesIO()
            draw.savefig(file, format=form, dpi=200, metadata=UNDATED[form])
            paths.append(stem.with_name(f"{stem.name}.{form}"))
            write_bytes(paths[-1], file.getvalue())
    return paths


# --- command line


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m evals plot",
        description="Draw measured models as bars with 95 % intervals (bars-METRIC) and runs as training curves with "
        "95 % bands over their seeds (curves-NAME), each as svg, pdf and png.",
    )
    made.add_argument("runs", nargs="*", metavar="RUN", help="runs or experiments (all their seeds); all when none")
    made.add_argument("--task", "--tasks", default="", metavar="A,B", help="bars of these tasks alone")
    made.add_argument("--metric", help="bars of this metric alone (default: each)")
    made.add_argument("--curve", metavar="NAME", help="a name in metrics.jsonl (default: reward, else loss)")
    made.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: build/figures)")
    return made


def main(argv: Sequence[str], root: Path) -> None:
    """Draw what there is. Raises UserError for a name that has neither results nor a training curve."""
    args = parser().parse_args(list(argv))
    names = [Path(name).name for name in args.runs]
    folder = args.out or root / "build" / "figures"
    import matplotlib

    with matplotlib.rc_context(STYLE):
        results = _results(root, names, [task for task in args.task.split(",") if task], args.metric)
        drawn = [
            (f"bars-{'-'.join(key if key[1] != 'none' else key[:1])}", bars(results, key))
            for key in sorted({row.key for result in results for row in result.rows})
            if args.metric in (None, key[0])
        ]
        if not (args.task or args.metric):
            drawn += _curves(root, names, args.curve)
        if not drawn:
            what = f"{', '.join(names)}: neither results nor metrics.jsonl" if names else "no result and no run"
            raise UserError(f"{what} to draw; measure or train first: nox -s eval, nox -s train")
        paths = [path for stem, figure in drawn for path in save(figure, folder / stem.replace("/", "-"))]
    for path in paths:
        print(path.relative_to(root) if path.is_relative_to(root) else path)


def _results(root: Path, names: Sequence[str], tasks: Sequence[str], metric: str | None) -> list[Result]:
    """Results of the runs and experiments named; none where there are none at all and nothing was asked of them."""
    folder = root / "evals" / "results"
    known = sorted(path.name for path in folder.glob("[!.]*") if any(path.rglob("*.json")))
    chosen = [run for run in known if not names or run in names or SEED.sub("", run) in names]
    if not chosen:
        if tasks or metric:
            raise UserError(f"{', '.join(names) or 'evals/results'}: no result to draw; measure first: nox -s eval")
        return []
    results = read(root, chosen, tasks)
    check_versions(results)
    metrics = {row.metric for result in results for row in result.rows}
    if metric and metric not in metrics:
        raise UserError(f"--metric {metric}: not in the results, {nearest(metric, metrics)}")
    return results


def _curves(root: Path, names: Sequence[str], key: str | None) -> list[tuple[str, "Figure"]]:
    """A figure of each experiment's curve: finished runs, and published ones that are not here."""
    folders: dict[str, Path] = {}
    for parent in (root / "evals" / "published" / "runs", root / "models" / "final"):
        folders |= {path.parent.name: path.parent for path in parent.glob("[!.]*/metrics.jsonl")}
    chosen = sorted(run for run in folders if not names or run in names or SEED.sub("", run) in names)
    groups: dict[str, list[Path]] = {}
    for run in chosen:
        groups.setdefault(SEED.sub("", run), []).append(folders[run])
    titles = {name: title for title, name in PANELS}
    for wanted in [key] if key else ["reward", "loss"]:
        found = [made for group in groups.values() if (made := curve(group, wanted))]
        if found:
            return [(f"curves-{wanted}", curves(found, titles.get(wanted, wanted)))]
    if key:
        logged = {name for group in groups.values() for row in read_metrics(group[0] / "metrics.jsonl") for name in row}
        raise UserError(f"--curve {key}: no run here logged it, {nearest(key, logged)}")
    return []


def _number(row: dict[str, Any], key: str) -> bool:
    value = row.get(key)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
