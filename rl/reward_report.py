"""`python -m rl reward-report`: what a reward model knows on its held-out pairs, and what a policy made of it.

Accuracy with Wilson's interval; calibration of P(chosen beats rejected) = sigmoid(score difference), as expected
calibration error (Naeini et al. 2015; Guo et al. 2017, arXiv 1706.04599) over the pairs' confidences; score against
length; and beside a run that was trained on it, learned reward and true verifier step by step (Gao et al. 2023,
2210.10760: the one may go on rising while the other falls). Everything is read from the runs' own files.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl import files, finished, record, report
from rl.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "reward_report"
BINS = 10  # of the confidences, which lie between one half and one
VERIFIERS = ("exact", "reasoning-gym", "math-verify")


@dataclass(frozen=True)
class Pair:
    """Scores and lengths (tokens with EOS) of a held-out pair's completions."""

    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int

    @property
    def margin(self) -> float:
        return self.chosen - self.rejected


@dataclass(frozen=True)
class Bin:
    """Pairs whose confidence lies in (low, high]: how many, how sure the model was on average, how many are right."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class Calibration:
    """`ece`: mean |accuracy - confidence| of the bins, weighted by their pairs."""

    ece: float
    bins: list[Bin]


@dataclass(frozen=True)
class Curve:
    """Means over a window of steps of the learned reward and the verifier in a run trained on the reward model."""

    run: str
    window: int
    steps: list[int]
    learned: list[float]
    verifier: list[float]
    verifier_name: str


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927); never outside [0, 1], and not a point at 0 or n right."""
    if not 0 <= right <= n or n == 0:
        raise ValueError(f"{right} of {n}")
    z, share = report.Z95, right / n
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # the share lies inside but for rounding
    return max(0.0, min(share, (middle - half) / scale)), min(1.0, max(share, (middle + half) / scale))


def calibration(margins: Sequence[float], bins: int = BINS) -> Calibration:
    """Calibration of the model's choice in each pair, from score(chosen) - score(rejected); a tie is not right.

    The confidence is that of the completion it prefers, sigmoid(|margin|), so that no bin lies below one half.
    """
    if not margins:
        raise ValueError("no pairs")
    members: list[list[float]] = [[] for _ in range(bins)]
    for margin in margins:
        place = math.ceil((_sigmoid(abs(margin)) - 0.5) * 2 * bins) - 1
        members[min(max(place, 0), bins - 1)].append(margin)
    found, error = [], 0.0
    for i, part in enumerate(members):
        if not part:
            continue
        right = sum(margin > 0 for margin in part)
        confidence = math.fsum(_sigmoid(abs(margin)) for margin in part) / len(part)
        low, high = 0.5 + i / (2 * bins), 0.5 + (i + 1) / (2 * bins)
        found.append(Bin(low, high, len(part), confidence, right / len(part), wilson(right, len(part))))
        error += len(part) / len(margins) * abs(right / len(part) - confidence)
    return Calibration(error, found)


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's r; None where one of the two does not vary."""
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"{len(x)} and {len(y)} values")
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    dx, dy = [v - mean_x for v in x], [v - mean_y for v in y]
    spread = math.sqrt(math.fsum(v * v for v in dx) * math.fsum(v * v for v in dy))
    return None if spread == 0 else math.fsum(a * b for a, b in zip(dx, dy, strict=True)) / spread


def curve(folder: Path, model: str) -> Curve:
    """Learned reward and verifier of the run in `folder`, which was trained on the reward model of the run `model`.

    Raises UserError where it was not, or where no verifier was logged beside it.
    """
    run = record.read(folder)
    rewards = run.config.get("reward", [])
    roles = [p["role"] for p in run.parents if p.get("name") == model and str(p.get("role")).startswith("reward.")]
    if not roles:
        raise UserError(
            f"{folder}: was not trained on the reward model {model}; its parents: {_parents(run) or 'none'}"
        )
    names = [_logged(rewards, i) for i in range(len(rewards))]
    learned = names[int(roles[0].split(".")[1])]
    verifier = next((names[i] for i, reward in enumerate(rewards) if reward["name"] in VERIFIERS), None)
    if verifier is None:
        raise UserError(
            f"{folder}: logged no verifier beside the learned reward: add [[reward]] name = 'exact', weight = 0 to its "
            "config and train it again"
        )
    keys = [f"rewards/{learned}/mean", f"rewards/{verifier}/mean"]
    rows = [row for row in record.read_metrics(folder / "metrics.jsonl") if all(_number(row.get(k)) for k in keys)]
    if not rows:
        raise UserError(f"{folder / 'metrics.jsonl'}: no step has both {' and '.join(keys)}; train it again")
    window = max(1, len(rows) // 10)
    smooth = [report.smoothed([row[key] for row in rows], window) for key in keys]
    return Curve(run.name, window, [row["step"] for row in rows], smooth[0], smooth[1], verifier)


def pairs_of(folder: Path) -> list[Pair]:
    """The held-out pairs of a finished run of algorithm "reward". Raises UserError where `folder` holds no such run."""
    run = record.read(folder)
    algorithm = run.config.get("trainer", {}).get("algorithm")
    if algorithm != "reward":
        raise UserError(f"{folder}: a run of algorithm '{algorithm}', valid: one of algorithm 'reward'")
    path = folder / "samples.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        made = [Pair(*map(float, row["after"]), *map(int, row["tokens"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not what a reward model's run writes ({error!r}); train it again") from None
    if not made:
        raise UserError(f"{path}: no pairs; train the run again")
    return made


