"""`copy` precision: a quantized copy of the merged weights at each sync, and the alarm for what it does to training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from config_helper import GRPO, error_of
from online_helper import inputs, logged, make_job, make_trainer
from scipy import stats
from trl import GRPOConfig

import rl.rollouts  # noqa: F401  binds BLAS before mlx loads

import mlx.core as mx  # isort: skip
from mlx.utils import tree_flatten

from rl import config, models
from rl.algorithms import grpo, mismatch
from rl.algorithms.guard import Health
from rl.errors import UserError
from rl.rollouts import device, parity, quantized, sync
from rl.rollouts import sampler as samplers

LORA = config.Lora(rank=4, alpha=12.0)
COPY = {"precision": "copy", "bits": 4, "group_size": 32, "max_completion_length": 24}


def policy_of(base: models.Base, lora: config.Lora | None) -> Any:
    torch.manual_seed(1)
    policy = models.load_policy(base, "float32", "cpu")
    if lora is not None:
        policy = models.add_lora(policy, lora)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.add_(0.2 * torch.randn_like(weight))
    return policy


def copy_of(base: models.Base, bits: int, group_size: int = 32) -> samplers.MLXSampler:
    return samplers.build(
        base.path, precision="copy", dtype="float32", eos_ids=[1], context=None, quantize=(bits, group_size)
    )


def quantized_by_hand(weight: np.ndarray, bits: int, group_size: int = 32) -> np.ndarray:
    """Values on a grid of 2^bits - 1 equal steps over each group, from its least to its greatest, in float64."""
    groups = weight.astype(np.float64).reshape(-1, group_size)
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    step = np.maximum(high - low, 1e-30) / (2**bits - 1)
    return (np.round((groups - low) / step) * step + low).reshape(weight.shape)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_each_sync_quantizes_the_merged_weights_anew(
    tiny_base: models.Base, lora: config.Lora | None, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed and held as values: one policy. Trap: merging into weights that were quantized before adds error up."""
    policy = policy_of(tiny_base, lora)
    held = copy_of(tiny_base, bits)
    monkeypatch.setattr(device, "keeps_packed_weights", lambda: True)
    packed = copy_of(tiny_base, bits)
    assert (held.packed, packed.packed) == (False, True)
    for _ in range(2):
        for sampler in (held, packed):
            report = sampler.sync(policy)
        merged = policy.merge_and_unload() if lora else policy
        exact = {n: p.detach().numpy() for n, p in merged.named_parameters()}
        assert report.tensors == len(exact)
        found = dict(tree_flatten(held.model.parameters()))
        assert found.keys() == exact.keys()
        for name, value in exact.items():
            if value.ndim == 1:
                np.testing.assert_array_equal(np.array(found[name]), value)
                continue
            # MLX moves a group's grid so that 0 lies on it: half a step of the plain grid, at most, beside rounding
            plain = quantized_by_hand(value, bits)
            error = np.abs(np.array(found[name]) - value).max()
            assert error < 2 * np.abs(plain - value).max()
            again = mx.dequantize(*mx.quantize(mx.array(value), 32, bits), 32, bits)
            np.testing.assert_allclose(np.array(found[name]), np.array(again), atol=1e-6)
        rows = parity.probe(17)
        both = [np.concatenate(parity.sampler_logprobs(s.model, rows)) for s in (held, packed)]
        np.testing.assert_allclose(both[0], both[1], atol=2e-4)
        policy = policy_of(tiny_base, lora)
        with torch.no_grad():
            next(p for p in policy.parameters() if p.requires_grad).mul_(2.0)


def test_the_check_is_of_the_exact_weights_and_tells_the_copy_s_difference(tiny_base: models.Base) -> None:
    policy = policy_of(tiny_base, LORA)
    four, eight = copy_of(tiny_base, 4), copy_of(tiny_base, 8)
    for sampler in (four, eight):
        sampler.sync(policy)
    assert four.check(policy, 17).mean > 5 * eight.check(policy, 17).mean > 1e-5


