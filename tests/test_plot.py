"""Figures of `python -m evals plot`: what is drawn, against hand-made results and metrics; bytes that stay the same."""

import json
import random
import re
from pathlib import Path

import pytest
from evals_helper import put_result
from scipy import stats as reference

from evals import __main__ as cli
from evals import plot, stats, table
from rl.errors import UserError


def _run(root: Path, name: str, rewards: list[float], parent: str = "models/final", key: str = "reward") -> Path:
    folder = root / parent / name
    folder.mkdir(parents=True)
    rows = [{"step": step, key: value} for step, value in enumerate(rewards, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two models on two tasks; an experiment of three seeds and one of a single run."""
    chance = random.Random(0)
    for task in ("gcd", "sums"):
        put_result(tmp_path, "demo", [int(chance.random() < 0.4) for _ in range(30)], "base", task)
        put_result(tmp_path, "demo", [int(chance.random() < 0.8) for _ in range(30)], "run", task)
    for seed in range(3):
        _run(tmp_path, f"demo-seed{seed}", [chance.random() for _ in range(8)])
    _run(tmp_path, "alone", [chance.random() for _ in range(8)], "evals/published/runs")
    return tmp_path


def test_bars_stand_at_the_scores_with_wilsons_intervals(root: Path) -> None:
    results = table.read(root)
    axes = plot.bars(results, ("strict", "none")).axes[0]
    base, run = axes.containers[0], axes.containers[2]
    rows = {(row.role, row.task): row for result in results for row in result.rows}
    for container, role in ((base, "base"), (run, "run")):
        assert [bar.get_height() for bar in container] == [rows[role, task].value for task in ("gcd", "sums")]
    segments = axes.containers[1].lines[2][0].get_segments()
    low, high = stats.wilson(round(rows["base", "gcd"].value * 30), 30)
    assert (segments[0][0][1], segments[0][1][1]) == pytest.approx((low, high))
    # in grey the hatches tell the bars apart
    assert base[0].get_hatch() != run[0].get_hatch()


def test_more_models_than_colours_still_differ(tmp_path: Path) -> None:
    """Trap: the ninth model would look as the first."""
    for number in range(20):
        put_result(tmp_path, f"m{number:02}", [1, 0])
    axes = plot.bars(table.read(tmp_path), ("strict", "none")).axes[0]
    looks = {(c[0].get_hatch(), c[0].get_facecolor()) for c in axes.containers if hasattr(c, "patches")}
    assert len(looks) == 20


def test_a_band_is_students_interval_over_the_seeds(tmp_path: Path) -> None:
    rewards = [[0.1, 0.5, 0.9], [0.2, 0.4, 1.0], [0.3, 0.9, 0.2, 0.7]]  # the last logged a step more
    folders = [_run(tmp_path, f"x-seed{seed}", values) for seed, values in enumerate(rewards)]
    made = plot.curve(folders, "reward")
    assert made is not None
    assert (made.experiment, made.seeds, made.window, made.steps) == ("x", 3, 1, [1, 2, 3])
    for place in range(3):
        values = [row[place] for row in rewards]
        low, high = reference.t.interval(0.95, 2, sum(values) / 3, reference.sem(values))
        assert (made.mean[place], made.low[place], made.high[place]) == pytest.approx((sum(values) / 3, low, high))


def test_seeds_are_smoothed_before_the_band(tmp_path: Path) -> None:
    """Trap: a band of raw steps shows the batches' noise, not how the runs differ."""
    up, down = [0.0, 1.0] * 10, [1.0, 0.0] * 10
    made = plot.curve([_run(tmp_path, "x-seed0", up), _run(tmp_path, "x-seed1", down)], "reward")
    assert made is not None
    assert made.window == 2
    assert made.mean == pytest.approx([0.5] * 20)
    assert made.high[1:] == pytest.approx([0.5] * 19)  # over two steps both seeds have a half


def test_a_value_not_logged_is_no_curve(tmp_path: Path) -> None:
    folders = [_run(tmp_path, "x-seed0", [1.0]), _run(tmp_path, "x-seed1", [1.0], key="loss")]
    assert plot.curve(folders, "reward") is None


def test_one_line_style_and_marker_an_experiment_and_a_band_only_of_seeds(root: Path) -> None:
    folders = [root / "models" / "final" / f"demo-seed{seed}" for seed in range(3)]
    found = [plot.curve(folders, "reward"), plot.curve([root / "evals/published/runs/alone"], "reward")]
    axes = plot.curves([one for one in found if one], "reward").axes[0]
    assert len(axes.collections) == 1
    assert len({(line.get_linestyle(), line.get_marker()) for line in axes.lines}) == 2


def test_the_same_files_give_the_same_bytes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trap: the date in SVG and PDF, and matplotlib's random ids in SVG."""
    cli.main(["plot"], root)
    written = [root / line for line in capsys.readouterr().out.splitlines()]
    names = {f"{stem}.{form}" for stem in ("bars-strict", "curves-reward") for form in plot.FORMATS}
    assert {path.name for path in written} == names
    assert {path.parent for path in written} == {root / "build" / "figures"}
    first = {path: path.read_bytes() for path in written}
    cli.main(["plot"], root)
    assert {path: path.read_bytes() for path in written} == first
    assert not re.search(rb"<dc:date>|CreationDate", b"".join(first.values()))


def test_chosen_runs_and_another_curve(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run(root, "sft", [3.0, 2.0], key="loss")
    cli.main(["plot", "sft", "--out", str(root / "out")], root)
    assert {path.name for path in (root / "out").iterdir()} == {f"curves-loss.{form}" for form in plot.FORMATS}
    assert capsys.readouterr().out.splitlines()[0] == "out/curves-loss.svg"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--metric", "stric"], "--metric stric: not in the results, did you mean 'strict'"),
        (["--curve", "rewad"], "--curve rewad: no run here logged it, did you mean 'reward'"),
        (["--task", "gdc"], "gdc: no result of this task"),
        (["nothing"], "nothing: neither results nor metrics.jsonl to draw"),
        (["alone", "--task", "gcd"], "alone: no result to draw"),
    ],
)
def test_what_cannot_be_drawn_is_one_line_and_writes_nothing(root: Path, argv: list[str], words: str) -> None:
    with pytest.raises(UserError) as error:
        cli.main(["plot", *argv], root)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (root / "build").exists()
