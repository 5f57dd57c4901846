"""The cache of a CUDA decode step, read as its kernels read it, against rows that decode one at a time."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_engine import EOS, LLAMA, VOCABULARY, WINDOWED, alone, make, reference

import rl.rollouts  # noqa: F401  binds BLAS before mlx loads

import mlx.core as mx  # isort: skip

from rl.rollouts import cache, forward, grouped, kernels, lent, load, parted
from rl.rollouts import engine as engines
from rl.rollouts.engine import Engine
from rl.rollouts.result import Sampling
from rl.rollouts.transfer import to_mlx


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("llama")
    return make(folder, LLAMA), load.load_sampler(folder)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("windowed")
    return make(folder, WINDOWED), load.load_sampler(folder)


def hidden_states(model: Any, token_B: mx.array, position_B: mx.array, prompts: Any, rings: Any, *rest: Any) -> Any:
    """What `kernels.hidden_states` gives, by torch, a row at a time; rings are written in place likewise."""
    spans, column = rest
    at = int(column.item())

    def attend(layer: int, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        q, *new = (x[:, :, 0] for x in lent.view(queries, keys, values))
        prompt, ring = lent.view(*prompts[layer]), lent.view(*rings[layer])
        for own, fresh in zip(ring, new, strict=True):
            own[:, :, at] = fresh
        out = q.new_zeros(q.shape)
        for row, group, first, end, back in np.array(spans[layer]):
            columns = (at - np.arange(back)) % ring[0].shape[2]
            pairs = zip(prompt, ring, strict=True)
            k, v = (np.concatenate([a[group, :, first:end], b[row][:, columns]], axis=1) for a, b in pairs)
            own_q = q[row].reshape(k.shape[0], -1, k.shape[2])
            weights = (scale * own_q @ q.new_tensor(k).transpose(1, 2)).softmax(-1)
            out[row] = (weights @ q.new_tensor(v)).reshape(out[row].shape)
        return to_mlx(out[:, :, None])

    return forward.hidden_states(model, token_B[:, None], position_B, attend)[:, -1]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "usable", lambda model: True)
    monkeypatch.setattr(kernels, "hidden_states", hidden_states)


@pytest.mark.parametrize("family", ["llama", "windowed"])
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    shared=st.integers(0, 5),
    group=st.integers(1, 3),
    eos=st.lists(st.integers(0, 60), min_size=1, max_size=12, unique=True),
    seed=st.integers(0, 2**32 - 1),
    max_batch=st.sampled_from([1, 2, 3, 256]),
    tokens=st.sampled_from([21, 40, 60, None]),
    look_every=st.sampled_from([1, 3]),
    step=st.sampled_from([2, 64]),
    fixed=st.booleans(),
)
def test_a_completion_does_not_depend_on_its_neighbours(
    request: pytest.FixtureRequest,
    family: str,
    lengths: list[int],
    shared: int,
    group: int,
    eos: list[int],
    seed: int,
    max_batch: int,
    tokens: int | None,
    look_every: int,
    step: int,
    fixed: bool,
) -> None:
    """Any batch, order, refill, memory bound, shrinking and look: the tokens of each row decoded by itself and the
    trainer's logprobs. Traps: a row keeps its group's number when groups move; a ring that has grown or come around;
    a row sees what the row before it in its place has drawn."""
    model, sampler = request.getfixturevalue(family)
    generator = np.random.default_rng(seed)
    start = generator.integers(0, VOCABULARY, shared).tolist()
    prompts = [start + generator.integers(0, VOCABULARY, n).tolist() for n in lengths]
    prompts = [prompts[i] for i in generator.permutation(np.repeat(np.arange(len(prompts)), group))]
    tokens = 60 if tokens is not None and max(map(len, prompts)) + shared + 7 > tokens else tokens
    with pytest.MonkeyPatch.context() as here:
        here.setattr(cache, "RING_STEP", step)
        engine = Engine(sampler, eos, max_batch=max_batch, max_batch_tokens=tokens, grouped=False, compiled=fixed)
        engine.look_every = look_every
        engine.step = lambda sampling, layout: engines.step_of(sampler, layout, sampling)
        done = engine.generate(prompts, Sampling(), max_tokens=7, seed=seed)
    for row, (prompt, completion) in enumerate(zip(prompts, done, strict=True)):
        assert completion.tokens == alone(sampler, prompt, row, seed, Sampling(), eos)
        np.testing.assert_allclose(completion.logprobs, reference(model, prompt, completion.tokens), atol=2e-4)


def test_a_prompt_counts_once_in_max_batch_tokens(llama: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: counted once a row, fewer rows than there is room for."""
    held: list[tuple[int, int]] = []
    real = parted.Parted.arrays

    def arrays(self: parted.Parted) -> Any:
        out = real(self)
        held.append(tuple(out[name][0][0].shape[0] * out[name][0][0].shape[2] for name in ("prompt", "ring")))
        return out

    monkeypatch.setattr(parted.Parted, "arrays", arrays)
    monkeypatch.setattr(cache, "RING_STEP", 4)
    prompts = [[i] * 20 for i in range(3, 9) for _ in range(6)]
    engine = Engine(llama[1], [EOS], max_batch_tokens=100, grouped=False, compiled=False)
    assert len(engine.generate(prompts, Sampling(), max_tokens=8, seed=3)) == len(prompts)
    assert max(ring for _, ring in held) >= 8 * 6
    assert max(map(sum, held)) <= 100