def test_what_cannot_be_quantized_or_sent_is_named(tiny_base: models.Base) -> None:
    with pytest.raises(UserError, match=r"\[rollout\] group_size: found 48, which does not divide the \d+ inputs of"):
        copy_of(tiny_base, 4, 48)
    sampler, policy = copy_of(tiny_base, 4), policy_of(tiny_base, None)
    named = [(n.replace("q_proj", "query_proj"), p) for n, p in policy.named_parameters()]
    with pytest.raises(sync.SyncError, match=r"missing \['model.layers.0.self_attn.q_proj.weight'"):
        sync.sync_quantized(sampler.model, named, 4, 32)
    with torch.no_grad():
        policy.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(sync.SyncError, match=r"layers.1.mlp.up_proj.weight: .* not finite"):
        sampler.sync(policy)


def sharpen(model: Any) -> None:
    """Weights of a policy that has something to lose: random initial ones give nearly uniform logits."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "lora" not in name:
                weight.mul_(30.0)


def test_four_bit_copy_with_sequence_mask_warns_at_once_and_stops(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap: TRL's default mask multiplies the gradient by nearly nothing, and the run goes on for hours."""
    monkeypatch.setattr(mismatch, "PATIENCE", 3)
    job = make_job(
        tiny_base, tmp_path, "grpo", rollout=COPY | {"correction": "sequence_mask"}, max_steps=8, learning_rate=1e-6
    )
    sharpen(job.model)
    warnings: list[str] = []
    rows = logged(job)
    job.hooks.warn = warnings.append
    outcome = grpo.train(job)
    assert outcome.steps == 3
    said = "the sampler (a 4-bit copy) is another policy than the trainer: 'sequence_mask' leaves"
    assert len(warnings) == 1
    assert warnings[0].startswith(f"step 1: {said}")
    assert "set [rollout] precision = 'shared'" in warnings[0]
    assert outcome.failure.startswith(f"for 3 rollouts {said}")
    for row in rows:
        assert row["sampling/ratio_p05"] <= row["sampling/ratio_p50"] <= row["sampling/ratio_p95"]
        assert row["sampling/kept_weight"] < 0.5 or row["sampling/clipped"] > 0.5


def test_shared_with_sequence_mask_is_quiet(tiny_base: models.Base, tmp_path: Path) -> None:
    policy = models.load_policy(tiny_base, "float32", "cpu")
    sharpen(policy)
    sharp = tmp_path / "sharp"
    policy.save_pretrained(sharp)
    models.load_tokenizer(tiny_base).save_pretrained(sharp)
    digest = quantized.build(sharp, None, 4, 32, tmp_path / "q", source="sharp")
    shared = replace(tiny_base, path=tmp_path / "q", sha256=digest)
    rollout = {"precision": "shared", "correction": "sequence_mask", "max_completion_length": 24}
    job = make_job(shared, tmp_path, "grpo", lora=True, rollout=rollout, max_steps=3, learning_rate=1e-4)
    warnings: list[str] = []
    rows = logged(job)
    job.hooks.warn = warnings.append
    assert grpo.train(job).failure is None
    assert warnings == []
    for row in rows:
        assert row["sampling/kept_weight"] == pytest.approx(1.0, abs=1e-2)
        assert row["sampling/clipped"] == 0.0


@pytest.mark.parametrize("correction", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_what_is_measured_is_by_hand_what_trl_applies(tiny_base: models.Base, tmp_path: Path, correction: str) -> None:
    job = make_job(tiny_base, tmp_path, "grpo", rollout=COPY | {"correction": correction, "correction_cap": 1.1})
    sharpen(job.model)
    job.config.trainer.args["vllm_importance_sampling_mode"] = correction
    job.config.trainer.args["vllm_importance_sampling_clip_max"] = 1.1
    trainer = make_trainer(job, grpo.DuetGRPOTrainer, GRPOConfig)
    batch = trainer._generate_and_score_completions(inputs(job, 2))
    mask = batch["completion_mask"].bool().numpy()
    logs = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]).double().numpy()
    ratios = np.exp((logs * mask).sum(1) if correction.startswith("sequence") else logs[mask])
    left = np.minimum(ratios, 1.1) if correction.endswith("truncate") else ratios * (ratios <= 1.1)
    metrics = {k: v[0] for k, v in trainer._metrics["train"].items()}
    assert metrics["sampling/clipped"] == pytest.approx((ratios > 1.1).mean(), abs=1e-6)
    assert metrics["sampling/kept_weight"] == pytest.approx(left.mean(), abs=1e-5)
    for name, q in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95)):
        assert metrics[f"sampling/ratio_{name}"] == pytest.approx(np.quantile(ratios, q), rel=1e-4)


