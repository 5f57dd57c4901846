"""A CPU's decode step by torch gives what transformers gives, follows every sync, and holds nothing afterwards."""

import os
import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_families import FAMILIES, make
from test_sync import LORA, VOCABULARY, policy_of, sampler_of, shake

import rl.rollouts  # noqa: F401  binds BLAS before mlx loads

import mlx.core as mx  # isort: skip

from rl import config, models
from rl.rollouts import fused, lent, load, parity, sampling, torch_step
from rl.rollouts.engine import Engine
from rl.rollouts.result import Sampling

PROMPTS = [[3, 9, 20, 41, 7, 7, 13], [3, 9, 20, 41, 7, 7, 13], [3, 9]]

# prints how many threads there are before a LoRA policy is checked and sampled from, after that, and after a product
# that is left to MLX
COUNT = """
import os, sys
from pathlib import Path
from conftest import _make_config
from test_sync import LORA, policy_of, sampler_of, shake
import mlx.core as mx, torch
from rl import models
from rl.rollouts.result import Sampling
base = models.resolve_base(_make_config("tiny"), Path(sys.argv[1]))
policy, sampler = policy_of(base, LORA), sampler_of(base.path)
shake(policy)
x = mx.ones((256, 256))
mx.eval(x + torch.from_dlpack(x).matmul(torch.ones(256, 256)).sum().item())
for work in (
    lambda: None,
    lambda: (sampler.sync(policy), sampler.check(policy, 17), sampler.generate([[3] * 99], Sampling(), max_tokens=9)),
    lambda: mx.eval(x @ x),
):
    work()
    print(len(os.listdir("/proc/self/task")))
"""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A mark for each step that torch made."""
    found: list[int] = []
    right = torch_step.logits
    monkeypatch.setattr(torch_step, "logits", lambda *inputs: found.append(1) or right(*inputs))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gives_the_logprobs_of_transformers(family: str, tmp_path: Path, calls: list[int]) -> None:
    """Biases, grouped keys, windows, layers without RoPE, Gemma's norms and GELU; rows that come later."""
    model = make(tmp_path, FAMILIES[family])
    sampler = load.load_sampler(tmp_path)
    fused.fuse(sampler)
    engine = Engine(sampler, [60], max_batch=2)
    for prompt, done in zip(PROMPTS, engine.generate(PROMPTS, Sampling(), max_tokens=12, seed=4), strict=True):
        (forced,) = parity.trainer_logprobs(model, [prompt + done.tokens])
        np.testing.assert_allclose(done.logprobs, forced[len(prompt) - 1 :], atol=1e-4)
    assert calls


@pytest.mark.parametrize("lora", [None, LORA, config.Lora(rank=3, alpha=4.0, targets=("q_proj", "up_proj"))])
def test_after_a_step_the_sampler_follows_the_trainer(
    tiny_base: models.Base, lora: config.Lora | None, calls: list[int]
) -> None:
    """Trap: tensors over the old arrays would stay at the first sync without a word."""
    policy, sampler = policy_of(tiny_base, lora), sampler_of(tiny_base.path)
    sampler.engine = Engine(sampler.model, [VOCABULARY])
    prompts = [[3, 4, 5], [3, 4, 5], [6]]
    for _ in range(2):
        shake(policy)
        sampler.sync(policy)
        for prompt, completion in zip(prompts, sampler.generate(prompts, Sampling(), max_tokens=4), strict=True):
            (forced,) = parity.trainer_logprobs(policy, [prompt + completion.tokens])
            np.testing.assert_allclose(completion.logprobs, forced[len(prompt) - 1 :], atol=2e-4)
    assert calls


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_held_after_a_rollout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """A sync that follows would find the old weights beside the new."""
    make(tmp_path, FAMILIES["llama"])
    sampler = load.load_sampler(tmp_path)
    fused.fuse(sampler)
    held: list[Any] = []
    right = torch_step.logits

    def step(weights: Any, *given: Any) -> torch.Tensor:
        held.append(weakref.ref(weights))
        if fails:
            raise RuntimeError("no")
        return right(weights, *given)

    monkeypatch.setattr(torch_step, "logits", step)
    with pytest.raises(RuntimeError, match="no") if fails else nullcontext():
        Engine(sampler, [60]).generate(PROMPTS, Sampling(), max_tokens=4)
    assert held[0]() is None


def test_other_models_go_the_other_way(tmp_path: Path, calls: list[int]) -> None:
    make(tmp_path, FAMILIES["llama"])
    sampler = load.load_sampler(tmp_path, "bfloat16")
    fused.fuse(sampler)
    assert Engine(sampler, [60]).generate(PROMPTS, Sampling(), max_tokens=4)[0].finite
    assert not calls


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc, of a BLAS that Linux shares")
def test_mlx_asks_for_no_workers_of_its_own(tmp_path: Path) -> None:
    """Trap: one small product of MLX's halves the speed of all that torch computes after it."""
    here = Path(__file__).parent
    env = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join((str(here.parent), str(here)))}
    done = subprocess.run([sys.executable, "-c", COUNT, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after, product = map(int, done.stdout.split()[-3:])
    if product == before:
        pytest.skip("MLX's products have no workers here")
    assert after == before


@pytest.mark.parametrize("size", [17, 61, 4096, 49152 // 8])
@pytest.mark.parametrize(
    "how",
    [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(temperature=0.0),
        Sampling(top_p=0.9),
        Sampling(top_k=5),
        Sampling(min_p=0.1),
    ],
)
def test_a_token_is_drawn_as_mlx_draws_it(how: Sampling, size: int) -> None:
    """From the same numbers, but for a number that falls between two roundings; a row that is not finite is said."""
    uniforms = sampling.uniforms_for(0, 1, np.arange(64), 1)[:, 0]
    logits = torch.randn(64, size, generator=torch.Generator().manual_seed(size)) * 3
    logits[7, 3] = float("nan")
    tokens, logprobs, finite = torch_step.sample(logits, uniforms, how)
    expected = (np.array(x) for x in sampling.sample(mx.array(logits.numpy()), mx.array(uniforms), how))
    wanted_tokens, wanted_logprobs, wanted_finite = expected
    np.testing.assert_array_equal(finite, wanted_finite)
    np.testing.assert_array_equal(np.flatnonzero(~finite), [7])
    same = (tokens == wanted_tokens) & finite
    assert same.sum() >= 62
    np.testing.assert_allclose(logprobs[same], wanted_logprobs[same], atol=5e-5)  # MLX sums in another order
    scaled = logits.double() / (how.temperature or 1.0)
    if not how.filtered:
        exact = scaled.log_softmax(-1)[torch.arange(64), torch.from_numpy(tokens).long()].numpy()
        np.testing.assert_allclose(logprobs[finite], exact[finite], atol=1e-5)


@pytest.mark.parametrize("rows", [1, 16])
def test_onednn_multiplies_as_exactly_as_torch(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64. Trap: a private operator may come to mean something else."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((rows, 192), (512, 192), (512,)))
    exact = x.double() @ weight.double().T + bias.double()
    assert weight.numel() >= lent.SMALL
    found = lent.linear(x, weight, bias)
    assert (found - exact).abs().max() < 1e-4
    monkeypatch.setattr(lent, "ONEDNN", False)
    assert (lent.linear(x, weight, bias) - found).abs().max() < 1e-4
