"""rl/rollouts/transfer.py: every bit arrives, in memory the trainer never writes to, by a way that was tried first."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

import rl.rollouts  # noqa: F401  binds BLAS before mlx loads

import mlx.core as mx  # isort: skip
import mlx.nn as nn
from mlx.utils import tree_flatten

from rl.rollouts import device, sync, transfer
from rl.rollouts.transfer import Way

CPU = torch.device("cpu")
HERE = [CPU]
if torch.cuda.is_available() and device.backend() == "cuda":
    HERE.append(torch.device("cuda", 0))
if torch.backends.mps.is_available() and device.backend() == "metal":
    HERE.append(torch.device("mps", 0))
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.T,
    "rows left out": lambda t: t[1::2],
    "a column's part": lambda t: t[:, 2:5],
    "repeated": lambda t: t[:1].expand(6, -1),
    "empty": lambda t: t[:0],
    "a number": lambda t: t[1, 2],
}


def values(dtype: torch.dtype, on: torch.device = CPU) -> torch.Tensor:
    """(7, 9), among them what a detour through another type would change: denormals, the largest, minus zero."""
    made = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    made[0, :4] = torch.tensor([-0.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny / 4, torch.inf], dtype=dtype)
    return made.to(on)


def bits(array: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(array).view(transfer.WORDS[array.itemsize]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("on", HERE, ids=str)
@pytest.mark.parametrize("sends", ["its own way", "through the host"])
def test_every_bit_arrives(sends: str, on: torch.device, dtype: torch.dtype, layout: str) -> None:
    tensor = LAYOUTS[layout](values(dtype, on))
    send = transfer.to_mlx if sends == "its own way" else transfer._through_host
    array = send(tensor)
    assert array.dtype == transfer.DTYPES[dtype]
    assert array.shape == tuple(tensor.shape)
    word = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    expected = tensor.cpu().contiguous().view(word).numpy()
    np.testing.assert_array_equal(bits(array), expected.view(np.uint16 if dtype.itemsize == 2 else np.uint32))


@pytest.mark.parametrize("on", HERE, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_what_the_optimizer_writes_afterwards_is_not_seen(on: torch.device, layout: str) -> None:
    """Trap: memory shared over DLPack, which the next step changes in place while the sampler draws."""
    weight = torch.nn.Parameter(torch.ones(64, 64, device=on))
    array = transfer.to_mlx(LAYOUTS[layout](weight))
    with torch.no_grad():
        weight.add_(1)
    transfer.wait(on)
    assert float(mx.max(array)) == float(mx.min(array)) == 1.0


@pytest.mark.parametrize("on", HERE, ids=str)
def test_it_outlives_the_trainers_tensor(on: torch.device) -> None:
    arrays = []
    for number in range(20):
        tensor = torch.full((256, 256), float(number), device=on)
        arrays.append(transfer.to_mlx(tensor))
        del tensor
        torch.full((256, 256), -1.0, device=on)  # takes the memory that was freed
    assert [float(mx.max(a)) for a in arrays] == [float(mx.min(a)) for a in arrays] == [*map(float, range(20))]


def test_a_way_that_fails_or_changes_a_bit_is_not_taken() -> None:
    def refuses(tensor: torch.Tensor) -> mx.array:
        raise ValueError("[convert] CUDA import is not supported.")

    def rounds(tensor: torch.Tensor) -> mx.array:  # float32 by way of half precision
        return mx.array(tensor.half()).astype(transfer.DTYPES[tensor.dtype])

    def other_type(tensor: torch.Tensor) -> mx.array:
        return mx.array(tensor.float())

    good = Way("through the host", transfer._through_host)
    for bad in (refuses, rounds, other_type):
        assert transfer.first_that_works([Way("bad", bad), good], CPU) is good
    assert transfer.first_that_works([Way("bad", refuses)], CPU) is transfer.COPIED
    assert transfer.way(CPU) is transfer.COPIED


def test_no_ways_but_those_tried_are_taken_without_a_gpu() -> None:
    """MLX 0.32.4 cannot share host memory on Linux, nor take CUDA's: the day it can, the docstring is to be changed."""
    tensor = torch.ones(8)
    if device.backend() != "metal":
        with pytest.raises(ValueError, match="without a copy"):
            mx.from_dlpack(tensor, copy=False)
    if device.backend() == "cpu":
        assert not transfer._works(transfer.WAYS["cuda"][0], CPU)


class Sampler(nn.Module):
    """One matrix and one vector."""

    def __init__(self, dtype: mx.Dtype):
        super().__init__()
        self.a, self.b = mx.zeros((512, 256), dtype), mx.zeros((300,), dtype)


def test_a_hand_over_on_a_cpu_is_one_copy_and_says_so() -> None:
    sampler, sent = Sampler(mx.float32), [("a", torch.ones(512, 256)), ("b", torch.full((300,), 2.0))]
    mx.eval(sampler.parameters())
    device.reset_peak_memory()
    before = mx.get_active_memory()
    report = sync.sync_weights(sampler, sent)
    size = 4 * (512 * 256 + 300)
    assert (report.tensors, report.bytes, report.way) == (2, size, "copied")
    assert 0 < report.seconds < 10
    assert mx.get_peak_memory() - before < 1.1 * size  # and no gathered copy beside it
    assert {n: float(mx.max(v)) for n, v in tree_flatten(sampler.parameters())} == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize("on", HERE, ids=str)
def test_gathered_tensors_of_mixed_types_find_their_places(on: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, in parts of a few tensors; here also on a CPU."""
    monkeypatch.setattr(sync, "PART_BYTES", 4096)
    made = torch.Generator().manual_seed(3)
    types = [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]
    sent = [(str(i), torch.randn(20 + i, 30, generator=made).to(types[i % 4]).to(on)) for i in range(9)]
    wanted = {name: torch.bfloat16 for name, _ in sent}
    parts = list(sync._parts(sent, wanted))
    assert [name for part in parts for name, _ in part] == [name for name, _ in sent]
    assert max(len(part) for part in parts) == 2
    for part in parts:
        for (name, array), (_, tensor) in zip(sync._gathered(part, torch.bfloat16), part, strict=True):
            assert array.dtype == mx.bfloat16, name
            np.testing.assert_array_equal(np.array(array.astype(mx.float32)), tensor.bfloat16().float().cpu().numpy())


@pytest.mark.parametrize("gather", [False, True], ids=["one by one", "gathered"])
def test_a_value_too_large_for_the_sampler_is_named(gather: bool) -> None:
    """70,000 is finite in the trainer's float32 and infinite in the sampler's float16."""
    part = [("fine", torch.ones(4)), ("large", torch.tensor([1.0, 7e4])), ("after", torch.ones(2))]
    hand_over = sync._gathered if gather else sync._transfer
    with pytest.raises(sync.SyncError, match="large: the trainer's weights are not finite in the sampler's float16"):
        hand_over(part, torch.float16)
    assert [name for name, _ in hand_over(part, torch.float32)] == ["fine", "large", "after"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_one_bad_value_is_seen_wherever_it_is(dtype: torch.dtype, bad: float) -> None:
    for place in (0, 1, 4097, 9999):
        tensor = torch.ones(10_000, dtype=dtype)
        assert sync.finite(tensor)
        tensor[place] = bad
        assert not sync.finite(tensor)
    assert sync.finite(torch.empty(0, dtype=dtype))
