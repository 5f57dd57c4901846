"""Listening to a training step: every operator it dispatches, every tensor of a type that MPS lacks.

The step runs on the CPU for real. Fake tensors on device "mps" would be nearer, and torch 2.15 lets them be made on
Linux, but no gradient can flow through one there: autograd asks for the device's guard, which only a build with MPS
has, and aborts the process. So the CPU takes MPS's choices instead (`listening`), and what a program on a Mac would do
to tensors of the host, before they are sent to the device or after they are fetched, is told apart and left out.
"""

import functools
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch._C import DispatchKey
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rl.audit import kernels

# MPS has no such tensors
ABSENT_DTYPES = (torch.float64, torch.complex128)
HOST = "_of_the_host"
aten = torch.ops.aten


class Recorder(TorchDispatchMode):
    """Collects operators by name, the parts of composite ones among them, and tensors in `ABSENT_DTYPES`.

    Operators arrive below autograd, so the backward pass and the optimizer are in it. One without a kernel of its own
    on MPS is run as MPS would, by its composite definition, whose parts arrive here in turn.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()
        self.absent: set[str] = set()  # "add.Tensor -> float64"
        self.inside: list[str] = []  # composite operators being taken apart
        self.deaf = False  # while a tensor of the host is being made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the operator, then run it."""
        name, kwargs = kernels.name_of(func), kwargs or {}
        given = _tensors((args, kwargs))
        if self.deaf or (given and all(hasattr(tensor, HOST) for tensor in given)):
            return _of_host(func(*_with_tensors(func, args), **kwargs))
        apart = kernels.status(name) == "composite" and name not in self.inside  # `detach` calls itself
        key = _composite_key(func) if apart else None
        if key is None:
            out = func(*_with_tensors(func, args), **kwargs)
        else:
            self.inside.append(name)
            with self:
                out = func._op_dk(key, *args, **kwargs)
            self.inside.pop()
        made = _tensors(out)
        if "::" not in name or given or made:  # torch marks steps for profilers by operators without tensors
            self.operators.add(name)
        for tensor in made:
            if tensor.dtype in ABSENT_DTYPES:
                self.absent.add(f"{name} -> {str(tensor.dtype).removeprefix('torch.')}")
        return out


class Host(TorchFunctionMode):
    """Marks the host's tensors: those made without a device and those fetched by `.cpu()`; `.to(device)` sends one."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take what makes, fetches or sends a tensor; leave all other functions."""
        kwargs = kwargs or {}
        if func is torch.Tensor.cpu or (func is torch.Tensor.to and "cpu" in args[1:2]):
            return _of_host(args[0].clone())  # a CPU would give the very tensor
        if func is torch.Tensor.to and any(isinstance(a, torch.device) for a in (*args[1:], *kwargs.values())):
            out = func(*args, **kwargs)
            return out.clone() if hasattr(out, HOST) and self._sent(out) else out
        made_here = kwargs.get("device") is None and not _tensors((args, kwargs))
        if not made_here:
            return func(*args, **kwargs)
        before, self.recorder.deaf = self.recorder.deaf, True
        try:
            return _of_host(func(*args, **kwargs))
        finally:
            self.recorder.deaf = before

    @staticmethod
    def _sent(tensor: torch.Tensor) -> bool:
        """Take the mark off, for the copy that follows."""
        delattr(tensor, HOST)
        return True


@contextmanager
def listening() -> Iterator[Recorder]:
    """Record what runs inside, a CPU taking what torch's code takes on MPS where the device decides on the operators.

    - `linear` and its gradient are one operator each (`linear`, `linear_backward`), which a CPU takes apart;
    - attention is never a fused kernel: an operator of MPS's own without a gradient, dropout or strides in its way,
      else plain products;
    - clipping goes a tensor at a time, no `_foreach_` operators;
    - TRL's fused head keeps every position, as rl/algorithms/learner.py tells it on MPS.

    transformers' default Adam is fused on both. Any other code that asks a tensor for its device finds a CPU.
    """
    recorder, library = Recorder(), torch.library.Library("aten", "IMPL")
    with ExitStack() as stack:
        stack.callback(library._destroy)
        for name, function in (
            ("linear", _linear),
            ("linear_backward", _linear_backward),
            ("_scaled_dot_product_attention_math_for_mps", aten._scaled_dot_product_attention_math),
        ):
            library.impl(name, function, "CPU")
        for name in ("_device_has_foreach_support", "_has_foreach_support"):
            stack.enter_context(mock.patch(f"torch.nn.utils.clip_grad.{name}", return_value=False))
        _keep_every_position(stack)
        fused = torch.nn.functional.scaled_dot_product_attention
        attention = functools.partial(_attend, fused)
        stack.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", attention))
        stack.enter_context(Host(recorder))
        yield stack.enter_context(recorder)


def _keep_every_position(stack: ExitStack) -> None:
    """Give TRL's fused head the answer for MPS, in every algorithm's module that is loaded."""
    from rl.algorithms import learner

    def answer() -> None:
        learner.trl.trainer.utils._use_triton = lambda device: False

    for name, module in list(sys.modules.items()):
        if name.startswith("rl.algorithms.") and hasattr(module, "score_completions_only"):
            stack.enter_context(mock.patch.object(module, "score_completions_only", answer))


def _attend(fused: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, args, strict=False)) | kwargs
    q, k, v = (given.pop(name) for name in names[:3])
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
    plain = given.get("dropout_p", 0.0) == 0.0 and all(tensor.is_contiguous() for tensor in (q, k, v))
    if plain and not learns:
        return aten._scaled_dot_product_attention_math_for_mps(q, k, v, **given)[0]
    with sdpa_kernel(SDPBackend.MATH):
        return fused(q, k, v, **given)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = torch.matmul(x, weight.t())
    return y if bias is None else y + bias


def _linear_backward(
    x: torch.Tensor, gradient: torch.Tensor, weight: torch.Tensor, wanted: list[bool]
) -> tuple[torch.Tensor | None, ...]:
    rows = gradient.reshape(-1, gradient.shape[-1])
    found = (
        lambda: gradient @ weight,
        lambda: rows.t() @ x.reshape(-1, x.shape[-1]),
        lambda: rows.sum(0),
    )
    return tuple(make() if want else None for make, want in zip(found, wanted, strict=True))


@functools.cache
def _composite_key(func: Any) -> DispatchKey | None:
    """The key under which the dispatcher holds what `func` is made of."""
    keys = (getattr(DispatchKey, name) for name in sorted(kernels.COMPOSITE))
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return next((key for key in keys if has(func.name(), key)), None)


def _with_tensors(func: Any, args: tuple[Any, ...]) -> list[Any]:
    """`args` as `func` takes them: a number that a composite operator made a tensor of arrives as a number again."""
    if torch._C._should_allow_numbers_as_tensors(func._schema.name.partition("::")[2]):
        return list(args)
    wanted = [str(argument.type) == "Tensor" for argument in func._schema.arguments]
    number = [want and isinstance(value, bool | int | float) for want, value in zip(wanted, args, strict=False)]
    return [torch.tensor(value) if lone else value for value, lone in zip(args, number, strict=True)]


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _of_host(tree: Any) -> Any:
    for tensor in _tensors(tree):
        setattr(tensor, HOST, True)
    return tree
