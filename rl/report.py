"""What a run shows for itself: scores with their errors, curves, the model card, and the table over seeds.

Statistics after Miller 2024, "Adding Error Bars to Evals" (arXiv 2411.00640): standard errors from the spread of
per-question scores, differences paired by question, intervals of ±1.96 standard errors. Over seeds: Student's t.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rl import files, record
from rl.errors import UserError
from rl.models import HUB_ID
from rl.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Z95 = 1.959963984540054
METRICS = ("strict", "lenient")
PACKAGED = {"smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # the hub's name of the packaged base
PANELS = (  # title, TRL's name; drawn where the run logged it
    ("reward", "reward"),
    ("mean |Δlogp|, trainer to sampler", "sampling/sampling_logp_difference/mean"),
    ("KL to the reference", "kl"),
    ("loss", "loss"),
    ("pairs ranked right", "accuracy"),
    ("token accuracy", "mean_token_accuracy"),
    ("entropy", "entropy"),
    ("completion length (tokens)", "completions/mean_length"),
    ("gradient norm", "grad_norm"),
)


class Scored(Protocol):
    """What is read of a graded completion (`rl.rewards.Score`)."""

    @property
    def strict(self) -> bool: ...
    @property
    def lenient(self) -> bool: ...
    @property
    def wellformed(self) -> bool: ...


def mean_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, sqrt(sum (x - mean)^2 / (n - 1) / n); no error from a single value."""
    n = len(values)
    if n == 0:
        raise ValueError("no values to take the mean of")
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def paired_difference(
    before: Sequence[float], after: Sequence[float]
) -> tuple[float, float | None, tuple[float, float] | None]:
    """Mean of after - before on the same questions in the same order, its standard error and 95 % interval.

    The error is that of the per-question differences (Miller 2024, paired analysis), smaller than that of two separate
    samples when the same questions are hard for both. ValueError when the lengths differ or are 0.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} scores before and {len(after)} after are not of the same questions")
    value, stderr = mean_stderr([float(b) - float(a) for a, b in zip(before, after, strict=True)])
    return value, stderr, None if stderr is None else (value - Z95 * stderr, value + Z95 * stderr)


def result(metric: str, before: Sequence[Scored], after: Sequence[Scored]) -> dict[str, Any]:
    """`run.json`'s `result`: the metric's before, after and difference, the same under `strict` and under `lenient`,
    and the share of well-formed completions (a gain without a gain there is not one of format)."""
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r}, one of {METRICS} is needed")
    both = {name: _compared([getattr(s, name) for s in before], [getattr(s, name) for s in after]) for name in METRICS}
    wellformed = [mean_stderr([float(score.wellformed) for score in scores])[0] for scores in (before, after)]
    return {
        "metric": metric,
        **both[metric],
        **both,
        "wellformed": {"before": wellformed[0], "after": wellformed[1]},
    }


def _compared(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    value, _, interval = paired_difference(before, after)
    return {
        "before": _measured(before),
        "after": _measured(after),
        "difference": {"value": value, "ci95": None if interval is None else list(interval)},
    }


def _measured(values: Sequence[bool]) -> dict[str, Any]:
    mean, stderr = mean_stderr([float(value) for value in values])
    return {"value": mean, "stderr": stderr, "n": len(values)}


def t_quantile(degrees: int) -> float:
    """The t with 95 % of Student's distribution between -t and t, for a whole number of degrees of freedom >= 1.

    By bisection on the finite sums of Abramowitz & Stegun 26.7.3-4, which need no numerical library.
    """
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom")
    low, high = 0.0, 13.0  # 12.706 at one degree is the largest
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, degrees) < 0.95 else (low, middle)
    return (low + high) / 2


def _t_within(t: float, degrees: int) -> float:
    """Probability that |T| <= t."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(2 + odd, degrees, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if degrees > 1 else 0.0))


