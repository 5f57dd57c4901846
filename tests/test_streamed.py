"""The kernels of a large model's decode step on CUDA, run thread by thread on a CPU (tests/cuda_on_cpu.hpp)."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from kernels_helper import compiler
from test_kernels import (  # noqa: F401  fixtures
    SMALL,
    THETA,
    adapters,
    as_on_cuda,
    exact,
    libraries,
    linears,
    normal,
    reference,
    same_but_for_rounding,
    sampler,
)
from transformers import LlamaConfig

import rl.rollouts  # noqa: F401  binds BLAS before mlx loads

import mlx.core as mx  # isort: skip
import mlx.nn as nn

from rl.rollouts import kernels, streamed
from rl.rollouts.engine import Engine
from rl.rollouts.result import Sampling
from rl.rollouts.streamed import Shape

pytestmark = pytest.mark.skipif(compiler is None, reason="no C++ compiler, which runs the kernels here")


@pytest.mark.parametrize(
    ("shape", "sizes", "ranks", "rows", "gated"),
    [
        (Shape(1, 4, 2, 3), [64, 64], [0, 0], 9, False),
        (Shape(2, 2, 8, 4), [64, 64], [4, 0], 71, False),
        (Shape(3, 1, 8, 2), [96, 48], [0, 0], 33, False),
        (Shape(1, 4, 8, 4), [64, 64], [4, 20], 64, True),
        (Shape(2, 4, 2, 4), [128, 128], [0, 4], 16, True),
        (Shape(1, 2, 4, 5), [64, 64], [4, 12], 25, True),
    ],
    ids=str,
)
def test_weights_stream(
    shape: Shape,
    sizes: list[int],
    ranks: list[int],
    rows: int,
    gated: bool,
    as_on_cuda: None,  # noqa: F811
) -> None:
    """Against float64, for each way to share out a block's work, and the same bits each time. Traps: a chunk is read
    before it has come, or after the next has; rows that are not there; up's product taken with gate's adapter."""
    one = linears(512, sizes, ranks, bias=True)
    x = normal(rows, 512)
    found, again = (streamed.product(one, x, shape, gated=gated) for _ in range(2))
    expected = reference(one, x, norm=None, gated=gated, more=None)
    assert np.abs(exact(found) - expected).max() < 0.015 * np.abs(expected).max()
    assert mx.array_equal(found, again)


@pytest.mark.parametrize(
    ("shape", "outputs", "rank", "rows"),
    [(Shape(2, 2, 8, 2, 4), 128, 0, 33), (Shape(2, 4, 8, 3, 2), 128, 12, 71), (Shape(1, 4, 2, 3, 4), 2304, 20, 3)],
    ids=str,
)
def test_parts_are_added_up(
    shape: Shape,
    outputs: int,
    rank: int,
    rows: int,
    as_on_cuda: None,  # noqa: F811
) -> None:
    """With adapter, bias, what went in, and the norm. Traps: a part left out; A's sums taken for outputs; more outputs
    than a block has threads for."""
    one = linears(1024, [outputs], [rank], bias=True)
    x, more, norm = normal(rows, 1024), normal(rows, outputs), nn.RMSNorm(outputs)
    norm.weight = 1 + normal(outputs) / 8
    out, normed = streamed.finish(one, streamed.product(one, x, shape), more, norm)
    expected = reference(one, x, norm=None, gated=False, more=more)
    assert np.abs(exact(out) - expected).max() < 0.015 * np.abs(expected).max()
    scale = 1 / np.sqrt((expected**2).mean(1, keepdims=True) + norm.eps)
    expected = expected * scale * exact(norm.weight)
    assert np.abs(exact(normed) - expected).max() < 0.015 * np.abs(expected).max()


def test_copies_may_come_at_once(
    as_on_cuda: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The CPU's copies are done when they are waited for; here as soon as they are asked for. Trap: a chunk that is
    asked for over one that is still read."""
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **how: run([*command, "-DCOPIES_AT_ONCE"], **how))
    one, x = linears(512, [64, 64], [4, 0]), normal(20, 512)
    found = streamed.product(one, x, Shape(1, 2, 8, 2))
    expected = reference(one, x, norm=None, gated=False, more=None)
    assert np.abs(exact(found) - expected).max() < 0.015 * np.abs(expected).max()


def test_which_products_stream() -> None:
    """Large ones of weights as they are, whose layers whole blocks fit."""

    def shape(inputs: int, sizes: list[int], *, rank: int = 0, rows: int = 64, **kind: bool) -> Shape | None:
        one = linears(64, [64], [0])
        one.sizes, one.rank = sizes, rank
        one.state = {"weight": mx.zeros((sum(sizes), inputs), mx.bfloat16)}
        return streamed.shape_of(one, rows, **kind)

    assert shape(576, [1536, 1536], gated=True) is None
    assert shape(2048, [2048] * 3) == Shape(1, 2, 8, 4)
    assert shape(2048, [2048] * 3, rows=16) == Shape(1, 2, 2, 8)
    assert shape(2048, [8192] * 2, gated=True, rank=32).warps == 4
    assert shape(2048, [2048], parts=True).split == 4
    assert shape(8192, [2048], parts=True).split == 8
    assert shape(2048, [8192, 8208]) is None
    assert shape(2048 + 64, [8192]) is None
    assert shape(2048, [2048] * 3, rank=48) is None
    codes = linears(2048, [1024], [0], bits=8)
    assert streamed.shape_of(codes, 64) is None


@pytest.fixture
def model(tmp_path: Path, as_on_cuda: None, monkeypatch: pytest.MonkeyPatch) -> nn.Module:  # noqa: F811
    """One whose products count as large."""
    monkeypatch.setattr(streamed, "LARGE", 0)
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 16}
    return sampler(tmp_path, LlamaConfig(**SMALL | sizes, rope_parameters=THETA), size=0.1)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_large_model_decodes_as_by_operations(
    adapted: bool, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token, through refill. Trap: the last layer's norm, which is the model's."""
    if adapted:
        adapters(model, 4, ("q_proj", "o_proj", "up_proj", "down_proj"), size=0.05)
    same_but_for_rounding(model, monkeypatch)
    assert streamed.chosen(model)


def test_a_kernel_that_is_wrong_is_not_used(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The other kernels go on."""
    finish = streamed.finish
    monkeypatch.setattr(streamed, "finish", lambda *given: [1.1 * out for out in finish(*given)])
    assert Engine(model, [60], grouped=False, compiled=False).generate([[3]], Sampling(), max_tokens=2)[0].finite
    assert not streamed.chosen(model)
    assert kernels.usable(model)
    assert "down of 71 rows" in caplog.text
