"""torch -> MLX: every tensor counted, the sampler follows the trainer, and what is exported loads in the real tools."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rl.rollouts  # noqa: F401  binds BLAS before mlx loads

import mlx.core as mx  # isort: skip
from mlx.utils import tree_flatten

from rl import config, models
from rl.rollouts import export, parity, quantized, sync
from rl.rollouts import sampler as samplers

LORA = config.Lora(rank=4, alpha=12.0, layers=1)
VOCABULARY = 17


def policy_of(base: models.Base, lora: config.Lora | None = None) -> Any:
    torch.manual_seed(1)
    policy = models.load_policy(base, "float32", "cpu")
    return policy if lora is None else models.add_lora(policy, lora)


def sampler_of(folder: Path, precision: str = "full") -> samplers.MLXSampler:
    return samplers.build(folder, precision=precision, dtype="float32", eos_ids=[1], context=None)


def shake(policy: Any, scale: float = 0.3) -> None:
    """A random optimizer step."""
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.add_(scale * torch.randn_like(weight))


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_after_a_step_the_sampler_follows_the_trainer(tiny_base: models.Base, lora: config.Lora | None) -> None:
    policy, sampler = policy_of(tiny_base, lora), sampler_of(tiny_base.path)
    rows = parity.probe(VOCABULARY)
    sampler.sync(policy)
    before = np.concatenate(parity.sampler_logprobs(sampler.model, rows))
    shake(policy)
    assert parity.compare(policy, sampler.model, rows).mean > 1e-2  # not yet synced
    report = sampler.sync(policy)
    assert parity.compare(policy, sampler.model, rows).largest < 1e-4
    assert np.abs(np.concatenate(parity.sampler_logprobs(sampler.model, rows)) - before).mean() > 1e-2
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert report.tensors == len(trained)
    assert report.bytes == 4 * sum(p.numel() for p in trained)
    assert report.way == sampler.syncs.way == "copied"


def test_a_renamed_tensor_is_an_error_and_changes_nothing(tiny_base: models.Base) -> None:
    """Trap: load_weights(strict=False) ignores it and the sampler stays frozen for the rest of the run."""
    policy, sampler = policy_of(tiny_base), sampler_of(tiny_base.path)
    named = [(n.replace("q_proj", "query_proj"), p) for n, p in policy.named_parameters()]
    with pytest.raises(sync.SyncError, match=r"missing \['model.layers.0.self_attn.q_proj.weight'"):
        sync.sync_weights(sampler.model, named)
    short = [(n, p[:1] if n == "model.norm.weight" else p) for n, p in policy.named_parameters()]
    with pytest.raises(sync.SyncError, match=r"model.norm.weight: the trainer's shape is \(1,\)"):
        sync.sync_weights(sampler.model, short)


def test_weights_that_are_not_finite_never_reach_the_sampler(tiny_base: models.Base) -> None:
    policy, sampler = policy_of(tiny_base), sampler_of(tiny_base.path)
    held = {n: np.array(v) for n, v in tree_flatten(sampler.model.parameters())}
    with torch.no_grad():
        policy.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(sync.SyncError, match=r"layers.1.mlp.up_proj.weight: .* not finite"):
        sampler.sync(policy)
    for name, value in tree_flatten(sampler.model.parameters()):
        np.testing.assert_array_equal(np.array(value), held[name])


def test_dora_is_refused(tiny_base: models.Base) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(policy_of(tiny_base), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(sync.SyncError, match="DoRA"):
        sync.adapter_tensors(model)


def test_the_adapter_loads_in_mlx_lm_with_the_run_s_logprobs(tiny_base: models.Base, tmp_path: Path) -> None:
    """The real `mlx_lm` loader, as `mlx_lm.generate --adapter-path` uses it."""
    from mlx_lm.utils import load_adapters

    policy = policy_of(tiny_base, LORA)
    shake(policy)
    export.write_adapter(policy, tmp_path)
    loaded = load_adapters(sampler_of(tiny_base.path).model, str(tmp_path))
    rows = parity.probe(VOCABULARY)
    assert parity.compare(policy, loaded, rows).largest < 1e-4
    assert parity.compare(policy_of(tiny_base), loaded, rows).mean > 1e-2


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_is_one_policy_on_both_sides(tiny_base: models.Base, tmp_path: Path, bits: int) -> None:
    """Packed weights in MLX and their dequantized values in torch; the original base is another policy."""
    folder = tmp_path / "q"
    digest = quantized.build(tiny_base.path, None, bits, 32, folder, source=tiny_base.sha256)
    shared = replace(tiny_base, path=folder, sha256=digest)
    policy = policy_of(shared, LORA)
    shake(policy)
    rows = parity.probe(VOCABULARY)
    from rl.rollouts.load import load_sampler

    packed = load_sampler(folder, packed=True)
    sync.attach_adapter(packed, sync.adapter_tensors(policy))
    sync.sync_adapter(packed, sync.adapter_tensors(policy))
    held = sampler_of(folder, "shared")
    held.sync(policy)
    for model in (packed, held.model):
        assert parity.compare(policy, model, rows).largest < 2e-4
    assert parity.compare(policy_of(tiny_base), sampler_of(folder).model, rows).mean > (2e-3 if bits == 4 else 1e-5)
    assert quantized.build(tiny_base.path, None, bits, 32, folder, source=tiny_base.sha256) == digest


def test_the_packaged_file_s_own_codes_are_taken(smollm2: models.Base) -> None:
    """Trap: quantizing the file's values again adds 10 % weight error; its codes dequantize to them exactly."""
    import json

    from safetensors import safe_open

    packed = quantized._packed_from_gguf(smollm2.gguf, json.loads((smollm2.path / "config.json").read_text()))
    names = ["model.layers.0.self_attn.q_proj", "model.layers.29.self_attn.k_proj", "model.layers.7.mlp.down_proj"]
    with safe_open(smollm2.path / "model.safetensors", "pt") as file:
        for name in names:
            codes = (packed[f"{name}.{kind}"] for kind in ("weight", "scales", "biases"))
            values = np.array(mx.dequantize(*codes, group_size=32, bits=4))
            np.testing.assert_array_equal(values, file.get_tensor(f"{name}.weight").numpy())
    assert packed["model.embed_tokens.weight"].shape == (49152, 144)  # 8 bits of 576, four to a word
