"""The trainer's base as packed codes: torch layers over the very 4- or 8-bit weights that MLX samples from.

A dequantized copy of an 8B base costs 16 to 32 GB beside the 4.5 GB of its codes. Here a layer's values exist while
that layer computes, once in forward and once more in backward, and adapters train on top (QLoRA, Dettmers et al. 2023,
arXiv 2305.14314, section 3, with MLX's affine format instead of NF4). Values are those of `mx.dequantize`:
w = scale * code + bias, one scale and one bias for each group of codes in a row.

Where torch and MLX have one memory these are the very codes that the sampler reads (`rl.rollouts.once`); memory of CUDA
MLX does not share, and there the two sides have a copy each.

A head tied to the embedding shares its codes. TRL's fused head slices `lm_head.weight` in tiles of the vocabulary, and
only the tile that it is at is dequantized (`Lazy`).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from rl.errors import UserError

BITS = (4, 8)


@dataclass(frozen=True)
class Packed:
    """One quantized matrix: `codes` (rows, columns * bits / 8) bytes, `scales` and `biases` (rows, columns / group)."""

    codes: torch.Tensor
    scales: torch.Tensor
    biases: torch.Tensor
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the values."""
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.bits


def packed(codes: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, bits: int) -> Packed:
    """`codes` as MLX stores them, 32-bit words with the first code in the lowest bits, without a copy.

    Raises ValueError for other widths than 4 and 8 bits, or shapes that do not belong together.
    """
    made = Packed(codes.view(torch.uint8), scales, biases, bits)
    if bits not in BITS:
        raise ValueError(f"{bits}-bit codes, valid: {' or '.join(map(str, BITS))}")
    if scales.shape != biases.shape or scales.shape[0] != codes.shape[0] or made.shape[1] % scales.shape[1]:
        raise ValueError(f"codes of {made.shape} do not fit scales {tuple(scales.shape)}, biases {tuple(biases.shape)}")
    return made


def dequantize(weight: Packed, dtype: torch.dtype, rows: torch.Tensor | None = None) -> torch.Tensor:
    """The values, (rows, columns), in `dtype`; of the given `rows` alone, in their order, where there are any.

    Computed in the scales' type, as MLX does, and rounded to `dtype` last.
    """
    codes, scales, biases = weight.codes, weight.scales, weight.biases
    if rows is not None:
        codes, scales, biases = codes[rows], scales[rows], biases[rows]
    if weight.bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1)
    grouped = codes.view(*scales.shape, -1).to(scales.dtype)
    values = torch.addcmul(biases[..., None], grouped, scales[..., None])
    return values.view(scales.shape[0], -1).to(dtype)


