"""PPO through the trainer: what a rollout becomes, and its loss against a loop in float64."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from online_helper import logged
from ppo_helper import build, off_policy, ppo_job, weights

from rl import models, rewards
from rl.algorithms import base, ppo
from rl.rollouts.result import Completion


def reference(batch: dict[str, torch.Tensor], scores: Any, scored: list[float | None], job: base.Job) -> dict[str, Any]:
    """Advantages, returns and both losses of one rollout of one mini-batch, in Python floats, token by token.

    From the models' logprobs and values alone; `scored` is each completion's reward, None where it is left out.
    """
    args = job.config.trainer.args
    kl_coef, gamma, lam = args["kl_coef"], args["gamma"], args["lam"]
    taken, rewards_, values = [], {}, {}
    for i, score in enumerate(scored):
        length = int(batch["completion_mask"][i].sum())
        for t in range(length if score is not None else 0):
            taken.append((i, t))
            k1 = float(batch["old_per_token_logps"][i, t] - batch["reference"][i, t])
            rewards_[i, t] = -kl_coef * k1 + (score if t == length - 1 else 0.0)
            values[i, t] = float(batch["old_values"][i, t])

    def whitened(of: dict, shift: bool) -> dict:
        mean = sum(of.values()) / len(of)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in of.values()) / len(of) + 1e-8)
        return {at: (v - mean) / deviation + (0.0 if shift else mean) for at, v in of.items()}

    if args.get("whiten_rewards"):
        rewards_ = whitened(rewards_, shift=False)
    advantages: dict[tuple[int, int], float] = {}
    for i, t in reversed(taken):
        delta = rewards_[i, t] + gamma * values.get((i, t + 1), 0.0) - values[i, t]
        advantages[i, t] = delta + gamma * lam * advantages.get((i, t + 1), 0.0)
    returns = {at: a + values[at] for at, a in advantages.items()}
    white = whitened(advantages, shift=True) if args.get("whiten_advantages", True) else advantages
    policy = value = 0.0
    for at in taken:
        weight = min(math.exp(float(batch["old_per_token_logps"][at] - batch["sampled"][at])), 2.0)
        ratio = math.exp(float(scores.logps_B_T[at] - batch["old_per_token_logps"][at]))
        policy -= weight * min(ratio * white[at], min(max(ratio, 0.95), 1.05) * white[at]) / len(taken)
        v, near = float(scores.values_B_T[at]), float(scores.values_B_T[at]) - values[at]
        near = values[at] + min(max(near, -0.03), 0.03)
        value += max((v - returns[at]) ** 2, (near - returns[at]) ** 2) / 2 / len(taken)
    return {"advantages": white, "returns": returns, "policy": policy, "value": value}


@pytest.mark.parametrize("lora", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("whiten", [(False, True), (True, False)])
def test_a_rollout_and_its_loss_are_those_of_a_loop(
    tiny_base: models.Base, tmp_path: Path, lora: bool, whiten: tuple[bool, bool]
) -> None:
    """To 1e-6: KL to the start, EOS penalty, one completion left out, a sampler that is off, both models moved on."""
    given = [0.0, 1.0, 1.0, None, -2.0, 0.5, 1.0, 1.0]
    job = ppo_job(
        tiny_base,
        tmp_path,
        lora=lora,
        reward=lambda prompts, completions, **c: given,
        rollout={"temperature": 0.8},
        kl_coef=0.3,
        gamma=0.9,
        lam=0.8,
        missing_eos_penalty=0.25,
        cliprange=0.05,
        cliprange_value=0.03,
        whiten_rewards=whiten[0],
        whiten_advantages=whiten[1],
    )
    trainer = build(job)
    off_policy(trainer)  # away from the start, so that there is a KL, and values are not 0
    generate, completions = job.sampler.generate, []

    def shifted(*args: Any, **kwargs: Any) -> list[Completion]:
        for i, c in enumerate(generate(*args, **kwargs)):  # one to three tokens, every other row ends in EOS
            tokens = c.tokens[: 1 + i % 3]
            tokens[-1] = job.stop_ids[0] if i % 2 else 5
            completions.append(Completion(tokens, [p - 0.1 * i for p in c.logprobs[: len(tokens)]]))
        return completions

    job.sampler.generate = shifted
    batch = trainer._prepare_inputs(job.train[:8])
    order = trainer.order[0, 0].tolist()
    with torch.no_grad():
        batch["reference"] = ppo.value.policy_scores(trainer.reference, batch, 0.8)[0]
        columns = batch["completion_ids"].shape[1]
        rows = [completions[i].logprobs + [0.0] * (columns - len(completions[i].logprobs)) for i in order]
        batch["sampled"] = torch.tensor(rows, dtype=torch.float64)
        off_policy(trainer)  # away from the old policy, so that ratios are clipped
        scores = trainer.model(batch, 0.8)
    scored: list[float | None] = []
    for i in order:
        cut = completions[i].tokens[-1] not in job.stop_ids
        scored.append(None if given[i] is None else given[i] - 0.25 * cut)
    expected = reference(batch, scores, scored, job)
    kept = {(i, t) for i, t in batch["loss_mask"].nonzero().tolist()}
    assert kept == expected["returns"].keys()
    for name in ("advantages", "returns"):
        for at in kept:
            assert float(batch[name][at]) == pytest.approx(expected[name][at], abs=2e-6, rel=1e-5)
    loss = trainer.compute_loss(trainer.model, batch)
    assert float(trainer.logged["policy/loss"][0]) == pytest.approx(expected["policy"], abs=1e-6, rel=0)
    assert float(trainer.logged["value/loss"][0]) == pytest.approx(expected["value"], abs=1e-6, rel=0)
    assert loss.item() == pytest.approx(expected["policy"] + 0.1 * expected["value"], abs=1e-6, rel=0)
    for name in ("clip_ratio/region_mean", "value/clip_ratio"):
        assert 0 < trainer.logged[name][0] < 1


def test_equal_rewards_teach_the_policy_nothing_and_the_value_something(tiny_base: models.Base, tmp_path: Path) -> None:
    """One token each and one reward for all: whitening must not turn the rest of a rounding into an advantage."""
    job = ppo_job(
        tiny_base,
        tmp_path,
        reward=lambda prompts, completions, **c: [1.0] * len(completions),
        rollout={"max_completion_length": 1},
        kl_coef=0.0,
    )
    trainer = build(job)
    batch = trainer._prepare_inputs(job.train[:8])
    assert batch["completion_ids"].shape == (8, 1)
    assert batch["advantages"].abs().max() < 1e-2
    assert batch["returns"].eq(1.0).all()
    trainer.compute_loss(trainer.model, batch)
    assert trainer.logged["value/loss"][0] == pytest.approx(0.5)


def test_several_rewards_are_weighted_and_none_is_left_out(tiny_base: models.Base, tmp_path: Path) -> None:
    """A function's None leaves its term out; a completion without any term is in no mean; weight 0 is logged only."""
    job = ppo_job(tiny_base, tmp_path, kl_coef=0.0)
    columns = {
        "a": (2.0, [1.0, None, 3.0, None, 1.0, 1.0, 1.0, 1.0]),
        "b": (-1.0, [4.0, 5.0, None, None, 0.0, 0.0, 0.0, 0.0]),
        "seen": (0.0, [9.0] * 8),
    }
    job.rewards = [
        rewards.functions.RewardFunction(name, weight, lambda prompts, completions, values=values, **c: values)
        for name, (weight, values) in columns.items()
    ]
    trainer = build(job)
    trainer.completions = [[3, job.stop_ids[0]]] * 8
    scores = trainer._scores(job.train[:8])
    assert scores[:3].tolist() == [-2.0, -5.0, 6.0]
    assert scores[3].isnan()
    assert trainer.logged["reward"] == [pytest.approx((-2 - 5 + 6 + 8) / 7)]
    assert trainer.logged["rewards/a/mean"] == [pytest.approx(8 / 6)]
    assert trainer.logged["rewards/seen/mean"] == [9.0]


