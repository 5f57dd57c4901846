"""A frozen base held once: torch's layers over the memory that MLX reads, where both can (a CPU, Apple silicon).

Under LoRA neither side writes to the base, so that it may be one: the codes of a quantized base (rl/packed.py), or the
values of one that both hold dequantized. MLX exports its arrays over DLPack and each stays as long as torch reads it.
MLX 0.32.4 exports no CUDA memory and imports none: on CUDA the trainer and the sampler have a copy each.
"""

import math
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import torch
from mlx.utils import tree_flatten

from rl.rollouts import device as mlx_device

# the device of torch whose memory is that of MLX's backend
ONE_MEMORY = {"cpu": "cpu", "metal": "mps"}


def hold_once(policy: Any, model: nn.Module) -> int:
    """Let frozen tensors of `policy` lie in the memory of `model`'s arrays of the same place, bits, shape and type.

    Returns how many bytes torch holds less. Trained tensors stay as they are, and so does what differs in a bit. From
    here on nothing may write to the policy's base, as merging an adapter into it would.
    """
    held = {name.replace(".linear.", "."): array for name, array in tree_flatten(model.parameters())}
    moved: dict[tuple[Any, ...], torch.Tensor] = {}
    for module, name, path, tensor in _frozen(policy):
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape))
        if key not in moved:
            view = _view(held[path], tensor) if path in held else None
            if view is None:
                continue
            moved[key] = view
        if name in module._parameters:
            module._parameters[name].data = moved[key]
        else:
            module._buffers[name] = moved[key]
    return sum(view.nbytes for view in moved.values())


def _frozen(policy: Any) -> Iterator[tuple[nn.Module, str, str, torch.Tensor]]:
    """(module, name in it, name as MLX has it, tensor) of what is not trained, a head tied to the embedding last."""
    found = []
    for where, module in policy.named_modules():
        place = where.removeprefix("base_model.model.").replace(".base_layer", "")
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and not tensor.requires_grad and tensor.numel():
                found.append((module, name, f"{place}.{'weight' if name == 'codes' else name}", tensor))
    yield from sorted(found, key=lambda one: one[2].startswith("lm_head."))


def _view(array: mx.array, tensor: torch.Tensor) -> torch.Tensor | None:
    """`array`'s memory as a tensor like `tensor`; None where that is not to be had, or not the same bit by bit."""
    if ONE_MEMORY.get(mlx_device.backend()) != tensor.device.type or not tensor.is_contiguous():
        return None
    if array.nbytes != tensor.nbytes or array.shape[:-1] != tuple(tensor.shape[:-1]):
        return None
    try:
        view = torch.from_dlpack(array)
        if view.device != tensor.device or not view.is_contiguous():
            return None
        view = view.view(tensor.dtype)
    except (RuntimeError, TypeError, ValueError, BufferError, AttributeError):
        return None
    same = view.shape == tensor.shape and view.data_ptr() != tensor.data_ptr() and _equal(view, tensor)
    return view if same else None


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit by bit: 0 and -0 are two, and a value that is not a number is itself."""
    width = math.gcd(8, a.shape[-1] * a.element_size())
    word = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[width]
    return torch.equal(a.view(word), b.view(word))