def mean_t(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean over seeds and its 95 % t interval (n - 1 degrees of freedom); no interval from a single seed."""
    mean, stderr = mean_stderr(values)
    if stderr is None:
        return mean, None
    half = t_quantile(len(values) - 1) * stderr
    return mean, (mean - half, mean + half)


def curves(metrics: Path, png: Path) -> None:
    """Draw `metrics.jsonl` (raw and trailing mean against the step) into a PNG of one panel per thing logged."""
    from matplotlib.figure import Figure  # no pyplot: no backend to choose, nothing global

    rows = [row for row in record.read_metrics(metrics) if isinstance(row.get("step"), int)]
    panels = [(title, key) for title, key in PANELS if any(_number(row.get(key)) is not None for row in rows)]
    if any(key == "reward" for _, key in panels):
        panels = [(title, key) for title, key in panels if key != "loss"]  # a policy-gradient loss says nothing
    columns = min(3, max(1, len(panels)))
    lines = max(1, math.ceil(len(panels) / columns))
    figure = Figure(figsize=(3.6 * columns, 2.5 * lines), dpi=110, layout="constrained")
    if not panels:
        figure.text(0.5, 0.5, "no step was logged", ha="center", va="center")
    for number, (title, key) in enumerate(panels, start=1):
        points = [(row["step"], y) for row in rows if (y := _number(row.get(key))) is not None]
        _panel(figure.add_subplot(lines, columns, number), title, [x for x, _ in points], [y for _, y in points])
    save_png(figure, png)


def save_png(figure: "Figure", png: Path) -> None:
    """Write a figure whole or not at all; the same figure gives the same bytes."""
    partial = png.with_name(f".{png.name}.tmp")
    try:
        figure.savefig(partial, format="png", metadata={"Software": None})
        files.write_bytes(png, partial.read_bytes())
    finally:
        partial.unlink(missing_ok=True)


def _panel(axes: "Axes", title: str, steps: list[int], values: list[float]) -> None:
    window = max(1, len(values) // 10)
    axes.plot(
        steps, values, color="tab:blue", alpha=0.35 if window > 1 else 1.0, lw=1, marker="." if window < 2 else ""
    )
    if window > 1:
        axes.plot(steps, smoothed(values, window), color="tab:blue", lw=1.8, label=f"mean of {window}")
        axes.legend(fontsize=7, frameon=False)
    if "Δlogp" in title and min(values) > 0:
        axes.set_yscale("log")  # spans decades when a sampler drifts; an exact 0 must stay visible, so not then
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and up to `window - 1` before it: looks at no later step."""
    return [math.fsum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - window + 1) : i + 1])]


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def model_card(run: Record, library: str | None = None, sections: Sequence[str] = ()) -> str:
    """`README.md` of a finished run: front matter as the Hugging Face hub reads it, command, scores, limits.

    An export names the `library` that opens it (its adapter is merged), and adds lines of its own (`sections`).
    """
    model, trainer = run.config.get("model", {}), run.config.get("trainer", {})
    algorithm, lora = str(trainer.get("algorithm", "?")), model.get("lora")
    base, data = str(run.base.get("id")), run.data
    adapter = bool(lora) and library is None
    front = [
        f"library_name: {library or ('peft' if adapter else 'transformers')}",
        f"pipeline_tag: {'text-classification' if algorithm == 'reward' else 'text-generation'}",
        f"tags: {json.dumps(['duet', algorithm, *(['lora'] if lora else [])])}",
    ]
    hub = PACKAGED.get(base, base)
    if HUB_ID.fullmatch(hub) and not Path(hub).exists():
        front.insert(1, f"base_model: {json.dumps(hub)}")
    tokens = run.tokens.get("completion") or 0
    trained = [
        f"`{run.name}`: {algorithm.upper()} from `{base}`{' with LoRA' if lora else ''} on {data.get('source')} data, ",
        f"{run.steps} steps, seed {run.seed}, {duration(run.wall_s)} on {run.device}",
        f", {tokens:,} tokens sampled" if tokens else "",
        ".",
    ]
    parents = "".join(f" It builds on the run `{parent.get('name')}`." for parent in run.parents)
    command = run.command or "nox -s train -- <the config in run.json>"
    versions = [f"{name} {run.packages[name]}" for name in ("torch", "trl", "mlx") if run.packages.get(name)]
    commit = f"commit {run.git['commit']}{' with local changes' if run.git.get('dirty') else ''}" if run.git else ""
    return "\n".join(
        [
            *("---", *front, "---", "", f"# {run.name}", "", "".join(trained) + parents, ""),
            *("```", command, "```", "", "## Held-out check", "", *_scores(run.result), ""),
            *("![training curves](curves.png)", "", *sections),
            *("## Limits", "", *_limits(run, adapter), "", "## Record", ""),
            ", ".join(part for part in (f"Python {run.python}", *versions, run.platform, commit) if part) + ".",
            f"Base weights sha256 `{run.base.get('sha256')}`, data fingerprint `{data.get('fingerprint')}`.",
            "Everything else is in `run.json`, each logged step in `metrics.jsonl`.",
            "",
        ]
    )