def summary(pairs: Sequence[Pair]) -> dict[str, Any]:
    """The report's numbers on held-out pairs."""
    margins = [pair.margin for pair in pairs]
    right = sum(margin > 0 for margin in margins)
    uneven = [pair for pair in pairs if pair.chosen_tokens != pair.rejected_tokens]
    longer = sum((pair.margin > 0) == (pair.chosen_tokens > pair.rejected_tokens) for pair in uneven)
    scores = [score for pair in pairs for score in (pair.chosen, pair.rejected)]
    lengths = [float(n) for pair in pairs for n in (pair.chosen_tokens, pair.rejected_tokens)]
    return {
        "pairs": len(pairs),
        "accuracy": {"value": right / len(pairs), "ci95": wilson(right, len(pairs))},
        "calibration": asdict(calibration(margins)),
        "length": {
            "correlation": correlation(lengths, scores),
            "pairs_of_unequal_length": len(uneven),
            "prefers_longer": None if not uneven else longer / len(uneven),
            "ci95": None if not uneven else wilson(longer, len(uneven)),
            "chosen_is_longer": None
            if not uneven
            else sum(pair.chosen_tokens > pair.rejected_tokens for pair in uneven) / len(uneven),
        },
    }


def main(name: str, against: str | None, root: Path = Path()) -> int:
    """Write `reward_report.{md,json,png}` into the final folder of the run `name`. Returns the exit code."""
    folder, _ = finished.find(root, name)
    pairs = pairs_of(folder)
    other = None if against is None else curve(finished.find(root, against)[0], folder.name)
    numbers = summary(pairs)
    sources = [folder / "run.json", folder / "samples.jsonl"]
    if against is not None:
        sources += [finished.find(root, against)[0] / file for file in ("run.json", "metrics.jsonl")]
        numbers["against"] = None if other is None else _ends(other)
    numbers["sources"] = {source.relative_to(root).as_posix(): files.sha256_file(source) for source in sources}
    draw(pairs, other, folder / f"{NAME}.png")
    files.write_json(folder / f"{NAME}.json", numbers)
    files.write_text(folder / f"{NAME}.md", markdown(folder.name, numbers))
    print(markdown(folder.name, numbers))
    print(f"written to {folder / NAME}.md, .json and .png")
    return 0


def markdown(name: str, numbers: dict[str, Any]) -> str:
    """The report as Markdown."""
    accuracy, length = numbers["accuracy"], numbers["length"]
    lines = [
        f"# Reward model {name}",
        "",
        f"Held-out pairs ranked right: **{accuracy['value']:.3f}** {_interval(accuracy['ci95'])} of {numbers['pairs']} "
        "(Wilson's 95 % interval).",
        "",
        f"Expected calibration error: **{numbers['calibration']['ece']:.3f}**. How sure the model was of its choice, "
        "sigmoid(score difference), and how often it was right:",
        "",
        "| confidence | pairs | mean confidence | right [95 %] |",
        "|---|---|---|---|",
        *(
            f"| {b['low']:.2f} to {b['high']:.2f} | {b['n']} | {b['confidence']:.3f} "
            f"| {b['accuracy']:.3f} {_interval(b['ci95'])} |"
            for b in numbers["calibration"]["bins"]
        ),
        "",
    ]
    r = length["correlation"]
    lines.append(f"Correlation of score with length in tokens: {'none, all are alike' if r is None else f'{r:+.3f}'}.")
    if length["prefers_longer"] is not None:
        lines.append(
            f"Of {length['pairs_of_unequal_length']} pairs of unequal length it prefers the longer completion in "
            f"{length['prefers_longer']:.3f} {_interval(length['ci95'])}; the longer one is right in "
            f"{length['chosen_is_longer']:.3f}."
        )
    if against := numbers.get("against"):
        lines += [
            "",
            f"## {against['run']}, trained on it",
            "",
            "| | first steps | at the verifier's best | last steps |",
            "|---|---|---|---|",
            *(
                f"| {label} | {ends['first']:.3f} | {ends['best']:.3f} | {ends['last']:.3f} |"
                for label, ends in (
                    ("learned reward", against["learned"]),
                    (against["verifier_name"], against["verifier"]),
                )
            ),
            "",
            f"Means over {against['window']} steps of the training rollouts; the verifier is best at step "
            f"{against['best_step']}. A fall after that, with the learned reward rising, is over-optimisation.",
        ]
    lines += ["", f"![calibration, length{', over-optimisation' if against else ''}]({NAME}.png)", "", "From "]
    lines[-1] += ", ".join(f"`{source}`" for source in numbers["sources"]) + "."
    return "\n".join(lines) + "\n"


