"""A decode step on a CPU, all of it torch's: MLX computes in a thread of its own, and where its products and torch's
attention take turns each waits for the other's threads. Its arrays are read where they lie.

A step of a small model costs what its operations cost to call, so they are few.
For float32 models without codes, which is what a CPU decodes; others go rl/rollouts/forward.py's way.
"""

import numpy as np
import torch
from torch.nn import functional

from rl.rollouts import lent
from rl.rollouts.grouped import Grouped
from rl.rollouts.result import Sampling
from rl.rollouts.sampling import block_of
from rl.rollouts.torch_weights import Layer, Weights, feed, norm


@torch.inference_mode()
def logits(weights: Weights, cached: Grouped, token_B: np.ndarray, position_B: np.ndarray) -> torch.Tensor:
    """Logits (B, V) after one token a row, which is stored; `cached` is ready for it."""
    rows, positions = len(token_B), torch.from_numpy(position_B)
    x = weights.embed(torch.from_numpy(token_B))
    turned: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for i, layer in enumerate(weights.layers):
        heads, kv_heads, width = layer.heads, layer.kv_heads, layer.width
        if (kind := id(layer.turns[0])) not in turned:
            turned[kind] = _for_all(layer, positions)
        cosine, sine = turned[kind]
        every = lent.linear_of(layer.qkv, norm(x, layer.norms["input_layernorm"])).view(rows, -1, width)
        if layer.q_k_norm is not None:
            q_k = every[:, : heads + kv_heads]
            q_k.copy_(norm(q_k, layer.q_k_norm))
        # values turn with queries and keys, by nothing: one operation for the three of them
        every = (every * cosine).addcmul_(every.roll(width // 2, -1), sine)
        q, k_v = every.split([heads, 2 * kv_heads], dim=1)
        cached.write(i, k_v.view(rows, 2, kv_heads, width).permute(1, 2, 0, 3))
        q = q.view(rows, kv_heads, -1, width).transpose(0, 1).contiguous()
        x = feed(weights, layer, x, cached.attended(i, layer.window, q))
    return weights.logits(norm(x, weights.norm))


def _for_all(layer: Layer, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (B, heads + 2 kv_heads, D): attention's scale is in those of the queries, values stay."""
    cosine, sine = (table[positions][:, None] for table in layer.turns)
    heads, kv_heads = layer.heads, layer.kv_heads
    by = torch.tensor([layer.scale] * heads + [1.0] * kv_heads + [0.0] * kv_heads)[:, None]
    cosine = cosine * by
    cosine[:, heads + kv_heads :] = 1.0
    return cosine, sine * by


@torch.inference_mode()
def sample(
    logits_B_V: torch.Tensor, uniforms_B_2: np.ndarray, sampling: Sampling
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `sampling.sample`: tokens, logprobs and whether the logits were finite, for the host to read."""
    least_B, most_B = logits_B_V.aminmax(dim=-1)
    finite_B = np.isfinite(least_B.numpy()) & np.isfinite(most_B.numpy())
    if sampling.temperature not in (0.0, 1.0):
        logits_B_V, most_B = logits_B_V / sampling.temperature, most_B / sampling.temperature
    if sampling.temperature and sampling.filtered:
        logits_B_V = filter_logits(logits_B_V, sampling)
    shifted_B_V = logits_B_V - most_B[:, None]
    weights_B_V = shifted_B_V.exp()
    token_B = logits_B_V.argmax(-1).numpy() if sampling.temperature == 0.0 else draw(weights_B_V, uniforms_B_2)
    chosen_B = shifted_B_V.numpy()[np.arange(len(token_B)), token_B]
    with np.errstate(invalid="ignore"):
        return token_B, chosen_B - np.log(weights_B_V.sum(-1).numpy()), finite_B


def filter_logits(logits_B_V: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """As `sampling.filter_logits`."""
    if 0 < sampling.top_k < logits_B_V.shape[-1]:
        kth = logits_B_V.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_B_V = logits_B_V.masked_fill(logits_B_V < kth, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = logits_B_V.sort(dim=-1, descending=True, stable=True)
        probs = ordered.softmax(-1)
        above = probs.cumsum(-1) - probs  # mass of the tokens before this one
        kept = torch.zeros_like(logits_B_V, dtype=torch.bool).scatter_(-1, order, above < sampling.top_p)
        logits_B_V = logits_B_V.masked_fill(~kept, -torch.inf)
    if sampling.min_p > 0.0:
        floor = logits_B_V.amax(-1, keepdim=True) + float(np.log(sampling.min_p))
        logits_B_V = logits_B_V.masked_fill(logits_B_V < floor, -torch.inf)
    return logits_B_V


def draw(weights_B_V: torch.Tensor, uniforms_B_2: np.ndarray) -> np.ndarray:
    """As `sampling.draw`: a block of the vocabulary by the first number, a token of it by the second."""
    rows, size = weights_B_V.shape
    first, second = torch.from_numpy(uniforms_B_2).split(1, dim=1)
    if size <= (block := block_of(size)):
        return _invert(weights_B_V, second)
    weights_B_V = functional.pad(weights_B_V, (0, -size % block)) if size % block else weights_B_V
    weights_B_K_N = weights_B_V.view(rows, -1, block)
    block_B = _invert(weights_B_K_N.sum(-1), first)
    return block_B * block + _invert(weights_B_K_N[np.arange(rows), block_B], second)


def _invert(weights_B_N: torch.Tensor, uniform_B_1: torch.Tensor) -> np.ndarray:
    sums_B_N = weights_B_N.cumsum(-1)
    return (sums_B_N <= uniform_B_1 * sums_B_N[:, -1:]).sum(-1).numpy()
