"""RLOO through the seam: leave-one-out advantages, the sequence's clipped ratio, and the weights TRL does not take."""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from config_helper import GRPO, error_of, write
from online_helper import inputs, logged, make_job, make_trainer
from trl import RLOOConfig

from rl import config, models, trl_fields
from rl.algorithms import rloo, seam
from rl.algorithms.rloo import sequence_weights
from rl.config.reading import conforms

EXACT = {"correction": "sequence_truncate"}
TEXT = GRPO.replace('"grpo"', '"rloo"')


def leave_one_out(rewards: torch.Tensor) -> torch.Tensor:
    """(groups, G) -> each less the mean of the others, written as a loop."""
    out = torch.empty_like(rewards)
    for i, group in enumerate(rewards):
        for j in range(len(group)):
            others = [float(group[k]) for k in range(len(group)) if k != j]
            out[i, j] = group[j] - sum(others) / len(others)
    return out


def test_advantages_leave_one_out_and_are_zero_where_all_rewards_are_equal(
    tiny_base: models.Base, tmp_path: Path
) -> None:
    given = [0.0, 1.0, 1.0, 4.0, 0.1, 0.1, 0.1, 0.1]
    job = make_job(tiny_base, tmp_path, "rloo", rollout=EXACT, beta=0.0, reward=lambda prompts, completions, **c: given)
    found = make_trainer(job, rloo.DuetRLOOTrainer, RLOOConfig)._generate_and_score_completions(inputs(job, 2))
    expected = leave_one_out(torch.tensor(given).view(2, 4)).view(-1)
    torch.testing.assert_close(found["advantages"], expected, atol=2e-5, rtol=1e-4)
    assert found["advantages"][4:].abs().max() < 1e-6


@pytest.mark.parametrize("one_token", [False, True])
def test_loss_is_the_clipped_ratio_of_the_sequence(tiny_base: models.Base, tmp_path: Path, one_token: bool) -> None:
    """Loss and gradient in float64; of one token the sequence's ratio is the token's; padding has none."""
    columns = 1 if one_token else 4
    job = make_job(tiny_base, tmp_path, "rloo", rollout=EXACT)
    trainer = make_trainer(job, rloo.DuetRLOOTrainer, RLOOConfig)
    torch.manual_seed(0)
    mask = torch.tensor([[1] * n + [0] * (columns - n) for n in ([1] * 5 if one_token else (4, 1, 2, 3, 4))])
    logps = (torch.randn(5, columns, dtype=torch.float64) - 2).requires_grad_()
    old = logps.detach() + 0.2 * torch.randn(5, columns, dtype=torch.float64)
    advantages = torch.tensor([1.0, -2.0, 0.5, 0.0, -0.3], dtype=torch.float64)
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (logps, torch.zeros(5, columns), None)
    loss = trainer._compute_loss(
        trainer.model,
        {
            "prompt_ids": torch.zeros(5, 2, dtype=torch.long),
            "prompt_mask": torch.ones(5, 2, dtype=torch.long),
            "completion_ids": torch.zeros(5, columns, dtype=torch.long),
            "completion_mask": mask,
            "advantages": advantages,
            "old_logps": (old * mask).sum(1),
        },
    )
    (gradient,) = torch.autograd.grad(loss, logps)
    expected, reference = 0.0, torch.zeros_like(gradient)
    for i in range(5):
        ratio = math.exp(sum(float(logps.detach()[i, t] - old[i, t]) for t in range(columns) if mask[i, t]))
        a = float(advantages[i])
        plain, bounded = ratio * a, min(max(ratio, 0.8), 1.2) * a
        expected -= min(plain, bounded) / 5
        if plain <= bounded:  # the clipped branch has no gradient
            reference[i] = -plain / 5 * mask[i].double()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient, reference, atol=1e-14, rtol=1e-10)