def draw(pairs: Sequence[Pair], other: Curve | None, png: Path) -> None:
    """Reliability, score against length and, with a run beside it, learned reward and verifier."""
    from matplotlib.figure import Figure  # no pyplot: no backend to choose, nothing global

    columns = 2 if other is None else 3
    figure = Figure(figsize=(4.2 * columns, 3.4), dpi=110, layout="constrained")
    _reliability(figure.add_subplot(1, columns, 1), calibration([pair.margin for pair in pairs]))
    _lengths(figure.add_subplot(1, columns, 2), pairs)
    if other is not None:
        _optimised(figure.add_subplot(1, columns, 3), other)
    report.save_png(figure, png)


def _reliability(axes: "Axes", found: Calibration) -> None:
    axes.plot([0.5, 1], [0.5, 1], color="0.6", lw=1, ls="--", label="calibrated")
    x, y = [b.confidence for b in found.bins], [b.accuracy for b in found.bins]
    errors = [[b.accuracy - b.ci95[0] for b in found.bins], [b.ci95[1] - b.accuracy for b in found.bins]]
    axes.errorbar(x, y, yerr=errors, fmt="o-", color="tab:blue", capsize=2, label=f"model, ECE {found.ece:.3f}")
    axes.set(xlabel="confidence", ylabel="pairs ranked right", title="calibration", xlim=(0.48, 1.02), ylim=(0, 1.03))
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.25)


def _lengths(axes: "Axes", pairs: Sequence[Pair]) -> None:
    for label, marker, color, shift, points in (
        ("right", "o", "tab:blue", -0.12, [(p.chosen_tokens, p.chosen) for p in pairs]),
        ("wrong", "x", "tab:orange", 0.12, [(p.rejected_tokens, p.rejected) for p in pairs]),
    ):
        x, y = [n + shift for n, _ in points], [score for _, score in points]
        axes.scatter(x, y, s=12, marker=marker, color=color, alpha=0.4, label=label)
    axes.set(xlabel="length of the completion (tokens)", ylabel="score", title="score against length")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.25)


def _optimised(axes: "Axes", other: Curve) -> None:
    axes.plot(other.steps, other.learned, color="tab:orange", ls="--", label="learned reward (left)")
    axes.set(xlabel="step", ylabel="learned reward", title=f"{other.run}, means of {other.window} steps")
    right = axes.twinx()
    right.plot(other.steps, other.verifier, color="tab:blue", label=f"{other.verifier_name} (right)")
    right.set_ylabel(other.verifier_name)
    lines = [*axes.get_lines(), *right.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], fontsize=8, frameon=False)
    axes.grid(alpha=0.25)


def _ends(other: Curve) -> dict[str, Any]:
    first = min(other.window, len(other.steps)) - 1  # the first whole window
    best = max(range(first, len(other.steps)), key=lambda i: other.verifier[i])

    def at(values: list[float]) -> dict[str, float]:
        return {"first": values[first], "best": values[best], "last": values[-1]}

    return {
        "run": other.run,
        "verifier_name": other.verifier_name,
        "window": other.window,
        "best_step": other.steps[best],
        "learned": at(other.learned),
        "verifier": at(other.verifier),
        "correlation": correlation(other.learned, other.verifier) if len(other.steps) > 1 else None,
    }


def _logged(rewards: Sequence[dict[str, Any]], position: int) -> str:
    """The name a reward is logged under, as `rl.rewards.build` gives it."""
    name = rewards[position]["name"]
    same = sum(other["name"] == name for other in rewards[:position])
    return name if not same else f"{name}_{same + 1}"


def _parents(run: record.Record) -> str:
    return ", ".join(str(parent.get("name")) for parent in run.parents)


def _interval(bounds: Sequence[float]) -> str:
    return f"[{bounds[0]:.3f}, {bounds[1]:.3f}]"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
