"""From logits to tokens: temperature and filters, per-row random streams, logprobs of what was really sampled.

A token is drawn by inverting the distribution function, in two levels: first a block of the vocabulary, then a token in
it. That takes one exp a logit where Gumbel's way takes two logs more, and sums of a few hundred terms, so that rounding
does not cut the tail off as a single running sum over 100,000 tokens would.
"""

from math import gcd

import mlx.core as mx
import numpy as np

from rl.rollouts import device, lent
from rl.rollouts.result import Sampling

BLOCK = 256


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): spreads a counter over 64 bits."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)) & np.uint64(0xFFFFFFFFFFFFFFFF)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms_for(seed: int, step: int, rows: np.ndarray, tokens: int) -> np.ndarray:
    """Two uniform numbers in [0, 1) a token, (len(rows), tokens, 2) float32: functions of (seed, step, row, token).

    Of nothing else, so a completion does not depend on its neighbours in the batch, and a resumed run draws what an
    unbroken one would.
    23 bits each: a number times a sum in float32 is then always below the sum.
    """
    with np.errstate(over="ignore"):
        base = _mix(_mix(np.asarray([seed], dtype=np.uint64)) ^ np.uint64(step))
        row = _mix(base ^ rows.astype(np.uint64))
        bits = _mix(row[:, None] ^ np.arange(tokens, dtype=np.uint64)[None])
    pair = np.stack([bits >> np.uint64(41), (bits >> np.uint64(9)) & np.uint64((1 << 23) - 1)], axis=-1)
    return pair.astype(np.float32) * np.float32(2.0**-23)


def filter_logits(logits_B_V: mx.array, sampling: Sampling) -> mx.array:
    """Logits with what the filters cut set to -inf: top-k, then top-p (nucleus), then min-p (share of the maximum).

    As in transformers' warpers each filter sees the distribution that the one before left, and one token always stays.
    """
    if sampling.top_k > 0 and sampling.top_k < logits_B_V.shape[-1]:
        kth = mx.sort(logits_B_V, axis=-1)[..., -sampling.top_k][..., None]
        logits_B_V = mx.where(logits_B_V < kth, -mx.inf, logits_B_V)
    if sampling.top_p < 1.0:
        order = mx.argsort(-logits_B_V, axis=-1)
        probs = mx.softmax(mx.take_along_axis(logits_B_V, order, axis=-1), axis=-1)
        above = mx.cumsum(probs, axis=-1) - probs  # mass of the tokens before this one
        kept = mx.put_along_axis(mx.zeros(logits_B_V.shape, mx.bool_), order, above < sampling.top_p, axis=-1)
        logits_B_V = mx.where(kept, logits_B_V, -mx.inf)
    if sampling.min_p > 0.0:
        floor = logits_B_V.max(axis=-1, keepdims=True) + float(np.log(sampling.min_p))
        logits_B_V = mx.where(logits_B_V < floor, -mx.inf, logits_B_V)
    return logits_B_V


def sample(logits_B_V: mx.array, uniforms_B_2: mx.array, sampling: Sampling) -> tuple[mx.array, mx.array, mx.array]:
    """Draw one token a row.

    Returns tokens (B,) int32, the float32 logprob of each under the *tempered and filtered* distribution (greedy: under
    the untempered one) (B,), and whether the row's logits were all finite (B,) bool.
    """
    logits_B_V = logits_B_V.astype(mx.float32)
    finite_B = mx.isfinite(logits_B_V.sum(axis=-1))  # a sum of finite logits overflows at 1e34 only
    if sampling.temperature not in (0.0, 1.0):
        logits_B_V = logits_B_V / sampling.temperature
    if sampling.temperature and sampling.filtered:
        logits_B_V = filter_logits(logits_B_V, sampling)
    most_B = logits_B_V.max(axis=-1)
    shifted_B_V = logits_B_V - most_B[:, None]
    weights_B_V = lent.exp(shifted_B_V) if device.torch_is_faster() else mx.exp(shifted_B_V)
    greedy = sampling.temperature == 0.0
    tokens_B = mx.argmax(logits_B_V, axis=-1) if greedy else draw(weights_B_V, uniforms_B_2)
    chosen_B = mx.take_along_axis(logits_B_V, tokens_B[:, None], axis=-1)[:, 0]
    return tokens_B.astype(mx.int32), chosen_B - most_B - mx.log(weights_B_V.sum(axis=-1)), finite_B


def draw(weights_B_V: mx.array, uniforms_B_2: mx.array) -> mx.array:
    """Indices (B,) in proportion to the weights (not negative, not all 0): a block by the first uniform, a token of it
    by the second. A weight of 0 is never drawn."""
    rows, size = weights_B_V.shape
    block = block_of(size)
    if size % block:
        weights_B_V = mx.pad(weights_B_V, [(0, 0), (0, -size % block)])
    weights_B_K_N = weights_B_V.reshape(rows, -1, block)
    block_B = _invert(weights_B_K_N.sum(axis=-1), uniforms_B_2[:, 0])
    weights_B_N = mx.take_along_axis(weights_B_K_N, block_B[:, None, None], axis=1)[:, 0]
    return block_B * block + _invert(weights_B_N, uniforms_B_2[:, 1])


def block_of(size: int) -> int:
    """Tokens of a block of a vocabulary of `size`: a divisor of it, unless that would be a small one."""
    block = gcd(size, BLOCK)
    return block if block >= BLOCK // 8 else BLOCK


def _invert(weights_B_N: mx.array, uniform_B: mx.array) -> mx.array:
    sums_B_N = mx.cumsum(weights_B_N, axis=-1)
    return (sums_B_N <= uniform_B[:, None] * sums_B_N[:, -1:]).sum(axis=-1)
