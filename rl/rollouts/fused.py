"""Layers that read the same input, multiplied as one: queries, keys and values; gate and up; each with its LoRA.

Decoding waits for its operations to be launched, one by one, on a GPU most of all, and a LoRA layer has five where a
plain one has one. Here the rows of the weights lie in one array, of which each layer keeps its part as a view, and the
adapters of the layers are one pair of matrices: A side by side, B in blocks with the scale in it. So a layer of a LoRA
policy has 12 products where it had 35 operations for them, with the same numbers but for rounding.

A model's layers stay what they are and may be synced as before; `refresh` takes over what has changed.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from rl.rollouts import device, lent

QUANTIZED = ("weight", "scales", "biases")
TILE = 16  # ranks are padded to it for tensor cores (rl/rollouts/kernels.py)


class Product:
    """The outputs of several linear layers of one input, side by side."""

    def __init__(self, tile: int = 1) -> None:
        # weight (and scales, biases), bias, a (ranks, in) and b (ranks, out), where: what compiled steps read
        self.state: dict[str, mx.array] = {}
        self.bases: list[Any] = []  # the layers' arrays that `state` was made of
        self.adapters: list[Any] = []
        self.settings: dict[str, Any] = {}
        self.sizes: list[int] = []  # outputs of each layer
        self.tile = tile  # ranks are padded to multiples of it
        self.rank = 0  # of each adapter, padded

    @property
    def inputs(self) -> int:
        """How many numbers a row has."""
        return self.state["weight"].shape[1] * (32 // self.settings["bits"] if self.settings else 1)

    def refresh(self, layers: Sequence[nn.Module]) -> bool:
        """Take over the layers' weights if any of them is another array than at the last call; whether one was."""
        bases = [layer.linear if "lora_a" in layer else layer for layer in layers]
        names = QUANTIZED if "scales" in bases[0] else QUANTIZED[:1]
        weights = _arrays(bases, (*names, "bias"))
        adapters = _arrays(layers, ("lora_a", "lora_b"))
        new_bases, new_adapters = not _same(weights, self.bases), not _same(adapters, self.adapters)
        self.sizes = sizes = [base["weight"].shape[0] for base in bases]
        # in place: compiled steps hold the dictionary
        if new_bases:
            self.state.clear()
            if "scales" in bases[0]:
                self.settings = {name: getattr(bases[0], name) for name in ("group_size", "bits", "mode")}
            for name in names:
                self._join(name, bases, sizes)
            if any("bias" in base for base in bases):
                kind = bases[0]["scales" if "scales" in bases[0] else "weight"].dtype
                parts = [base.get("bias", mx.zeros(size, kind)) for base, size in zip(bases, sizes, strict=True)]
                self.state["bias"] = mx.concatenate(parts)
            self.bases = _arrays(bases, (*names, "bias"))
        if new_bases or new_adapters:  # after a sync of an adapter the base stays where it is
            for name in ("a", "b"):
                self.state.pop(name, None)
            self._join_adapters(layers, sizes)
            self.adapters = adapters
        return new_bases or new_adapters

    def _join(self, name: str, bases: Sequence[nn.Module], sizes: Sequence[int]) -> None:
        if len(bases) == 1:
            self.state[name] = bases[0][name]
            return
        whole = mx.concatenate([base[name] for base in bases])
        mx.eval(whole)
        start = 0
        for base, size in zip(bases, sizes, strict=True):
            base[name] = whole[start : start + size]
            start += size
        mx.eval([base[name] for base in bases])  # views now: what they were views of before is free
        self.state[name] = whole

    def _join_adapters(self, layers: Sequence[nn.Module], sizes: Sequence[int]) -> None:
        ranks = [layer["lora_a"].shape[1] for layer in layers if "lora_a" in layer]
        self.rank = -(-max(ranks, default=0) // self.tile) * self.tile
        start, a, b, where = 0, [], [], []
        for layer, size in zip(layers, sizes, strict=True):
            where += [len(a) * self.rank if "lora_a" in layer else -1] * (size // self.tile)
            if "lora_a" in layer:
                missing = (0, self.rank - layer["lora_a"].shape[1])
                a.append(mx.pad(layer["lora_a"].T, [missing, (0, 0)]))
                b.append(mx.pad(layer.scale * layer["lora_b"], [missing, (start, sum(sizes) - start - size)]))
            start += size
        if a:
            self.state["a"], self.state["b"] = mx.contiguous(mx.concatenate(a)), mx.concatenate(b)
        if self.tile > 1:
            self.state["where"] = mx.array(where, mx.int32)

    def hold_alone(self, layers: Sequence[nn.Module]) -> None:
        """From here on the adapters are brought into `state` itself, without the layers (rl/rollouts/handover.py).
        Theirs become NaN: where they were read all the same, an old policy would be sampled without a word."""
        for layer in layers:
            for name in ("lora_a", "lora_b") if "lora_a" in layer else ():
                layer[name] = mx.broadcast_to(mx.array(mx.nan, layer[name].dtype), layer[name].shape)
        self.adapters = _arrays(layers, ("lora_a", "lora_b"))

    def __call__(self, x: mx.array) -> mx.array:
        """(…, in) -> (…, sum of the layers' outputs), in the dtype of `x`."""
        state, flat = self.state, x.reshape(-1, x.shape[-1])
        if lent.takes(x, state["weight"]):
            return lent.product(flat, state).reshape(*x.shape[:-1], -1)
        if self.settings:
            out = mx.quantized_matmul(flat, *(state[n] for n in QUANTIZED), transpose=True, **self.settings)
            out = out + state["bias"] if "bias" in state else out
        elif "bias" in state:
            out = mx.addmm(state["bias"], flat, state["weight"].T)
        else:
            out = flat @ state["weight"].T
        if "a" in state:
            out = mx.addmm(out, flat @ state["a"].T.astype(x.dtype), state["b"].astype(x.dtype))
        return out.reshape(*x.shape[:-1], -1)


class Layer:
    """The products of one layer."""

    def __init__(self, tile: int = 1) -> None:
        self.qkv, self.o, self.gate_up, self.down = (Product(tile) for _ in range(4))

    @property
    def every(self) -> tuple[Product, ...]:
        """In the order in which a token passes them."""
        return self.qkv, self.o, self.gate_up, self.down

    def products(self, layer: nn.Module) -> list[tuple[Product, list[nn.Module]]]:
        """Each with the modules that it stands for."""
        attention, mlp = layer.self_attn, layer.mlp
        return [
            (self.qkv, [attention.q_proj, attention.k_proj, attention.v_proj]),
            (self.o, [attention.o_proj]),
            (self.gate_up, [mlp.gate_proj, mlp.up_proj]),
            (self.down, [mlp.down_proj]),
        ]


class Fused:
    """The products of a whole model."""

    def __init__(self, model: nn.Module) -> None:
        tile = TILE if device.takes_own_kernels() else 1
        self.layers = [Layer(tile) for _ in model.model.layers]
        self.turns: list[mx.array] = []  # cosines and sines of each kind of RoPE; rl/rollouts/turns.py fills them
        self.turn_of: list[int] = []  # the kind of each layer
        self.plan: Any = None  # of bringing an adapter into them (rl/rollouts/handover.py)
        self.table: Any = None  # of where they lie (rl/rollouts/whole.py)
        # kinds of products of which the kernels were tried, and whether they were right
        self.right: dict[Any, bool] = {}
        self.refresh(model)

    def each(self, model: nn.Module) -> Iterator[tuple[Product, list[nn.Module]]]:
        """Each product with the modules that it stands for."""
        for layer, module in zip(self.layers, model.model.layers, strict=True):
            yield from layer.products(module)

    def refresh(self, model: nn.Module) -> bool:
        """Take over what a sync, or a new adapter, has changed since the last time, and say whether anything was; under
        a millisecond if nothing."""
        kind = model.model.norm.weight.dtype
        changed = [product for product, parts in self.each(model) if product.refresh(parts)]
        for product in changed:
            product.state |= {n: product.state[n].astype(kind) for n in ("a", "b") if n in product.state}
        mx.eval([product.state for product in changed])  # once: each wait costs a GPU more than its work
        return bool(changed)

    @property
    def state(self) -> list[dict[str, mx.array]]:
        """All arrays, as an input of compiled steps."""
        return [p.state for layer in self.layers for p in layer.every]


def _arrays(layers: Sequence[nn.Module], names: Sequence[str]) -> list[Any]:
    return [layer.get(name) for layer in layers for name in names]


def _same(new: Sequence[Any], old: Sequence[Any]) -> bool:
    return len(new) == len(old) and all(a is b for a, b in zip(new, old, strict=True))


def rest(model: nn.Module) -> list[Any]:
    """What no product holds (embedding, norms, head), as an input of compiled steps."""
    inner = model.model
    norms = [{n: m for n, m in layer.items() if n not in ("self_attn", "mlp")} for layer in inner.layers]
    own = [{n: m for n, m in layer.self_attn.items() if n in ("q_norm", "k_norm")} for layer in inner.layers]
    return [inner.embed_tokens, inner.norm, model.get("lm_head", {}), norms, own]


def fuse(model: nn.Module) -> None:
    """Let `model` (of rl/rollouts/load.py) be run by its fused products, if layers of one input are of one kind."""
    layers = [parts for layer in model.model.layers for _, parts in Layer().products(layer)]
    if all(len({_kind(layer) for layer in parts}) == 1 for parts in layers):
        model.fused = Fused(model)


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """What must be alike in layers whose weights are to lie in one array."""
    base = layer.linear if "lora_a" in layer else layer
    settings = tuple(getattr(base, name, None) for name in ("group_size", "bits", "mode"))
    return ("scales" in base, base["weight"].dtype, base["weight"].shape[1], *settings)


def of(model: nn.Module) -> Fused | None:
    """The model's fused products, None where it has none."""
    return getattr(model, "fused", None)
