"""What `nox -s bench` measured: statistics, bars, and the table. Imports nothing that computes."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

ENGINE, BATCH, HF, PAGED = "this engine", "BatchGenerator", "HF generate", "continuous batching"
OURS, STOCK = "this project", "stock TRL"
SHAPES = ("tiny", "smollm2", "1.7b")
JUDGED = {"cpu": ("tiny", "smollm2"), "cuda": ("smollm2", "1.7b")}
OUTSIDE_TRAINER = ("rollout", "sync", "reward")


@dataclass(frozen=True)
class Spread:
    """Median, least and largest of repeated measurements."""

    median: float
    low: float
    high: float

    def text(self, form: str = ",.0f") -> str:
        """`5,195 (5,100–5,300)`."""
        return f"{self.median:{form}} ({self.low:{form}}–{self.high:{form}})"


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError when there are none."""
    if not values:
        raise ValueError("no measurements")
    return Spread(statistics.median(values), min(values), max(values))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Their seconds over ours, repetition by repetition: above 1 we are faster.

    They may have stayed out of later repetitions, but not we: ValueError.
    """
    if len(theirs) > len(ours):
        raise ValueError(f"{len(theirs)} of their repetitions, longer than our {len(ours)}")
    return [b / a for a, b in zip(ours, theirs, strict=False)]


@dataclass(frozen=True)
class Floor:
    """Least seconds for one piece of work: each forward takes the longer of its bytes and its sums; launches apart."""

    bytes_s: float
    flops_s: float
    forwards_s: float  # the longer of the two, forward by forward
    launches_s: float


@dataclass(frozen=True)
class Machine:
    """Measured here: bytes/s of a copy (read and written), FLOP/s of a product in the bench's dtype, s/launch."""

    bandwidth: float
    flops: float
    launch: float
    launches: int  # a decode step of the engine


@dataclass(frozen=True)
class Sizes:
    """What of a model decides its floor: weights of the layers' products and of the head, bytes of a cached token."""

    body: int
    head: int
    cache_bytes: int
    itemsize: int


def floor(sizes: Sizes, machine: Machine, prompts: int, prompt: int, lengths: Sequence[int]) -> Floor:
    """For `prompts` distinct prompts of `prompt` tokens and one completion of each of `lengths`.

    Counted as little as can be: every prompt is run once and its keys and values read once a step for all its rows; a
    row that is done costs nothing; attention's own sums are left out. The first tokens come from the prompts' forward.
    """
    weights = (sizes.body + sizes.head) * sizes.itemsize
    moved = [weights + prompts * prompt * sizes.cache_bytes]
    sums = [2.0 * prompts * (prompt * sizes.body + sizes.head)]
    for step in range(1, max(lengths)):
        rows = sum(length > step for length in lengths)
        moved.append(weights + (prompts * prompt + rows * step) * sizes.cache_bytes)
        sums.append(2.0 * rows * (sizes.body + sizes.head))
    bytes_s, flops_s = [m / machine.bandwidth for m in moved], [s / machine.flops for s in sums]
    longer = sum(max(a, b) for a, b in zip(bytes_s, flops_s, strict=True))
    return Floor(sum(bytes_s), sum(flops_s), longer, len(moved) * machine.launches * machine.launch)


@dataclass(frozen=True)
class Work:
    """Rollouts to time: `prompts` distinct prompts of one length, each completed `group` times."""

    name: str
    prompts: int
    group: int
    prompt_tokens: int
    max_tokens: int
    long_tail: bool = False


@dataclass(frozen=True)
class Contest:
    """Seconds by contestant and new tokens, one entry a repetition; `floors` likewise.

    A contestant may have stayed out of the later repetitions, and its list is shorter then.
    """

    work: Work
    tokens: list[int]
    longest: list[int]
    seconds: dict[str, list[float]]
    floors: list[Floor]


@dataclass(frozen=True)
class Agreement:
    """A contestant's greedy tokens before timing, against the trainer's logits in float32.

    `regret`: mean logprob that its token falls short of the best one; `dlogp`: mean |its logprob − the trainer's|, None
    where it gives none; `equal`: share of tokens that are the trainer's own best.
    """

    contestant: str
    tokens: int
    regret: float
    dlogp: float | None
    equal: float


@dataclass(frozen=True)
class Sync:
    """Hand-overs torch → MLX of one kind."""

    what: str
    tensors: int
    bytes: int
    seconds: list[float]


