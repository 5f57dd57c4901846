"""From logits to tokens: temperature and filters, per-row random streams, logprobs of what was really sampled."""

import mlx.core as mx
import numpy as np

from rl.rollouts.result import Sampling


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): spreads a counter over 64 bits."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)) & np.uint64(0xFFFFFFFFFFFFFFFF)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keys_for(seed: int, step: int, rows: np.ndarray, tokens: int) -> np.ndarray:
    """Random keys (len(rows), tokens, 2) uint32, each a function of (seed, step, row, token) alone.

    So a completion does not depend on its neighbours in the batch, and a resumed run draws what an unbroken one would.
    """
    with np.errstate(over="ignore"):
        base = _mix(_mix(np.asarray([seed], dtype=np.uint64)) ^ np.uint64(step))
        row = _mix(base ^ rows.astype(np.uint64))
        keys = _mix(row[:, None] ^ np.arange(tokens, dtype=np.uint64)[None])
    return np.stack([keys >> np.uint64(32), keys & np.uint64(0xFFFFFFFF)], axis=-1).astype(np.uint32)


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


def sample(logits_B_V: mx.array, keys_B_2: mx.array, sampling: Sampling) -> tuple[mx.array, mx.array, mx.array]:
    """Draw one token a row.

    Returns tokens (B,) int32, the float32 logprob of each under the *tempered and filtered* distribution (greedy: under
    the untempered one) (B,), and whether the row's logits were all finite (B,) bool.
    """
    logits_B_V = logits_B_V.astype(mx.float32)
    finite_B = mx.isfinite(logits_B_V).all(axis=-1)
    if sampling.temperature == 0.0:
        tokens_B = mx.argmax(logits_B_V, axis=-1)
    else:
        logits_B_V = logits_B_V / sampling.temperature
        if sampling.filtered:
            logits_B_V = filter_logits(logits_B_V, sampling)
        tokens_B = mx.vmap(lambda logits, key: mx.random.categorical(logits, key=key))(logits_B_V, keys_B_2)
    chosen_B = mx.take_along_axis(logits_B_V, tokens_B[:, None], axis=-1)[:, 0]
    return tokens_B.astype(mx.int32), chosen_B - mx.logsumexp(logits_B_V, axis=-1), finite_B
