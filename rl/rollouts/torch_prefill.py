"""Prompts read on a CPU, all of it torch's, as its decode steps are (rl/rollouts/torch_step.py says why)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from rl.rollouts import lent
from rl.rollouts.torch_weights import Layer, Weights, feed, norm, turn

# tokens that go through the layers at once: what they are between two products is to stay in the caches
TOKENS = 1024


@dataclass
class Read:
    """Prompts that went through the model: of each layer keys and values (2, kv_heads, P, L, D), and each length.

    Prompt p's tokens are in columns 0 to lengths[p] - 1; what lies to the right of them is to be masked.
    """

    layers: list[torch.Tensor]
    lengths: np.ndarray


@torch.inference_mode()
def read(weights: Weights, prompts: Sequence[Sequence[int]], common: Read | None = None) -> tuple[torch.Tensor, Read]:
    """Hidden states (P, width), normed, after each prompt, and what decoding needs of all their tokens.

    `common` is one prompt that all of them continue; it is not read again, and `lengths` count it.
    """
    before = 0 if common is None else int(common.lengths[0])
    longest, count = max(map(len, prompts)), len(prompts)
    kept = [
        torch.empty(2, layer.kv_heads, count, before + longest, layer.width) for layer in weights.layers
    ]  # written where they stay
    ids = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts])
    ends = torch.tensor([len(p) - 1 for p in prompts])
    masks = {layer.window: _mask(longest, before, layer.window) for layer in weights.layers}
    size, last = max(1, TOKENS // longest), []
    for start in range(0, count, size):
        part = slice(start, start + size)
        x = weights.embed(ids[part])
        for i, layer in enumerate(weights.layers):
            if common is not None:
                kept[i][:, :, part, :before] = common.layers[i]
            only = ends[part] if i == len(weights.layers) - 1 else None
            x = _through(weights, layer, x, kept[i][:, :, part], before, masks[layer.window], only)
        last.append(x[:, 0])
    return norm(torch.cat(last), weights.norm), Read(kept, np.array([before + len(p) for p in prompts]))


def _through(
    weights: Weights,
    layer: Layer,
    x_P_N_W: torch.Tensor,
    kept: torch.Tensor,
    before: int,
    mask: torch.Tensor | None,
    only: torch.Tensor | None,
) -> torch.Tensor:
    """One layer. Of the last one nothing is wanted but keys, values and one token of each prompt, number `only`."""
    count, length, wide = x_P_N_W.shape
    heads, kv_heads = layer.heads, layer.kv_heads
    rows = norm(x_P_N_W.reshape(-1, wide), layer.norms["input_layernorm"])
    every = lent.linear_of(layer.qkv, rows).view(count, length, heads + 2 * kv_heads, -1)
    q_k, values = every.split([heads + kv_heads, kv_heads], dim=2)
    q_k = norm(q_k, layer.q_k_norm) if layer.q_k_norm is not None else q_k
    q_k = turn(q_k, *(table[before : before + length, None] for table in layer.turns))
    kept[0, :, :, before:] = q_k[:, :, heads:].permute(2, 0, 1, 3)
    kept[1, :, :, before:] = values.permute(2, 0, 1, 3)
    keys, values, q = kept[0].transpose(0, 1), kept[1].transpose(0, 1), q_k[:, :, :heads]
    if only is not None:
        each = torch.arange(count)
        x_P_N_W, q = x_P_N_W[each, only][:, None], q[each, only][:, None]
        if mask is None:
            mask = _mask(length, before, None, always=True)
        mask, length = mask[only][:, None, None], 1
    attended = q.new_empty(q.shape)
    repeats = heads // kv_heads
    for r in range(repeats):  # enable_gqa takes the slow way on a CPU
        attended[:, :, r::repeats] = functional.scaled_dot_product_attention(
            q[:, :, r::repeats].transpose(1, 2), keys, values, mask, is_causal=mask is None, scale=layer.scale
        ).transpose(1, 2)
    x = x_P_N_W.reshape(-1, wide)
    return feed(weights, layer, x, attended.view(count * length, -1)).view(count, length, wide)


def _mask(length: int, before: int, window: int | None, *, always: bool = False) -> torch.Tensor | None:
    """(length, before + length), to be added to the scores; None where "causal" says it."""
    if not always and before == 0 and (window is None or length <= window):
        return None
    distance = torch.arange(before, before + length)[:, None] - torch.arange(before + length)
    seen = (distance >= 0) & (distance < (window or before + length))
    return torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))