def test_rows_of_a_prompt_stand_together() -> None:
    """Wherever they lie, and idle ones last. Trap: a block of rows of many prompts reads all of them."""
    layout = parted.Parted(20)
    layout.group = np.array([2, 0, 1, 0, 2, 1, 0])
    length_B, age_T_B = np.array([5, 9, 0, 9, 5, 7, 9]), np.array([[0, 3, 8, 30, 2, 1, 3], [1, 4, 9, 31, 3, 2, 4]])
    whole, near = layout.seen([None, 4], length_B, age_T_B, np.arange(2), 1)
    assert whole.dtype == near.dtype == np.int32
    assert np.array(whole[0]).tolist() == [
        [1, 0, 0, 9, 4], [3, 0, 0, 9, 20], [6, 0, 0, 9, 4], [5, 1, 0, 7, 2], [0, 2, 0, 5, 1], [4, 2, 0, 5, 3],
        [2, 1, 0, 0, 1],
    ]  # fmt: skip
    assert np.array(near[1])[:, 2:].tolist() == [
        [10, 9, 4], [37, 9, 4], [10, 9, 4], [6, 7, 3], [3, 5, 2], [5, 5, 4], [6, 0, 1],
    ]  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.integers(0, 2**31 - 1))
def test_what_is_packed_for_the_card_is_there_again(steps: int, rows: int, kinds: int, seed: int) -> None:
    """Both ways, bit for bit. Trap: floats that are counted as integers are other numbers."""
    generator = np.random.default_rng(seed)
    column_T = generator.integers(0, 500, steps)
    position_T_B = generator.integers(0, 9_000, (steps, rows))
    seen = [generator.integers(0, 700, (steps, rows, 5)).astype(np.int32) for _ in range(kinds)]
    uniforms_T_B_2 = generator.random((steps, rows, 2), np.float32)
    packed = mx.array(parted.pack(position_T_B, seen, column_T, uniforms_T_B_2))
    assert packed.dtype == mx.int32
    position, spans, column, uniforms = parted.unpack(packed, kinds)
    pairs = [(position, position_T_B), (column, column_T), (uniforms, uniforms_T_B_2)]
    for found, told in [*pairs, *zip(spans, seen, strict=True)]:
        assert np.array_equal(np.array(found), told)
    drawn = [(position[t, :] + t, -uniforms[t, :, 0] * 1e3, uniforms[t, :, 1] < 0.5) for t in range(steps)]
    for found, told in zip(parted.unpack_drawn(np.array(parted.pack_drawn(drawn))), drawn, strict=True):
        assert [one.dtype for one in found] == [np.int32, np.float32, bool]
        assert all(np.array_equal(one, np.array(other)) for one, other in zip(found, told, strict=True))


@pytest.mark.parametrize("usable", [True, False])
def test_which_layout_a_model_is_given(usable: bool, llama: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One that any operation reads where the kernels may not decode."""
    monkeypatch.setattr(kernels, "usable", lambda model: usable)
    assert parted.layout_of(llama[1], grouped=False) is (parted.Parted if usable else cache.Joined)
    assert parted.layout_of(llama[1], grouped=True) is grouped.Grouped
