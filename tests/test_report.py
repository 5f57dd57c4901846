"""Scores with their errors against scipy and numpy; curves, model card and seeds table by what they say."""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import image
from scipy import stats

from rl import files, record, report
from rl.errors import UserError
from rl.record import Record

SCORES = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60)


@dataclass(frozen=True)
class Score:
    strict: bool
    lenient: bool
    wellformed: bool


def finished(seed: int, before: int, after: int, n: int = 100, **changes) -> Record:
    """A finished run with `before` and `after` of `n` questions right, the after set holding the before set."""
    given = {
        "name": f"demo-seed{seed}",
        "status": "finished",
        "config": {
            "run": {"name": "demo", "seed": seed},
            "model": {"base": "smollm2-135m-instruct", "lora": {"rank": 16}},
            "trainer": {"algorithm": "grpo", "learning_rate": 2e-4},
        },
        "device": "cpu",
        "seed": seed,
        "base": {"id": "smollm2-135m-instruct", "sha256": "b" * 64},
        "data": {"source": "arithmetic", "fingerprint": "d" * 64, "rows": {"train": 9, "heldout": n}},
        "started": f"2026-01-0{seed + 1}",
        "wall_s": 127.0,
        "steps": 32,
        "tokens": {"prompt": 10, "completion": 12345},
        "result": report.result(
            "strict",
            [Score(i < before, i < before + 5, True) for i in range(n)],
            [Score(i < after, i < after + 5, i > 0) for i in range(n)],
        ),
    }
    return Record(**(given | changes))


@given(SCORES)
def test_mean_and_standard_error_are_scipys(pairs):
    values = [float(a) for a, _ in pairs]
    mean, stderr = report.mean_stderr(values)
    assert mean == pytest.approx(np.mean(values), abs=1e-12)
    assert stderr == pytest.approx(stats.sem(values), abs=1e-12)


@given(SCORES)
def test_paired_difference_is_the_t_test_statistic_and_millers_decomposition(pairs):
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    value, stderr, (low, high) = report.paired_difference(before, after)
    x, y = np.array(before, float), np.array(after, float)
    assert value == pytest.approx(y.mean() - x.mean(), abs=1e-12)
    # Miller 2024: var(difference) = (var_A + var_B - 2 cov_AB) / n
    covariance = np.cov(x, y, ddof=1)
    variance = (covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) / len(pairs)
    assert stderr == pytest.approx(math.sqrt(max(variance, 0)), abs=1e-8)
    if stderr > 0:
        assert value / stderr == pytest.approx(stats.ttest_rel(y, x).statistic, rel=1e-9)
    assert (low, high) == pytest.approx(
        (value - stats.norm.ppf(0.975) * stderr, value + stats.norm.ppf(0.975) * stderr), abs=1e-12
    )


def test_pairing_by_hand():
    # differences 1, 0, 1, 0: mean .5, sample variance 1/3, standard error sqrt(1/12)
    value, stderr, (low, high) = report.paired_difference([0, 1, 0, 1], [1, 1, 1, 1])
    assert (value, stderr) == (0.5, pytest.approx(0.28867513459481287))
    assert (low, high) == (pytest.approx(-0.06579286660), pytest.approx(1.06579286660))


def test_questions_that_are_not_the_same_or_none_are_refused_and_one_has_no_error():
    with pytest.raises(ValueError, match="2 scores before and 1 after"):
        report.paired_difference([1, 0], [1])
    with pytest.raises(ValueError, match="no values"):
        report.paired_difference([], [])
    assert report.paired_difference([0], [1]) == (1.0, None, None)
    assert report.mean_stderr([0.25]) == (0.25, None)


@pytest.mark.parametrize("degrees", [*range(1, 13), 29, 30, 99, 100])
def test_t_quantile_is_scipys(degrees):
    assert report.t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-10)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8))
def test_interval_over_seeds_is_scipys(values):
    mean, (low, high) = report.mean_t(values)
    assert mean == pytest.approx(np.mean(values), abs=1e-12)
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=1e-9)


def test_result_has_the_contracts_shape_for_the_metric_and_for_both_scores():
    before = [Score(False, True, True), Score(False, False, False), Score(True, True, True), Score(False, False, True)]
    after = [Score(True, True, True), Score(False, False, True), Score(True, True, True), Score(True, True, True)]
    result = report.result("strict", before, after)
    assert result["before"] == {"value": 0.25, "stderr": pytest.approx(0.25), "n": 4}
    assert result["after"] == {"value": 0.75, "stderr": pytest.approx(0.25), "n": 4}
    assert result["difference"]["value"] == 0.5
    assert result["difference"]["ci95"] == pytest.approx([-0.0657928666, 1.0657928666])
    assert result["lenient"]["before"]["value"] == 0.5
    assert result["lenient"]["difference"]["value"] == 0.25
    assert result["strict"] == {key: result[key] for key in ("before", "after", "difference")}
    assert result["wellformed"] == {"before": 0.75, "after": 1.0}
    lenient = report.result("lenient", before, after)
    assert lenient["before"] == lenient["lenient"]["before"]
    json.dumps(result, allow_nan=False)
    with pytest.raises(ValueError, match="'exact'"):
        report.result("exact", before, after)


