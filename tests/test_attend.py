"""Attention of a CUDA decode step, run thread by thread on a CPU, gives what float64 gives."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from kernels_helper import compiler, cuda_kernel

import rl.rollouts  # noqa: F401  binds BLAS before mlx loads

import mlx.core as mx  # isort: skip
import mlx.nn as nn

from rl.rollouts import device, kernels

pytestmark = pytest.mark.skipif(compiler is None, reason="no C++ compiler, which runs the kernels here")

COLUMNS = 24  # of a ring


@dataclass
class Batch:
    """What one call reads: `spans` (B, 5) in any order of the rows."""

    module: nn.Module
    qkv: mx.array
    turn_B_D: mx.array
    prompt: tuple[mx.array, mx.array]
    ring: tuple[mx.array, mx.array]
    spans: np.ndarray
    at: int


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "attend"
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr(device, "cuda_kernel", partial(cuda_kernel, folder))
    kernels._attend.cache_clear()


def block(monkeypatch: pytest.MonkeyPatch, rows: int, at_once: int = 1, warps: int = 2) -> None:
    """So many rows a block, pieces of 16 keys at once, and warps."""
    monkeypatch.setattr(kernels, "_shares", lambda *_: (rows, at_once, warps))


def normal(generator: np.random.Generator, *shape: int) -> mx.array:
    return mx.array(generator.standard_normal(shape).astype(np.float32)).astype(mx.bfloat16)


def exact(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32), np.float64)


def batch(
    groups: list[int], heads: int = 4, kv_heads: int = 2, width: int = 32, *, norm: bool = False, at: int = 13
) -> Batch:
    """Random rows of these prompts: each sees most of its prompt of up to 40 keys, and some columns back."""
    generator = np.random.default_rng(len(groups) + heads + width)
    rows, length = len(groups), 40
    module = nn.Module()
    module.n_heads, module.n_kv_heads, module.scale = heads, kv_heads, width**-0.5
    if norm:
        module.q_norm, module.k_norm = nn.RMSNorm(width, 1e-3), nn.RMSNorm(width, 1e-3)
        for one in (module.q_norm, module.k_norm):
            one.weight = 1 + normal(generator, width) / 4
    angles = generator.uniform(0, 6, (rows, width // 2))
    turn = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    end = generator.integers(1, length + 1, max(groups) + 1)[groups]
    back = generator.integers(1, COLUMNS + 1, rows)
    return Batch(
        module,
        normal(generator, rows, (heads + 2 * kv_heads) * width),
        mx.array(turn),
        tuple(normal(generator, max(groups) + 1, kv_heads, length, width) for _ in range(2)),
        tuple(normal(generator, rows, kv_heads, COLUMNS, width) for _ in range(2)),
        np.stack([np.arange(rows), groups, np.zeros(rows, int), end, back], axis=1),
        at,
    )


def reference(given: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(B, heads × D) in float64, and the rings with the new keys and values, (B, kv_heads, D) each."""
    module, qkv = given.module, exact(given.qkv)
    heads, kv_heads, width = module.n_heads, module.n_kv_heads, given.turn_B_D.shape[1]
    every = qkv.reshape(len(qkv), -1, width)
    queries, keys, values = np.split(every, [heads, heads + kv_heads], axis=1)
    turn = np.array(given.turn_B_D, np.float64)[:, None]
    cosine, sine = turn[..., : width // 2], turn[..., width // 2 :]

    def turned(x: np.ndarray, name: str) -> np.ndarray:
        if name in module:
            own = module[name]
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + own.eps) * exact(own.weight)
        left, right = np.split(x, 2, axis=-1)
        return np.concatenate([left * cosine - right * sine, right * cosine + left * sine], axis=-1)

    queries, keys = turned(queries, "q_norm"), turned(keys, "k_norm")
    ring_k, ring_v = (exact(a) for a in given.ring)
    prompt_k, prompt_v = (exact(a) for a in given.prompt)
    ring_k[:, :, given.at], ring_v[:, :, given.at] = keys, values
    out = np.zeros((len(qkv), heads, width))
    for row, group, first, end, back in given.spans:
        columns = (given.at - np.arange(back)) % ring_k.shape[2]
        for head in range(heads):
            kv = head // (heads // kv_heads)
            k = np.concatenate([prompt_k[group, kv, first:end], ring_k[row, kv, columns]])
            v = np.concatenate([prompt_v[group, kv, first:end], ring_v[row, kv, columns]])
            scores = k @ queries[row, head] * module.scale
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ v / weights.sum()
    return out.reshape(len(qkv), -1), keys, values


def call(given: Batch) -> np.ndarray:
    spans, at = mx.array(given.spans.astype(np.int32)), mx.array(given.at, mx.int32)
    mx.eval(given.ring)
    out = kernels.attend(given.module, given.qkv, given.turn_B_D, given.prompt, given.ring, spans, at)
    return exact(out)