@pytest.mark.parametrize(
    ("correction", "weight"),
    [
        ("none", lambda w: 1.0),
        ("sequence_truncate", lambda w: min(w, 2.0)),
        ("sequence_mask", lambda w: w if w <= 2.0 else 0.0),
    ],
)
def test_advantages_are_weighted_by_trainer_over_sampler(
    tiny_base: models.Base, tmp_path: Path, correction: str, weight: Any
) -> None:
    """Against a sampler that is off by a known amount a token, different in every row."""
    given = [0.0, 1.0, 1.0, 4.0, -1.0, 0.5, 0.0, 2.0]
    job = make_job(
        tiny_base,
        tmp_path,
        "rloo",
        rollout={"correction": correction},
        beta=0.0,
        reward=lambda prompts, completions, **c: given,
    )
    off = torch.linspace(-0.6, 0.6, 8).tolist()
    lengths: list[int] = []
    generate = job.sampler.generate

    def shifted(*args: Any, **kwargs: Any) -> list[Any]:
        out = generate(*args, **kwargs)
        lengths.extend(len(c.tokens) for c in out)
        return [dataclasses.replace(c, logprobs=[p + d for p in c.logprobs]) for c, d in zip(out, off, strict=True)]

    job.sampler.generate = shifted
    trainer = make_trainer(job, rloo.DuetRLOOTrainer, RLOOConfig)
    found = trainer._generate_and_score_completions(inputs(job, 2))
    raw = [math.exp(-d * n) for d, n in zip(off, lengths, strict=True)]
    weights = torch.tensor([weight(w) for w in raw])
    expected = leave_one_out(torch.tensor(given).view(2, 4)).view(-1) * weights
    torch.testing.assert_close(found["advantages"], expected, atol=1e-4, rtol=1e-4)
    metrics = trainer._metrics["train"]
    tokens = [abs(d) for d, n in zip(off, lengths, strict=True) for _ in range(n)]
    assert metrics["sampling/sampling_logp_difference/mean"][0] == pytest.approx(sum(tokens) / len(tokens), abs=1e-5)
    assert metrics["sampling/sampling_logp_difference/max"][0] == pytest.approx(0.6, abs=1e-5)
    assert metrics["sampling/importance_sampling_ratio/mean"][0] == pytest.approx(weights.mean().item(), abs=1e-4)
    assert metrics["sampling/sequences_above_cap"][0] == sum(w > 2.0 for w in raw) / 8
    w = torch.tensor([math.exp(-d) for d, n in zip(off, lengths, strict=True) for _ in range(n)])
    assert metrics["sampling/ess"][0] == pytest.approx((w.sum() ** 2 / (len(w) * (w**2).sum())).item(), abs=1e-4)


def test_weighted_leave_one_out_is_the_exact_gradient_of_the_trainers_expected_reward() -> None:
    """Every pair of two-token sequences over two letters, weighed by the sampler's probability: without the weights
    the mean gradient is another one, with a token's weights too."""
    torch.manual_seed(1)
    first = torch.randn(2, dtype=torch.float64, requires_grad=True)
    second = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    off = [torch.randn(2, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)]

    def logps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.stack([a.log_softmax(0)[x], b.log_softmax(1)[x, y]]) for x in (0, 1) for y in (0, 1)])

    trainer, sampler = logps(first, second), logps(first + off[0], second + off[1]).detach()
    reward = torch.tensor([0.0, 1.0, 5.0, -2.0], dtype=torch.float64)
    exact = torch.autograd.grad((trainer.sum(1).exp() * reward).sum(), [first, second], retain_graph=True)

    def mean_gradient(correction: str) -> tuple[torch.Tensor, ...]:
        weights = sequence_weights((trainer - sampler).detach(), correction, cap=1e9)
        objective = torch.zeros((), dtype=torch.float64)
        for i, j in itertools.product(range(4), repeat=2):
            chance = (sampler[i].sum() + sampler[j].sum()).exp()
            pair = torch.stack([reward[i] - reward[j], reward[j] - reward[i]])
            objective = (
                objective
                + chance * (pair[0] * weights[i] * trainer[i].sum() + pair[1] * weights[j] * trainer[j].sum()) / 2
            )
        return torch.autograd.grad(objective, [first, second], retain_graph=True)

    for correction in ("sequence_truncate", "sequence_mask"):
        for found, expected in zip(mean_gradient(correction), exact, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    assert (mean_gradient("none")[0] - exact[0]).abs().max() > 0.05


def test_weights_of_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="token_truncate"):
        sequence_weights(torch.zeros(2, 3), "token_truncate", 2.0)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_sampler_and_trainer_agree_at_every_step(tiny_base: models.Base, tmp_path: Path, lora: bool) -> None:
    """The KL of a LoRA run is 0 at the start, where the policy is the reference, and grows."""
    job = make_job(tiny_base, tmp_path, "rloo", lora=lora, rollout=EXACT, max_steps=3, beta=0.05)
    rows = logged(job)
    before = {n: p.detach().clone() for n, p in job.model.named_parameters()}
    outcome = rloo.train(job)
    assert (outcome.steps, outcome.failure, outcome.interrupted, outcome.skipped) == (3, None, False, 0)
    assert any(not torch.equal(before[n], p) for n, p in job.model.named_parameters())
    for row in rows:
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-4)
        assert row["sampling/ess"] == pytest.approx(1.0, abs=1e-4)
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert abs(rows[-1]["kl"]) > 1e-6
    assert job.sampler.syncs.count == 1 + 3
    assert job.tokens["completion"] >= 3 * 8


