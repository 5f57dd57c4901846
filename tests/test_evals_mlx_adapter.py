"""What the MLX model under lm-eval is loaded from: adapters, quantized bases, and folders that it must refuse."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlx_model_helper import ASKED, hf, instances, ours, told, write, write_quantized
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evals import mlx_model
from rl.errors import RunFailed, UserError
from rl.packed import load_policy
from rl.rollouts import device

TOLERANCE = 1e-4  # of a log-likelihood, float32 on both sides


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> dict[str, tuple[Path, Path | None]]:
    """Model folder and adapter of each kind, taught nothing; do not change their files."""
    root = tmp_path_factory.mktemp("models")
    made: dict[str, tuple[Path, Path | None]] = {
        name: (write(root / name, name, steps=1), None) for name in ("llama", "qwen2", "qwen3")
    }
    return made | {"4-bit": write_quantized(root / "quantized", made["llama"][0])}


def test_the_packed_weights_of_a_quantized_base_are_the_dequantized_ones(
    folders: dict[str, tuple[Path, Path | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU reads: packed weights with the adapter beside them. Trap: merging it would quantize it away."""
    monkeypatch.setattr(device, "keeps_packed_weights", lambda: True)
    base, adapter = folders["4-bit"]
    packed = ours(base, adapter)
    layer = packed.model.model.layers[0].self_attn.q_proj
    assert (type(layer).__name__, type(layer.linear).__name__) == ("LoRALinear", "QuantizedLinear")
    assert layer.scale == 12 / 4
    asked = instances("loglikelihood", ASKED)
    theirs = hf(base, adapter).loglikelihood(asked, disable_tqdm=True)
    bare = ours(base).loglikelihood(asked, disable_tqdm=True)
    found = packed.loglikelihood(asked, disable_tqdm=True)
    assert [v for v, _ in found] == pytest.approx([v for v, _ in theirs], abs=TOLERANCE)
    assert max(abs(a - b) for (a, _), (b, _) in zip(found, bare, strict=True)) > 0.1  # the adapter says something


def test_a_quantized_base_and_its_adapter_score_as_in_the_trainer(
    folders: dict[str, tuple[Path, Path | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer's own policy: codes dequantized a layer at a time in torch, PEFT's adapter beside them."""
    base, adapter = folders["4-bit"]
    assert adapter is not None
    policy = PeftModel.from_pretrained(load_policy(base, torch.float32, "cpu"), str(adapter))
    asked = [pair for pair in ASKED if pair[0] and len(pair[0]) < 99]  # the others are cut to the context, or given one
    for packed in (False, True):
        monkeypatch.setattr(device, "keeps_packed_weights", lambda packed=packed: packed)
        lm = ours(base, adapter)
        found = lm.loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)
        for pair, answer in zip(asked, found, strict=True):
            before, after = lm._encode_pair(*pair)
            with torch.no_grad():
                logits = policy(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
            total = logits.log_softmax(-1)[range(len(after)), after].sum()
            assert answer[0] == pytest.approx(float(total), abs=TOLERANCE), pair
            assert answer[1] is (logits.argmax(-1).tolist() == after), pair


def _adapter(folder: Path, base: Path, **options: Any) -> Path:
    """A LoRA adapter whose B is not 0, saved by PEFT."""
    torch.manual_seed(5)
    lora = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def test_a_rank_stabilised_adapter_has_its_own_scale(
    folders: dict[str, tuple[Path, Path | None]], tmp_path: Path
) -> None:
    """alpha / √r; and layers that the adapter leaves out stay as they are."""
    base = folders["qwen3"][0]
    adapter = _adapter(tmp_path, base, use_rslora=True, lora_alpha=6, layers_to_transform=[1])
    asked = instances("loglikelihood", ASKED[:4])
    theirs, mine = (lm.loglikelihood(asked, disable_tqdm=True) for lm in (hf(base, adapter), ours(base, adapter)))
    assert [v for v, _ in mine] == pytest.approx([v for v, _ in theirs], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"rank_pattern": {"layers.0.self_attn.q_proj": 2}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
    ],
)
def test_an_adapter_that_is_more_than_lora_is_refused(
    folders: dict[str, tuple[Path, Path | None]], tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    """Trap: reading its A and B alone gives a number of another model."""
    adapter = _adapter(tmp_path, folders["qwen2"][0], **options)
    with pytest.raises(UserError, match=named):
        ours(folders["qwen2"][0], adapter)


def _no_weights(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()


def _truncated(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def _half(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if "layers.1" in name or "lora_A" in name}, path)


def _not_finite(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file({name: t * math.nan for name, t in load_file(path).items()}, path)


def _other_shape(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file({name: torch.cat([t, t], dim=1) if "lora_A" in name else t for name, t in load_file(path).items()}, path)


def _settings_gone(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text('{"r": 4}')


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_no_weights, "no adapter_model.safetensors"),
        (_truncated, "truncated"),
        (_half, "layers.0.*lora_B.* stands alone"),
        (_not_finite, "not finite"),
        (_other_shape, "not of this model.*shape"),
        (_settings_gone, "not the settings of a LoRA"),
    ],
)
def test_a_damaged_adapter_is_one_line(
    folders: dict[str, tuple[Path, Path | None]], tmp_path: Path, damage: Callable[[Path], None], named: str
) -> None:
    adapter = _adapter(tmp_path, folders["qwen2"][0])
    damage(adapter)
    with pytest.raises(UserError, match=named) as caught:
        ours(folders["qwen2"][0], adapter)
    assert "\n" not in str(caught.value)


def test_models_that_cannot_be_read_are_one_line(folders: dict[str, tuple[Path, Path | None]], tmp_path: Path) -> None:
    """An unknown family says the same as the rollout engine; a folder without weights says so."""
    copy = tmp_path / "copy"
    shutil.copytree(folders["qwen2"][0], copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(UserError, match=r"'mamba' family; the MLX engine decodes llama"):
        ours(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        ours(copy)


def test_logits_that_are_not_finite_stop_the_measurement(folders: dict[str, tuple[Path, Path | None]]) -> None:
    """Trap: a NaN compares as worst choice or as an empty answer, and the table shows a number all the same."""
    lm = ours(folders["qwen2"][0])
    lm.model.model.norm.weight = lm.model.model.norm.weight * math.nan
    with pytest.raises(RunFailed, match="not finite"):
        lm.loglikelihood(instances("loglikelihood", [("Tom", " has")]), disable_tqdm=True)
    with pytest.raises(RunFailed, match="not finite"):
        lm.generate_until(told(["Tom"]))


def test_every_end_of_the_model_ends_an_answer(folders: dict[str, tuple[Path, Path | None]], tmp_path: Path) -> None:
    """Chat models end a turn with a token that the tokenizer does not call EOS; generation_config.json names it."""
    copy = tmp_path / "copy"
    shutil.copytree(folders["llama"][0], copy)
    free = ours(copy).generate_until(told(["Tom has"], until=[]))[0]
    tokens = ours(copy).tok_encode(free, add_special_tokens=False)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, tokens[1]]}))
    lm = ours(copy)
    assert mlx_model.build(copy, adapter=None).engine.eos_ids == (2, tokens[1])
    asked = told(["Tom has"], until=[])
    assert lm.generate_until(asked) == hf(copy).generate_until(asked, disable_tqdm=True)
    assert lm.engine.totals.last_tokens == 2
