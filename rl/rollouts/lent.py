"""What MLX's CPU backend is slow at, computed by torch on the same memory: exponentials, attention with them, products.

On a CPU one exponential takes MLX 10 ns and torch a tenth of that, and a decoding model is full of them. MLX's arrays
are read where they lie; results are copied back once. Nothing of it is used where MLX has a GPU.

No product of float32 may be left to MLX, however small. It computes in a thread of its own, by the BLAS of torch, and
OpenMP keeps workers for each thread that asks for them: with more of them in the process than there are cores they
sleep after every operation where they would have waited for the next, and all that torch computes, training too, takes
twice as long from the first such product to the process's end.
"""

import mlx.core as mx
import torch
from torch.nn import functional

from rl.rollouts import device
from rl.rollouts.transfer import to_mlx

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
SMALL = 1 << 16  # numbers of a weight whose product costs less than what oneDNN does beside it


def view(*arrays: mx.array) -> list[torch.Tensor]:
    """The arrays, evaluated together, as tensors over their memory."""
    mx.eval(arrays)
    return [torch.from_dlpack(array) for array in arrays]


@torch.no_grad()
def gated(gate: mx.array, up: mx.array, gelu: bool) -> mx.array:
    """silu(gate) * up, or GELU's tanh form in place of SiLU."""
    gate_t, up_t = view(gate, up)
    act = torch.nn.functional.gelu(gate_t, approximate="tanh") if gelu else torch.nn.functional.silu(gate_t)
    return to_mlx(act.mul_(up_t))


@torch.no_grad()
def attention(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    """Queries (B, heads, N, D) over keys and values (B, kv_heads, K, D): causal (N = K), or where `mask` (N, K) is
    true."""
    q, k, v = view(queries, keys, values)
    if q.shape[1] != k.shape[1]:  # enable_gqa takes the slow way on a CPU
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    seen = None if mask is None else view(mask)[0]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=mask is None, scale=scale)
    return to_mlx(out.contiguous())


def exp(x: mx.array) -> mx.array:
    """exp, elementwise."""
    return to_mlx(view(x)[0].exp())


def takes(x: mx.array, weight: mx.array) -> bool:
    """Whether `product` is for these: float32, with no codes among them, where torch lends a hand."""
    return device.torch_is_faster() and x.dtype == weight.dtype == mx.float32


@torch.no_grad()
def product(x: mx.array, state: dict[str, mx.array]) -> mx.array:
    """`linear_of`, of MLX's."""
    x_t, *state_t = view(x, *state.values())
    return to_mlx(linear_of(dict(zip(state, state_t, strict=True)), x_t))


def linear_of(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """x @ weight.T, with `state`'s bias where it has one, and its adapter of (ranks, in) and (ranks, out)."""
    out = linear(x, state["weight"], state.get("bias"))
    return out.addmm_(x @ state["a"].T, state["b"]) if "a" in state else out


def add_linear(x: torch.Tensor, state: dict[str, torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    """`linear_of(state, y)` added to x, in place."""
    if "bias" in state or state["weight"].numel() >= SMALL:
        return x.add_(linear_of(state, y))
    x.addmm_(y, state["weight"].T)
    return x.addmm_(y @ state["a"].T, state["b"]) if "a" in state else x


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias. By oneDNN where the weight is not small: on AMD's CPUs it is twice as fast as MKL, to which
    torch gives float32 products."""
    if weight.numel() < SMALL or not ONEDNN or x.dtype != torch.float32:
        return functional.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