def test_smoothing_looks_at_no_later_step():
    assert report.smoothed([1.0, 2.0, 6.0, 0.0], 3) == [1.0, 1.5, 3.0, pytest.approx(8 / 3)]


def write_metrics(path: Path, rows: list[dict]) -> Path:
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def drawn(metrics: Path, monkeypatch) -> dict[str, tuple[list, list]]:
    """Title of each panel drawn, with the raw curve's steps and values."""
    seen: dict[str, tuple[list, list]] = {}
    panel = report._panel
    monkeypatch.setattr(report, "_panel", lambda a, t, x, y: (seen.update({t: (x, y)}), panel(a, t, x, y)))
    report.curves(metrics, metrics.with_name("curves.png"))
    return seen


def test_curves_draw_what_was_logged_and_leave_gaps_where_it_was_not(tmp_path, monkeypatch):
    rows = [
        {"step": i, "wall_s": 1.0, "reward": None if i == 3 else i / 40, "loss": 0.1, "kl": 0.01}
        | {"sampling/sampling_logp_difference/mean": 1e-4 * i, "completions/mean_length": 4.0}
        for i in range(1, 41)
    ]
    seen = drawn(write_metrics(tmp_path / "metrics.jsonl", [*rows, {"step": 40, "train_runtime": 3.0}]), monkeypatch)
    assert list(seen) == [
        *("reward", "mean |Δlogp|, trainer to sampler", "KL to the reference", "completion length (tokens)"),
    ]
    steps, values = seen["reward"]
    assert steps == [i for i in range(1, 41) if i != 3]
    assert values == [i / 40 for i in steps]
    pixels = image.imread(tmp_path / "curves.png")
    assert 300 < pixels.shape[0] < 900
    assert 300 < pixels.shape[1] < 1300
    assert np.std(pixels[..., :3]) > 0.05  # not a blank sheet
    assert (tmp_path / "curves.png").stat().st_size < 150_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_curves_of_supervised_training_show_the_loss(tmp_path, monkeypatch):
    rows = [{"step": i, "loss": 1 / i, "mean_token_accuracy": 0.5, "entropy": 1.0} for i in (1, 2)]
    seen = drawn(write_metrics(tmp_path / "metrics.jsonl", rows), monkeypatch)
    assert list(seen) == ["loss", "token accuracy", "entropy"]
    assert seen["loss"] == ([1, 2], [1.0, 0.5])


@pytest.mark.parametrize("rows", [[], [{"step": 1, "reward": None}], [{"step": 1, "reward": 0.5}]])
def test_curves_of_a_run_that_logged_little_are_still_a_picture(tmp_path, rows):
    report.curves(write_metrics(tmp_path / "metrics.jsonl", rows), tmp_path / "curves.png")
    assert image.imread(tmp_path / "curves.png").shape[0] > 100


def test_same_metrics_give_the_same_bytes(tmp_path):
    metrics = write_metrics(tmp_path / "metrics.jsonl", [{"step": i, "reward": i / 9} for i in range(1, 9)])
    for name in ("a.png", "b.png"):
        report.curves(metrics, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_model_card_front_matter_is_yaml_and_the_text_gives_scores_with_intervals():
    run = finished(
        0,
        36,
        73,
        command="nox -s train -- configs/grpo.toml",
        rollout={"precision": "shared"},
        git={"commit": "abc", "dirty": True},
        packages={"torch": "2.15.0", "mlx": None},
    )
    _, front, text = report.model_card(run).split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["library_name"] == "peft"
    assert head["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert head["tags"] == ["duet", "grpo", "lora"]
    assert "\nnox -s train -- configs/grpo.toml\n" in text
    # by hand: sqrt(.36 * .64 / 99) = .0482, sqrt(.73 * .27 / 99) = .0446, 37 of 100 gained: .37 ± 1.96 * .0485
    assert "| strict (the run’s metric) | 100 | 0.360 ± 0.048 | 0.730 ± 0.045 | +0.370 [+0.275, +0.465] |" in text, text
    assert "| lenient | 100 | 0.410 ± 0.049 | 0.780 ± 0.042 | +0.370 [+0.275, +0.465] |" in text
    assert "Well-formed completions: 1.000 before, 0.990 after." in text
    assert "32 steps, seed 0, 2 min 07 s on cpu, 12,345 tokens sampled." in text
    assert "belongs to the quantized base" in text
    assert "torch 2.15.0" in text
    assert "mlx None" not in text
    assert "commit abc with local changes" in text


def test_model_card_of_a_full_run_from_a_local_folder_names_no_hub_model():
    run = finished(0, 1, 2, result=None, git=None, base={"id": "./models/mine", "sha256": "x"})
    run = replace(run, config={"model": {"base": "./models/mine"}, "trainer": {"algorithm": "sft"}})
    card = report.model_card(run)
    head = yaml.safe_load(card.split("---\n")[1])
    assert "base_model" not in head
    assert head["library_name"] == "transformers"
    assert "This run was not measured." in card
    assert "quantized base" not in card


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (303, "5 min 03 s"), (3600, "1 h 00 min"), (7620, "2 h 07 min")],
)
def test_duration(seconds, text):
    assert report.duration(seconds) == text