class Lazy(torch.Tensor):
    """A matrix's values where a tensor is asked for: type, shape and device are told at no cost, rows sliced off are
    dequantized alone, and any other operator gets all values. Writing to it raises RuntimeError: no code would change.
    """

    held: Packed

    @staticmethod
    def __new__(cls, weight: Packed, dtype: torch.dtype) -> "Lazy":
        made = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=dtype, device=weight.codes.device)
        made.held = weight
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Dequantize what the operator needs."""
        first = args[0] if args else None
        if isinstance(first, Lazy):
            if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
                return Lazy(first.held, first.dtype)
            if func is torch.ops.aten.slice.Tensor and (len(args) < 2 or args[1] == 0):
                rows = slice(*args[2:5])
                held = first.held
                part = Packed(held.codes[rows], held.scales[rows], held.biases[rows], held.bits)
                return dequantize(part, first.dtype)
            told = func._schema.arguments[0].alias_info
            if told is not None and told.is_write:
                raise RuntimeError(
                    "a packed weight cannot be written to: load the dequantized base to change its values"
                )
        args, kwargs = tree_map_only(Lazy, lambda lazy: dequantize(lazy.held, lazy.dtype), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """Shape and width, not the values."""
        return f"Lazy({tuple(self.shape)}, {self.held.bits} bits)"


class _Product(torch.autograd.Function):
    """x W', with W dequantized in forward and again in backward: between the two only its codes are held."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Packed) -> torch.Tensor:
        ctx.weight = weight
        return nn.functional.linear(x, dequantize(weight, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ dequantize(ctx.weight, gradient.dtype), None


class _Holds(nn.Module):
    """Codes, scales and biases as buffers, which move with the module and are in no optimizer."""

    codes: torch.Tensor
    scales: torch.Tensor
    biases: torch.Tensor

    def hold(self, weight: Packed, dtype: torch.dtype) -> None:
        self.bits, self.dtype = weight.bits, dtype
        for name in ("codes", "scales", "biases"):
            self.register_buffer(name, getattr(weight, name))

    @property
    def held(self) -> Packed:
        return Packed(self.codes, self.scales, self.biases, self.bits)

    @property
    def weight(self) -> torch.Tensor:
        """The values, made where they are used: for PEFT, which asks for their type, and for TRL's fused head."""
        return Lazy(self.held, self.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # `.to(dtype)` means the activations' type: scales keep their own, or the values would change
        kept = {name: getattr(self, name).dtype for name in ("scales", "biases")}
        super()._apply(fn, recurse)
        for name, dtype in kept.items():
            if getattr(self, name).dtype != dtype:
                raise TypeError(f"a packed layer's {name} are {dtype} and stay so: move the model by device alone")
        return self


class PackedLinear(_Holds, nn.Linear):
    """A frozen linear layer over packed codes; PEFT takes it for the `nn.Linear` it is."""

    def __init__(self, weight: Packed, bias: torch.Tensor | None, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.hold(weight, dtype)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., columns) -> (..., rows)."""
        y = _Product.apply(x, self.held)
        return y if self.bias is None else y + self.bias


class PackedEmbedding(_Holds, nn.Embedding):
    """A frozen embedding over packed codes: only the rows asked for are dequantized."""

    def __init__(self, weight: Packed, padding_idx: int | None, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx
        self.hold(weight, dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) ids -> (..., columns)."""
        return dequantize(self.held, self.dtype, ids.reshape(-1)).view(*ids.shape, -1)


def load_policy(folder: Path, dtype: torch.dtype, device: torch.device | str) -> Any:
    """The causal LM of a shared quantized base (`rl.rollouts.quantized`), its quantized layers packed, on `device`.

    Everything else is in `dtype`. No dequantized matrix is ever read from disk or held. Raises UserError where the
    folder's packed weights are not the model's, or in a format that torch's side does not know.
    """
    from accelerate import init_empty_weights
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    source = folder / "mlx" / "model.safetensors"
    tensors = load_file(source)
    formats = json.loads((folder / "mlx" / "config.json").read_text())["quantization"]
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with init_empty_weights(include_buffers=False):  # RoPE's frequencies are buffers, and in no file
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.config._name_or_path = model.name_or_path = str(folder)
    for stem in sorted(name.removesuffix(".scales") for name in tensors if name.endswith(".scales")):
        _replace(model, stem, tensors, formats.get(stem, formats)["bits"], dtype, source)
    rest = {name: value.to(dtype) for name, value in tensors.items()}
    _, unknown = model.load_state_dict(rest, strict=False, assign=True)
    embedding = model.get_input_embeddings()
    if config.tie_word_embeddings and isinstance(embedding, PackedEmbedding):
        model.set_output_embeddings(PackedLinear(embedding.held, None, dtype))
    else:
        model.tie_weights()
    missing = [name for name, weight in model.named_parameters() if weight.is_meta]
    if missing or unknown:
        raise UserError(
            f"{source}: not this model's weights ({', '.join([*missing, *unknown][:3])}): remove {folder}, "
            "and the next run makes it again"
        )
    bad = [name for name, weight in model.state_dict().items() if not torch.isfinite(weight).all()]
    if bad:
        raise UserError(f"{source}: {bad[0]} holds values that are not finite: take a whole copy of the base")
    return model.to(device).eval().requires_grad_(False)


def _replace(
    model: nn.Module, stem: str, tensors: dict[str, torch.Tensor], bits: int, dtype: torch.dtype, source: Path
) -> None:
    """Put a packed layer where `stem` names one, taking its tensors out of `tensors`."""
    parent_name, _, name = stem.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = getattr(parent, name)
    codes, scales, biases = (tensors.pop(f"{stem}.{kind}") for kind in ("weight", "scales", "biases"))
    try:
        weight = packed(codes, scales, biases, bits)
    except ValueError as error:
        raise UserError(f"{source}: {stem}: {error}; set [model.quantization] bits = 4 or 8") from error
    if isinstance(old, nn.Embedding):
        new: nn.Module = PackedEmbedding(weight, old.padding_idx, dtype)
    else:
        bias = tensors.pop(f"{stem}.bias", None)
        new = PackedLinear(weight, None if bias is None else bias.to(dtype), dtype)
    setattr(parent, name, new)