@dataclass(frozen=True)
class Steps:
    """GRPO steps, `{contestant: one {part: seconds} a repetition}`; `kind` is what is trained."""

    kind: str
    prompts: int
    group: int
    prompt_tokens: int
    max_tokens: int
    seconds: dict[str, list[dict[str, float]]]

    def total(self, who: str) -> list[float]:
        """Whole step."""
        return [sum(parts.values()) for parts in self.seconds[who]]

    def trainer(self, who: str) -> list[float]:
        """All that is not rollout, sync or reward."""
        return [sum(s for part, s in parts.items() if part not in OUTSIDE_TRAINER) for parts in self.seconds[who]]


@dataclass(frozen=True)
class Report:
    """All about one model on one device (`cpu`, `cuda` or `mps`); `full` when it was not scaled down.

    `absent`: contestants that did not take part, with the reason; `notes`: parts not run or failed.
    """

    shape: str
    parameters: int
    device: str
    dtype: str
    full: bool
    agreements: list[Agreement]
    machine: Machine
    contests: list[Contest] = field(default_factory=list)
    syncs: list[Sync] = field(default_factory=list)
    steps: list[Steps] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Bar:
    """A bar of the project and what was found; `most` when the value has to stay below it."""

    what: str
    wanted: float
    found: Spread
    most: bool = False

    @property
    def met(self) -> bool:
        """By the median."""
        return self.found.median <= self.wanted if self.most else self.found.median >= self.wanted


def bars(report: Report) -> list[Bar]:
    """The bars that hold for this report; none where it was scaled down, or for a model or device that has none."""
    if not report.full or report.shape not in JUDGED.get(report.device, ()):
        return []
    found = []
    for contest in report.contests:
        ours, shared = contest.seconds[ENGINE], contest.work.group > 1
        versus_batch = spread(ratios(ours, contest.seconds[BATCH]))
        versus_hf = spread(ratios(ours, contest.seconds[HF]))
        found.append(Bar(f"rollout {contest.work.name} ÷ {BATCH}", 1.5 if shared else 1.0, versus_batch))
        found.append(Bar(f"rollout {contest.work.name} ÷ {HF}", 8.0 if report.device == "cuda" else 1.5, versus_hf))
    for steps in report.steps:
        whole = spread(ratios(steps.total(OURS), steps.total(STOCK)))
        found.append(Bar(f"whole GRPO step ({steps.kind}) ÷ {STOCK}", 2.0, whole))
        if report.shape == "smollm2" and "LoRA" in steps.kind:  # the default config's
            trainer = spread(ratios(steps.trainer(OURS), steps.trainer(STOCK)))
            found.append(Bar(f"trainer's part of the step ({steps.kind}) ÷ {STOCK}", 2.0, trainer))
            parts = zip(steps.seconds[OURS], steps.total(OURS), strict=True)
            share = spread([100 * p.get("sync", 0.0) / whole for p, whole in parts])
            found.append(Bar("LoRA sync, % of the step", 2.0, share, most=True))
    return found


def markdown(device: str, sections: Sequence[Sequence[str]]) -> str:
    """The file, from the lines of its sections."""
    lines = [f"# Bench on {device}", ""]
    lines += [
        "Medians with (least–largest) over repetitions that take turns. Ratios are taken within a repetition; above 1 "
        "this project is faster. Every contestant has the same weights, dtype, temperature 1 without filters and the "
        "same number of new tokens in every row (counted, not assumed). The engine also returns the logprob of every "
        "token, which the others are spared. A slow contestant takes part in fewer repetitions where time is short.",
    ]
    for section in sections:
        lines += ["", *section]
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, numbers to the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, rule, *rows)]


def section(report: Report, about: Sequence[str]) -> list[str]:
    """The lines of one report; `about` is lines on command, machine, versions and time."""
    lines = [f"## {report.shape}: {report.parameters / 1e6:,.1f}M parameters, {report.dtype} on {report.device}", ""]
    if not report.full:
        lines += ["**Scaled down (`--quick`): these numbers compare nothing. No bar is judged.**", ""]
    lines += [*(f"- {line}" for line in about), *(f"- **{note}**" for note in report.notes)]
    lines += [*(f"- {name} does not run here: {why}" for name, why in report.absent.items()), ""]
    judged = bars(report)
    if judged:
        lines += ["### Bars", ""]
        rows = [
            (bar.what, f"{'≤' if bar.most else '≥'} {bar.wanted:g}", bar.found.text(".2f"), _verdict(bar))
            for bar in judged
        ]
        lines += [*table(("bar", "wanted", "found", ""), rows), ""]
    elif report.full:
        lines += ["No bar is set for this model on this device.", ""]
    lines += ["### Agreement before timing (greedy)", ""]
    rows = [
        (
            a.contestant,
            f"{a.tokens:,}",
            f"{100 * a.equal:.1f} %",
            f"{a.regret:.1e}",
            "not given" if a.dlogp is None else f"{a.dlogp:.1e}",
        )
        for a in report.agreements
    ]
    head = ("contestant", "tokens", "the trainer's own best", "mean logprob short of the best", "mean |Δlogp|")
    lines += table(head, rows)
    if report.contests:
        lines += ["", *_rollouts(report)]
    if report.syncs:
        lines += ["", "### Sync torch → MLX", ""]
        rows = []
        for sync in report.syncs:
            found = spread([1e3 * s for s in sync.seconds])
            speed = sync.bytes / 1e6 / found.median
            rows.append((sync.what, f"{sync.tensors}", f"{sync.bytes / 1e6:,.1f}", found.text(",.2f"), f"{speed:.2f}"))
        lines += table(("weights", "tensors", "MB", "ms", "GB/s"), rows)
    for steps in report.steps:
        lines += ["", *_steps(steps)]
    return lines


