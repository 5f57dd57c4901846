"""torch -> MLX: the policy's weights into the sampler, every tensor counted.

`load_weights(strict=False)` ignores names that do not match, and a rename would freeze the sampler without a word. So
names and shapes are compared with what the sampler holds before anything is copied.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import torch
from mlx.utils import tree_flatten, tree_unflatten

from rl.errors import RunFailed

# tensors copied together: large enough that the count of copies does not matter, small beside any model
PART_BYTES = 64 << 20


class SyncError(RunFailed):
    """The trainer's tensors are not the sampler's: names, shapes or values that must not be sampled from."""


@dataclass(frozen=True)
class SyncReport:
    """One hand-over: how many tensors, how many bytes, how long (seconds of wall time)."""

    tensors: int
    bytes: int
    seconds: float


def to_mlx(tensor: torch.Tensor) -> mx.array:
    """A copy of `tensor` in MLX with the same dtype and bits; bfloat16 travels as 16-bit words, not through float32."""
    tensor = tensor.detach().to("cpu").contiguous()
    if tensor.dtype == torch.bfloat16:
        return mx.array(tensor.view(torch.int16).numpy()).view(mx.bfloat16)
    return mx.array(tensor.numpy())


def adapter_tensors(model: Any, adapter: str = "default") -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """`{module path: (A (rank, in), B (out, rank), scale)}` of a PEFT model's LoRA layers, paths as in the base model.

    Raises SyncError for what mlx-lm's LoRALinear cannot express: DoRA, and a bias in the adapter.
    """
    found = {}
    for name, module in model.named_modules():
        if adapter not in getattr(module, "lora_A", {}):
            continue
        if getattr(module, "use_dora", {}).get(adapter) or getattr(module, "lora_bias", {}).get(adapter):
            raise SyncError(f"{name}: DoRA and LoRA biases have no counterpart in the MLX sampler; switch them off")
        path = name.removeprefix("base_model.model.")
        found[path] = (module.lora_A[adapter].weight, module.lora_B[adapter].weight, float(module.scaling[adapter]))
    return found


def attach_adapter(sampler: nn.Module, adapters: dict[str, tuple[torch.Tensor, torch.Tensor, float]]) -> None:
    """Wrap the sampler's layers named in `adapters` with LoRA of the same rank and scale, unmerged.

    Raises SyncError when a path is not a linear layer of the sampler.
    """
    from mlx_lm.tuner.lora import LoRALinear

    layers = dict(sampler.named_modules())
    wrapped = []
    for path, (a, _, scale) in adapters.items():
        layer = layers.get(path)
        if not isinstance(layer, nn.Linear | nn.QuantizedLinear):
            raise SyncError(f"the adapter's {path} is not a linear layer of the sampler")
        wrapped.append((path, LoRALinear.from_base(layer, r=a.shape[0], scale=scale, dropout=0.0)))
    sampler.update_modules(tree_unflatten(wrapped))
    sampler.eval()


def sync_adapter(sampler: nn.Module, adapters: dict[str, tuple[torch.Tensor, torch.Tensor, float]]) -> SyncReport:
    """Copy LoRA matrices into a sampler prepared by `attach_adapter` (A and B transposed, as mlx-lm keeps them)."""
    pairs = []
    for path, (a, b, _) in adapters.items():
        pairs += [(f"{path}.lora_a", a.T), (f"{path}.lora_b", b.T)]
    held = {n: v for n, v in tree_flatten(sampler.parameters()) if n.endswith((".lora_a", ".lora_b"))}
    return _copy(sampler, pairs, held)


def sync_weights(sampler: nn.Module, named: Iterable[tuple[str, torch.Tensor]]) -> SyncReport:
    """Copy all weights of a model without adapters; a head tied to the embedding is sent once."""
    held = dict(tree_flatten(sampler.parameters()))
    tied = "lm_head.weight" not in held
    pairs = [(name, tensor) for name, tensor in named if not (tied and name == "lm_head.weight")]
    return _copy(sampler, pairs, held)


def _copy(sampler: nn.Module, pairs: list[tuple[str, torch.Tensor]], held: dict[str, mx.array]) -> SyncReport:
    started = time.perf_counter()
    sent = {name for name, _ in pairs}
    if sent != held.keys():
        missing, extra = sorted(held.keys() - sent), sorted(sent - held.keys())
        raise SyncError(
            f"{len(pairs)} tensors sent, {len(held)} held by the sampler; "
            f"missing {missing[:3] or 'none'}, unknown {extra[:3] or 'none'}"
        )
    for name, tensor in pairs:
        if tuple(tensor.shape) != tuple(held[name].shape):
            raise SyncError(f"{name}: the trainer's shape is {tuple(tensor.shape)}, the sampler's {held[name].shape}")
    arrays = [(n, array.astype(held[n].dtype)) for part in _parts(pairs) for n, array in _transfer(part)]
    size = sum(tensor.numel() * tensor.element_size() for _, tensor in pairs)
    sampler.load_weights(arrays, strict=False)  # names were checked above: exactly the held ones
    mx.eval([array for _, array in arrays])
    return SyncReport(len(arrays), size, time.perf_counter() - started)


def _parts(pairs: list[tuple[str, torch.Tensor]]) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Consecutive tensors of one dtype, together at most PART_BYTES (or one larger tensor)."""
    part: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in pairs:
        bytes_ = tensor.numel() * tensor.element_size()
        if part and (size + bytes_ > PART_BYTES or tensor.dtype != part[0][1].dtype):
            yield part
            part, size = [], 0
        part.append((name, tensor))
        size += bytes_
    if part:
        yield part


def _transfer(part: list[tuple[str, torch.Tensor]]) -> list[tuple[str, mx.array]]:
    """One check and one copy for all tensors of `part`: each of its own would make a GPU wait hundreds of times."""
    flat = torch.cat([tensor.detach().reshape(-1) for _, tensor in part])
    if not bool(torch.isfinite(flat).all()):
        name = next(name for name, tensor in part if not bool(torch.isfinite(tensor).all()))
        raise SyncError(f"{name}: the trainer's weights are not finite")
    array, start, out = to_mlx(flat), 0, []
    for name, tensor in part:
        out.append((name, array[start : start + tensor.numel()].reshape(tensor.shape)))
        start += tensor.numel()
    return out