def heard(alarm: mismatch.Alarm, steps: int, **changes: float) -> None:
    healthy = mismatch.Mismatch(p05=0.9, p50=1.0, p95=1.1, clipped=0.0, kept=1.0, effective=0.99, count=64)
    for step in range(steps):
        alarm.hear(step, replace(healthy, **changes))


def test_only_bad_rollouts_in_a_row_stop_the_run() -> None:
    warnings: list[str] = []
    rollout = config.Rollout(precision="full", correction="sequence_mask")
    alarm = mismatch.Alarm(rollout, Health(), warnings.append)
    heard(alarm, 9, kept=0.3)
    heard(alarm, 1)
    heard(alarm, 9, clipped=0.7)
    heard(alarm, 1)
    heard(alarm, 9, effective=0.1)
    heard(alarm, 3, effective=0.1, count=4)  # of four weights an effective share says nothing
    assert len(warnings) == 3
    assert "correction = 'token_truncate'" in warnings[0]
    assert alarm.health.reason is None
    heard(alarm, 10, kept=0.3)
    assert alarm.health.reason.startswith("for 10 rollouts the sampler (full precision) is another policy")


def test_mismatch_of_normal_log_ratios_is_the_closed_form() -> None:
    """log w ~ N(-s²/2, s²): the weights' effective share is exp(-s²), their mean 1 (lognormal moments)."""
    generator, s = torch.Generator().manual_seed(0), 0.6
    logs = s * torch.randn(4000, 50, generator=generator) - s**2 / 2
    found = mismatch.measure(logs, torch.ones_like(logs), logs.exp(), "token_mask", 1.0)
    assert found.kept == pytest.approx(1.0, abs=0.01)
    assert found.effective == pytest.approx(np.exp(-(s**2)), abs=0.02)
    assert found.p95 == pytest.approx(np.exp(s * stats.norm.ppf(0.95) - s**2 / 2), rel=0.02)
    assert found.clipped == pytest.approx(stats.norm.sf(s / 2), abs=0.01)
    assert mismatch.measure(logs * float("nan"), torch.ones_like(logs), logs, "token_mask", 1.0) is None
    assert mismatch.measure(logs, torch.zeros_like(logs), logs, "token_mask", 1.0) is None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("rollout.engine=torch",), "[rollout] precision: found 'copy' with engine = 'torch', valid there: full"),
        (
            ("model.lora.rank=8", "model.quantization.bits=4"),
            "[rollout] precision: found 'copy' with [model.quantization], valid: shared, or no such table",
        ),
        (("rollout.correction=none",), "[rollout] correction: found 'none' with precision = 'copy'"),
        (("trainer.algorithm=ppo",), "[rollout] precision: found 'copy' for 'ppo', valid there: full, shared"),
        (
            ("trainer.mask_truncated_completions=true", 'rollout.stop=["ab"]'),
            "[trainer] mask_truncated_completions: found true with a [rollout] stop of several characters",
        ),
    ],
)
def test_copy_without_what_it_needs_is_one_line(tmp_path: Path, overrides: tuple[str, ...], said: str) -> None:
    text = GRPO.replace("num_generations = 8\n", "") if "trainer.algorithm=ppo" in overrides else GRPO
    line = error_of(tmp_path, text, "rollout.precision=copy", "rollout.bits=4", *overrides)
    assert line.removeprefix("--set: ").removeprefix("x.toml: ").startswith(said)
    line = error_of(tmp_path, GRPO, "rollout.precision=copy")
    assert line == "x.toml with --set: [rollout] bits: missing, precision = 'copy' needs them, valid: 4, 8"