def _verdict(bar: Bar) -> str:
    whole = (bar.found.high <= bar.wanted) if bar.most else (bar.found.low >= bar.wanted)
    return "**missed**" if not bar.met else "met" if whole else "met by the median, not every time"


def _rollouts(report: Report) -> list[str]:
    others = [who for who in (BATCH, HF, PAGED) if any(who in contest.seconds for contest in report.contests)]
    head = ("prompts × completions", "new tokens", "longest", *(f"{who}, tokens/s" for who in (ENGINE, *others)))
    head += (*(f"÷ {who}" for who in others), "repetitions")
    head += ("seconds", "floor: bytes", "FLOPs", "launches", "× the floor")
    rows = []
    for contest in report.contests:
        ours = contest.seconds[ENGINE]
        speeds = {
            who: spread([n / s for n, s in zip(contest.tokens, times, strict=False)]).text()
            for who, times in contest.seconds.items()
            if times
        }
        gains = {who: spread(ratios(ours, times)).text(".2f") for who, times in contest.seconds.items() if times}
        least = [max(f.forwards_s, f.launches_s) for f in contest.floors]
        middle = [
            statistics.median(getattr(f, n) for f in contest.floors) for n in ("bytes_s", "flops_s", "launches_s")
        ]
        rows.append(
            (
                contest.work.name,
                spread(contest.tokens).text(),
                spread(contest.longest).text(),
                *(speeds.get(who, "–") for who in (ENGINE, *others)),
                *(gains.get(who, "–") for who in others),
                " / ".join(f"{len(contest.seconds.get(who, []))}" for who in (ENGINE, *others)),
                spread(ours).text(".3g"),
                *(f"{seconds:.2g}" for seconds in middle),
                spread([s / f for s, f in zip(ours, least, strict=True)]).text(".1f"),
            )
        )
    work, machine = report.contests[0].work, report.machine
    return [
        f"### Rollouts: prompts of {work.prompt_tokens} tokens, at most {work.max_tokens} new ones",
        "",
        *table(head, rows),
        "",
        f"The floor is of this machine as measured: {machine.bandwidth / 1e9:,.1f} GB/s copying, "
        f"{machine.flops / 1e9:,.0f} GFLOP/s in a large product in {report.dtype}, {1e6 * machine.launch:.2f} µs an "
        f"operation × {machine.launches} operations a decode step. It counts every distinct prompt once and only rows "
        "that still run; the engine is compared with the longer of (bytes or FLOPs, whichever is longer in each "
        "forward) and launches.",
    ]


def _steps(steps: Steps) -> list[str]:
    parts = list(dict.fromkeys(part for who in steps.seconds.values() for step in who for part in step))
    order = ("rollout", "sync", "reward", "logprobs and loss", "backward", "KL to the start", "rest")
    rows = []
    for part in sorted(parts, key=order.index):
        times = {who: [step.get(part, 0.0) for step in steps.seconds[who]] for who in (OURS, STOCK)}
        both = min(min(values) for values in times.values()) > 0
        ratio = spread(ratios(times[OURS], times[STOCK])).text(".2f") if both else ""
        rows.append((part, *(spread(times[who]).text(".3g") if max(times[who]) else "" for who in times), ratio))
    for name, of in (("trainer's part", steps.trainer), ("whole step", steps.total)):
        both = ratios(of(OURS), of(STOCK))
        rows.append((f"**{name}**", *(spread(of(who)).text(".3g") for who in (OURS, STOCK)), spread(both).text(".2f")))
    return [
        f"### One GRPO step, {steps.kind}: {steps.prompts} × {steps.group}, prompt {steps.prompt_tokens}, completion "
        f"{steps.max_tokens}, float32 trainer",
        "",
        *table(("part", f"{OURS}, s", f"{STOCK}, s", "ratio"), rows),
        "",
        "A part's time is its own, without that of parts inside it, and the device is waited for at each border. "
        "Stock TRL generates with transformers; its bf16 autocast and gradient checkpointing are off.",
    ]