def test_only_what_was_cut_is_penalised(tiny_base: models.Base, tmp_path: Path) -> None:
    """A text that stops a completion may be spread over several tokens, none of which ends one by itself."""
    job = ppo_job(tiny_base, tmp_path, rollout={"stop": ("==",)}, missing_eos_penalty=0.5, kl_coef=0.0)
    job.rewards = [rewards.functions.RewardFunction("one", 1.0, lambda prompts, **c: [1.0] * len(prompts))]
    trainer = build(job)
    equals, seven = (job.tokenizer.convert_tokens_to_ids(c) for c in "=7")
    trainer.completions = [[seven, job.stop_ids[0]], [equals, equals], [equals, seven], [seven]]
    assert trainer._scores(job.train[:4]).tolist() == [1.0, 1.0, 0.5, 0.5]
    assert trainer.logged["completions/clipped_ratio"] == [0.5]
    assert trainer.logged["completions/mean_terminated_length"] == [2.0]
    assert trainer.logged["reward"] == [1.0]


def test_every_pass_uses_each_completion_once_and_micro_batches_share_a_mean(
    tiny_base: models.Base, tmp_path: Path
) -> None:
    job = ppo_job(
        tiny_base,
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_mini_batches=3,
        num_ppo_epochs=2,
    )
    trainer = build(job)
    rows = job.train[:12]
    seen = []
    for index in range(2 * 3 * 2):
        batch = trainer._prepare_inputs(rows)
        seen.append(batch["completion_ids"].shape[0])
        mini, micro = divmod(index % 6, 2)
        if micro == 0:
            tokens = trainer.rollout["loss_mask"][trainer.order[mini].flatten()].sum()
        assert batch["tokens"] == tokens
        if index in (0, 6):
            assert sorted(trainer.order.flatten().tolist()) == list(range(12))
            trainer.state.global_step += 3
    assert seen == [2] * 12
    assert job.sampler.syncs.count == 1 + 1  # one rollout served them all