def check(given: Batch) -> None:
    """Up to bfloat16's rounding; nothing but the new column of the rings has changed."""
    before = [exact(a) for a in given.ring]
    expected, *new = reference(given)
    found = call(given)
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    for after, old, own in zip(given.ring, before, new, strict=True):
        old[:, :, given.at] = exact(after)[:, :, given.at]
        np.testing.assert_array_equal(exact(after), old)
        np.testing.assert_allclose(exact(after)[:, :, given.at], own, atol=0.03)


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("groups", [[0] * 8, list(range(8)), [0, 1, 0, 2, 1, 0, 0, 3, 2], [1, 1, 1, 0, 0]], ids=str)
def test_rows_of_any_prompts_share_a_block(groups: list[int], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traps: a prompt is read for the first of its rows only; rows of one prompt with another between them; the last
    block's rows that are not there."""
    block(monkeypatch, rows)
    check(batch(groups))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "norm", "rows", "at_once"),
    [
        (9, 3, 64, False, 2, 1),
        (9, 3, 64, True, 5, 2),
        (4, 4, 64, False, 8, 2),
        (4, 4, 64, False, 16, 1),
        (16, 2, 128, False, 1, 1),
        (16, 2, 128, True, 2, 1),
        (8, 2, 32, True, 4, 2),
        (12, 1, 32, False, 1, 1),
        (2, 1, 256, True, 4, 1),
    ],
)
def test_each_shape_of_heads(
    heads: int, kv_heads: int, width: int, norm: bool, rows: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traps: columns of a product that are nobody's query; more queries than one product takes; two blocks that share
    keys, so that one may read the new column before the other has written it."""
    block(monkeypatch, rows, at_once)
    check(batch([0, 0, 1, 0, 1, 1, 2, 2, 2, 2], heads, kv_heads, width, norm=norm))


@pytest.mark.parametrize("warps", [1, 4, 8])
def test_warps_that_find_nothing_to_do(warps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: the largest score of no key at all."""
    block(monkeypatch, 2, 2, warps)
    given = batch([0, 0, 1])
    given.spans[:, 3:] = [[1, 1], [1, 2], [3, 1]]
    check(given)


def test_rows_may_stand_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `spans` gives them. Trap: a row's number taken for its place among them."""
    block(monkeypatch, 4)
    given = batch([0, 1, 0, 2, 1, 0, 0, 2, 2])
    given.spans = given.spans[np.random.default_rng(0).permutation(9)]
    check(given)


@pytest.mark.parametrize("at", [0, 5, 23])
def test_a_window_sees_the_end_of_the_prompt(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row another part of one prompt, or none of it; rings that have come around or not. Traps: a key that one row
    of the block sees given to all; a ring read on where it ends."""
    block(monkeypatch, 8)
    given = batch([0] * 8, at=at)
    given.spans[:, 2] = [30, 3, 0, 38, 0, 17, 40, 40]
    given.spans[:, 3] = [33, 40, 12, 40, 5, 40, 40, 40]
    given.spans[:, 4] = [1, 24, 23, 20, 2, 16, 17, 5]
    check(given)


def test_an_idle_row_reads_its_own_token_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever prompt. Trap: where it comes first, the others' keys are as few as its own."""
    block(monkeypatch, 4)
    given = batch([0, 0, 1, 1, 0, 1])
    given.spans[[0, 2, 4], 2:] = 0, 0, 1
    check(given)


def test_what_is_no_number_stays_with_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a key or in a value, also where nobody sees it. Traps: zero times it is none either, in all columns of a
    product; the larger of it and a number is the number, and the row looks sound."""
    block(monkeypatch, 8)
    given = batch([0, 0, 1, 1, 2, 2, 2, 2])
    given.spans[:, 3], given.spans[:, 4] = [12, 12, 9, 9, 5, 5, 5, 5], [3, 4, 5, 6, 7, 3, 4, 5]
    expected, *_ = reference(given)
    for part in (*given.prompt, *given.ring):
        part[:, :, 20:] = mx.nan
        part[:, :, 14:16] = mx.nan
    (prompt_k, prompt_v), (ring_k, ring_v) = given.prompt, given.ring
    prompt_k[0, :, 20:], prompt_v[1, :, 3] = 0, mx.nan
    ring_k[5, :, 12], ring_v[7, :, 11] = mx.nan, mx.nan
    found = call(given)
    broken = np.isnan(found).any(1)
    assert broken.tolist() == [False, False, True, True, False, True, False, True]
    assert np.abs(found - expected)[~broken].max() < 0.02 * np.abs(expected).max()


def test_which_blocks_a_gpu_is_given() -> None:
    """Enough to keep it busy, of as many rows as share a product."""
    assert kernels._shares(64, 32, 1, 64) == (8, 1, 8)
    assert kernels._shares(16, 32, 1, 64) == (4, 2, 8)
    assert kernels._shares(64, 3, 3, 64) == kernels._shares(64, 2, 8, 128) == (1, 1, 8)
    assert kernels._shares(16, 3, 3, 64) == (1, 2, 8)
    assert [kernels._together(n) for n in (1, 3, 4, 7, 8, 12)] == [1, 3, 4, 7, 8, 6]
