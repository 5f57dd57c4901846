"""Products made as one give what the layers give one by one, and follow what becomes of these."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_families import FAMILIES, make
from test_sync import LORA, VOCABULARY, policy_of, sampler_of, shake

import rl.rollouts  # noqa: F401  binds BLAS before mlx loads

import mlx.core as mx  # isort: skip
import mlx.nn as nn

from rl import config, models
from rl.rollouts import attention, bench, device, fused, load, parity, quantized, sync
from rl.rollouts.engine import Engine
from rl.rollouts.result import Sampling

PROMPTS = [[3, 9, 20, 41, 7, 7, 13], [3, 9, 20, 41, 7, 7, 13], [3, 9]]


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is done by torch, and attention is taken apart."""
    monkeypatch.setattr(device, "torch_is_faster", lambda: False)
    monkeypatch.setattr(device, "masks_fused_attention", lambda: False)
    monkeypatch.setattr(attention, "kernel_works", lambda: False)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gives_the_logprobs_of_transformers(family: str, tmp_path: Path, as_on_cuda: None) -> None:
    """Biases, grouped keys, heads of their own width, norms of queries and keys, layers without RoPE, GELU."""
    model = make(tmp_path, FAMILIES[family])
    sampler = load.load_sampler(tmp_path)
    fused.fuse(sampler)
    assert fused.of(sampler) is not None
    assert parity.compare(model, sampler, parity.probe(61, (5, 9, 14, 25))).largest < 1e-4
    engine = Engine(sampler, [60], grouped=False, compiled=False, max_batch=2)
    for prompt, done in zip(PROMPTS, engine.generate(PROMPTS, Sampling(), max_tokens=12, seed=4), strict=True):
        (forced,) = parity.trainer_logprobs(model, [prompt + done.tokens])
        np.testing.assert_allclose(done.logprobs, forced[len(prompt) - 1 :], atol=1e-4)


