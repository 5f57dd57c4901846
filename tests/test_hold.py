"""[model.quantization] hold: a run on the base's codes is the run on its values, algorithm by algorithm."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from rl import config as configs
from rl import device, models, packed
from rl.packed import Lazy, PackedLinear
from rl.rollouts import quantized
from rl.smoke import steps
from rl.tiny import write_tiny

CPU = torch.device("cpu")
SGD = {"optim": "sgd", "learning_rate": 0.1}


def trained(folder: Path, algorithm: str, hold: str, **args: Any) -> tuple[dict[str, torch.Tensor], steps.Step]:
    """(adapter after one step, the step) of a shared 4-bit base held so."""
    config = steps.make_config(CPU, algorithm, lora=True, shared=True, **args)
    quantization = replace(config.model.quantization, hold=hold)
    config = replace(config, model=replace(config.model, quantization=quantization))
    step = steps.take(steps.make_job(config, folder, CPU))
    held = {isinstance(m, PackedLinear) for n, m in step.job.model.named_modules() if n.endswith("q_proj.base_layer")}
    assert held == {hold == "packed"}
    return {n: p.detach() for n, p in step.job.model.named_parameters() if n in step.trained}, step


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "dpo"])
def test_one_step_on_codes_moves_the_adapter_as_on_values(tmp_path: Path, algorithm: str) -> None:
    """Trap: an algorithm that reads a base weight by itself (a head, a copy for the reference, a value model)."""
    args = {} if algorithm == "ppo" else SGD
    if algorithm == "grpo":
        args = args | {"beta": 0.1}  # with the reference that PEFT gives
    values, _ = trained(tmp_path, algorithm, "values", **args)
    codes, step = trained(tmp_path, algorithm, "packed", **args)
    assert step.outcome.failure is None
    assert step.moved
    assert codes.keys() == values.keys()
    for name, value in values.items():
        torch.testing.assert_close(codes[name], value, atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_what_a_gpu_holds_by_default_are_codes(tmp_path: Path) -> None:
    shared = steps.make_config(CPU, "grpo", lora=True, shared=True)
    assert [device.holds_codes(shared, kind) for kind in ("cpu", "cuda", "mps")] == [False, True, True]
    for other in (
        steps.make_config(CPU, "grpo", lora=True),
        replace(shared, rollout=replace(shared.rollout, precision="full")),
        replace(shared, trainer=replace(shared.trainer, algorithm="reward")),
    ):
        assert not device.holds_codes(other, "cuda")


def test_trl_s_head_dequantizes_its_tiles_and_nothing_larger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL looks at `lm_head.weight` three times in a forward: at 8 B parameters 2.5 GB each."""
    import trl.trainer.utils

    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 5)
    folder = base(tmp_path)
    ids = torch.randint(2, 17, (3, 12), generator=torch.Generator().manual_seed(1))
    results, asked = [], []
    dequantize = packed.dequantize

    def counting(weight: packed.Packed, *args: Any) -> torch.Tensor:
        asked.append(weight.shape)
        return dequantize(weight, *args)

    for load in (
        lambda: models.load_policy(models.Base("b", folder, "", None), "float32", "cpu"),
        lambda: packed.load_policy(folder, torch.float32, "cpu"),
    ):
        model = load()
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        torch.manual_seed(3)
        model = models.add_lora(model, configs.Lora(rank=4, alpha=8.0))
        monkeypatch.setattr(packed, "dequantize", counting)
        out = model(input_ids=ids, labels=ids, fused_lm_head=True)
        out.log_probs.sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        results.append((out.log_probs.detach(), out.entropy.detach(), gradients))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    vocabulary = model.config.vocab_size
    # once forwards and once backwards in tiles; the embedding's rows are the only other ones of this width
    assert sum(shape[0] for shape in asked if shape[0] <= 5) == 2 * vocabulary


def test_a_packed_weight_says_its_shape_and_refuses_to_be_written(tmp_path: Path) -> None:
    """PEFT's merge adds to `weight.data`: into values made for the moment it would be lost without a word."""
    model = packed.load_policy(base(tmp_path), torch.float32, "cpu")
    layer = model.model.layers[0].mlp.up_proj
    weight = layer.weight
    assert isinstance(weight, Lazy)
    assert (tuple(weight.shape), weight.dtype, weight.device.type) == ((384, 128), torch.float32, "cpu")
    exact = packed.dequantize(layer.held, torch.float32)
    assert torch.equal(weight[3:7], exact[3:7])
    assert torch.equal(weight + 0, exact)
    assert torch.equal(weight.detach()[:2], exact[:2])
    with pytest.raises(RuntimeError, match="cannot be written to"):
        weight += 1
    merged = models.add_lora(model, configs.Lora(rank=4, alpha=8.0))
    with pytest.raises(RuntimeError, match="cannot be written to"):
        merged.merge_and_unload()


def base(folder: Path) -> Path:
    """A tiny Llama's shared 4-bit base."""
    write_tiny(folder / "tiny", configs.TinyModel(), 0, "test")
    quantized.build(folder / "tiny", None, 4, 32, folder / "shared", source="x")
    return folder / "shared"
