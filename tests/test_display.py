"""The terminal: plain lines without one, a live bar with one, and nothing that a model says is obeyed."""

import io
import os
import pty
import re
from contextlib import suppress
from dataclasses import dataclass

import pytest
from rich.cells import cell_len

from rl import report
from rl.display import Display, Sample, TrainBar, head, spread, tail, visible

TRL = {
    "reward": 0.5,
    "loss": 0.01,
    "completions/mean_length": 3.9,
    "kl": 0.00123,
    "sampling/sampling_logp_difference/mean": 2e-4,
    "rollout/tokens_per_s": 1234.5,
}
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


@dataclass(frozen=True)
class Score:
    strict: bool
    lenient: bool
    wellformed: bool = True


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def result() -> dict:
    before = [Score(i < 36, i < 41) for i in range(100)]
    return report.result("strict", before, [Score(i < 73, i < 78) for i in range(100)])


def test_log_lines_have_no_control_characters_even_when_colour_is_forced(monkeypatch):
    """CI sets FORCE_COLOR, which rich takes for a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    display = Display(out, stages=2, width=80)
    display.stage("base model")
    display.warn("mlx is absent")
    with display.train_progress(2) as bar:
        bar.update(1, TRL)
        bar.update(2)
    display.result(result(), [Sample("1+1=", "3\x1b[2J", "2", "2", False, True)], {"model": "models/final/demo"})
    assert not CONTROL.search(out.getvalue())
    assert "1/2 base model\n" in out.getvalue()
    assert "    warning: mlx is absent\n" in out.getvalue()


def test_progress_line_says_steps_times_and_trls_numbers():
    out, clock = io.StringIO(), Clock()
    with Display(out, clock=clock).train_progress(32) as bar:
        clock.now += 15
        bar.update(1, TRL)
    assert out.getvalue() == (
        "    train 1/32 15 s, 7 min 45 s left  reward 0.500  length 3.9  kl 0.0012  |Δlogp| 2.0e-04  tok/s 1,234\n"
    )


def test_loss_and_accuracy_stand_where_there_is_no_reward_and_missing_values_are_left_out():
    out = io.StringIO()
    with Display(out, clock=Clock()).train_progress(2) as bar:
        bar.update(1, {"loss": 1.25, "mean_token_accuracy": 0.5, "kl": None})
    assert out.getvalue().endswith("left  loss 1.250  accuracy 0.500\n")


def test_time_left_after_a_resume_counts_only_the_steps_of_this_process():
    clock = Clock()
    bar = TrainBar("train", total=100, start=90, clock=clock)
    assert bar.times() == (0.0, None)
    clock.now += 20
    bar.update(92)
    assert bar.times() == (20.0, pytest.approx(80.0))  # 10 s a step; counting all 92 would say 1.7 s
    clock.now += 5
    assert bar.times() == (25.0, pytest.approx(75.0))  # counts down inside a step
    clock.now += 500
    assert bar.times()[1] == 0.0


@pytest.mark.parametrize(("total", "batch"), [(7, 1), (32, 1), (1000, 1), (256, 30), (4096, 256)])
def test_a_log_gets_about_twenty_lines_with_the_first_and_the_last(total, batch):
    """Evaluation moves by whole batches, which need not hit the multiples."""
    out = io.StringIO()
    with Display(out).eval_progress(total) as bar:
        for step in [*range(batch, total, batch), total]:
            bar.update(step)
            bar.update(step)  # told twice, shown once
    steps = [int(line.split()[1].split("/")[0]) for line in out.getvalue().splitlines()]
    assert steps[0] == batch
    assert steps[-1] == total
    assert len(set(steps)) == len(steps)
    assert min(total, 5) <= len(steps) <= 22


def test_log_lines_are_not_wrapped():
    out = io.StringIO()
    Display(out, width=40).note("x" * 200)
    assert out.getvalue() == "    " + "x" * 200 + "\n"


def through_terminal(work, monkeypatch, columns: int, **environment: str) -> str:
    """What `work(display)` sends to a real terminal of so many columns."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    for key in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    controller, terminal = pty.openpty()
    chunks = []
    with os.fdopen(terminal, "w", encoding="utf-8") as file:
        display = Display(file)
        assert display.live
        work(display)
        file.flush()
        os.set_blocking(controller, False)
        while True:
            try:
                chunks.append(os.read(controller, 65536))
            except (BlockingIOError, OSError):
                break
    os.close(controller)
    return b"".join(chunks).decode()


def train(display: Display) -> None:
    with display.train_progress(4) as bar:
        bar.update(2, TRL)
        bar.update(4)


def test_terminal_shows_a_live_bar_that_ends_complete_with_the_cursor_back(monkeypatch):
    sent = through_terminal(train, monkeypatch, 100)
    assert "\x1b[?25l" in sent
    assert sent.rindex("\x1b[?25h") > sent.rindex("\x1b[?25l")
    last = sent[sent.rindex("train") :]
    assert "4/4" in last
    assert "reward 0.500" in last
    assert "━" in last