def _scores(result: dict[str, Any] | None) -> list[str]:
    if not result:
        return ["This run was not measured."]
    head = ["| score | n | before | after | difference [95 %] |", "|---|---|---|---|---|"]
    lines = []
    for name in METRICS:
        score = result[name]
        lines.append(
            f"| {name}{' (the run’s metric)' if name == result['metric'] else ''} | {score['after']['n']} "
            f"| {plus_minus(score['before'])} | {plus_minus(score['after'])} | {interval(score['difference'])} |"
        )
    well = result.get("wellformed")
    share = f"Well-formed completions: {well['before']:.3f} before, {well['after']:.3f} after." if well else ""
    note = "± is one standard error over the questions; the difference is paired by question (Miller 2024)."
    return [*head, *lines, "", f"{share} {note}".strip()]


def _limits(run: Record, lora: bool) -> list[str]:
    reward = run.config.get("trainer", {}).get("algorithm") == "reward"
    lines = [
        "- One run with one seed: the intervals cover the choice of questions, not the spread between seeds.",
        "- Scores are shares of held-out pairs ranked right: completions of one policy to questions of the training "
        "distribution. Those of a policy trained on this reward are others, and may be ranked worse."
        if reward
        else "- The check is quick: greedy decoding on held-out questions of the training distribution. "
        "It says nothing about other tasks, which may have got worse.",
        "- The base's own limits, biases and licence carry over.",
    ]
    if lora and (run.rollout or {}).get("precision") == "shared":
        lines.append("- The adapter belongs to the quantized base it was trained on; on the original base it is off.")
    if run.packages_match_lock is False:
        lines.append("- Package versions differ from the lock: another install may give other numbers.")
    return lines


def plus_minus(score: dict[str, Any]) -> str:
    """`0.361 ± 0.030`, without the error where there is none."""
    return f"{score['value']:.3f}" + ("" if score["stderr"] is None else f" ± {score['stderr']:.3f}")


def interval(difference: dict[str, Any]) -> str:
    """`+0.372 [+0.301, +0.443]`, without the interval where there is none."""
    bounds = difference["ci95"]
    return f"{difference['value']:+.3f}" + ("" if bounds is None else f" [{bounds[0]:+.3f}, {bounds[1]:+.3f}]")


def duration(seconds: float) -> str:
    """`45 s`, `5 min 03 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02} min"


@dataclass(frozen=True)
class SeedRow:
    """One seed's own held-out scores and paired difference."""

    run: str
    seed: int
    n: int
    before: float
    after: float
    difference: float
    ci95: list[float] | None
    wall_s: float


@dataclass(frozen=True)
class Seeds:
    """The table over seeds for one metric; `mean` holds {value, ci95} of before, after and difference over seeds."""

    name: str
    metric: str
    rows: list[SeedRow]
    mean: dict[str, dict[str, Any]]


