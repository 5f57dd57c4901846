"""A decode step in five kernels a layer, for MLX on CUDA, where a step is mostly the launching of its operations.

An operation costs the host 6 µs there and a product, which is cuBLAS's to plan, 35, whatever its size; a layer with
LoRA takes 21 operations, 12 of them products. Here it takes five: queries, keys and values with their norm before;
attention with RoPE and the new key and value (attend.cu); its output's product and the sum with what went in; gate and
up with norm and SiLU; down and the sum (product.cu; wide.cu for many rows of large layers). Adapters, biases and 4- or
8-bit codes are read inside. A large model of weights as they are goes by rl/rollouts/streamed.py.

No test machine has CUDA: the tests run the same sources on a CPU (tests/cuda_on_cpu.hpp), and here they are tried on
numbers, against the operations that they replace, before they are used; where they fail, or do not know the model, the
operations stay.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from rl.rollouts import attention, device, fused, turns
from rl.rollouts.fused import TILE

log = logging.getLogger(__name__)

WARPS = 8  # of a block
ROWS = 32  # of a block of product.cu
WIDE_ROWS = 64  # of a block of wide.cu
WIDE = 2_000_000  # weights from which on a product waits for them rather than for its launch
FEW_ROWS = 32  # up to so many product.cu is as fast or faster: seen on an H200, 1.7B, 16 rows against 64
WIDE_BLOCKS = 64  # that draw on a GPU's memory as fast as it gives, or nearly
SUMS = 8  # tiles whose sums fit a thread's registers
PROCESSORS = 132  # of an H100
BLOCKS = 120  # that keep them busy
FOLDER = Path(__file__).parent
TOLERANCE = {mx.float16: 1e-2, mx.bfloat16: 8e-2}  # of the largest number: some roundings; a mistake is as large as it
INPUTS = ("rows", "weight", "scales", "offsets", "gamma", "a", "b", "where", "bias", "more")
ATTEND_INPUTS = ("qkv", "turns", "q_gamma", "k_gamma", "prompt_keys", "prompt_values", "keys", "values", "spans")
ATTEND_INPUTS += ("column",)
Pair = tuple[mx.array, mx.array]  # keys and values


def hidden_states(
    model: Any,
    token_B: mx.array,
    position_B: mx.array,
    prompts: Sequence[Pair],
    rings: Sequence[Pair],
    spans: Sequence[mx.array],
    column: mx.array,
    products: Sequence[fused.Layer] | None = None,
) -> mx.array:
    """Normed hidden states (B, width) of one token a row at `position_B`, of a model that is `usable` and `reaches` it.

    For each layer keys and values of the prompts, (P, kv_heads, L, D), and each row's ring of columns for what it
    draws, (B, kv_heads, W, D); the token's own are written into `column` of these, in place. `spans` (B, 5) say what
    each row sees in a layer (rl/rollouts/parted.py), the new column included. `products` are the model's own if None.
    """
    inner, own_of = model.model, fused.of(model)
    x = inner.embed_tokens(token_B)
    tables = [table[position_B] for table in own_of.turns]
    for i, layer in enumerate(inner.layers[: len(prompts)]):
        own, module, turn = (products or own_of.layers)[i], layer.self_attn, tables[own_of.turn_of[i]]
        qkv = product(own.qkv, x, norm=layer.input_layernorm)
        middle = product(own.o, attend(module, qkv, turn, prompts[i], rings[i], spans[i], column), more=x)
        x = product(
            own.down, product(own.gate_up, middle, norm=layer.post_attention_layernorm, gated=True), more=middle
        )
    return inner.norm(x)


def product(
    one: fused.Product,
    rows_M_K: mx.array,
    *,
    norm: nn.RMSNorm | None = None,
    gated: bool = False,
    more: mx.array | None = None,
) -> mx.array:
    """`one` of the rows, (M, outputs): of RMSNorm of them if `norm`; silu of the first half of the outputs times the
    second if `gated`; plus `more`. Sums in float32, what the operations would give is rounded to the rows' dtype."""
    state, none = one.state, rows_M_K
    sides, ranks = 2 if gated else 1, one.rank // TILE
    outputs = sum(one.sizes) // sides
    wide = _wide(one, outputs, sides, ranks) if rows_M_K.shape[0] > FEW_ROWS else None
    blocks = -(-rows_M_K.shape[0] // (WIDE_ROWS if wide else ROWS))
    tiles = wide or tiles_of(one, rows_M_K.shape[0], gated=gated)
    shape = [("WN", tiles)] if wide else [("NT", tiles), ("MT", ROWS // 8), ("WARPS", WARPS)]
    inputs = {
        "rows": rows_M_K,
        "offsets": state.get("biases", none),
        "gamma": none if norm is None else norm.weight,
        "more": more if more is not None else none,
    }
    (out,) = _product("wide" if wide else "product", None if norm is None else float(norm.eps))(
        inputs=[inputs[name] if name in inputs else state.get(name, none) for name in INPUTS],
        template=[
            ("T", rows_M_K.dtype),
            ("BITS", one.settings.get("bits", 16)),
            ("GROUP", one.settings.get("group_size", 1)),
            *shape,
            ("RANKS", ranks),
            ("NORM", norm is not None),
            ("GATED", gated),
            ("BIAS", "bias" in state),
            ("ADD", more is not None),
        ],
        grid=(outputs // TILE // tiles * 32 * WARPS, blocks, 1),
        threadgroup=(32 * WARPS, 1, 1),
        output_shapes=[(rows_M_K.shape[0], outputs)],
        output_dtypes=[rows_M_K.dtype],
    )
    return out


def _wide(one: fused.Product, outputs: int, sides: int, ranks: int) -> int | None:
    """Tiles of outputs that a block of wide.cu makes, as many as leave enough blocks; None if the layer is not large,
    or none of its kind: a block lies in one layer, takes whole chunks of inputs and has a warp for each of A's tiles.
    """
    if one.inputs * sum(one.sizes) < WIDE:
        return None
    for tiles in (4, 2):
        fits = one.inputs % (64 * (WARPS // tiles)) == 0 and all(size % (TILE * tiles) == 0 for size in one.sizes)
        if fits and sides * ranks <= tiles and (tiles == 2 or outputs // (TILE * tiles) >= WIDE_BLOCKS):
            return tiles
    return None


def tiles_of(one: fused.Product, rows: int, *, gated: bool = False) -> int:
    """Tiles of outputs that a block of product.cu makes: as many as leave enough blocks, and lie in one layer."""
    sides, blocks = 2 if gated else 1, -(-rows // ROWS)
    for tiles in (4, 2):
        enough = sum(one.sizes) // sides // (TILE * tiles) * blocks >= BLOCKS
        if enough and sides * (tiles + one.rank // TILE) <= SUMS and all(n % (TILE * tiles) == 0 for n in one.sizes):
            return tiles
    return 1


def attend(
    module: nn.Module,
    qkv: mx.array,
    turn_B_D: mx.array,
    prompt: Pair,
    ring: Pair,
    spans_B_5: mx.array,
    column: mx.array,
) -> mx.array:
    """(B, heads × D) of the queries, keys and values (B, (heads + 2 kv_heads) × D) that attention's product gave;
    `turn_B_D` float32, cosines and sines of each row's position, the rest as in `hidden_states`."""
    normed, width = "q_norm" in module, ring[0].shape[3]
    rows = len(qkv)
    together, shares, at_once, warps = sharing(rows, module, width)
    (out,) = _attend(float(module.scale), float(module.q_norm.eps) if normed else None)(
        inputs=[
            qkv,
            turn_B_D,
            module.q_norm.weight if normed else qkv,
            module.k_norm.weight if normed else qkv,
            *prompt,
            *ring,
            spans_B_5,
            column.reshape(1),
        ],
        template=[
            ("T", qkv.dtype),
            ("D", width),
            ("HEADS", module.n_heads),
            ("KV", module.n_kv_heads),
            ("QUERIES", together),
            ("ROWS", shares),
            ("AT_ONCE", at_once),
            ("WARPS", warps),
            ("NORM", normed),
        ],
        grid=(module.n_heads // together * 32 * warps, -(-rows // shares), 1),
        threadgroup=(32 * warps, 1, 1),
        output_shapes=[(rows, module.n_heads * width)],
        output_dtypes=[qkv.dtype],
    )
    return out


def sharing(rows: int, module: nn.Module, width: int) -> tuple[int, int, int, int]:
    """Of a block of attend.cu, heads being so wide: its queries, and what `_shares` gives."""
    together = _together(module.n_heads // module.n_kv_heads)
    return together, *_shares(rows, module.n_heads // together, together, width)


def _together(repeats: int) -> int:
    """Queries of a block, of those that share their keys: all, or the largest part that fits."""
    return next(n for n in range(8, 0, -1) if repeats % n == 0)


def _shares(rows: int, heads: int, together: int, width: int) -> tuple[int, int, int]:
    """Rows of a block of attend.cu, pieces of 16 keys that a warp asks for at once, and warps; `heads` blocks a row.

    As many rows, which read their prompt once, as leave enough blocks, and no more than 8 queries, the width of the
    tensor cores' product; few registers where two blocks share a processor.
    """
    shares = next((n for n in (8, 4, 2) if n * together <= 8 and -(-rows // n) * heads >= BLOCKS), 1)
    alone = -(-rows // shares) * heads <= PROCESSORS
    return shares, 2 if width < 64 or (width == 64 and alone) else 1, WARPS


@cache
def _product(name: str, eps: float | None) -> Callable[..., list[mx.array]]:
    return device.cuda_kernel(name, INPUTS, read(f"{name}.cu"), header(EPS=eps), contiguous=True)


@cache
def _attend(scale: float, eps: float | None) -> Callable[..., list[mx.array]]:
    return device.cuda_kernel("attend", ATTEND_INPUTS, read("attend.cu"), header(SCALE=scale, EPS=eps))


def read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def header(**constants: float | None) -> str:
    told = [f"constexpr float {name} = {value or 0.0!r}f;" for name, value in constants.items()]
    return "\n".join([*told, read("product.cuh")])


def usable(model: Any) -> bool:
    """Whether `hidden_states` may decode this model: it is of a kind that the kernels know, and they were right on it.

    Call it after a prefill, which brings the products up to date, and not while a step is compiled. The trial is made
    once for each kind of products (an adapter may come later).
    """
    products = fused.of(model)
    if products is None or not device.takes_own_kernels():
        return False
    kind = tuple((tuple(p.settings.items()), p.rank, "bias" in p.state) for p in products.layers[0].every)
    if kind not in products.right:
        products.right[kind] = _knows(model) and right(model, _trial)
    return products.right[kind]


def _knows(model: Any) -> bool:
    """Whether the model has nothing that the kernels leave out."""
    inner, dtype = model.model, model.model.norm.weight.dtype
    if model.args.model_type == "gemma3_text" or dtype not in TOLERANCE:
        return False
    attention = [layer.self_attn for layer in inner.layers]
    if any(getattr(module.rope, "traditional", False) for module in attention):
        return False
    if not all(turns.head_size(module) in (32, 64, 128, 256) for module in attention):
        return False
    return all(_fits(one, dtype) for layer in fused.of(model).layers for one in layer.every)


def _fits(one: fused.Product, dtype: mx.Dtype) -> bool:
    """Whole tiles of outputs, whole parts of 32 inputs, and adapters whose sums fit beside."""
    values = one.state["scales" if one.settings else "weight"]
    kinds = one.settings.get("mode", "affine") == "affine" and one.settings.get("bits", 4) in (4, 8)
    return (
        kinds
        and values.dtype == dtype
        and one.inputs % 32 == 0
        and all(size % TILE == 0 for size in one.sizes)
        and one.rank <= 2 * TILE
    )


Trial = Callable[[Any, Callable[..., mx.array]], dict[str, tuple[mx.array, mx.array]]]


def right(model: Any, trial: Trial) -> bool:
    """Whether each kernel gives what the operations give, on the first layer's weights and random inputs, adapters."""
    dtype = model.model.norm.weight.dtype

    def normal(*shape: int) -> mx.array:
        return mx.random.normal(shape, key=mx.random.key(sum(shape))).astype(dtype)

    try:
        apart = {name: _apart(*pair) for name, pair in trial(model, normal).items()}
    except (RuntimeError, ValueError) as error:
        log.warning("decoding goes on without fused kernels: %s", str(error).splitlines()[0])
        return False
    most = TOLERANCE[dtype]
    wrong = ", ".join(f"{name} by {value:.1e}" for name, value in apart.items() if not value < most)
    if wrong:
        log.warning("decoding goes on without fused kernels, which are off here: %s", wrong)
    return not wrong


def _apart(found: mx.array, expected: mx.array) -> float:
    """The largest difference, as a share of the largest number."""
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    return (mx.abs(found - expected).max() / mx.abs(expected).max()).item()


def _trial(model: Any, normal: Callable[..., mx.array]) -> dict[str, tuple[mx.array, mx.array]]:
    """What each kernel gives, and what the operations give."""
    layer, own = model.model.layers[0], fused.of(model).layers[0]
    module, many = layer.self_attn, WIDE_ROWS + 7
    qkv, o, gate_up, down = (shaken(one, normal) for one in own.every)
    out = _attention_trial(module, normal)
    for rows in (5, many):  # either kernel of a large layer
        x, attended, between = (
            normal(rows, width) for width in (layer.input_layernorm.weight.size, o.inputs, down.inputs)
        )
        before, after = layer.input_layernorm, layer.post_attention_layernorm
        gate, up = mx.split(gate_up(after(x)), 2, axis=-1)
        out |= {
            f"queries, keys and values of {rows} rows": (product(qkv, x, norm=before), qkv(before(x))),
            f"attention's output of {rows} rows": (product(o, attended, more=x), x + o(attended)),
            f"gate and up of {rows} rows": (product(gate_up, x, norm=after, gated=True), nn.silu(gate) * up),
            f"down of {rows} rows": (product(down, between, more=x), x + down(between)),
        }
    return out


def _attention_trial(module: nn.Module, normal: Callable[..., mx.array]) -> dict[str, tuple[mx.array, mx.array]]:
    """The same of attention: few rows and many, so that a block has one of them or several; three prompts whose rows
    are no neighbours, idle rows, and rings before and after their first round."""
    out, length, columns = {}, 40, 24
    size, heads, kv_heads = turns.head_size(module), module.n_heads, module.n_kv_heads
    for rows, at in ((5, 23), (64, 13)):
        every = np.arange(rows)
        spans = np.stack([every[::-1], every % 3, every % 2, 33 + every % 7, 1 + every * 5 % columns], axis=1)
        spans[2, 2:] = 0, 0, 1  # idle
        prompt = normal(3, kv_heads, length, size), normal(3, kv_heads, length + 1, size)[:, :, 1:]
        ring = normal(rows, kv_heads, columns, size), normal(rows, kv_heads, columns + 1, size)[:, :, 1:]
        given, position_B = normal(rows, (heads + 2 * kv_heads) * size), mx.array(every * 197 % 1000, mx.int32)
        queries, key, value = mx.split(
            given.reshape(rows, 1, -1, size).transpose(0, 2, 1, 3), [heads, heads + kv_heads], axis=1
        )
        if "q_norm" in module:
            queries, key = module.q_norm(queries), module.k_norm(key)
        queries, key = module.rope(queries, offset=position_B), module.rope(key, offset=position_B)
        new = [mx.concatenate([a[:, :, :at], b, a[:, :, at + 1 :]], 2) for a, b in zip(ring, (key, value), strict=True)]
        of_row = np.empty_like(spans)
        of_row[spans[:, 0]] = spans
        both = [mx.concatenate([a[mx.array(of_row[:, 1])], b], axis=2) for a, b in zip(prompt, new, strict=True)]
        column, (first, end, back) = np.arange(columns), of_row[:, 2:].T[..., None]
        seen = np.concatenate(
            [(first <= np.arange(length)) & (np.arange(length) < end), (at - column) % columns < back], axis=1
        )
        expected = attention.plain(queries, *both, module.scale, mx.array(seen[:, None])).reshape(rows, -1)
        mx.eval(expected, new, ring)  # before the kernel writes into two of them
        turn_B_D = turns.table(module, 1001)[position_B]
        found = attend(module, given, turn_B_D, prompt, ring, mx.array(spans, mx.int32), mx.array(at, mx.int32))
        mx.eval(found)
        out |= {f"attention of {rows} rows": (found, expected), f"keys of {rows} rows": (ring[0], new[0])}
        out[f"values of {rows} rows"] = (ring[1], new[1])
    return out


def shaken(one: fused.Product, normal: Callable[..., mx.array]) -> fused.Product:
    """`one` with an adapter that does something: a fresh one does not."""
    out = fused.Product(one.tile)
    out.settings, out.sizes, out.rank, out.state = one.settings, one.sizes, one.rank, dict(one.state)
    if one.rank:
        own = np.zeros(one.state["b"].shape, np.float32)
        for tile, first in enumerate(np.array(one.state["where"])):
            if first >= 0:
                own[first : first + one.rank, TILE * tile : TILE * (tile + 1)] = 1
        out.state["a"] = normal(*one.state["a"].shape) / one.inputs**0.5
        out.state["b"] = normal(*own.shape) * mx.array(own).astype(out.state["a"].dtype)
    return out


def shaken_layer(own: fused.Layer, normal: Callable[..., mx.array]) -> fused.Layer:
    """All products of a layer so."""
    out = fused.Layer()
    out.qkv, out.o, out.gate_up, out.down = (shaken(one, normal) for one in own.every)
    return out
