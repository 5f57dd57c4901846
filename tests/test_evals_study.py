"""`python -m evals study` on records written by hand, against sums done by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from evals import __main__ as cli
from evals import study
from rl.errors import UserError

APART, ESS = "sampling/sampling_logp_difference/mean", "sampling/ess"


def put(folder: Path, name: str, seed: int, after: list[int], rewards: list[float], **changes: Any) -> None:
    """A finished run of four questions; a step takes 2 s, the first is done at 30 s."""
    told = {
        **{"name": f"{name}-seed{seed}", "status": "finished", "config": {}, "device": "cuda: a card", "seed": seed},
        **{"base": {}, "data": {"source": "arithmetic", "fingerprint": "f"}, "steps": len(rewards)},
        "result": {"strict": {"before": {"value": 0.25}}},
    } | {key: value for key, value in changes.items() if key in ("steps", "status", "data")}
    rows = [
        {"step": i + 1, "wall_s": 30.0 + changes.get("pace", 2.0) * i, "reward": reward, APART: 0.01 * (i + 1)}
        | {ESS: 1.0 - 0.1 * i, "time/sync": 0.005, "sync/bytes": 9e6}
        for i, reward in enumerate(rewards)
    ]
    samples = [{"id": f"q{i}", "right": [False, bool(mark)]} for i, mark in enumerate(after)]
    run = folder / f"{name}-seed{seed}"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(told))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "samples.jsonl").write_text("\n".join(json.dumps(row) for row in samples))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    put(tmp_path, "full", 0, [1, 1, 0, 0], [0.0, 0.2, 0.4, 0.6])
    put(tmp_path, "full", 1, [1, 1, 1, 0], [0.2, 0.4, 0.6, 0.8])
    put(tmp_path, "shared", 0, [1, 0, 0, 1], [0.1, 0.1, 0.5, 0.5], pace=1.0)
    put(tmp_path, "shared", 1, [1, 1, 1, 1], [0.1, 0.3, 0.5, 0.7], pace=1.0)
    put(tmp_path, "full-more", 0, [0, 0, 0, 0], [0.0])  # another experiment, though its name begins alike
    return tmp_path


def test_summaries_by_hand(runs: Path) -> None:
    found = study.study(runs, ["full", "shared"])
    full, shared = found.summaries
    assert (full.seeds, full.steps, found.questions) == ((0, 1), 4, 4)
    assert full.before == 0.25
    assert full.after.value == pytest.approx(0.625)
    # two seeds, .5 and .75: t(1) = 12.706 times .125
    assert full.after.high - full.after.value == pytest.approx(12.7062 * 0.125, rel=1e-4)
    assert full.by_step == pytest.approx((0.1, 0.3, 0.5, 0.7))
    # the shortest trains for 3 s after its first step: .75, 1.5, 2.25 and 3 s, where full is at its steps 1, 1, 2, 2
    assert found.times == pytest.approx((0.75, 1.5, 2.25, 3.0))
    assert full.by_time == pytest.approx((0.1, 0.1, 0.3, 0.3))
    assert shared.by_time == pytest.approx((0.1, 0.2, 0.5, 0.6))
    assert (full.step_s, shared.step_s) == (2.0, 1.0)
    assert (full.sync_s, full.sync_bytes) == (0.005, 9e6)
    assert (full.apart, full.apart_most) == pytest.approx((0.025, 0.04))
    assert (full.ess, full.ess_least) == pytest.approx((0.85, 0.7))


def test_equivalence_pairs_questions_and_seeds_apart(runs: Path) -> None:
    """Questions' means: full 1, 1, .5, 0; shared 1, .5, .5, 1: differences 0, −.5, 0, 1 with mean .125.

    Their deviation is √(1.1875 / 3) = .62915, its error .31458, t(3) at 90 % 2.3534. By seed: 0 and .25, error .125.
    """
    (against,) = study.study(runs, ["full", "shared"]).against
    assert against.questions.value == against.seeds.value == pytest.approx(0.125)
    assert against.questions.high == pytest.approx(0.125 + 2.35336 * 0.314576, rel=1e-4)
    assert against.seeds.high == pytest.approx(0.125 + 6.31375 * 0.125, rel=1e-4)
    assert not against.equivalent


def test_equivalent_needs_both(tmp_path: Path) -> None:
    """400 questions of which one differs, in one seed: within two points over questions and over seeds."""
    marks = [1] * 200 + [0] * 200
    for seed in range(3):
        put(tmp_path, "a", seed, marks, [0.5, 0.5])
        put(tmp_path, "b", seed, [*marks[:-1], int(seed == 0)], [0.5, 0.5])
        put(tmp_path, "c", seed, marks[: 200 + 30 * (seed - 1)] + [0] * (200 - 30 * (seed - 1)), [0.5, 0.5])
    near, wild = study.study(tmp_path, ["a", "b", "c"]).against
    assert near.equivalent
    assert near.questions.high < 0.02
    assert wild.seeds.value == pytest.approx(0.0 - 30 / 400 / 3)  # .5, .5 and .425: no seed is above
    assert not wild.seeds.equivalent
    assert not wild.equivalent


def test_runs_that_are_not_alike_are_refused(runs: Path) -> None:
    for name, wrong in (
        ("steps", {"steps": 5}),
        ("data", {"data": {"source": "arithmetic", "fingerprint": "g"}}),
    ):
        for seed in (0, 1):
            put(runs, f"other-{name}", seed, [1, 1, 0, 0], [0.1] * 4, **wrong)
        with pytest.raises(UserError, match=f"other-{name} and full differ in their {name}"):
            study.study(runs, ["full", f"other-{name}"])
    put(runs, "one", 0, [1, 1, 0, 0], [0.1] * 4)
    with pytest.raises(UserError, match=r"differ in their seeds: \[0\] against \[0, 1\]"):
        study.study(runs, ["full", "one"])
    put(runs, "killed", 0, [1, 1, 0, 0], [0.1] * 4, status="interrupted")
    with pytest.raises(UserError, match="status is 'interrupted'"):
        study.study(runs, ["full", "killed"])
    with pytest.raises(UserError, match="no run of 'none'"):
        study.study(runs, ["full", "none"])
    with pytest.raises(UserError, match="two or more"):
        study.study(runs, ["full"])


def test_the_command_writes_table_and_data(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    root.mkdir()
    cli.main(["study", "full", "shared", "--from", str(runs)], root)
    text = (root / "evals" / "published" / "study-precision.md").read_text()
    assert text in capsys.readouterr().out
    assert str(runs.parent) not in text
    learned = next(line for line in text.splitlines() if line.startswith("| shared |"))
    assert learned.split("|")[4:8] == [" 0.100 ", " 0.200 ", " 0.500 ", " 0.600 "]
    assert "**not shown**" in text
    kept = json.loads((root / "evals" / "published" / "study-precision.json").read_text())
    assert kept["against"][0]["seeds"]["value"] == pytest.approx(0.125)


def test_the_studys_configs_differ_in_precision_alone() -> None:
    from rl.config import load, resolved

    root = Path(__file__).resolve().parent.parent / "configs" / "study"
    found = {path.stem: resolved(load(path)) for path in sorted(root.glob("precision-*.toml"))}
    assert len(found) == 5
    assert all(config["eval"]["size"] >= 1000 for config in found.values())
    stripped = []
    for name, config in found.items():
        assert config["run"].pop("name") == name
        config["model"].pop("quantization", None)
        for key in ("precision", "bits", "group_size", "dtype"):
            config["rollout"].pop(key, None)
        stripped.append(config)
    assert all(config == stripped[0] for config in stripped)