@pytest.mark.parametrize("lora", [None, LORA, config.Lora(rank=3, alpha=4.0, targets=("q_proj", "up_proj"))])
def test_after_a_step_the_sampler_follows_the_trainer(
    tiny_base: models.Base, lora: config.Lora | None, as_on_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap: copies of the weights, or a compiled step that closed over them, would stay at the first sync without a
    word. An adapter on some of the layers of a product leaves the others as they are."""
    policy, sampler = policy_of(tiny_base, lora), sampler_of(tiny_base.path)
    sampler.engine = Engine(sampler.model, [VOCABULARY], grouped=False, compiled=True)
    prompts = [[3, 4, 5], [3, 4, 5], [6]]
    for _ in range(2):
        shake(policy)
        sampler.sync(policy)
        done = sampler.generate(prompts, Sampling(), max_tokens=4)
        for prompt, completion in zip(prompts, done, strict=True):
            (forced,) = parity.trainer_logprobs(policy, [prompt + completion.tokens])
            np.testing.assert_allclose(completion.logprobs, forced[len(prompt) - 1 :], atol=2e-4)
    before = parity.compare(policy, sampler.model, parity.probe(VOCABULARY))
    assert before.largest < 2e-4
    sampler.model.model.layers[1].mlp.down_proj = nn.Linear(
        *reversed(weight_of(sampler, "down_proj").shape), bias=False
    )
    assert parity.compare(policy, sampler.model, parity.probe(VOCABULARY)).mean > 1e-3  # not only a sync is noticed


def weight_of(sampler: Any, name: str) -> mx.array:
    layer = sampler.model.model.layers[1].mlp[name]
    return (layer.linear if "lora_a" in layer else layer).weight


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_a_shared_base_are_fused_as_they_are(
    tiny_base: models.Base, tmp_path: Path, bits: int, as_on_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of codes lie along the inputs, so rows of several layers are one quantized weight as they are."""
    quantized.build(tiny_base.path, None, bits, 32, tmp_path / "q", source=tiny_base.sha256)
    monkeypatch.setattr(device, "keeps_packed_weights", lambda: True)
    shared = models.Base("q", tmp_path / "q", "")
    policy = policy_of(shared, LORA)
    sampler = sampler_of(shared.path, "shared")
    plain = load.load_sampler(shared.path, packed=True)
    first = fused.of(sampler.model).layers[0].qkv.state
    parts = [plain.model.layers[0].self_attn[name] for name in ("q_proj", "k_proj", "v_proj")]
    for name in ("weight", "scales", "biases"):
        np.testing.assert_array_equal(np.array(first[name]), np.concatenate([np.array(p[name]) for p in parts]))
    shake(policy)
    sampler.sync(policy)
    assert parity.compare(policy, sampler.model, parity.probe(VOCABULARY)).largest < 2e-4


def test_weights_are_held_once(tiny_base: models.Base, as_on_cuda: None) -> None:
    """A layer's weight is a view into the product's, also after a sync has brought new arrays."""
    policy, sampler = policy_of(tiny_base), sampler_of(tiny_base.path)
    for _ in range(2):
        whole = np.array(fused.of(sampler.model).layers[0].gate_up.state["weight"], copy=False)
        mlp = sampler.model.model.layers[0].mlp
        for name in ("gate_proj", "up_proj"):
            part = np.array(mlp[name].weight, copy=False)
            begin = part.ctypes.data - whole.ctypes.data
            assert 0 <= begin < whole.nbytes
        shake(policy)
        sampler.sync(policy)


def test_layers_of_several_kinds_are_left_alone(tiny_base: models.Base) -> None:
    """Some layers in higher precision than their neighbours are no one array."""
    model = load.load_sampler(tiny_base.path)
    nn.quantize(model, group_size=32, bits=8, class_predicate=lambda path, module: path.endswith("q_proj"))
    fused.fuse(model)
    assert fused.of(model) is None
    assert Engine(model, [VOCABULARY]).generate([[3, 4]], Sampling(), max_tokens=2)[0].finite


def test_a_step_has_fewer_operations(tiny_base: models.Base, as_on_cuda: None) -> None:
    """4 products a layer in place of 7, and with LoRA 12 operations for them in place of 35."""
    policy = policy_of(tiny_base, LORA)
    plain, one = load.load_sampler(tiny_base.path), sampler_of(tiny_base.path)
    adapters = sync.adapter_tensors(policy)
    layers = len(plain.model.layers)
    without = bench.launches(plain, 4) - bench.launches(one.model, 4)
    sync.attach_adapter(plain, adapters)
    sync.sync_adapter(plain, adapters)
    one.sync(policy)
    assert without >= 4 * layers
    assert bench.launches(plain, 4) - bench.launches(one.model, 4) - without == (28 - 8) * LORA.layers
    assert torch.isfinite(torch.tensor(parity.compare(policy, one.model, parity.probe(VOCABULARY)).mean))


@pytest.mark.parametrize("off", [0.0, 1e-3, float("nan")])
def test_the_attention_kernel_is_used_where_it_is_right(off: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: a kernel for a machine that no test has would sample from another policy without a word."""
    monkeypatch.setattr(device, "masks_fused_attention", lambda: False)
    attention.kernel_works.cache_clear()
    calls = []

    def kernel(*inputs: Any) -> mx.array:
        calls.append(inputs)
        return attention.plain(*inputs) + off

    monkeypatch.setattr(attention, "_kernel", kernel)
    try:
        queries, mask = mx.random.normal((2, 4, 1, 32)), mx.array([[True, False, True], [False, True, True]])[:, None]
        keys, values = mx.random.normal((2, 2, 3, 32)), mx.random.normal((2, 2, 3, 32))
        found = attention.one_query(queries, keys, values, 0.2, mask)
        weights = np.array(queries).reshape(2, 2, 2, 32) @ np.array(keys).transpose(0, 1, 3, 2) * 0.2
        weights = np.exp(weights) * np.array(mask)[:, :, None]
        expected = weights / weights.sum(-1, keepdims=True) @ np.array(values)
        np.testing.assert_allclose(np.array(found), expected.reshape(2, 4, 1, 32), atol=1e-5)
        assert len(calls) == (2 if off == 0.0 else 1)  # once to try it, and for the queries if it was right
    finally:
        attention.kernel_works.cache_clear()


@pytest.mark.skipif(device.backend() == "cuda", reason="here the kernel has its backend")
def test_without_the_kernel_s_backend_decoding_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attention.kernel_works.cache_clear()
    assert not attention.kernel_works()  # mlx's CPU wheel has no cuda_kernel
    assert "goes on without the fused attention kernel" in caplog.text
    attention.kernel_works.cache_clear()