def test_accumulation_and_padding_change_no_weight(tiny_base: models.Base, tmp_path: Path) -> None:
    """Trap: a mean of micro-batches' means weighs tokens by the company they keep."""
    results = []
    for changes in (
        {},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"pad_to_multiple_of": 8},
    ):
        job = ppo_job(tiny_base, tmp_path, optim="sgd", learning_rate=0.3, num_ppo_epochs=2, **changes)
        assert ppo.train(job).steps == 2
        results.append(weights(job.model))
    for other in results[1:]:
        for name, weight in results[0].items():
            torch.testing.assert_close(other[name], weight, atol=1e-6, rtol=1e-5, msg=lambda s, n=name: f"{n}: {s}")


@pytest.mark.parametrize(
    ("lora", "value_model"),
    [(False, "separate"), (False, "shared"), (True, "separate"), (True, "shared")],
)
def test_training_moves_the_policy_from_a_start_it_agrees_with(
    tiny_base: models.Base, tmp_path: Path, lora: bool, value_model: str
) -> None:
    job = ppo_job(tiny_base, tmp_path, lora=lora, value_model=value_model, max_steps=4, num_ppo_epochs=2, kl_coef=0.05)
    rows, before = logged(job), weights(job.model)
    outcome = ppo.train(job)
    assert (outcome.steps, outcome.failure, outcome.interrupted, outcome.skipped) == (4, None, False, 0)
    moved = {n for n, p in job.model.named_parameters() if not torch.equal(before[n], p)}
    assert moved
    assert not lora or all("lora" in n for n in moved)
    first, again, second = rows[0], rows[1], rows[2]
    for row in (first, second):
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
        assert row["sampling/ess"] == pytest.approx(1.0, abs=1e-4)
    assert abs(first["kl"]) < 1e-6 < second["kl"]
    assert abs(first["approx_kl"]) < 1e-9 < again["approx_kl"]
    assert (first["clip_ratio/region_mean"], first["value/mean"]) == (0.0, 0.0)
    assert "reward" not in again  # the second pass samples nothing
    assert first["value/loss"] > 0
    assert {"entropy", "grad_norm", "value/explained_variance", "advantages/mean", "advantages/std"} <= first.keys()
    assert job.sampler.syncs.count == 1 + 2
    assert 2 * 8 <= job.tokens["completion"] <= 2 * 8 * 3


def test_without_a_penalty_no_reference_is_held(tiny_base: models.Base, tmp_path: Path) -> None:
    job = ppo_job(tiny_base, tmp_path, kl_coef=0.0, max_steps=1)
    rows = logged(job)
    assert build(job).reference is None
    ppo.train(job)
    assert "kl" not in rows[0]


def test_the_reference_is_another_run_where_the_config_names_one(tiny_base: models.Base, tmp_path: Path) -> None:
    """Trap: a start of its own beside it would pull the policy to where it comes from."""
    job = ppo_job(tiny_base, tmp_path)
    job.reference = ppo_job(tiny_base, tmp_path).model.requires_grad_(False)
    with torch.no_grad():
        for p in job.reference.parameters():
            p.mul_(1.5)
    trainer = build(job)
    assert trainer.reference is job.reference
    trainer._prepare_inputs(job.train[:8])
    assert trainer.logged["kl"][0] > 1e-3


def test_gradient_checkpointing_changes_no_weight(tiny_base: models.Base, tmp_path: Path) -> None:
    results = []
    for on in (False, True):
        job = ppo_job(tiny_base, tmp_path, gradient_checkpointing=on, max_steps=1, optim="sgd", learning_rate=0.3)
        ppo.train(job)
        assert job.model.is_gradient_checkpointing == on
        results.append(weights(job.model))
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, atol=1e-6, rtol=1e-5, msg=lambda s, n=name: f"{n}: {s}")


def test_torch_engine_agrees_with_itself(tiny_base: models.Base, tmp_path: Path) -> None:
    job = ppo_job(tiny_base, tmp_path, engine="torch")
    rows = logged(job)
    assert ppo.train(job).steps == 2
    assert rows[0]["sampling/sampling_logp_difference/max"] < 1e-4
