"""A LoRA adapter from torch to the fused products in one piece: hundreds of small matrices cost a GPU's host more than
their bytes do.

torch lays all A and B out in one array of the sampler's dtype, scales in it, as the products hold them (A side by side,
B in blocks); it crosses at once, and each product takes its part as a view. The plan of it is made once, of the sampler
and policy as `sync.sync_adapter` left them, and kept as long as neither has become another. What it does not cover to
the last trained tensor goes by `sync_adapter`, which counts names and shapes.

The layers' own matrices are not read any more and would be those of an older policy: they become NaN, so that whoever
reads them all the same is heard of.
"""

import math
import time
import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import torch

from rl.rollouts import fused, sync, transfer

ADAPTER = "default"
ALIGNED = 256  # bytes between beginnings of matrices are multiples of it


@dataclass(frozen=True)
class Part:
    """The adapters of one layer of a product, of all products alike: names, A (rank, inputs) and B (outputs, rank) of
    each; their scale, and where in a product's matrices they stand."""

    names: list[str]
    a: list[torch.Tensor]
    b: list[torch.Tensor]
    scale: float
    rows: slice
    columns: slice


@dataclass(frozen=True)
class Alike:
    """Products whose adapters have the same shapes and scales, and where the first one's A and B begin."""

    products: list[fused.Product]
    parts: list[Part]
    starts: dict[str, int]


class Plan:
    """Where each tensor of a policy's adapter goes, for as long as it `fits`."""

    def __init__(self, policy: Any, alike: list[Alike], dtype: torch.dtype, size: int) -> None:
        self.alike, self.dtype, self.size = alike, dtype, size
        self.tensors = [t for one in alike for part in one.parts for t in (*part.a, *part.b)]
        self.device = self.tensors[0].device
        self.report = len(self.tensors), sum(tensor.nbytes for tensor in self.tensors)
        self.flat: torch.Tensor | None = None
        self.cuts, self.places = _cuts(alike, dtype)
        self.adapters = [(product, product.adapters) for one in alike for product in one.products]
        # the rest is to notice a change by
        own = set(map(id, self.tensors))
        self.frozen = [p for p in policy.parameters() if id(p) not in own]
        self.parts_of = [held for module in policy.modules() for held in (module._modules, module._parameters)]
        self.content, self.kinds = _content(self.parts_of), _kinds(self.tensors)
        self.layers = [module for module in policy.modules() if ADAPTER in getattr(module, "lora_A", {})]
        self.settings = _settings(self.layers)
        self.policy = weakref.ref(policy, self._let_go)

    def _let_go(self, _: Any) -> None:
        """The policy is gone: keep nothing of it."""
        for part in (part for one in self.alike for part in one.parts):
            part.a.clear()
            part.b.clear()
        for held in (self.tensors, self.frozen, self.parts_of, self.layers, self.content):
            held.clear()

    def fits(self, policy: Any) -> bool:
        """Whether nothing that the plan was made of is another: modules, tensors, what is trained, who holds it."""
        if self.policy() is not policy or not all(product.adapters is own for product, own in self.adapters):
            return False
        now = _content(self.parts_of)
        return (
            len(now) == len(self.content)
            and all(map(is_, now, self.content))
            and not any(parameter.requires_grad for parameter in self.frozen)
            and _kinds(self.tensors) == self.kinds
            and _settings(self.layers) == self.settings
        )

    @torch.no_grad()
    def lay_out(self) -> torch.Tensor:
        """The adapter as the products hold it, all of it in one array; raises SyncError for values that are not finite
        there."""
        flat = self.flat
        if flat is None:
            flat = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for one in self.alike:
            shapes = {name: one.products[0].state[name].shape for name in ("a", "b")}
            a, b = (_rows(flat, one.starts[n], len(one.products), shape) for n, shape in shapes.items())
            for part in one.parts:
                a[:, part.rows] = torch.stack(part.a)
                # as MLX would: in float32, then rounded
                b[:, part.rows, part.columns] = torch.stack(part.b).float().mT * part.scale
        if not sync.finite(flat):
            raise sync.not_finite(self._first_bad(), self.dtype)
        if self.device.type == "cpu":  # there a fresh array costs more than what is written to it
            self.flat = flat
        return flat

    def _first_bad(self) -> str:
        for part in (part for one in self.alike for part in one.parts):
            for name, a, b in zip(part.names, part.a, part.b, strict=True):
                for kind, values in (("lora_a", a), ("lora_b", b.float() * part.scale)):
                    if not sync.finite(values.to(self.dtype)):
                        return f"{name}.{kind}"
        return "the adapter"

    def take_over(self, whole: mx.array) -> None:
        """Give each product its part of `whole`."""
        parts = mx.split(whole, self.cuts)
        taken = [(state, name, parts[i].reshape(shape)) for state, name, i, shape in self.places]
        mx.eval([array for _, _, array in taken])
        for state, name, array in taken:  # in place: compiled steps hold the dictionary
            state[name] = array