def seeds_table(records: Sequence[Record], metric: str | None = None) -> Seeds:
    """Gather finished runs of one experiment that differ in their seed alone.

    Raises UserError when one is unfinished or unmeasured, a seed occurs twice, or something but the seed differs.
    """
    if not records:
        raise ValueError("no records")
    first = records[0]
    for run in records:
        if run.status != "finished" or not run.result:
            raise UserError(f"run {run.name}: {run.status}, no finished measurement; train it to the end first")
        if other := [line for line in record.differences(first, run) if not line.startswith(_seed_made(first))]:
            raise UserError(f"run {run.name}: not {first.name} with another seed: {'; '.join(other)}; train both alike")
    seeds = [run.seed for run in records]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds {', '.join(map(str, seeds))}: each may occur once")
    metric = metric or first.result["metric"]
    rows = [_seed_row(run, run.result[metric]) for run in records]
    mean = {}
    for column in ("before", "after", "difference"):
        value, bounds = mean_t([getattr(row, column) for row in rows])
        mean[column] = {"value": value, "ci95": None if bounds is None else list(bounds)}
    return Seeds(re.sub(r"-seed\d+$", "", first.name), metric, rows, mean)


def _seed_made(run: Record) -> tuple[str, ...]:
    """Keys that come with the seed: itself, a tiny base drawn from it, and what runs with that seed have made."""
    keys = ["seed:", "run.seed:"]
    if run.parents:
        keys += ["parents.", "data.fingerprint:"]
    if run.parents or run.base.get("id") == "tiny":
        keys.append("base.sha256:")
    return tuple(keys)


def _seed_row(run: Record, score: dict[str, Any]) -> SeedRow:
    before, after, difference = score["before"], score["after"], score["difference"]
    values = before["value"], after["value"], difference["value"]
    return SeedRow(run.name, run.seed, after["n"], *values, difference["ci95"], run.wall_s)


def seeds_markdown(seeds: Seeds) -> str:
    """The table as Markdown, with what its intervals mean and which files it comes from."""
    head = "| seed | n | before | after | difference [95 %] | time |\n|---|---|---|---|---|---|\n"
    lines = [
        f"| {row.seed} | {row.n} | {row.before:.3f} | {row.after:.3f} "
        f"| {interval({'value': row.difference, 'ci95': row.ci95})} | {duration(row.wall_s)} |\n"
        for row in seeds.rows
    ]
    mean = seeds.mean
    lines.append(f"| mean of {len(seeds.rows)} | | {_over(mean['before'])} | {_over(mean['after'])} ")
    lines.append(f"| {interval(mean['difference'])} | |\n")
    return f"## {seeds.name}: {seeds.metric}\n\n{head}{''.join(lines)}\n"


def _over(value: dict[str, Any]) -> str:
    bounds = value["ci95"]
    return f"{value['value']:.3f}" + ("" if bounds is None else f" [{bounds[0]:.3f}, {bounds[1]:.3f}]")


def write_seeds(root: Path, name: str, runs: Sequence[str]) -> list[Seeds]:
    """Write `models/final/<name>-seeds.{md,json}` from the run.json files of `runs` alone; strict and lenient.

    Returns the tables, the runs' own metric first.
    """
    final = root / "models" / "final"
    records = [record.read(final / run) for run in runs]
    tables = [seeds_table(records)]
    tables += [seeds_table(records, metric) for metric in METRICS if metric != tables[0].metric]
    sources = {f"models/final/{run}/run.json": files.sha256_file(final / run / "run.json") for run in runs}
    n = len(runs)
    note = (
        "A row's interval covers the choice of questions (paired, ±1.96 standard errors); "
        f"the mean's covers the seeds (Student's t, n = {n}, {n - 1} degrees of freedom).\n"
        if n > 1
        else "One seed: the interval covers the choice of questions; nothing is known of the spread over seeds.\n"
    )
    made = f"\nFrom {', '.join(f'`{source}`' for source in sources)}.\n"
    files.write_text(final / f"{name}-seeds.md", "".join(map(seeds_markdown, tables)) + note + made)
    files.write_json(final / f"{name}-seeds.json", {"tables": [asdict(table) for table in tables], "sources": sources})
    return tables
