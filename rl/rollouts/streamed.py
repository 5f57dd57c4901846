"""A decode step of a large model on CUDA, where a step waits for the weights: they stream through shared memory.

In place of product.cu's and wide.cu's five kernels a layer takes seven: attention's output and the feed-forward's last
product have few outputs of many inputs, so their inputs are shared out too (stream.cu), and a kernel of its own adds up
the parts, the adapter's and what went in, and norms the sum for the product that comes next (finish.cu).
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from rl.rollouts import device, fused, kernels
from rl.rollouts.fused import TILE

WARPS = 8  # of a block
STAGES, ROOM = 8, 100_000  # chunks on their way, as shared memory has room for in two blocks at once
LARGE = 2_000_000  # weights from which on a product waits for them rather than for its launch
SUMS = 32  # tiles whose sums fit a thread's registers beside what it multiplies
LONG = 4096  # inputs from which on they are in 8 parts
INPUTS = ("rows", "weight", "a", "b", "where", "bias")
FINISH_INPUTS = ("parts", "b", "where", "bias", "more", "gamma")


@dataclass(frozen=True)
class Shape:
    """Of a block: `tiles` of 16 outputs a warp (of each side), `warps` of 8 beside each other, `rows` in eights, chunks
    on their way at once, and how many parts the inputs are in."""

    tiles: int
    warps: int
    rows: int
    stages: int
    split: int = 1

    @property
    def chunk(self) -> int:
        """Inputs."""
        return max(64, 32 * (WARPS // self.warps))

    def stage_bytes(self, sides: int, ranks: int) -> int:
        """Of one chunk."""
        return 2 * self.chunk * (16 * sides * self.tiles * self.warps + self._low(sides, ranks) + 8 * self.rows)

    def bytes(self, sides: int, ranks: int) -> int:
        """Of shared memory: chunks on their way, and at the end the warps' sums."""
        sums = WARPS * sides * self.tiles * self.rows * 512 + 16 * self.rows * self._low(sides, ranks)
        return max(self.stages * self.stage_bytes(sides, ranks), sums)

    def _low(self, sides: int, ranks: int) -> int:
        return 0 if self.split > 1 else 16 * sides * ranks


