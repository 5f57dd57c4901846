"""The guard's look at all values at once."""

import math

import pytest
import torch

from rl.algorithms import guard

BAD = [math.nan, math.inf, -math.inf]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tried_anew() -> None:
    guard._maximum_tells.cache_clear()


@pytest.mark.parametrize("by", ["each value", "a maximum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", BAD)
def test_one_bad_value_is_seen_wherever_it_is(
    bad: float, dtype: torch.dtype, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap: a NaN gradient is stepped into the weights while every metric stays calm."""
    monkeypatch.setattr(guard, "BY_MAXIMUM", {"cpu"} if by == "a maximum" else set())
    sizes = [(3,), (1,), (0, 4), (70, 1100), (16, 9)]
    tensors = [torch.randn(size).to(dtype) for size in sizes] + [torch.full((5,), torch.finfo(dtype).max, dtype=dtype)]
    assert guard._finite([*tensors, torch.ones(2)])  # of another type
    for tensor in (t for t in tensors if t.numel()):
        values = tensor.view(-1)
        for place in {0, len(values) // 2, len(values) - 1}:
            before = values[place].clone()
            values[place] = bad
            assert not guard._finite(tensors)
            values[place] = before
    assert guard._finite(tensors)
    assert guard._finite([])


@pytest.mark.parametrize("wrong", ["NaN is passed over", "the largest overflows", "only the first tensor"])
def test_a_maximum_that_does_not_tell_is_not_asked(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, asked = guard._maximum, []

    def maximum(tensors: list[torch.Tensor]) -> float:
        asked.append(len(tensors))
        if wrong == "NaN is passed over":
            return right([t.nan_to_num(0.0, math.inf, -math.inf) for t in tensors])
        return 1e300 * right(tensors) if wrong == "the largest overflows" else right(tensors[:1])

    assert guard._maximum_tells(CPU, torch.float32)
    assert not guard._maximum_tells(CPU, torch.int64)
    guard._maximum_tells.cache_clear()
    monkeypatch.setattr(guard, "_maximum", maximum)
    monkeypatch.setattr(guard, "BY_MAXIMUM", {"cpu"})
    assert not guard._maximum_tells(CPU, torch.float32)
    trials = len(asked)
    assert not guard._finite([torch.ones(4), torch.tensor([1.0, math.nan])])
    assert guard._finite([torch.ones(4)])
    assert len(asked) == trials  # tried once, and left


@pytest.mark.skipif(not torch.cuda.is_available(), reason="of CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_cuda_s_maximum_tells(dtype: torch.dtype) -> None:
    assert guard._maximum_tells(torch.device("cuda", 0), dtype)
