"""What is drawn, and with which logprob: against softmax, chi-square and transformers' own filters."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import rl.rollouts  # noqa: F401  binds BLAS before mlx loads

import mlx.core as mx  # isort: skip
from rl.rollouts.result import Sampling
from rl.rollouts.sampling import draw, filter_logits, sample, uniforms_for

DRAWS = 20_000
LOGITS = torch.randn(24, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2
CASES = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(temperature=2.0),
    Sampling(top_k=5),
    Sampling(top_p=0.8),
    Sampling(min_p=0.1),
    Sampling(temperature=1.5, top_k=12, top_p=0.9, min_p=0.05),
]


def reference(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution by transformers' warpers, in their order, in float64."""
    scores = (logits / sampling.temperature)[None]
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize("sampling", CASES, ids=str)
def test_draws_follow_the_distribution_and_logprobs_are_its_own(sampling: Sampling) -> None:
    """Trap: mlx-lm reports untempered logprobs; the trainer needs those of the distribution really sampled."""
    expected = reference(LOGITS, sampling).numpy()
    logits = mx.broadcast_to(mx.array(LOGITS.float().numpy())[None], (DRAWS, 24))
    uniforms = mx.array(uniforms_for(1, 0, np.arange(DRAWS), 1)[:, 0])
    tokens, logprobs, finite = sample(logits, uniforms, sampling)
    tokens, logprobs = np.array(tokens), np.array(logprobs)
    assert bool(finite.all())
    np.testing.assert_allclose(logprobs, np.log(expected[tokens]), atol=1e-5)
    kept = expected > 0
    assert kept[tokens].all()
    counts = np.bincount(tokens, minlength=24)[kept]
    assert stats.chisquare(counts, expected[kept] * DRAWS).pvalue > 1e-3


def test_greedy_takes_the_largest_and_reports_the_untempered_logprob() -> None:
    logits = mx.array(LOGITS.float().numpy())[None]
    tokens, logprobs, _ = sample(logits, mx.zeros((1, 2)), Sampling(temperature=0.0))
    assert tokens.item() == int(LOGITS.argmax())
    assert logprobs.item() == pytest.approx(LOGITS.log_softmax(-1).max().item(), abs=1e-5)


def test_bfloat16_logits_are_normalised_in_float32() -> None:
    """Trap: in bfloat16 a logprob of -5 moves in steps of 1/32."""
    logits = LOGITS.to(torch.bfloat16).float()
    low = mx.array(logits.numpy()).astype(mx.bfloat16)[None]
    tokens, logprobs, _ = sample(low, mx.array([[0.3, 0.6]]), Sampling(temperature=0.7))
    assert logprobs.dtype == mx.float32
    expected = (logits.double() / 0.7).log_softmax(-1)[tokens.item()].item()
    assert logprobs.item() == pytest.approx(expected, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12, unique=True),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.9),
)
def test_filters_keep_what_transformers_keeps(values: list[float], top_k: int, top_p: float, min_p: float) -> None:
    sampling = Sampling(top_k=top_k, top_p=top_p, min_p=min_p)
    logits = torch.tensor(values, dtype=torch.float64)
    kept = np.array(mx.isfinite(filter_logits(mx.array(values, dtype=mx.float32)[None], sampling)))[0]
    expected = (reference(logits, sampling) > 0).numpy()
    probs = torch.sort(logits.softmax(-1), descending=True).values.cumsum(-1)
    near_edge = bool((probs - top_p).abs().min() < 1e-5) or min_p > 0  # the two may round apart on the edge itself
    assert kept.any()
    assert kept[int(np.argmax(values))]
    if not near_edge:
        assert (kept == expected).all()


def test_streams_depend_on_seed_step_row_and_token_only() -> None:
    base = uniforms_for(5, 7, np.arange(4), 3)
    assert (uniforms_for(5, 7, np.array([2]), 3)[0] == base[2]).all()
    assert (uniforms_for(5, 7, np.arange(4), 2) == base[:, :2]).all()
    others = [uniforms_for(6, 7, np.arange(4), 3), uniforms_for(5, 8, np.arange(4), 3), base[::-1]]
    assert not any((other == base).all(axis=-1).any() for other in others)
    many = uniforms_for(0, 0, np.arange(1000), 50).reshape(-1, 2)
    assert len(np.unique(many, axis=0)) == len(many)


def test_the_two_numbers_of_a_token_are_uniform_and_independent() -> None:
    pairs = uniforms_for(3, 1, np.arange(400), 100).reshape(-1, 2)
    assert pairs.min() >= 0
    assert pairs.max() < 1
    for column in pairs.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    cells = np.bincount((pairs[:, 0] * 8).astype(int) * 8 + (pairs[:, 1] * 8).astype(int), minlength=64)
    assert stats.chisquare(cells).pvalue > 1e-3


@pytest.mark.parametrize("size", [300, 1024, 1187 * 32], ids=["padded", "even", "blocks of 32"])
def test_a_draw_in_two_levels_follows_the_weights_over_a_large_vocabulary(size: int) -> None:
    """Trap: a float32 running sum over 100,000 tokens loses the small ones at its end; here each of 40 parts of the
    sorted vocabulary is hit as often as it should be."""
    generator = np.random.default_rng(7)
    weights = generator.exponential(size=size).astype(np.float32) ** 6 + np.float32(1e-6)
    weights[generator.integers(0, size, size // 4)] = 0.0
    drawn = []
    for part in range(20):
        rows = np.arange(1000) + 1000 * part
        uniforms = mx.array(uniforms_for(1, 2, rows, 1)[:, 0])
        drawn.append(np.array(draw(mx.broadcast_to(mx.array(weights)[None], (1000, size)), uniforms)))
    tokens = np.concatenate(drawn)
    assert (weights[tokens] > 0).all()
    exact = weights.astype(np.float64) / weights.sum(dtype=np.float64)
    bins = np.minimum(
        (np.cumsum(exact[np.argsort(exact)]) * 40).astype(int), 39
    )  # 40 bins of like mass, smallest first
    bin_of = np.empty(size, int)
    bin_of[np.argsort(exact)] = bins
    expected = np.bincount(bin_of, weights=exact, minlength=40) * DRAWS
    kept = expected > 5
    counts = np.bincount(bin_of[tokens], minlength=40)
    assert stats.chisquare(counts[kept], expected[kept] * counts[kept].sum() / expected[kept].sum()).pvalue > 1e-3


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-23])
def test_a_weight_of_zero_is_never_drawn_at_the_ends(uniform: float) -> None:
    """Trap: at the last representable number the running sum's rounding would point behind the last token."""
    for last in (0.1, 1.0000001, 3.0, 1e-30):
        weights = mx.array([[0.0, 0.7, 0.0, last, 0.0]])
        assert draw(weights, mx.array([[uniform, uniform]])).item() in (1, 3)


def test_other_backends_take_their_own_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's detour through torch changes speed alone."""
    from rl.rollouts import sampling as module

    logits = mx.broadcast_to(mx.array(LOGITS.float().numpy())[None], (64, 24))
    uniforms = mx.array(uniforms_for(1, 0, np.arange(64), 1)[:, 0])
    detour = sample(logits, uniforms, Sampling(temperature=0.7))
    monkeypatch.setattr(module.device, "torch_is_faster", lambda: False)
    plain = sample(logits, uniforms, Sampling(temperature=0.7))
    assert detour[0].tolist() == plain[0].tolist()
    np.testing.assert_allclose(np.array(detour[1]), np.array(plain[1]), atol=1e-6)
