"""What a shared run leaves, in the tools it is for: `mlx_lm.generate`, `mlx_lm.fuse` and `peft`."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rl.rollouts  # noqa: F401  binds BLAS before mlx loads
from rl import config as configs
from rl import files, models, packed, policy_run
from rl.rollouts import parity, quantized
from rl.tiny import write_tiny

THETA = 300.0  # far from the 10000 that mlx-lm falls back to
VOCABULARY = 17
PROMPT = "12+34="


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any, Any]:
    """(4-bit base, folder of a finished run, its policy on the base's codes, tokenizer); RoPE as transformers 5 saves
    it, nested."""
    folder = tmp_path_factory.mktemp("export")
    sizes = {"hidden": 64, "layers": 2, "heads": 4, "intermediate": 128}
    tiny = configs.TinyModel(**sizes, alphabet="0123456789+-*= a,b\n")  # mlx-lm encodes "a ,b" and a line break
    write_tiny(folder / "tiny", tiny, 0, "test")
    told = json.loads((folder / "tiny" / "config.json").read_text())
    told.pop("rope_theta", None)
    told["rope_parameters"] = {"rope_type": "default", "rope_theta": THETA}
    files.write_json(folder / "tiny" / "config.json", told)
    quantized.build(folder / "tiny", None, 4, 32, folder / "base", source="x")
    torch.manual_seed(4)
    lora = configs.Lora(rank=4, alpha=8.0)
    policy = models.add_lora(packed.load_policy(folder / "base", torch.float32, "cpu"), lora)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    tokenizer = models.load_tokenizer(models.Base("base", folder / "base", ""))
    config = configs.Config(
        path=Path("export.toml"),
        run=configs.Run(name="export"),
        model=configs.Model(base="tiny", lora=lora, quantization=configs.Quantization(bits=4, group_size=32)),
        data=configs.Data(source="arithmetic", train_size=8),
        trainer=configs.Trainer(algorithm="grpo"),
    )
    policy_run.save(config, policy, tokenizer, folder / "run")
    return folder / "base", folder / "run", policy, tokenizer


def test_peft_loads_it_on_the_dequantized_base_with_the_same_logprobs(run: tuple[Path, Path, Any, Any]) -> None:
    from peft import AutoPeftModelForCausalLM

    base, folder, policy, _ = run
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert not list(folder.glob("model*.safetensors"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert differences(policy, loaded) < 1e-5
    with loaded.disable_adapter():
        assert differences(policy, loaded) > 1e-2


def test_mlx_lm_fuse_with_dequantize_gives_the_policy_as_one_model(
    run: tuple[Path, Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traps: RoPE's base, which it would take for 10000; and fusing without --dequantize, which rounds the adapter."""
    from transformers import AutoModelForCausalLM

    base, folder, policy, _ = run
    fused = tmp_path / "fused"
    told = ["--model", str(base / "mlx"), "--adapter-path", str(folder / "mlx"), "--save-path", str(fused)]
    call("mlx_lm.fuse", monkeypatch, *told, "--dequantize")
    loaded = AutoModelForCausalLM.from_pretrained(fused, dtype=torch.float32).eval()
    assert not hasattr(loaded.config, "quantization_config")
    assert differences(policy, loaded) < 1e-4


def test_mlx_lm_generate_writes_what_the_policy_would(
    run: tuple[Path, Path, Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, folder, policy, tokenizer = run
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    told = ["--model", str(base / "mlx"), "--adapter-path", str(folder / "mlx"), "--prompt", PROMPT, "--temp", "0"]
    said = call("mlx_lm.generate", monkeypatch, *told, "--max-tokens", "12", "--verbose", "False", out=capsys)
    with torch.no_grad():
        expected = policy.generate(input_ids=ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
        with policy.disable_adapter():
            other = policy.generate(input_ids=ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
    text = tokenizer.decode(expected, skip_special_tokens=True)
    assert len(text) > 3
    assert text in said
    assert tokenizer.decode(other, skip_special_tokens=True) not in said


def differences(policy: Any, other: Any) -> float:
    """The largest |Δlogp| over the probe's tokens."""
    largest = 0.0
    for row in parity.probe(VOCABULARY):
        ids = torch.tensor([list(row)])
        with torch.no_grad():
            both = [model(input_ids=ids).logits[0].log_softmax(-1) for model in (policy.eval(), other)]
        largest = max(largest, (both[0] - both[1]).abs().max().item())
    return largest


def call(
    module: str, monkeypatch: pytest.MonkeyPatch, *arguments: str, out: pytest.CaptureFixture[str] | None = None
) -> str:
    """Run a tool of mlx-lm as its command does; what it has printed."""
    importlib.import_module(module)
    main: Callable[[], None] = sys.modules[module].main  # the package has a function of the module's name
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    main()
    return out.readouterr().out if out else ""
