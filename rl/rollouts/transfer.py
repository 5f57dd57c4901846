"""The way a tensor's bytes take from torch to MLX: by device, tried once, named in every report.

A parameter is never aliased. The optimizer writes to it in place, so a sampler that shared its memory would follow the
trainer in mid-rollout, and past the check for values that are not finite. What is handed over without a copy is memory
made for the hand-over alone. MLX 0.32.4 takes over DLPack
- host memory, bfloat16 too, with one copy; it refuses to share it on Linux (`copied`);
- a Metal buffer, an MPS tensor, with none (`shared`);
- no CUDA memory. There a kernel of MLX reads from torch's address into an array of its own (`on the card`); where that
  fails, torch writes into the host memory of an MLX array, which the card then reads (`through the host`).
Seen to work: `copied`. The others are taken only where a trial on the machine itself brings every bit over.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np
import torch

from rl.rollouts import device as mlx_device

DTYPES = {
    torch.float32: mx.float32,
    torch.float16: mx.float16,
    torch.bfloat16: mx.bfloat16,
    torch.int32: mx.int32,
    torch.int64: mx.int64,
    torch.uint8: mx.uint8,
    torch.bool: mx.bool_,
}
WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
# a grid is rounded up to whole blocks: threads past the end must not write
KERNEL = """
    auto i = cooperative_groups::this_grid().thread_rank();
    if (i < from[1]) out[i] = reinterpret_cast<const T*>(from[0])[i];
"""


@dataclass(frozen=True)
class Way:
    """`send` makes an MLX array of a detached, contiguous tensor; if `aliases`, over the tensor's own memory."""

    name: str
    send: Callable[[torch.Tensor], mx.array]
    aliases: bool = False


def to_mlx(tensor: torch.Tensor) -> mx.array:
    """`tensor` in MLX with the same shape, dtype and bits, in memory that the trainer never writes to."""
    chosen = way(tensor.device)
    own = tensor.detach().contiguous()
    if chosen.aliases and own.data_ptr() == tensor.data_ptr():
        own = own.clone()
    return chosen.send(own)


def wait(device: torch.device) -> None:
    """Until torch has done what was asked of `device`: MLX has a queue of its own, and would read too early."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@cache
def way(device: torch.device) -> Way:
    """The first way from `device` that works here."""
    return first_that_works(WAYS.get(device.type, ()), device)


def first_that_works(ways: Sequence[Way], device: torch.device) -> Way:
    """The first of `ways` that brings a trial over whole, bit by bit; else by way of torch's own copy to the host."""
    return next((one for one in ways if _works(one, device)), COPIED)


def _works(one: Way, device: torch.device) -> bool:
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.linspace(-3, 3, 1001).to(dtype)  # no whole number of blocks
        try:
            found = one.send(values.to(device))
            same = found.dtype == DTYPES[dtype] and np.array_equal(_bits(found), _bits(_copied(values)))
        except (RuntimeError, ValueError, TypeError, BufferError, AttributeError):
            return False
        if not same:
            return False
    return True


def _bits(array: mx.array) -> np.ndarray:
    return np.array(array.view(WORDS[array.itemsize]))


def _copied(tensor: torch.Tensor) -> mx.array:
    return mx.array(tensor.cpu())


def _shared(tensor: torch.Tensor) -> mx.array:
    wait(tensor.device)
    return mx.from_dlpack(tensor)  # holds the exporter for as long as it lives


def _on_card(tensor: torch.Tensor) -> mx.array:
    if mlx_device.backend() != "cuda" or tensor.device.index != getattr(mx.default_device(), "index", 0):
        raise ValueError("torch and MLX are on different cards")
    if not tensor.numel():
        return mx.zeros(tuple(tensor.shape), DTYPES[tensor.dtype])
    wait(tensor.device)
    words = WORDS[tensor.element_size()]
    (out,) = _kernel()(
        inputs=[mx.array(np.array([tensor.data_ptr(), tensor.numel()], np.uint64))],
        template=[("T", words)],
        grid=(tensor.numel(), 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[tuple(tensor.shape)],
        output_dtypes=[words],
    )
    mx.eval(out)  # before torch may use the memory again
    return out.view(DTYPES[tensor.dtype])


@cache
def _kernel() -> Callable[..., list[mx.array]]:
    return mlx_device.cuda_kernel("from_torch", ["from"], KERNEL)


def _through_host(tensor: torch.Tensor) -> mx.array:
    array = mx.zeros(tuple(tensor.shape), DTYPES[tensor.dtype], stream=mx.cpu)
    mx.eval(array)
    torch.from_dlpack(array).copy_(tensor)
    return array


COPIED = Way("copied", _copied)
WAYS = {
    "mps": (Way("shared", _shared, aliases=True),),
    "cuda": (Way("on the card", _on_card), Way("through the host", _through_host)),
}
