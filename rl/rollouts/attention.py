"""Attention of the one token that a row decodes, over keys of which each row sees its own.

MLX's fused attention does it where it takes a mask. With CUDA it takes none for a single query and is replaced by five
operations, each of which a decoding GPU waits for; there a kernel of our own does it in one. That is tried on numbers
before it is used, and where it fails or differs the five operations are.
"""

import logging
from collections.abc import Callable
from functools import cache

import mlx.core as mx

from rl.rollouts import device

log = logging.getLogger(__name__)

WARPS = 8
# A block of 8 warps has one query; a warp takes every 8th key, a lane D / 32 numbers of it. The softmax is the running
# one of Milakov and Gimelshein 2018 (arXiv 1805.02867, algorithm 3), in each warp, and once more over the warps.
SOURCE = """
    constexpr int E = D / 32;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.x, row = blockIdx.y;
    const auto* query = queries + row * queries_strides[0] + head * queries_strides[1] + lane * E;
    const auto* key = keys + row * keys_strides[0] + (head / REPEATS) * keys_strides[1] + lane * E;
    const auto* value = values + row * values_strides[0] + (head / REPEATS) * values_strides[1] + lane * E;
    const auto* mine = seen + row * seen_strides[0];
    const int count = seen_shape[2];
    float x[E], sum[E];
    for (int i = 0; i < E; i++) {
        x[i] = SCALE * static_cast<float>(query[i]);
        sum[i] = 0.0f;
    }
    float most = -3.0e38f, total = 0.0f;
    for (int j = warp; j < count; j += WARPS) {
        if (!mine[j]) continue;
        float score = 0.0f;
        for (int i = 0; i < E; i++) score += x[i] * static_cast<float>(key[j * keys_strides[2] + i]);
        for (int o = 16; o > 0; o /= 2) score += __shfl_xor_sync(0xffffffff, score, o);
        const float higher = fmaxf(most, score), before = expf(most - higher), weight = expf(score - higher);
        total = total * before + weight;
        for (int i = 0; i < E; i++)
            sum[i] = sum[i] * before + weight * static_cast<float>(value[j * values_strides[2] + i]);
        most = higher;
    }
    __shared__ float tops[WARPS], totals[WARPS], sums[WARPS][D];
    for (int i = 0; i < E; i++) sums[warp][lane * E + i] = sum[i];
    if (lane == 0) {
        tops[warp] = most;
        totals[warp] = total;
    }
    __syncthreads();
    for (int d = threadIdx.x; d < D; d += 32 * WARPS) {
        float top = tops[0], under = 0.0f, over = 0.0f;
        for (int w = 1; w < WARPS; w++) top = fmaxf(top, tops[w]);
        for (int w = 0; w < WARPS; w++) {
            const float weight = expf(tops[w] - top);
            under += weight * totals[w];
            over += weight * sums[w][d];
        }
        out[(row * gridDim.x + head) * D + d] = static_cast<T>(over / under);
    }
"""


def one_query(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask_B_1_K: mx.array) -> mx.array:
    """Queries (B, heads, 1, D) over keys and values (B, kv_heads, K, D) where the mask is true, which it is somewhere
    in every row; (B, heads, 1, D), with softmax in float32."""
    if device.masks_fused_attention():
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask_B_1_K[:, None])
    if queries.shape[-1] % 32 == 0 and queries.shape[-1] <= 256 and kernel_works():
        return _kernel(queries, keys, values, scale, mask_B_1_K)
    return plain(queries, keys, values, scale, mask_B_1_K)


def prepare() -> None:
    """Try the kernel now, where it is wanted: not in the middle of compiling a step."""
    if not device.masks_fused_attention():
        kernel_works()


def plain(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask_B_1_K: mx.array) -> mx.array:
    """`one_query`, an operation at a time."""
    rows, heads, _, width = queries.shape
    queries = (queries * scale).reshape(rows, keys.shape[1], -1, width)
    scores = queries @ keys.swapaxes(-1, -2)
    scores = mx.where(mask_B_1_K[:, None], scores, mx.finfo(scores.dtype).min)
    return (mx.softmax(scores, axis=-1, precise=True) @ values).reshape(rows, heads, 1, width)


@cache
def kernel_works() -> bool:
    """Whether the kernel gives what `plain` gives, on strided queries, grouped keys and rows that see few of them."""
    count = 45
    queries = mx.random.normal((3, 10, 1, 64), key=mx.random.key(0))[:, :6]
    keys = mx.random.normal((3, 2, 64, 64), key=mx.random.key(1))[:, :, :count]
    values = mx.random.normal((3, 2, 64, 64), key=mx.random.key(2))[:, :, :count]
    mask = mx.arange(count)[None, None] < mx.array([1, 17, count])[:, None, None]
    try:
        expected = plain(queries, keys, values, 0.125, mask)
        apart = mx.abs(_kernel(queries, keys, values, 0.125, mask) - expected).max().item()
    except (RuntimeError, ValueError) as error:
        log.warning("decoding goes on without the fused attention kernel: %s", str(error).splitlines()[0])
        return False
    if not apart < 1e-4:
        log.warning("decoding goes on without the fused attention kernel: it is off by %.1e here", apart)
    return apart < 1e-4


def _kernel(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask_B_1_K: mx.array) -> mx.array:
    rows, heads, _, width = queries.shape
    (out,) = _made(float(scale))(
        inputs=[queries, keys, values, mask_B_1_K],
        template=[("T", queries.dtype), ("D", width), ("REPEATS", heads // keys.shape[1])],
        grid=(heads * 32 * WARPS, rows, 1),
        threadgroup=(32 * WARPS, 1, 1),
        output_shapes=[queries.shape],
        output_dtypes=[queries.dtype],
    )
    return out


@cache
def _made(scale: float) -> Callable[..., list[mx.array]]:
    header = f"constexpr int WARPS = {WARPS};\nconstexpr float SCALE = {scale!r}f;\n"
    return device.cuda_kernel("attend", ["queries", "keys", "values", "seen"], SOURCE, header)