def hand_over(model: nn.Module, policy: Any) -> sync.SyncReport | None:
    """Bring the policy's adapter into the products of `model`, which `sync.sync_adapter` has filled once; None, and
    nothing changed, where that is the way to take again."""
    products = fused.of(model)
    if products is None or products.refresh(model):
        return None
    plan = products.plan
    if plan is None or not plan.fits(policy):
        plan = products.plan = plan_of(model, policy)
    if plan is None:
        return None
    transfer.way(plan.device)
    transfer.wait(plan.device)
    started = time.perf_counter()
    way = transfer.way(plan.device)
    plan.take_over(way.send(plan.lay_out()))
    tensors, size = plan.report
    return sync.SyncReport(tensors, size, time.perf_counter() - started, way.name)


def plan_of(model: nn.Module, policy: Any) -> Plan | None:
    """A plan of all that is trained of `policy`; None where something is trained, or sampled, that it cannot cover."""
    adapters = sync.adapter_tensors(policy)
    tensors = [tensor for a, b, _ in adapters.values() for tensor in (a, b)]
    covered = set(map(id, tensors))
    if any(p.requires_grad and id(p) not in covered for p in policy.parameters()):
        return None
    if len({t.device for t in tensors}) != 1 or any(type(t) not in (torch.Tensor, torch.nn.Parameter) for t in tensors):
        return None
    kinds, names = defaultdict(list), {id(module): name for name, module in model.named_modules()}
    left = dict(adapters)
    for product, layers in fused.of(model).each(model):
        parts, column, row = [], 0, 0
        for layer, outputs in zip(layers, product.sizes, strict=True):
            if "lora_a" in layer:
                name = names[id(layer)]
                a, b, scale = left.pop(name, (None, None, None))
                if a is None or not _same(layer, a, b, scale):
                    return None
                parts.append((name, a, b, scale, slice(row, row + len(a)), slice(column, column + outputs)))
                row += product.rank
            column += outputs
        if parts:
            kind = [(a.dtype, a.shape, b.dtype, scale, rows, columns) for _, a, b, scale, rows, columns in parts]
            kinds[str(kind)].append((product, layers, parts))
    if left or not kinds:
        return None
    dtypes = {product.state[name].dtype for found in kinds.values() for product, *_ in found for name in ("a", "b")}
    if len(dtypes) != 1 or (dtype := sync.HELD.get(dtypes.pop())) is None:
        return None
    alike, size = [], 0
    for found in kinds.values():
        products, starts = [product for product, *_ in found], {}
        for name in ("a", "b"):
            starts[name] = size
            size += len(products) * _room(products[0].state[name].shape, dtype)
        columns = (zip(*one, strict=True) for one in zip(*(parts for *_, parts in found), strict=True))
        parts = [
            Part(list(n), list(a), list(b), scale[0], rows[0], columns[0]) for n, a, b, scale, rows, columns in columns
        ]
        alike.append(Alike(products, parts, starts))
    for product, layers, _ in (one for found in kinds.values() for one in found):
        product.hold_alone(layers)
    return Plan(policy, alike, dtype, size)


def _same(layer: nn.Module, a: torch.Tensor, b: torch.Tensor, scale: float) -> bool:
    """Whether the sampler's layer has these shapes, this scale, and the type that scales are multiplied in."""
    held_a, held_b = layer["lora_a"], layer["lora_b"]
    return (
        (*held_a.shape, *held_b.shape) == (*a.T.shape, *b.T.shape)
        and held_a.dtype == held_b.dtype == mx.float32
        and layer.scale == scale
    )


def _room(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Numbers from the beginning of one matrix to that of the next."""
    whole = ALIGNED // dtype.itemsize
    return -(-math.prod(shape) // whole) * whole


def _rows(flat: torch.Tensor, start: int, count: int, shape: Sequence[int]) -> torch.Tensor:
    """`count` matrices in `flat`, (count, *shape)."""
    room = _room(shape, flat.dtype)
    return flat[start : start + count * room].view(count, room)[:, : math.prod(shape)].unflatten(1, tuple(shape))


def _cuts(alike: list[Alike], dtype: torch.dtype) -> tuple[list[int], list[tuple[Any, str, int, tuple[int, ...]]]]:
    """Where to cut the one array, and each matrix's dictionary, name, place among what was cut, and shape."""
    cuts, places = [], []
    for one in alike:
        for name, start in one.starts.items():
            for i, product in enumerate(one.products):
                shape = product.state[name].shape
                begin = start + i * _room(shape, dtype)
                places.append((product.state, name, len(cuts), shape))
                cuts += sorted({begin + math.prod(shape), begin + _room(shape, dtype)})
    return cuts[:-1], places  # the last is the end


def _content(parts_of: list[dict[str, Any]]) -> list[Any]:
    """The modules and parameters that modules hold, in order."""
    return list(chain.from_iterable(map(dict.values, parts_of)))


def _kinds(tensors: list[torch.Tensor]) -> list[tuple[Any, ...]]:
    return [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]


def _settings(layers: list[Any]) -> list[tuple[Any, ...]]:
    return [(m.scaling.get(ADAPTER), m.use_dora.get(ADAPTER), m.lora_bias.get(ADAPTER)) for m in layers]