def shape_of(one: fused.Product, rows: int, *, parts: bool = False, gated: bool = False) -> Shape | None:
    """What was fastest on an H200 for 16 and 64 rows of 1.7B; None for a product that is not large, or not of the kind:
    weights as they are, a block in one layer, whole chunks of inputs, and a warp for each of A's tiles."""
    if one.settings or one.inputs * sum(one.sizes) < LARGE or one.rank > 2 * TILE:
        return None
    low, eights = 0 if parts else (2 if gated else 1) * one.rank // TILE, 2 if rows <= 16 else 4 if rows <= 32 else 8
    tiles, warps, split = (2, 2, 8 if one.inputs >= LONG else 4) if parts else (1, 2 if low <= 2 else 4, 1)
    shape = Shape(tiles, warps, eights, 1, split)
    fits = one.inputs % (shape.chunk * split) == 0 and all(size % (TILE * tiles * warps) == 0 for size in one.sizes)
    if not fits or (parts and len(one.sizes) > 1):
        return None
    return replace(shape, stages=max(2, min(STAGES, ROOM // shape.stage_bytes(2 if gated else 1, one.rank // TILE))))


def shape_at_once(
    one: fused.Product, rows: int, blocks: int, room: int, *, parts: bool = False, gated: bool = False
) -> Shape | None:
    """The same where just so many blocks run, which have so many bytes of shared memory each: what takes the least time
    as `_nanoseconds` has it, or None."""
    if one.settings or one.rank > 2 * TILE or (parts and len(one.sizes) > 1):
        return None
    sides, ranks = 2 if gated else 1, one.rank // TILE
    low, eights = 0 if parts else sides * ranks, 2 if rows <= 16 else 4 if rows <= 32 else 8
    found = []
    for tiles, warps, split in itertools.product((1, 2, 4), (2, 4), (2, 4, 8, 16) if parts else (1,)):
        shape = Shape(tiles, warps, eights, 1, split)
        whole = one.inputs % (shape.chunk * split) == 0 and all(n % (TILE * tiles * warps) == 0 for n in one.sizes)
        stages = min(STAGES, room // shape.stage_bytes(sides, ranks))
        fits = replace(shape, stages=3).bytes(sides, ranks) <= room and sides * tiles * eights <= SUMS
        if whole and fits and low <= warps:
            found.append(replace(shape, stages=stages))
    return min(found, key=lambda shape: _nanoseconds(one, shape, rows, blocks, sides), default=None)


def _nanoseconds(one: fused.Product, shape: Shape, rows: int, blocks: int, sides: int) -> float:
    """A product's, seen on an H200: a block takes 30 bytes of weights in each, and 45 with the inputs from the card's
    cache; a round begins and ends in 1,500."""
    outputs, inputs = TILE * sides * shape.tiles * shape.warps, one.inputs // shape.split
    weights, given = 2 * inputs * outputs, 2 * inputs * min(rows, 8 * shape.rows)
    rounds = -(-(sum(one.sizes) // outputs * shape.split * -(-rows // (8 * shape.rows))) // blocks)
    summed = 0 if shape.split == 1 else 8 * rows * sum(one.sizes) * shape.split / blocks  # written, and read again
    return rounds * (max(weights / 30, (weights + given) / 45) + 1500) + summed / 45


def product(one: fused.Product, rows_M_K: mx.array, shape: Shape, *, gated: bool = False) -> mx.array:
    """`one` of the rows, or silu of the first half of its outputs times the second if `gated`; with a split shape
    float32 sums (parts, M, outputs + ranks) for `finish`."""
    state, sides, ranks, parts = one.state, 2 if gated else 1, one.rank // TILE, shape.split > 1
    outputs, blocks = sum(one.sizes) // sides, -(-len(rows_M_K) // (8 * shape.rows))
    across = outputs // (TILE * shape.tiles * shape.warps) + (parts and ranks > 0)
    (out,) = _stream()(
        inputs=[rows_M_K if name == "rows" else state.get(name, rows_M_K) for name in INPUTS],
        template=[
            ("T", rows_M_K.dtype),
            ("NT", shape.tiles),
            ("WN", shape.warps),
            ("MT", shape.rows),
            ("STAGES", shape.stages),
            ("SPLIT", shape.split),
            ("PARTS", parts),
            ("RANKS", ranks),
            ("GATED", gated),
            ("BIAS", "bias" in state and not parts),
        ],
        grid=(across * 32 * WARPS, blocks * shape.split, 1),
        threadgroup=(32 * WARPS, 1, 1),
        output_shapes=[(shape.split, len(rows_M_K), outputs + one.rank) if parts else (len(rows_M_K), outputs)],
        output_dtypes=[mx.float32 if parts else rows_M_K.dtype],
        shared_memory=shape.bytes(sides, ranks),
    )
    return out


def finish(one: fused.Product, parts: mx.array, more_M_N: mx.array, norm: nn.RMSNorm) -> tuple[mx.array, mx.array]:
    """What `product` left in parts, plus `more`; and its norm."""
    state, (rows, outputs) = one.state, more_M_N.shape
    given = {"parts": parts, "more": more_M_N, "gamma": norm.weight}
    out, normed = _finish(float(norm.eps))(
        inputs=[given[name] if name in given else state.get(name, more_M_N) for name in FINISH_INPUTS],
        template=[
            ("T", more_M_N.dtype),
            ("SPLIT", len(parts)),
            ("RANKS", one.rank // TILE),
            ("EACH", -(-outputs // (8 * 32 * WARPS))),
            ("BIAS", "bias" in state),
        ],
        grid=(rows * 32 * WARPS, 1, 1),
        threadgroup=(32 * WARPS, 1, 1),
        output_shapes=[more_M_N.shape] * 2,
        output_dtypes=[more_M_N.dtype] * 2,
    )
    return out, normed


def hidden_states(
    model: Any,
    token_B: mx.array,
    position_B: mx.array,
    prompts: Sequence[kernels.Pair],
    rings: Sequence[kernels.Pair],
    spans: Sequence[mx.array],
    column: mx.array,
    products: Sequence[fused.Layer] | None = None,
) -> mx.array:
    """As `kernels.hidden_states`, of a model that is `usable`."""
    inner, own_of, rows = model.model, fused.of(model), len(token_B)
    x = inner.embed_tokens(token_B)
    tables = [table[position_B] for table in own_of.turns]
    layers = inner.layers
    after = [*(layer.input_layernorm for layer in layers[1:]), inner.norm]
    normed = layers[0].input_layernorm(x)
    for i, layer in enumerate(layers[: len(prompts)]):
        own, module, turn = (products or own_of.layers)[i], layer.self_attn, tables[own_of.turn_of[i]]
        qkv = product(own.qkv, normed, shape_of(own.qkv, rows))
        attended = kernels.attend(module, qkv, turn, prompts[i], rings[i], spans[i], column)
        parts = product(own.o, attended, shape_of(own.o, rows, parts=True))
        x, normed = finish(own.o, parts, x, layer.post_attention_layernorm)
        between = product(own.gate_up, normed, shape_of(own.gate_up, rows, gated=True), gated=True)
        parts = product(own.down, between, shape_of(own.down, rows, parts=True))
        x, normed = finish(own.down, parts, x, after[i])
    return normed


def usable(model: Any) -> bool:
    """Whether `hidden_states` may decode this model, which `kernels.usable` has said yes to: all its products are
    large, and the kernels were right on them. The trial is made once for each kind of products; call it as that."""
    if (products := fused.of(model)) is None:
        return False
    if (key := _key(products)) not in products.right:
        products.right[key] = _knows(products) and kernels.right(model, _trial)
    return products.right[key]


def chosen(model: Any) -> bool:
    """What `usable` found, also while a step is compiled."""
    return (products := fused.of(model)) is not None and products.right.get(_key(products), False)


def _key(products: fused.Fused) -> tuple[Any, ...]:
    return ("streamed", *((tuple(p.settings.items()), p.rank, "bias" in p.state) for p in products.layers[0].every))


def _knows(products: fused.Fused) -> bool:
    def shapes(own: fused.Layer) -> list[Shape | None]:
        return [
            shape_of(own.qkv, 1),
            shape_of(own.o, 1, parts=True),
            shape_of(own.gate_up, 1, gated=True),
            shape_of(own.down, 1, parts=True),
        ]

    return all(shape is not None for own in products.layers for shape in shapes(own))


def _trial(model: Any, normal: Callable[..., mx.array]) -> dict[str, tuple[mx.array, mx.array]]:
    """What each kernel gives, and what the operations give, for few rows and for more than a block has."""
    layer, own, out = model.model.layers[0], fused.of(model).layers[0], {}
    qkv, o, gate_up, down = (kernels.shaken(one, normal) for one in own.every)
    norm = layer.post_attention_layernorm
    for rows in (5, 71):
        x, more = normal(rows, qkv.inputs), normal(rows, qkv.inputs)
        gate, up = mx.split(gate_up(x), 2, axis=-1)
        out[f"queries, keys and values of {rows} rows"] = product(qkv, x, shape_of(qkv, rows)), qkv(x)
        found = product(gate_up, x, shape_of(gate_up, rows, gated=True), gated=True)
        out[f"gate and up of {rows} rows"] = found, nn.silu(gate) * up
        for name, one in (("attention's output", o), ("down", down)):
            x = normal(rows, one.inputs)
            expected = more + one(x)
            found = finish(one, product(one, x, shape_of(one, rows, parts=True)), more, norm)
            out[f"{name} of {rows} rows"], out[f"{name}, normed, of {rows} rows"] = zip(
                found, (expected, norm(expected)), strict=True
            )
    return out


@cache
def _stream() -> Any:
    return device.cuda_kernel("stream", INPUTS, kernels.read("stream.cu"), kernels.header(), contiguous=True)


@cache
def _finish(eps: float) -> Any:
    source, header = kernels.read("finish.cu"), kernels.header(EPS=eps)
    # two outputs: of one array, out[0] would be a gather, a kernel of MLX's that takes longer than this one
    return device.cuda_kernel("finish", FINISH_INPUTS, source, header, contiguous=True, outputs=("out", "normed"))
