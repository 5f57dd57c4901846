"""REINFORCE++: returns with the KL still to come, normalised over the batch; the KL once and not in the loss too."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from config_helper import GRPO, error_of, write
from hypothesis import given
from hypothesis import strategies as st
from online_helper import inputs, logged, make_job, make_trainer
from trl import GRPOConfig

from rl import config, models
from rl.algorithms import reinforce_pp
from rl.algorithms.global_advantages import GlobalTrainer, advantages

TEXT = GRPO.replace('"grpo"', '"reinforce_pp"')


def reference(rewards: list[float], kl: list[list[float]], lengths: list[int], beta: float) -> list[list[float]]:
    """The docstring's two lines as loops over completions without padding; NaN rewards have no part."""
    returns = [[r - beta * sum(row[t:n]) for t in range(n)] for r, row, n in zip(rewards, kl, lengths, strict=True)]
    flat = [x for r, row in zip(rewards, returns, strict=True) if not math.isnan(r) for x in row]
    mean, std = (np.mean(flat), max(np.std(flat), 1e-4)) if flat else (0.0, 1.0)
    return [[0.0 if math.isnan(r) else (x - mean) / std for x in row] for r, row in zip(rewards, returns, strict=True)]


@given(
    st.lists(
        st.tuples(
            st.one_of(st.floats(-3, 3), st.just(math.nan)),
            st.integers(0, 4),
            st.lists(st.floats(-2, 2), min_size=4, max_size=4),
        ),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([0.0, 0.3]),
)
def test_advantages_are_their_formula(rows: list[tuple[float, int, list[float]]], beta: float) -> None:
    """Padding on the right, empty and one-token completions, rewards that failed; sums run over later tokens only."""
    rewards, lengths, kl = (list(column) for column in zip(*rows, strict=True))
    mask = torch.tensor([[1] * n + [0] * (4 - n) for n in lengths])
    found = advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(kl, dtype=torch.float64), mask, beta)
    for row, n, expected in zip(found, lengths, reference(rewards, kl, lengths, beta), strict=True):
        np.testing.assert_allclose(row[:n].numpy(), expected, atol=1e-6, rtol=1e-6)
        assert not row[n:].any()


def test_equal_rewards_teach_nothing() -> None:
    """In float32 a mean of tenths is not exactly a tenth: divided by its own rounding it would be an advantage of 1."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    found = advantages(torch.full((3,), 0.1), None, mask, 0.0)
    assert found.abs().max() < 1e-3
    assert not advantages(torch.full((3,), math.nan), None, mask, 0.0).any()
    assert not advantages(torch.ones(3), None, torch.zeros(3, 3, dtype=torch.long), 0.0).any()


def test_the_sign_of_the_kl_lowers_what_the_policy_makes_likelier() -> None:
    found = advantages(torch.ones(2), torch.tensor([[1.0], [-1.0]]), torch.ones(2, 1), 0.5)
    assert found.tolist() == [[-1.0], [1.0]]


def test_the_batch_gets_its_advantages_and_the_loss_no_kl_of_its_own(tiny_base: models.Base, tmp_path: Path) -> None:
    """Against the trainer's own logprobs. Trap: TRL would add beta * KL to the loss beside the KL in the return."""
    given_ = [0.0, 1.0, 1.0, 4.0, -1.0, 0.5, 0.0, 2.0]
    job = make_job(tiny_base, tmp_path, "reinforce_pp", beta=0.5, reward=lambda prompts, completions, **c: given_)
    trainer = make_trainer(job, GlobalTrainer, GRPOConfig)
    generator = torch.Generator().manual_seed(0)
    for p in trainer.ref_model.parameters():  # a start the policy has moved away from
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    batch = trainer._generate_and_score_completions(inputs(job, 2))
    mask, lengths = batch["completion_mask"], batch["completion_mask"].sum(1).tolist()
    kl = batch["old_per_token_logps"] - batch["ref_per_token_logps"]
    expected = reference(given_, kl.tolist(), lengths, 0.5)
    for row, n, wanted in zip(batch["advantages"], lengths, expected, strict=True):
        np.testing.assert_allclose(row[:n].tolist(), wanted, atol=1e-4)
    mean_kl = float((kl * mask).sum() / mask.sum())
    assert abs(mean_kl) > 1e-3
    assert trainer._metrics["train"]["kl"] == [pytest.approx(mean_kl, abs=1e-6)]
    loss = float(trainer._compute_loss(trainer.model, batch).detach())
    weighted = batch["advantages"] * batch["importance_sampling_ratio"] * mask
    assert loss == pytest.approx(-float(weighted.sum() / mask.sum()), abs=1e-5)  # on-policy every ratio is 1
    assert trainer.beta == 0.5


@pytest.mark.parametrize("engine", ["mlx", "torch"])
def test_a_run_changes_weights_and_the_kl_starts_at_zero(tiny_base: models.Base, tmp_path: Path, engine: str) -> None:
    """With torch TRL computes no old logprobs of its own; the KL needs them."""

    def places(prompts: list, completions: list, **columns: Any) -> list[float]:
        return [float(i) for i in range(len(completions))]  # never all alike

    job = make_job(tiny_base, tmp_path, "reinforce_pp", engine=engine, beta=0.05, reward=places)
    rows = logged(job)
    before = {n: p.detach().clone() for n, p in job.model.named_parameters()}
    outcome = reinforce_pp.train(job)
    assert (outcome.steps, outcome.failure, outcome.skipped) == (2, None, 0)
    assert any(not torch.equal(before[n], p) for n, p in job.model.named_parameters())
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert abs(rows[1]["kl"]) > 1e-6


def test_what_would_have_no_effect_is_refused(tmp_path: Path) -> None:
    assert config.load(write(tmp_path, TEXT)).trainer.args["beta"] == 0.01
    for setting, found in (
        ("scale_rewards=group", "'group'"),
        ("multi_objective_aggregation=normalize_then_sum", "'normalize_then_sum'"),
        ("loss_type=grpo", "'grpo'"),
    ):
        assert f"found {found}, valid: " in error_of(tmp_path, TEXT, f"trainer.{setting}")