def test_the_cursor_comes_back_when_training_is_interrupted(monkeypatch):
    def interrupted(display: Display) -> None:
        with suppress(KeyboardInterrupt), display.train_progress(4) as bar:
            bar.update(1, TRL)
            raise KeyboardInterrupt

    sent = through_terminal(interrupted, monkeypatch, 100)
    assert sent.rindex("\x1b[?25h") > sent.rindex("\x1b[?25l")


def test_no_color_leaves_no_colour_codes(monkeypatch):
    def work(display: Display) -> None:
        display.warn("careful")
        train(display)

    coloured = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m|\x1b\[9[0-9]m")
    assert coloured.search(through_terminal(work, monkeypatch, 100))
    assert not coloured.search(through_terminal(work, monkeypatch, 100, NO_COLOR="1"))


@pytest.mark.parametrize("width", [50, 80, 140])
def test_nothing_is_wider_than_the_terminal(width):
    out = io.StringIO()
    samples = [Sample("Q" * 300, "b" * 300, "a" * 300, "9" * 300, False, True)] * 9
    Display(out, width=width).result(result(), samples)
    tables = [line for line in out.getvalue().splitlines() if not line.startswith("    *")]
    assert max(cell_len(line) for line in tables) <= width


def test_result_shows_both_scores_with_interval_wellformed_share_and_where_things_lie():
    out = io.StringIO()
    display = Display(out, width=100)
    samples = [Sample(f"Q: x\n{i} + 1 =", "0", str(i + 1), str(i + 1), False, True) for i in range(12)]
    display.result(result(), samples, {"model": "models/final/demo", "curve": "models/final/demo/curves.png"})
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert "strict * 0.360 ± 0.048 0.730 ± 0.045 +0.370 [+0.275, +0.465]" in lines
    assert "lenient 0.410 ± 0.049 0.780 ± 0.042 +0.370 [+0.275, +0.465]" in lines
    assert "well-formed 1.000 1.000 +0.000" in lines
    assert [line for line in lines if "+ 1 =" in line] == [
        f"{i} + 1 = ✗ 0 ✓ {i + 1} {i + 1}" for i in (0, 2, 4, 6, 8, 10)
    ]
    assert lines[-2:] == ["model: models/final/demo", "curve: models/final/demo/curves.png"]


def test_completions_are_neither_markup_nor_terminal_commands():
    """A model may print anything: `[/red]` raises in rich when read as markup, and \\x1b[2J clears the screen."""
    out = io.StringIO()
    display = Display(out, width=120)
    display.result(result(), [Sample("[bold]q[/bold]", "[/red]\x1b[2J\r\n", "\x9b1A\u202e", "[x]", False, False)])
    display.note("[/nothing] \x1b[31m")
    text = out.getvalue()
    assert "[bold]q[/bold]" in text
    assert r"[/red]\x1b[2J\r\n" in text
    assert r"\x9b1A\u202e" in text
    assert r"    [/nothing] \x1b[31m" in text
    assert not CONTROL.search(text)


def test_a_stream_without_unicode_gets_ascii_marks_instead_of_an_error():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    display = Display(stream, width=100)
    with display.train_progress(1) as bar:
        bar.update(1, TRL)
    display.result(result(), [Sample("1+1=", "3", "2", "2", False, True)])
    stream.flush()
    text = raw.getvalue().decode("ascii")
    assert re.search(r"1\+1= .*- 3 .*\+ 2 ", text)


def test_seeds_are_shown_with_their_mean():
    rows = [
        report.SeedRow(f"demo-seed{s}", s, 256, 0.36, a, a - 0.36, [0.3, 0.4], 9.0) for s, a in ((0, 0.73), (1, 0.67))
    ]
    mean = {"before": 0.36, "after": 0.70, "difference": 0.34}
    values = {key: {"value": value, "ci95": [value - 0.1, value + 0.1]} for key, value in mean.items()}
    out = io.StringIO()
    Display(out, width=100).seeds([report.Seeds("demo", "strict", rows, values)])
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert "0 0.360 0.730 +0.370 [+0.300, +0.400]" in lines
    assert "mean of 2 0.360 0.700 +0.340 [+0.240, +0.440]" in lines


def test_samples_are_spread_evenly_so_that_nobody_picked_them():
    assert spread(range(256), 6) == [0, 42, 85, 128, 170, 213]
    assert spread([1, 2], 6) == [1, 2]
    assert spread([], 6) == []


def test_cutting_text():
    assert tail("one\n4 + 5 =\n\n", 20) == "4 + 5 ="
    assert tail("x" * 30, 5) == "…xxxxx"
    assert tail("", 5) == ""
    assert head("abcdef", 3) == "abc…"
    assert head("abc", 3) == "abc"
    assert visible("é✓ a\tb") == r"é✓ a\tb"
