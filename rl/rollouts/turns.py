"""RoPE's cosines and sines by position, for steps that turn queries and keys themselves: the kernels of a CUDA decode
step, and torch's on a CPU."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from rl.rollouts import device, fused

LEAST_POSITIONS = 512


def reach(model: Any, positions: int) -> None:
    """Know the cosines and sines of so many positions, where such steps may want them."""
    products = fused.of(model)
    wanted = products is not None and (device.takes_own_kernels() or device.torch_is_faster())
    if not wanted or (products.turns and len(products.turns[0]) >= positions):
        return
    length = max(LEAST_POSITIONS, 1 << (positions - 1).bit_length())
    modules = [layer.self_attn for layer in model.model.layers]
    keys = [np.array(table(module, 16)).tobytes() for module in modules]
    kinds = list(dict.fromkeys(keys))
    products.turn_of = [kinds.index(key) for key in keys]
    products.turns[:] = [table(modules[keys.index(kind)], length) for kind in kinds]
    mx.eval(products.turns)


def table(module: nn.Module, length: int) -> mx.array:
    """(length, D) float32: RoPE's cosine for each of D / 2 pairs, then its sines, each times RoPE's own scale: what it
    makes of ones and zeros. As of one long row: one broadcast to many positions came out wrong on an H100 (0.32.4)."""
    half = head_size(module) // 2
    unit = mx.concatenate([mx.ones((1, 1, length, half)), mx.zeros((1, 1, length, half))], axis=-1)
    return mx.contiguous(module.rope(unit)[0, 0])


def head_size(module: nn.Module) -> int:
    base = module.q_proj.linear if "lora_a" in module.q_proj else module.q_proj
    return base.weight.shape[0] // module.n_heads
