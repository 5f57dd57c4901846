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

from rl.errors import RunFailed, UserError
from rl.rollouts import transfer

# tensors of a GPU copied together: large enough that the count of copies does not matter, small beside any model
PART_BYTES = 64 << 20
HELD = {held: sent for sent, held in transfer.DTYPES.items()}


class SyncError(RunFailed):
    """The trainer's tensors are not the sampler's: names, shapes or values that must not be sampled from."""


@dataclass(frozen=True)
class SyncReport:
    """One hand-over: how many tensors, how many bytes of the trainer's, how long (seconds of wall time, from when the
    trainer's device is idle), and which way (`rl.rollouts.transfer`)."""

    tensors: int
    bytes: int
    seconds: float
    way: str


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


@torch.no_grad()
def merged_weights(policy: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights under the base model's names, with the adapter (if there is one) added in: W + scale B A."""
    if not hasattr(policy, "peft_config"):
        yield from policy.named_parameters()
        return
    adapters = adapter_tensors(policy)
    for name, weight in policy.get_base_model().named_parameters():
        if ".lora_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        if name.endswith(".weight") and (path := name.removesuffix(".weight")) in adapters:
            a, b, scale = adapters[path]
            weight = weight + scale * (b.to(weight.dtype) @ a.to(weight.dtype))
        yield name, weight


def check_group_size(sampler: nn.Module, group_size: int) -> None:
    """Raise UserError when a layer that would be quantized has inputs that the group size does not divide."""
    for name, module in sampler.named_modules():
        if hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size:
            raise UserError(
                f"[rollout] group_size: found {group_size}, which does not divide the {module.weight.shape[-1]} inputs "
                f"of {name}, valid: 32, 64 or 128 that does"
            )


def sync_quantized(
    sampler: nn.Module, named: Iterable[tuple[str, torch.Tensor]], bits: int, group_size: int
) -> SyncReport:
    """Quantize and copy all weights of a model without adapters: MLX's affine quantization of every linear layer and
    embedding from float32 values, as `mx.quantize` rounds them. A sampler that holds floating-point weights gets the
    dequantized values, the same policy. `bytes` are those of the trainer's tensors."""
    layers = {n: m for n, m in sampler.named_modules() if hasattr(m, "to_quantized") or hasattr(m, "scales")}
    held = dict(tree_flatten(sampler.parameters()))
    tied = "lm_head.weight" not in held
    pairs = [(name, tensor) for name, tensor in named if not (tied and name == "lm_head.weight")]
    parts = {f"{stem}.{kind}" for stem in layers for kind in ("scales", "biases")}
    _check_names((name for name, _ in pairs), held.keys() - parts)
    arrays: list[tuple[str, mx.array]] = []
    started = _start(pairs)
    for part in _parts(pairs):
        for name, array in _transfer(part):
            stem, _, kind = name.rpartition(".")
            if kind != "weight" or stem not in layers:
                arrays.append((name, array.astype(held[name].dtype)))
                continue
            packed = mx.quantize(array.astype(mx.float32), group_size=group_size, bits=bits)
            if f"{stem}.scales" in held:
                named_parts = zip(("weight", "scales", "biases"), packed, strict=True)
                arrays += [(f"{stem}.{k}", v.astype(held[f"{stem}.{k}"].dtype)) for k, v in named_parts]
            else:
                values = mx.dequantize(*packed, group_size=group_size, bits=bits)
                arrays.append((name, values.astype(held[name].dtype)))
        mx.eval([array for _, array in arrays])
    for name, array in arrays:
        if array.shape != held[name].shape:
            raise SyncError(f"{name}: the trainer's shape is {array.shape}, the sampler's {held[name].shape}")
    sampler.load_weights(arrays, strict=False)  # names were checked above: exactly the held ones
    return _report(pairs, started)


def _check_names(sent: Iterable[str], held: Iterable[str]) -> None:
    """Raise SyncError unless the trainer's tensors are those that the sampler holds."""
    sent, held = set(sent), set(held)
    if sent != held:
        missing, extra = sorted(held - sent), sorted(sent - held)
        raise SyncError(
            f"{len(sent)} tensors sent, {len(held)} held by the sampler; "
            f"missing {missing[:3] or 'none'}, unknown {extra[:3] or 'none'}"
        )


def _copy(sampler: nn.Module, pairs: list[tuple[str, torch.Tensor]], held: dict[str, mx.array]) -> SyncReport:
    _check_names((name for name, _ in pairs), held)
    for name, tensor in pairs:
        if tuple(tensor.shape) != tuple(held[name].shape):
            raise SyncError(f"{name}: the trainer's shape is {tuple(tensor.shape)}, the sampler's {held[name].shape}")
    started = _start(pairs)
    wanted = {name: HELD.get(value.dtype) for name, value in held.items()}
    arrays = [pair for part in _parts(pairs, wanted) for pair in _transfer(part, wanted[part[0][0]])]
    mx.eval([array for _, array in arrays])
    sampler.load_weights(arrays, strict=False)  # names were checked above: exactly the held ones
    return _report(pairs, started)


def _start(pairs: list[tuple[str, torch.Tensor]]) -> float:
    """When the hand-over begins: the trainer's own work, still queued on its device, is none of it."""
    for device in {tensor.device for _, tensor in pairs}:
        transfer.way(device)  # the trial of a first time compiles a kernel
        transfer.wait(device)
    return time.perf_counter()


def _report(pairs: list[tuple[str, torch.Tensor]], started: float) -> SyncReport:
    seconds = time.perf_counter() - started
    ways = sorted({transfer.way(tensor.device).name for _, tensor in pairs})
    return SyncReport(len(pairs), sum(tensor.nbytes for _, tensor in pairs), seconds, " and ".join(ways))


def _parts(
    pairs: list[tuple[str, torch.Tensor]], wanted: dict[str, torch.dtype | None] | None = None
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Consecutive tensors of one device, type and `wanted` type, together at most PART_BYTES (or one larger tensor)."""
    part: list[tuple[str, torch.Tensor]] = []
    size = 0
    last: Any = None
    for name, tensor in pairs:
        kind = (tensor.device, tensor.dtype, wanted and wanted[name])
        if part and (size + tensor.nbytes > PART_BYTES or kind != last):
            yield part
            part, size = [], 0
        part.append((name, tensor))
        size, last = size + tensor.nbytes, kind
    if part:
        yield part


def _transfer(part: list[tuple[str, torch.Tensor]], dtype: torch.dtype | None = None) -> list[tuple[str, mx.array]]:
    """The tensors of `part` in MLX, in `dtype` if given; raises SyncError for values that are not finite in it.

    On a CPU nothing waits for anything, so each goes by itself, in one copy.
    """
    if part[0][1].device.type != "cpu":
        return _gathered(part, dtype)
    cast = [(name, tensor.detach().to(dtype or tensor.dtype)) for name, tensor in part]
    for name, tensor in cast:
        if not finite(tensor):
            raise not_finite(name, tensor.dtype)
    return [(name, transfer.to_mlx(tensor)) for name, tensor in cast]


def _gathered(part: list[tuple[str, torch.Tensor]], dtype: torch.dtype | None = None) -> list[tuple[str, mx.array]]:
    """All at once, with one check: each of its own would make a GPU wait hundreds of times."""
    flat = torch.cat([tensor.detach().reshape(-1) for _, tensor in part])
    flat = flat.to(dtype or flat.dtype)
    if not finite(flat):
        name = next(name for name, tensor in part if not finite(tensor.detach().to(flat.dtype)))
        raise not_finite(name, flat.dtype)
    # `flat` is nobody else's: where torch and MLX can share memory, gathering was the only copy
    array, start, out = transfer.way(flat.device).send(flat), 0, []
    for name, tensor in part:
        out.append((name, array[start : start + tensor.numel()].reshape(tensor.shape)))
        start += tensor.numel()
    return out


def finite(tensor: torch.Tensor) -> bool:
    """In one pass and without a mask of the tensor's size: least and largest are NaN where any value is."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def not_finite(name: str, dtype: torch.dtype) -> SyncError:
    told = str(dtype).removeprefix("torch.")
    return SyncError(f"{name}: the trainer's weights are not finite in the sampler's {told}")
