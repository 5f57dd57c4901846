"""What a run prints: stages, a progress bar with time left, and at the end before beside after.

On a terminal a live bar; anywhere else (CI logs, pipes) plain lines without control characters. Completions are a
model's output: they are shown with their control characters escaped and are never read as markup.
"""

import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rl import processes, report
from rl.report import Seeds

COLUMNS = (  # label, names a trainer may log it under, format
    ("reward", ("reward",), ".3f"),
    ("loss", ("loss",), ".3f"),
    ("accuracy", ("mean_token_accuracy", "accuracy"), ".3f"),
    ("length", ("completions/mean_length",), ".1f"),
    ("kl", ("kl",), ".2g"),
    ("|Δlogp|", ("sampling/sampling_logp_difference/mean",), ".1e"),
    ("tok/s", ("rollout/tokens_per_s", "tokens_per_s"), ",.0f"),
)
PLAIN_LINES = 20  # about so many progress lines in a log


@dataclass(frozen=True)
class Sample:
    """One held-out question with the completions before and after training and their verdicts."""

    prompt: str
    before: str
    after: str
    answer: str
    before_right: bool
    after_right: bool


@dataclass
class TrainBar:
    """Progress of one training or evaluation; `update` with the steps done so far and what was logged at that step."""

    title: str
    total: int
    start: int
    clock: Callable[[], float]
    show: Callable[["TrainBar"], None] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.step, self.previous = self.start, self.start
        self.began = self.updated = self.clock()

    def update(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """`step` steps are done; call it once a step, with what was logged. Metrics not given keep their last value."""
        self.previous, self.step, self.updated = self.step, step, self.clock()
        self.metrics |= metrics or {}
        if self.show:
            self.show(self)

    def times(self) -> tuple[float, float | None]:
        """Seconds since the start and seconds left, None before the first step (steps of a resumed run don't count)."""
        now, done = self.clock(), self.step - self.start
        if done <= 0:
            return now - self.began, None
        left = (self.updated - self.began) / done * (self.total - self.step)
        return now - self.began, max(0.0, left - (now - self.updated))  # counts down inside a long step too


class Display:
    """The terminal of one command. Honours NO_COLOR and COLUMNS; live only on a real terminal."""

    def __init__(
        self,
        file: IO[str] | None = None,
        *,
        stages: int | None = None,
        width: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        file = file or sys.stdout
        self.live = file.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")
        # FORCE_COLOR is common in CI and must not bring control characters into its logs
        self.console = Console(file=file, force_terminal=self.live, width=width, highlight=False)
        self.stages, self.done, self.clock = stages, 0, clock
        utf = (self.console.encoding or "").lower().startswith("utf")
        self.right, self.wrong = ("✓", "✗") if utf else ("+", "-")
        if not utf and hasattr(file, "reconfigure"):
            file.reconfigure(errors="replace")  # a Δ must not end a run

    def stage(self, text: str) -> None:
        """`2/4 text`: the next stage begins."""
        self.done += 1
        number = f"{self.done}/{self.stages}" if self.stages else f"{self.done}"
        self._line(Text.assemble((number, "bold cyan"), " ", (visible(text), "bold")))

    def note(self, text: str) -> None:
        """An indented line of detail."""
        self._line(Text("    " + visible(text)))

    def warn(self, text: str) -> None:
        """An indented line that stands out."""
        self._line(Text("    warning: " + visible(text), style="yellow"))

    def _line(self, text: Text) -> None:
        # a log's lines are left whole for grep; a terminal wraps by itself
        self.console.print(text, soft_wrap=True)
        self.console.file.flush()

    @contextmanager
    def train_progress(self, total: int, *, start: int = 0, title: str = "train") -> Iterator[TrainBar]:
        """A bar over optimizer steps, `start` of them done before a resume; yields what to `update`."""
        with self._bar(total, start, title) as bar:
            yield bar

    @contextmanager
    def eval_progress(self, total: int, *, title: str = "held-out") -> Iterator[TrainBar]:
        """A bar over questions answered; yields what to `update`."""
        with self._bar(total, 0, title) as bar:
            yield bar

    @contextmanager
    def _bar(self, total: int, start: int, title: str) -> Iterator[TrainBar]:
        bar = TrainBar(title, total, start, self.clock)
        if not self.live:
            bar.show = self._plain
            yield bar
            return
        with Live(get_renderable=lambda: _drawn(bar), console=self.console, refresh_per_second=4):
            yield bar

    def _plain(self, bar: TrainBar) -> None:
        every = max(1, -(-bar.total // PLAIN_LINES))
        # evaluation moves by whole batches: a line for each multiple passed, not only for those hit
        first, last = bar.previous == bar.start, bar.step >= bar.total
        if bar.step > bar.previous and (first or last or bar.step // every > bar.previous // every):
            line = f"{bar.title} {_steps(bar)}"
            self.note("  ".join([line, *_columns(bar.metrics)]))

    def result(
        self,
        result: Mapping[str, Any],
        samples: Sequence[Sample] = (),
        where: Mapping[str, Path | str] | None = None,
        what: str = "questions, greedy",
    ) -> None:
        """The end of a run: scores before and after, six completions side by side, and where everything lies.

        `result` is `run.json`'s. Of the samples, six at even distances are shown: nobody picked them.
        """
        n = result["after"]["n"]
        table = Table(title=f"held-out, {n} {what}", title_justify="left", box=self._box())
        for name in ("score", "before", "after", "difference [95 %]"):
            table.add_column(name, justify="left" if name == "score" else "right")
        for name in report.METRICS:
            score = result[name]
            chosen = name == result["metric"]
            cells = (report.plus_minus(score["before"]), report.plus_minus(score["after"]))
            style = "bold" if chosen else ""
            table.add_row(name + (" *" if chosen else ""), *cells, report.interval(score["difference"]), style=style)
        if well := result.get("wellformed"):
            change = f"{well['after'] - well['before']:+.3f}"
            table.add_row("well-formed", f"{well['before']:.3f}", f"{well['after']:.3f}", change)
        self.console.print(table)
        self.note("* the run's metric; ± one standard error; the difference is paired by question")
        if samples:
            self.console.print(self._samples(samples))
        for label, path in (where or {}).items():
            self._line(Text.assemble((f"{visible(label)}: ", "bold"), visible(str(path))))

    def _samples(self, samples: Sequence[Sample]) -> Table:
        shown = spread(samples, 6)
        table = Table(title=f"{len(shown)} of {len(samples)} completions", title_justify="left", box=self._box())
        for name, share in (("question", 3), ("before", 3), ("after", 3), ("answer", 1)):
            table.add_column(name, ratio=share, overflow="fold")
        for sample in shown:
            table.add_row(
                Text(tail(sample.prompt, 40)),
                self._verdict(sample.before, sample.before_right),
                self._verdict(sample.after, sample.after_right),
                Text(tail(sample.answer, 20)),
            )
        return table

    def _verdict(self, completion: str, right: bool) -> Text:
        mark = (self.right, "green") if right else (self.wrong, "red")
        return Text.assemble(mark, " ", head(completion, 60))

    def seeds(self, tables: Sequence[Seeds]) -> None:
        """The tables over seeds, as `rl.report.write_seeds` returns them."""
        for seeds in tables:
            table = Table(title=f"{seeds.name}: {seeds.metric}", title_justify="left", box=self._box())
            for name in ("seed", "before", "after", "difference [95 %]"):
                table.add_column(name, justify="right")
            for row in seeds.rows:
                change = report.interval({"value": row.difference, "ci95": row.ci95})
                table.add_row(str(row.seed), f"{row.before:.3f}", f"{row.after:.3f}", change)
            means = [f"{seeds.mean[column]['value']:.3f}" for column in ("before", "after")]
            last = report.interval(seeds.mean["difference"])
            table.add_row(f"mean of {len(seeds.rows)}", *means, last, style="bold")
            self.console.print(table)
        self.note("a seed's interval covers the questions, the mean's covers the seeds (Student's t)")

    def _box(self) -> Any:
        from rich import box

        return box.SIMPLE_HEAD if self.right == "✓" else box.ASCII2


def _drawn(bar: TrainBar) -> Group:
    """The bar with its times, and below it what was logged last; drawn anew four times a second."""
    grid = Table.grid(padding=(0, 1))
    done = ProgressBar(total=max(1, bar.total), completed=bar.step, width=30)
    grid.add_row(Text(f"    {bar.title}"), done, Text(_steps(bar), no_wrap=True))
    columns = Text("    " + "  ".join(_columns(bar.metrics)), overflow="ellipsis", no_wrap=True)
    return Group(grid, columns) if bar.metrics else Group(grid)


def _steps(bar: TrainBar) -> str:
    elapsed, left = bar.times()
    remaining = "" if bar.step >= bar.total else ", …" if left is None else f", {report.duration(left)} left"
    return f"{bar.step}/{bar.total} {report.duration(elapsed)}{remaining}"


def _columns(metrics: Mapping[str, Any]) -> list[str]:
    """`label value` for each of COLUMNS that was logged; the loss only where there is no reward."""
    shown = []
    for label, names, form in COLUMNS:
        value = next((metrics[name] for name in names if isinstance(metrics.get(name), int | float)), None)
        if value is not None and not (label == "loss" and "reward" in metrics):
            shown.append(f"{label} {value:{form}}")
    return shown


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items at even distances, the first included."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def visible(text: str) -> str:
    """The text with every character that could move the cursor, colour or clear the screen escaped: `\\n`, `\\x1b`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def head(text: str, length: int) -> str:
    """The first `length` characters, visible, with … where more follow."""
    return visible(text[:length]) + ("…" if len(text) > length else "")


def tail(text: str, length: int) -> str:
    """The last `length` characters of the text's last line that is not empty, visible, with … where more precede."""
    line = (text.rstrip().splitlines() or [""])[-1]
    return ("…" if len(line) > length else "") + visible(line[-length:])


def terminal(stages: int) -> Display:
    """The terminal of a run; of its processes the main one alone has it."""
    return Display(None if processes.is_main() else io.StringIO(), stages=stages)
