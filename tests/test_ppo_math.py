"""PPO's formulas against loops in float64, numbers worked out by hand, and the expectations they estimate."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.algorithms import ppo_math as m


def tensor(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def mask_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([[t < n for t in range(max(1, *lengths))] for n in lengths])


@st.composite
def batches(draw: Callable[..., Any]) -> tuple[torch.Tensor, torch.Generator]:
    """A mask with at least one token, and where to draw values from."""
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any))
    return mask_of(lengths), torch.Generator().manual_seed(draw(st.integers(0, 10_000)))


def random_like(mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Values with NaN where the mask is False: nothing under it may count."""
    values = torch.randn(mask.shape, dtype=torch.float64, generator=generator)
    return values.masked_fill(~mask, torch.nan)


# --- rewards


def test_a_completion_worked_out_by_hand() -> None:
    """Three tokens, KL .1, -.2, .3 times 0.5, score 2 at the last; gamma .9, lambda .8."""
    mask = mask_of([3])
    rewards = m.token_rewards(torch.tensor([2.0], dtype=torch.float64), tensor([[0.1, -0.2, 0.3]]), mask, 0.5)
    assert rewards.tolist() == [pytest.approx([-0.05, 0.1, 1.85])]
    values = tensor([[0.5, 1.0, -1.0]])
    # delta: 1.85 + 1 = 2.85;  0.1 - 0.9 - 1 = -1.8;  -0.05 + 0.9 - 0.5 = 0.35
    # A: 2.85;  -1.8 + 0.72 * 2.85 = 0.252;  0.35 + 0.72 * 0.252 = 0.53144
    advantages, returns = m.advantages_and_returns(rewards, values, mask, 0.9, 0.8)
    assert advantages.tolist() == [pytest.approx([0.53144, 0.252, 2.85])]
    assert returns.tolist() == [pytest.approx([1.03144, 1.252, 1.85])]


def test_the_score_lies_at_the_last_token_whatever_the_length() -> None:
    """Edges: one token, a full row (cut, without EOS), none at all."""
    scores = torch.tensor([5.0, 7.0, 9.0])
    assert m.token_rewards(scores, None, mask_of([1, 3, 0]), 0.1).tolist() == [[5, 0, 0], [0, 0, 7], [0, 0, 0]]


def test_the_penalty_falls_on_tokens_the_policy_likes_more_than_the_start() -> None:
    """A sign turned round would pay the policy for leaving its start."""
    logps, reference = tensor([[-0.1, -2.0, -9.0]]), tensor([[-1.1, -1.5, 0.0]])
    kl = m.kl_estimates(logps, reference, "k1")
    rewards = m.token_rewards(torch.zeros(1, dtype=torch.float64), kl, mask_of([2, 3])[:1], 0.1)
    assert rewards.tolist() == [pytest.approx([-0.1, 0.05, 0.0])]


def test_both_kl_estimators_have_the_kl_as_their_expectation() -> None:
    torch.manual_seed(0)
    policy, reference = (torch.randn(7, dtype=torch.float64).log_softmax(0) for _ in range(2))
    p, r = policy.exp().tolist(), reference.exp().tolist()
    exact = sum(a * math.log(a / b) for a, b in zip(p, r, strict=True))
    for estimator in ("k1", "k3"):
        estimates = m.kl_estimates(policy, reference, estimator)
        assert float((policy.exp() * estimates).sum()) == pytest.approx(exact, rel=1e-12)
    assert m.kl_estimates(policy, reference, "k1").min() < 0 <= m.kl_estimates(policy, reference, "k3").min()
    with pytest.raises(ValueError, match="valid: k1, k3"):
        m.kl_estimates(policy, reference, "k2")


# --- advantages


@settings(deadline=None, max_examples=60)
@given(batches(), st.floats(0, 1), st.floats(0, 1))
def test_advantages_are_the_discounted_sum_of_td_errors(
    drawn: tuple[torch.Tensor, torch.Generator], gamma: float, lam: float
) -> None:
    """The definition, a double sum in Python floats, against the recursion; NaN fills the padding."""
    mask, generator = drawn
    rewards, values = random_like(mask, generator), random_like(mask, generator)
    advantages, returns = m.advantages_and_returns(rewards, values, mask, gamma, lam)
    for i in range(len(mask)):
        length = int(mask[i].sum())
        v = [float(x) for x in values[i, :length]] + [0.0]
        deltas = [float(rewards[i, t]) + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t))
            assert float(advantages[i, t]) == pytest.approx(expected, abs=1e-12)
            assert float(returns[i, t]) == pytest.approx(expected + v[t], abs=1e-12)
        assert advantages[i, length:].eq(0).all()
        assert returns[i, length:].eq(0).all()


def test_lambda_one_is_the_return_less_the_value_and_lambda_zero_one_step() -> None:
    rewards, values, mask = tensor([[1.0, 2.0, 4.0]]), tensor([[10.0, 20.0, 30.0]]), mask_of([3])
    advantages, returns = m.advantages_and_returns(rewards, values, mask, 0.5, 1.0)
    assert returns.tolist() == [[1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4]]
    assert advantages.tolist() == [[3 - 10, 4 - 20, 4 - 30]]
    advantages, _ = m.advantages_and_returns(rewards, values, mask, 0.5, 0.0)
    assert advantages.tolist() == [[1 + 10 - 10, 2 + 15 - 20, 4 - 30]]


