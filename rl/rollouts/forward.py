"""One forward pass over mlx-lm's layers, with the attention left to the caller.

mlx-lm's own model calls cannot share one prompt's keys among the rows of a group, know no sliding windows for Qwen,
and take windows from caches that cannot be refilled. Its layers (weights, norms, RoPE, LoRA, quantized products) are
used as they are; only the way through them is here. Families: rl/rollouts/families.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from rl.rollouts import device, fused, lent

# queries (B, heads, N, D), keys and values (B, kv_heads, N, D) of layer i and its scale -> (B, heads, N, D)
Attend = Callable[[int, mx.array, mx.array, mx.array, float], mx.array]
# tokens that go through the layers at once when prompts are read
PREFILL_TOKENS = 16_384


def hidden_states(
    model: Any,
    tokens_B_N: mx.array,
    offset: int | mx.array,
    attend: Attend,
    look: Callable[[str, mx.array], None] = lambda name, value: None,
) -> mx.array:
    """Normed hidden states (B, N, width); `offset` is the position of column 0, for all rows or of each.

    `look` hears the output of the embedding and of each layer's attention, feed-forward and sum, in order.
    """
    inner, args = model.model, model.args
    gemma = args.model_type == "gemma3_text"
    products = fused.of(model)
    x = inner.embed_tokens(tokens_B_N)
    if gemma:
        x = x * mx.array(args.hidden_size**0.5).astype(x.dtype)
    look("model.embed_tokens", x)
    for i, layer in enumerate(inner.layers):
        name = f"model.layers.{i}"
        own = None if products is None else products.layers[i]
        attended = _attention(layer.self_attn, own, layer.input_layernorm(x), offset, attend, i)
        look(f"{name}.self_attn", attended)
        if gemma:
            middle = _residual(x, layer.post_attention_layernorm(attended))
            fed = _feed(layer.mlp, own, layer.pre_feedforward_layernorm(middle), gemma)
            x = _residual(middle, layer.post_feedforward_layernorm(fed))
        else:
            middle = x + attended
            fed = _feed(layer.mlp, own, layer.post_attention_layernorm(middle), gemma)
            x = middle + fed
        look(f"{name}.mlp", fed)
        look(name, x)
    return inner.norm(x)


def head(model: Any, hidden: mx.array) -> mx.array:
    """Logits of hidden states: by the head, or by the embedding it is tied to."""
    module = model.lm_head if "lm_head" in model else model.model.embed_tokens
    if "weight" in module and lent.takes(hidden, module["weight"]):
        own = {name: module[name] for name in ("weight", "bias") if name in module}
        return lent.product(hidden.reshape(-1, hidden.shape[-1]), own).reshape(*hidden.shape[:-1], -1)
    return module(hidden) if "lm_head" in model else module.as_linear(hidden)


def _attention(
    module: Any, products: fused.Layer | None, x: mx.array, offset: int | mx.array, attend: Attend, layer: int
) -> mx.array:
    rows, length, _ = x.shape
    heads, kv_heads = module.n_heads, module.n_kv_heads

    def by_head(out: mx.array, count: int) -> mx.array:
        return out.reshape(rows, length, count, -1).transpose(0, 2, 1, 3)

    if products is None:
        queries, keys = by_head(module.q_proj(x), heads), by_head(module.k_proj(x), kv_heads)
        values = by_head(module.v_proj(x), kv_heads)
    else:
        every = by_head(products.qkv(x), heads + 2 * kv_heads)
        queries, keys, values = mx.split(every, [heads, heads + kv_heads], axis=1)
    if "q_norm" in module:
        queries, keys = module.q_norm(queries), module.k_norm(keys)
    elif products is not None:
        # one operation for both; values turn with them, unread: a part of the array would be copied first
        queries, keys, _ = mx.split(module.rope(every, offset=offset), [heads, heads + kv_heads], axis=1)
    if "q_norm" in module or products is None:
        queries, keys = module.rope(queries, offset=offset), module.rope(keys, offset=offset)
    out = attend(layer, queries, keys, values, module.scale).transpose(0, 2, 1, 3).reshape(rows, length, -1)
    return module.o_proj(out) if products is None else products.o(out)


def _feed(module: Any, products: fused.Layer | None, x: mx.array, gemma: bool) -> mx.array:
    if products is None:
        gate, up, down = module.gate_proj(x), module.up_proj(x), module.down_proj
    else:
        (gate, up), down = mx.split(products.gate_up(x), 2, axis=-1), products.down
    if device.torch_is_faster():
        return down(lent.gated(gate, up, gemma))
    return down((nn.gelu_approx(gate) if gemma else nn.silu(gate)) * up)


def _residual(x: mx.array, y: mx.array) -> mx.array:
    """x + y, kept inside float16's range, which Gemma's sums leave."""
    if x.dtype != mx.float16:
        return x + y
    most = mx.finfo(mx.float16).max
    return mx.clip(x.astype(mx.float32) + y.astype(mx.float32), -most, most).astype(mx.float16)


@dataclass
class Prefilled:
    """Prompts that went through the model: per layer keys and values (P, kv_heads, L, D), and each prompt's length.

    Prompt p's tokens are in columns 0 to lengths[p] - 1; what lies to the right of them is to be masked.
    """

    keys: list[mx.array]
    values: list[mx.array]
    lengths: np.ndarray


def prefill(
    model: Any,
    prompts: Sequence[Sequence[int]],
    common: Prefilled | None = None,
    look: Callable[[str, mx.array], None] = lambda name, value: None,
) -> tuple[mx.array, Prefilled]:
    """Read token rows, padded on the right: hidden states (P, longest, width) and what decoding needs of them.

    `common` is one prompt that all of them continue; it is not read again, and `lengths` count it.
    """
    if (products := fused.of(model)) is not None:
        products.refresh(model)
    before = 0 if common is None else int(common.lengths[0])
    longest = max(len(p) for p in prompts)
    tokens = mx.array([list(p) + [0] * (longest - len(p)) for p in prompts], dtype=mx.int32)
    out = Prefilled([], [], np.array([before + len(p) for p in prompts]))
    masks: dict[int | None, Any] = {}

    def attend(layer: int, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        if common is not None:
            shape = (len(prompts), -1, -1, -1)
            keys = mx.concatenate([_spread(common.keys[layer], shape), keys], axis=2)
            values = mx.concatenate([_spread(common.values[layer], shape), values], axis=2)
        out.keys.append(keys)
        out.values.append(values)
        window = model.args.windows[layer]
        if window not in masks:
            masks[window] = _causal(longest, before, window)
        if device.torch_is_faster():
            return lent.attention(queries, keys, values, scale, masks[window])
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=masks[window])

    return hidden_states(model, tokens, before, attend, look), out


def prefill_last(
    model: Any, prompts: Sequence[Sequence[int]], common: Prefilled | None = None
) -> tuple[mx.array, Prefilled]:
    """Hidden states (P, width) after each prompt, as many prompts at a time as PREFILL_TOKENS allow."""
    longest = max(len(p) for p in prompts)
    size = max(1, PREFILL_TOKENS // longest)
    before = 0 if common is None else int(common.lengths[0])
    last, parts = [], []
    for start in range(0, len(prompts), size):
        chunk = prompts[start : start + size]
        hidden, part = prefill(model, [[*p, *[0] * (longest - len(p))] for p in chunk], common)  # one width for all
        ends = mx.array([len(p) - 1 for p in chunk])
        last.append(mx.take_along_axis(hidden, ends[:, None, None], axis=1)[:, 0])
        mx.eval(last[-1], part.keys, part.values)
        parts.append(part)
    layers = range(len(parts[0].keys))
    whole = Prefilled(
        [mx.concatenate([p.keys[i] for p in parts]) for i in layers],
        [mx.concatenate([p.values[i] for p in parts]) for i in layers],
        np.array([before + len(p) for p in prompts]),
    )
    return mx.concatenate(last), whole


def _spread(array: mx.array, rows: tuple[int, ...]) -> mx.array:
    return mx.broadcast_to(array, (rows[0], *array.shape[1:]))


def _causal(length: int, before: int, window: int | None) -> mx.array | str | None:
    """A mask (length, before + length) for torch or MLX, or what says "causal" to it."""
    if window is None or before + length <= window:
        if not device.torch_is_faster():
            return "causal"
        if before == 0:  # torch counts from the upper left corner, MLX from the lower right
            return None
    distance = mx.arange(before, before + length)[:, None] - mx.arange(before + length)[None]
    return (distance >= 0) & (distance < (window or before + length))
