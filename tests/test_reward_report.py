"""The reward-model report: its statistics against hand computation and scipy, its files, what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_helper import fresh
from scipy import stats

from rl import files, record, reward_report
from rl.__main__ import main
from rl.errors import UserError


@pytest.mark.parametrize(("right", "n"), [(0, 7), (7, 7), (3, 8), (427, 512)])
def test_wilson_is_scipys(right: int, n: int) -> None:
    wanted = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert reward_report.wilson(right, n) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_calibration_by_hand() -> None:
    """Four pairs at confidence .9 of which two are right, one at .55 that is wrong, one tie: ties are not right."""
    margins = [logit(0.9), -logit(0.9), logit(0.9), -logit(0.9), -logit(0.55), 0.0]
    found = reward_report.calibration(margins, bins=5)
    assert [(b.n, round(b.confidence, 6), b.accuracy) for b in found.bins] == [(2, 0.525, 0.0), (4, 0.9, 0.5)]
    assert found.ece == pytest.approx(4 / 6 * 0.4 + 2 / 6 * 0.525)


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=60), st.integers(1, 12))
def test_bins_hold_every_pair_once(margins: list[float], bins: int) -> None:
    found = reward_report.calibration(margins, bins)
    assert sum(b.n for b in found.bins) == len(margins)
    assert sum(b.n * b.accuracy for b in found.bins) == pytest.approx(sum(m > 0 for m in margins))
    for b in found.bins:
        assert b.low - 1e-9 <= b.confidence <= b.high + 1e-9
        assert b.ci95[0] <= b.accuracy <= b.ci95[1]
    assert 0 <= found.ece <= 1


def test_a_calibrated_model_has_a_small_error_and_a_boastful_one_a_large() -> None:
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.5, 1, 20_000)
    margins = np.where(rng.random(20_000) < sure, 1, -1) * np.log(sure / (1 - sure))
    assert reward_report.calibration(margins.tolist()).ece < 0.01
    assert reward_report.calibration((4 * margins).tolist()).ece > 0.1


def test_correlation_is_numpys_and_none_without_spread() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=50), rng.normal(size=50)
    assert reward_report.correlation(x.tolist(), y.tolist()) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    assert reward_report.correlation([1.0, 1.0], [1.0, 2.0]) is None


PAIRS = [  # chosen, rejected, tokens: right and longer, right and shorter, wrong, right of equal length
    ((2.0, 1.0), (3, 2)),
    ((1.0, 0.0), (2, 4)),
    ((0.0, 1.0), (2, 3)),
    ((1.5, 1.0), (3, 3)),
]


def finished(root: Path, name: str, algorithm: str, **given: Any) -> Path:
    folder = root / "models" / "final" / name
    made = fresh(root, name=name, trainer={"algorithm": algorithm}, parents=given.pop("parents", ()))
    made.status, made.config["reward"] = "finished", given.pop("reward", [])
    record.save(made, folder)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A reward model's run and a run trained on it, as far as the report reads them."""
    folder = finished(tmp_path, "judge", "reward")
    rows = [{"after": list(scores), "tokens": list(tokens)} for scores, tokens in PAIRS]
    files.write_text(folder / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    rewards = [{"name": "length"}, {"name": "model"}, {"name": "exact", "weight": 0.0}]
    parents = [{"role": "reward.1.model", "name": "judge", "inputs_sha256": "x"}]
    folder = finished(tmp_path, "policy", "grpo", reward=rewards, parents=parents)
    for step in range(1, 21):  # the verifier rises, then falls while the learned reward goes on rising
        exact = step / 20 if step <= 10 else 1 - step / 20
        metrics = {"rewards/model/mean": float(step), "rewards/exact/mean": exact, "rewards/length/mean": -1.0}
        record.append_metrics(folder / "metrics.jsonl", step, 0.0, metrics)
    return tmp_path


def test_numbers_on_pairs_by_hand(root: Path) -> None:
    numbers = reward_report.summary(reward_report.pairs_of(root / "models/final/judge"))
    assert (numbers["pairs"], numbers["accuracy"]["value"]) == (4, 0.75)
    length = numbers["length"]
    assert (length["pairs_of_unequal_length"], length["prefers_longer"]) == (3, pytest.approx(2 / 3))
    assert length["chosen_is_longer"] == pytest.approx(1 / 3)
    lengths, scores = [3, 2, 2, 4, 2, 3, 3, 3], [2.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.5, 1.0]
    assert length["correlation"] == pytest.approx(np.corrcoef(lengths, scores)[0, 1])


def test_over_optimisation_is_seen_where_the_verifier_falls(root: Path) -> None:
    """Trap: the learned reward of a config is named by its place among the rewards, not the first of them."""
    curve = reward_report.curve(root / "models/final/policy", "judge")
    assert (curve.window, curve.verifier_name, curve.steps) == (2, "exact", list(range(1, 21)))
    assert curve.learned[-1] == 19.5
    assert curve.verifier[-1] == pytest.approx((1 - 19 / 20 + 0.0) / 2)
    ends = reward_report._ends(curve)
    assert ends["best_step"] in (10, 11)
    assert ends["learned"]["last"] > ends["learned"]["best"] > ends["learned"]["first"] == 1.5
    assert ends["verifier"]["last"] < ends["verifier"]["best"]


def test_the_command_writes_the_same_files_twice(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(root)
    folder, made = Path("models/final/judge"), {}
    for _ in range(2):
        assert main(["reward-report", "judge", "--against", "policy"]) == 0
        again = {kind: (folder / f"reward_report.{kind}").read_bytes() for kind in ("md", "json", "png")}
        assert made in ({}, again)
        made = again
    text = made["md"].decode()
    assert "right: **0.750** [0.301, 0.954] of 4" in text
    assert "## policy, trained on it" in text
    assert "`models/final/policy/metrics.jsonl`" in text
    assert made["png"].startswith(b"\x89PNG")
    numbers = json.loads(made["json"])
    assert numbers["sources"]["models/final/judge/samples.jsonl"] == files.sha256_file(folder / "samples.jsonl")
    capsys.readouterr()
    assert main(["reward-report", "jugde"]) == 2
    assert "jugde: no such run in models/final; did you mean 'judge'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (
            lambda root: reward_report.pairs_of(root / "models/final/policy"),
            "algorithm 'grpo', valid: one of algorithm 'reward'",
        ),
        (
            lambda root: reward_report.curve(root / "models/final/policy", "other"),
            "not trained on the reward model other",
        ),
        (
            lambda root: (
                files.write_text(root / "models/final/judge/samples.jsonl", '{"after": [1]}\n')
                or reward_report.pairs_of(root / "models/final/judge")
            ),
            "not what a reward model's run writes",
        ),
        (
            lambda root: (
                (root / "models/final/policy/metrics.jsonl").unlink()
                or reward_report.curve(root / "models/final/policy", "judge")
            ),
            "no step has both rewards/model/mean and rewards/exact/mean",
        ),
    ],
)
def test_what_cannot_be_reported_is_one_line(root: Path, break_it: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        break_it(root)
    assert "\n" not in str(caught.value)


def test_a_run_without_a_verifier_is_told_how_to_log_one(root: Path) -> None:
    parents = [{"role": "reward.0.model", "name": "judge", "inputs_sha256": "x"}]
    folder = finished(root, "blind", "grpo", reward=[{"name": "model"}], parents=parents)
    with pytest.raises(UserError, match=r"logged no verifier .* add \[\[reward\]\] name = 'exact', weight = 0"):
        reward_report.curve(folder, "judge")
