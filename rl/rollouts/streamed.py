"""A decode step of a large model on CUDA, where a step waits for the weights: they stream through shared memory.

In place of product.cu's and wide.cu's five kernels a layer takes seven: attention's output and the feed-forward's last
product have few outputs of many inputs, so their inputs are shared out too (stream.cu), and a kernel of its own adds up
the parts, the adapter's and what went in, and norms the sum for the product that comes next (finish.cu).
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from rl.rollouts import device, fused, kernels
from rl.rollouts.fused import TILE

WARPS, ROOM = 8, 220_000  # bytes of shared memory that a block may have, and some to spare
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

    def bytes(self, sides: int, ranks: int) -> int:
        """Of shared memory: chunks on their way, and at the end the warps' sums."""
        low = 0 if self.split > 1 else 16 * sides * ranks
        lines = 16 * sides * self.tiles * self.warps + low + 8 * self.rows
        sums = WARPS * sides * self.tiles * self.rows * 512 + 16 * self.rows * low
        return max(lines * self.chunk * 2 * self.stages, sums)


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
    (out,) = _finish(float(norm.eps))(
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
        output_shapes=[(2, rows, outputs)],
        output_dtypes=[more_M_N.dtype],
    )
    return out[0], out[1]


@cache
def _stream() -> Any:
    return device.cuda_kernel("stream", INPUTS, kernels._read("stream.cu"), kernels._header(), contiguous=True)


@cache
def _finish(eps: float) -> Any:
    return device.cuda_kernel("finish", FINISH_INPUTS, kernels._read("finish.cu"), kernels._header(EPS=eps), contiguous=True)
