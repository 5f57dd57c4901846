"""Which device MLX samples on, and what follows from it."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx

CACHE_BYTES = 1 << 30
ALONE = ContextVar("ALONE", default=False)


def backend() -> str:
    """`metal`, `cuda` or `cpu`: where MLX's default stream runs."""
    if mx.default_device() == mx.cpu:  # also where a GPU is there and `use_cpu` has turned from it
        return "cpu"
    if mx.metal.is_available():
        return "metal"
    if hasattr(mx, "cuda") and mx.cuda.is_available():
        return "cuda"
    return "cpu"


def use_cpu() -> None:
    """Sample on the CPU from here on, also where MLX sees a GPU: `[run] device = "cpu"` leaves that to others."""
    mx.set_default_device(mx.cpu)


def describe() -> dict[str, str]:
    """`{"backend", "device", "version"}` for records and `nox -s doctor`."""
    info = mx.device_info() if hasattr(mx, "device_info") else {}
    name = info.get("device_name") or info.get("architecture") or "cpu"
    return {"backend": backend(), "device": str(name), "version": mx.__version__}


def keeps_packed_weights() -> bool:
    """Whether quantized products run packed here.

    On MLX's CPU backend they reach about 1 GFLOP/s, so there the dequantized values are held: the same policy.
    """
    return backend() != "cpu"


def torch_is_faster() -> bool:
    """Whether torch lends a hand on MLX's memory (rl/rollouts/lent.py)."""
    return backend() == "cpu" and not ALONE.get()


@contextmanager
def mlx_alone() -> Iterator[None]:
    """In this block MLX computes all by itself, so that its operations can be counted."""
    before = ALONE.set(True)
    try:
        yield
    finally:
        ALONE.reset(before)


def steps_between_syncs() -> int:
    """Decode steps between looks from the host: a look stalls a GPU's queue and costs nothing on a CPU."""
    return 1 if backend() == "cpu" else 8


def groups_share_keys() -> bool:
    """Whether a group's prompt is held and multiplied once by torch (`grouped.Grouped`), rather than once a row
    (`cache.Joined`), or once by a kernel where there is one (`parted.Parted`).

    On CPU it saves most of attention's time at long prompts. Elsewhere it would trade one fused attention a layer for
    about ten launches, of which decoding has too many already.
    """
    return backend() == "cpu"


def compiles_steps() -> bool:
    """Whether a decode step is compiled (`mx.compile`), for which its shapes stay in a few sizes.

    It fuses launches, the floor of decoding on a GPU. A CPU has no launches to save, and its fused kernels are built by
    the system's C++ compiler while the run waits.
    """
    return backend() != "cpu"


def masks_fused_attention() -> bool:
    """Whether MLX's fused attention of one query a row takes a mask; with CUDA it does not, and would be taken apart
    into more operations than it takes here."""
    return backend() != "cuda"


def takes_own_kernels() -> bool:
    """Whether rl/rollouts/kernels.py may do the work of many small operations here."""
    return backend() == "cuda"


@functools.cache
def processors() -> int:
    """Of the card: how many blocks of a kernel run at once where each takes a whole one."""
    import torch

    return torch.cuda.get_device_properties(getattr(mx.default_device(), "index", 0)).multi_processor_count


def cuda_kernel(
    name: str,
    inputs: Sequence[str],
    source: str,
    header: str = "",
    *,
    contiguous: bool = False,
    outputs: Sequence[str] = ("out",),
) -> Callable[..., list[mx.array]]:
    """A kernel that reads its inputs as they lie, or copied where they are not `contiguous`;
    RuntimeError where MLX is not CUDA's.

    MLX keeps compiled kernels on disk by their name alone, so the name tells the source.
    """
    told = hashlib.sha256((header + source).encode()).hexdigest()[:16]

    @functools.cache
    def made(shared_memory: int) -> Callable[..., list[mx.array]]:
        return mx.fast.cuda_kernel(
            name=f"{name}_{told}" + (f"_{shared_memory}" if shared_memory else ""),
            input_names=list(inputs),
            output_names=list(outputs),
            source=source,
            header=header,
            ensure_row_contiguous=contiguous,
            shared_memory=shared_memory,
        )

    def call(*, shared_memory: int = 0, **how: Any) -> list[mx.array]:
        return made(shared_memory)(**how)

    return call


def share_memory() -> None:
    """Bound what MLX keeps for reuse: trainer and sampler live in one memory, and freed buffers of many shapes pile up.

    Without it a process of this size held 10 GB on an H200, and several of them ran the card out of memory.
    """
    if backend() != "cpu":
        mx.set_cache_limit(CACHE_BYTES)


def peak_memory_bytes() -> int:
    """Peak bytes MLX has allocated in this process."""
    return int(mx.get_peak_memory())


def reset_peak_memory() -> None:
    """Begin counting the peak anew, from what is allocated now."""
    mx.reset_peak_memory()