def test_reusing_the_forward_changes_no_weight(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One forward for the old logprobs and the loss, against TRL's two."""
    results = []
    for reuse in (True, False):
        job = make_job(tiny_base, tmp_path, "rloo", rollout=EXACT, max_steps=2, optim="sgd")
        if not reuse:
            monkeypatch.setattr(rloo.DuetRLOOTrainer, "_on_policy", lambda self: False)
        rloo.train(job)
        results.append({n: p.detach() for n, p in job.model.named_parameters()})
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name], atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_torch_engine_runs_without_weights(tiny_base: models.Base, tmp_path: Path) -> None:
    job = make_job(tiny_base, tmp_path, "rloo", engine="torch", rollout=EXACT)
    rows = logged(job)
    assert rloo.train(job).steps == 2
    assert "sampling/ess" not in rows[0]


def test_contract_with_trl_1_16(tiny_base: models.Base, tmp_path: Path) -> None:
    """The names the seam leans on in RLOOTrainer; a TRL that moves one fails here first."""
    job = make_job(tiny_base, tmp_path, "rloo", rollout=EXACT)
    trainer = make_trainer(job, rloo.DuetRLOOTrainer, RLOOConfig)
    assert trainer.use_vllm is True
    assert trainer.eos_token_ids == job.stop_ids
    assert isinstance(trainer._get_train_sampler(), seam.EpochSampler)
    found = trainer._generate_and_score_completions(inputs(job, 2))
    mask = found["completion_mask"]
    torch.testing.assert_close((found["old_per_token_logps"] * mask).sum(1), found["old_logps"])
    sampled = (found["sampling_per_token_logps"] * mask).sum(1)
    torch.testing.assert_close(sampled, found["old_logps"], atol=1e-4, rtol=0)


# --- configs


def test_unset_correction_is_of_sequences_and_tokens_are_refused(tmp_path: Path) -> None:
    assert config.load(write(tmp_path, TEXT)).rollout.correction == "sequence_truncate"
    assert config.load(write(tmp_path, TEXT), ["rollout.correction=none"]).rollout.correction == "none"
    assert config.load(write(tmp_path)).rollout.correction == "token_truncate"
    assert error_of(tmp_path, TEXT, "rollout.correction=token_mask") == (
        "--set: [rollout] correction: found 'token_mask', valid: sequence_truncate, sequence_mask, none; "
        "rloo's loss is of whole sequences, not of tokens"
    )
    assert "found [1.0], valid: [least, most]" in error_of(tmp_path, TEXT, "trainer.reward_clip_range=[1.0]")
    assert config.load(write(tmp_path, TEXT), ["trainer.reward_clip_range=[-1.0, 1.0]"])
    assert "it is an argument of algorithm 'grpo', this is 'rloo'" in error_of(
        tmp_path, TEXT, "trainer.scale_rewards=none"
    )


def test_the_group_defaults_to_rloos_own_two(tmp_path: Path) -> None:
    """GRPO's default of 8 would refuse this batch, which TRL takes."""
    text = TEXT.replace("num_generations = 8\n", "").replace("batch_size = 16", "batch_size = 6")
    assert config.load(write(tmp_path, text))
    assert "not divisible by 8" in error_of(tmp_path, text.replace('"rloo"', '"grpo"'))


def test_arguments_read_from_the_source_are_the_real_dataclass() -> None:
    found, real = trl_fields.arguments("rloo"), {f.name: f for f in dataclasses.fields(RLOOConfig)}
    assert found.keys() == real.keys()
    for name, f in real.items():
        if f.default is not dataclasses.MISSING and name != "optim":  # which depends on the installed torch
            assert found[name].default == f.default, name
            assert found[name].type is None or f.default is None or conforms(f.default, found[name].type), name
    for name in found:
        if "vllm" in name or "hub" in name or "continuous_batching" in name:
            assert trl_fields.home_of(name), name
    for shared in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_iterations", "save_steps"):
        assert found[shared].default == trl_fields.arguments("grpo")[shared].default