@settings(deadline=None, max_examples=40)
@given(batches())
def test_whitened_tokens_have_mean_0_or_their_own_and_variance_1(drawn: tuple[torch.Tensor, torch.Generator]) -> None:
    mask, generator = drawn
    values = random_like(mask, generator)
    kept = [float(v) for v in values[mask]]
    mean = sum(kept) / len(kept)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in kept) / len(kept) + 1e-8)
    for shift_mean, offset in ((True, 0.0), (False, mean)):
        white = m.whiten(values, mask, shift_mean=shift_mean)
        assert [float(w) for w in white[mask]] == pytest.approx([(v - mean) / deviation + offset for v in kept])
        assert white[~mask].eq(0).all()


def test_equal_advantages_whiten_to_nothing() -> None:
    """Edge: all rewards equal and no value yet; dividing by their deviation alone would give NaN or noise of size 1."""
    mask = mask_of([1, 1, 1])
    for value in (0.0, 1.0, 0.1):
        assert m.whiten(torch.full((3, 1), value), mask, shift_mean=True).abs().max() < 1e-2
    assert m.whiten(torch.full((3, 1), 0.1), mask, shift_mean=False).tolist() == [[pytest.approx(0.1, abs=1e-2)]] * 3


def test_a_batch_without_any_token_is_finite() -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    values = torch.full((2, 3), torch.nan)
    assert m.masked_mean(values, mask) == 0
    assert m.whiten(values, mask, shift_mean=True).eq(0).all()


# --- losses


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.floats(0.05, 0.5))
def test_losses_and_gradients_are_those_of_a_loop(seed: int, clip: float) -> None:
    """Loss in Python floats; the clipped branch has no gradient, the other one -A times the ratio, or V - R."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(3, 4, dtype=torch.float64, generator=generator)

    old, advantages = draw(), draw()
    logps = (old + draw(0.4)).requires_grad_()
    terms, clipped = m.policy_terms(logps, old, advantages, clip)
    (gradient,) = torch.autograd.grad(terms.sum(), logps)
    old_values, returns = draw(), draw()
    values = (old_values + draw(0.4)).requires_grad_()
    value_terms, value_clipped = m.value_terms(values, old_values, returns, clip)
    (value_gradient,) = torch.autograd.grad(value_terms.sum(), values)
    for i in range(3):
        for t in range(4):
            a, ratio = float(advantages[i, t]), math.exp(float(logps.detach()[i, t] - old[i, t]))
            plain, bounded = ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a
            assert float(terms.detach()[i, t]) == pytest.approx(-min(plain, bounded), abs=1e-12)
            assert bool(clipped[i, t]) == (bounded < plain)
            assert float(gradient[i, t]) == pytest.approx(0.0 if bounded < plain else -plain, abs=1e-12)
            v, v_old, r = float(values.detach()[i, t]), float(old_values[i, t]), float(returns[i, t])
            near = v_old + min(max(v - v_old, -clip), clip)
            assert float(value_terms.detach()[i, t]) == pytest.approx(max((v - r) ** 2, (near - r) ** 2) / 2, abs=1e-12)
            far = (near - r) ** 2 > (v - r) ** 2
            assert bool(value_clipped[i, t]) == far
            assert float(value_gradient[i, t]) == pytest.approx(0.0 if far else v - r, abs=1e-12)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope"),
    [
        (1.0, 1.5, -1.2, 0.0),  # already likelier than it may become: no push further
        (1.0, 0.5, -0.5, -0.5),  # good and too unlikely: pull all the way back
        (-1.0, 0.5, 0.8, 0.0),  # bad and already unlikely
        (-1.0, 1.5, 1.5, 1.5),  # bad and too likely
    ],
)
def test_the_four_corners_of_the_surrogate(advantage: float, ratio: float, loss: float, slope: float) -> None:
    logps = tensor([[math.log(ratio)]]).requires_grad_()
    terms, _ = m.policy_terms(logps, tensor([[0.0]]), tensor([[advantage]]), 0.2)
    (gradient,) = torch.autograd.grad(terms.sum(), logps)
    assert (terms.item(), gradient.item()) == (pytest.approx(loss), pytest.approx(slope))


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        ("none", [[1, 1], [1, 0]]),
        ("token_truncate", [[0.5, 2.0], [1.5, 0]]),
        ("token_mask", [[0.5, 0.0], [1.5, 0]]),
        ("sequence_truncate", [[2.0, 2.0], [1.5, 0]]),
        ("sequence_mask", [[0.0, 0.0], [1.5, 0]]),
    ],
)
def test_weights_of_the_sampler(correction: str, expected: list[list[float]]) -> None:
    """Ratios 0.5 and 5 (2.5 as a sequence) and 1.5, the cap 2; the padding's ratio of e^9 is nothing."""
    difference = tensor([[math.log(0.5), math.log(5.0)], [math.log(1.5), 9.0]])
    weights = m.sampler_weights(difference, mask_of([2, 1]), correction, 2.0)
    assert [pytest.approx(row) for row in expected] == weights.tolist()


def test_an_unknown_correction_is_an_error() -> None:
    with pytest.raises(ValueError, match="token_cut"):
        m.sampler_weights(tensor([[0.0]]), mask_of([1]), "token_cut", 2.0)


def test_explained_variance_of_a_perfect_a_constant_and_a_reversed_value() -> None:
    returns, mask = tensor([[1.0, 3.0, 99.0]]), mask_of([2, 3])[:1]
    assert m.explained_variance(returns + 5, returns, mask) == 1  # a constant offset is no variance
    assert m.explained_variance(tensor([[2.0, 2.0, 0.0]]), returns, mask) == 0
    assert m.explained_variance(-returns, returns, mask) == -3
    assert m.explained_variance(returns, tensor([[1.0, 1.0, 0.0]]), mask).isnan()