def test_seeds_table_means_over_seeds_not_over_questions():
    table = report.seeds_table([finished(0, 36, 73), finished(1, 36, 67), finished(2, 40, 70)])
    assert (table.name, table.metric) == ("demo", "strict")
    assert [(row.seed, row.before, row.after) for row in table.rows] == [
        (0, 0.36, 0.73),
        (1, 0.36, 0.67),
        (2, 0.4, 0.7),
    ]
    differences = [0.37, 0.31, 0.30]
    low, high = stats.t.interval(0.95, 2, np.mean(differences), stats.sem(differences))
    assert table.mean["difference"]["value"] == pytest.approx(np.mean(differences))
    assert table.mean["difference"]["ci95"] == pytest.approx([low, high])
    assert table.mean["before"]["value"] == pytest.approx(np.mean([0.36, 0.36, 0.4]))


def test_seeds_table_of_one_seed_claims_no_interval():
    table = report.seeds_table([finished(1, 36, 73)])
    assert table.mean["difference"] == {"value": pytest.approx(0.37), "ci95": None}
    assert "| mean of 1 | | 0.360 | 0.730 | +0.370 | |" in report.seeds_markdown(table)


def test_seeds_table_refuses_what_is_not_the_same_experiment():
    one = finished(0, 36, 73)
    other = finished(1, 36, 73)
    other.config["trainer"]["learning_rate"] = 5e-4
    for second, message in (
        (other, r"trainer\.learning_rate: 0\.0002 → 0\.0005"),
        (finished(1, 36, 73, packages={"torch": "2.11.0"}), r"packages\.torch"),
        (finished(1, 36, 73, data={"fingerprint": "e"}), r"data\.fingerprint"),
        (finished(1, 36, 73, status="failed"), "failed, no finished measurement"),
        (finished(1, 36, 73, result=None), "no finished measurement"),
        (finished(0, 36, 73), "each may occur once"),
    ):
        with pytest.raises(UserError, match=message):
            report.seeds_table([one, second])


def test_seeds_table_accepts_what_comes_with_the_seed():
    """Parents trained with that seed, and a tiny base drawn from it, differ between seeds of one experiment."""
    parents = [[{"role": "from", "name": f"sft-seed{seed}", "inputs_sha256": str(seed)}] for seed in (0, 1)]
    runs = [
        finished(
            seed, 36, 73, parents=parents[seed], base={"id": "x", "sha256": str(seed)}, data={"fingerprint": str(seed)}
        )
        for seed in (0, 1)
    ]
    assert len(report.seeds_table(runs).rows) == 2
    tiny = [finished(seed, 36, 73, base={"id": "tiny", "sha256": str(seed)}) for seed in (0, 1)]
    assert len(report.seeds_table(tiny).rows) == 2


def test_seeds_files_are_made_from_run_json_alone(tmp_path):
    final = tmp_path / "models" / "final"
    runs = [finished(seed, 36, 70 + seed) for seed in (0, 1, 2)]
    for run in runs:
        record.save(run, final / run.name)
    tables = report.write_seeds(tmp_path, "demo", [run.name for run in runs])
    assert [table.metric for table in tables] == ["strict", "lenient"]
    text = (final / "demo-seeds.md").read_text()
    # after .70 .71 .72: mean .71, t(2) = 4.303, .01 / sqrt(3) * 4.303 = .0248
    assert "| mean of 3 | | 0.360 [0.360, 0.360] | 0.710 [0.685, 0.735] | +0.350 [+0.325, +0.375] | |" in text
    assert "| 1 | 100 | 0.360 | 0.710 | +0.350 [+0.256, +0.444] | 2 min 07 s |" in text
    assert "n = 3, 2 degrees of freedom" in text
    written = json.loads((final / "demo-seeds.json").read_text())
    assert written["tables"] == [asdict(table) for table in tables]
    source = "models/final/demo-seed1/run.json"
    assert written["sources"][source] == files.sha256_file(tmp_path / source)
    assert f"`{source}`" in text
