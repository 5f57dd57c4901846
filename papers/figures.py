"""A study's figures: points with intervals, or logged values along training with bands over seeds. Vector, and legible
in grey: lines differ in style and marker too. The same results give the same bytes with one version of matplotlib.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evals import stats
from evals.plot import COLOURS, LINES, MARKERS, STYLE, UNDATED
from evals.stats.estimates import Estimate
from papers import tables
from papers.results import Kept
from papers.study import Figure, Study
from rl import files
from rl.report import smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

FORMATS = ("svg", "pdf")
WIDTH = 6.3  # inches: the text block of the report


def draw(study: Study, figure: Figure, found: Mapping[str, Sequence[Kept]], single: Sequence[str]) -> "Drawing":
    """The figure of a study. UserError for an expression that is none."""
    return _points(study, figure, found, single) if figure.x is None else _curves(study, figure, found)


def _points(study: Study, figure: Figure, found: Mapping[str, Sequence[Kept]], single: Sequence[str]) -> "Drawing":
    """A row a run, the best value at the top; open circles are its seeds."""
    from matplotlib.figure import Figure as Canvas

    known = [spec.name for spec in study.runs]
    canvas = Canvas(figsize=(WIDTH, 0.8 + 0.2 * max(1, len(figure.runs))), layout="constrained")
    for number, text in enumerate(figure.y):
        axes = canvas.add_subplot(1, len(figure.y), number + 1)
        rows: list[tuple[str, Estimate]] = []
        for run in figure.runs:
            estimate = tables.measured(tables.expression(text, run), known, found, single)
            if estimate is not None:
                rows.append((run, estimate))
        rows.sort(key=lambda row: row[1].value)
        for place, (run, estimate) in enumerate(rows):
            if math.isfinite(estimate.low):
                axes.plot([estimate.low, estimate.high], [place, place], color="black", linewidth=1.2, zorder=2)
            axes.plot(estimate.value, place, "o", color="black", markersize=4, zorder=3)
            for kept in found[run]:
                own = tables.measured(tables.expression(text, run), known, {run: [kept]}, [run])
                if own is not None:
                    axes.plot(own.value, place, "o", markersize=5, markeredgecolor="0.45", fillstyle="none", zorder=1)
        axes.set_yticks(range(len(rows)), [study.label(run) for run, _ in rows])
        axes.set_xlabel(figure.ylabel)
        axes.grid(visible=True, axis="x", alpha=0.3)
        axes.margins(y=0.04)
        _open(axes)
    return canvas


def _curves(study: Study, figure: Figure, found: Mapping[str, Sequence[Kept]]) -> "Drawing":
    """A panel for each logged name, a line for each run: the mean over its seeds and its 95 % interval."""
    from matplotlib.figure import Figure as Canvas

    lines = -(-len(figure.runs) // 3)
    canvas = Canvas(figsize=(WIDTH, 2.5 + 0.2 * lines), layout="constrained")
    for number, key in enumerate(figure.y):
        axes = canvas.add_subplot(1, len(figure.y), number + 1)
        for place, run in enumerate(figure.runs):
            _line(axes, found.get(run, ()), str(figure.x), key, place, study.label(run))
        axes.set_xlabel(figure.xlabel)
        axes.set_title(figure.ylabel.split(";")[number].strip() if ";" in figure.ylabel else figure.ylabel, fontsize=8)
        axes.grid(visible=True, alpha=0.3)
        _open(axes)
    handles, labels = canvas.axes[0].get_legend_handles_labels()
    if handles:
        canvas.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return canvas


def _line(axes: "Axes", seeds: Sequence[Kept], x: str, y: str, place: int, label: str) -> None:
    """One run: both values smoothed over a tenth of the steps, then the mean over seeds step by step."""
    series = [one for kept in seeds if (one := _series(kept, x, y))]
    if not series:
        return
    length = min(len(xs) for xs, _ in series)
    over = [stats.mean([ys[i] for _, ys in series], clusters=range(len(series))) for i in range(length)]
    along = [math.fsum(xs[i] for xs, _ in series) / len(series) for i in range(length)]
    colour = COLOURS[-1 - place % len(COLOURS)]
    axes.plot(
        along,
        [one.value for one in over],
        color=colour,
        linestyle=LINES[place % len(LINES)],
        marker=MARKERS[place % len(MARKERS)],
        markevery=max(1, length // 6),
        markersize=3.5,
        linewidth=1.1,
        label=label,
    )
    if len(series) > 1:
        axes.fill_between(along, [one.low for one in over], [one.high for one in over], color=colour, alpha=0.15, lw=0)


def _series(kept: Kept, x: str, y: str) -> tuple[list[float], list[float]] | None:
    root = x.startswith("sqrt(") and x.endswith(")")
    name = x[5:-1] if root else x
    if name not in kept.metrics or y not in kept.metrics:
        return None
    rows = [(a, b) for a, b in zip(kept.metrics[name], kept.metrics[y], strict=True) if a is not None and b is not None]
    if not rows:
        return None
    window = max(1, len(rows) // 10)
    xs, ys = ([float(row[i]) for row in rows] for i in range(2))
    smooth = xs if name in ("step", "wall_s") else smoothed(xs, window)
    return [math.sqrt(max(0.0, one)) if root else one for one in smooth], smoothed(ys, window)


def _open(axes: "Axes") -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def write(
    study: Study, figure: Figure, found: Mapping[str, Sequence[Kept]], single: Sequence[str], folder: Path
) -> None:
    """The figure as SVG and PDF below `folder`."""
    import matplotlib

    with matplotlib.rc_context({**STYLE, "pdf.fonttype": 42}):
        made = draw(study, figure, found, single)
        for form in FORMATS:
            file = io.BytesIO()
            made.savefig(file, format=form, metadata=UNDATED[form])
            files.write_bytes(folder / f"{figure.name}.{form}", file.getvalue())
