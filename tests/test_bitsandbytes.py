"""bitsandbytes has no MPS backend: nothing here imports it, and a config that asks for it is told MLX's way."""

import ast
import json
from pathlib import Path

import pytest

from rl.config import load
from tests.config_helper import GRPO, error_of, write

ROOT = Path(__file__).resolve().parent.parent
WAY = "valid: the model it was made of, with [model.quantization] bits = 4 and [model.lora]: MLX quantizes it"


@pytest.mark.parametrize("base", ["unsloth/Llama-3.2-1B-Instruct-bnb-4bit", "org/Qwen3-0.6B-BNB-8bit"])
def test_a_hub_model_that_bitsandbytes_packed_is_refused_with_mlxs_way(tmp_path: Path, base: str) -> None:
    text = GRPO.replace('base = "tiny"', f'base = "{base}"')
    said = f"x.toml: [model] base: found '{base}', packed by bitsandbytes, which has no MPS; {WAY}"
    assert error_of(tmp_path, text) == said


def test_a_local_folder_is_asked(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    text = GRPO.replace('base = "tiny"', f'base = "{folder}"').replace('form = "char"', 'form = "plain"')
    for content, refused in (
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, True),
        ({"quantization_config": {"quant_method": "gptq"}}, False),
        ({"model_type": "llama"}, False),
        ([], False),
    ):
        (folder / "config.json").write_text(json.dumps(content))
        if refused:
            assert WAY in error_of(tmp_path, text)
        else:
            load(write(tmp_path, text))
    (folder / "config.json").write_text("{")
    load(write(tmp_path, text))


@pytest.mark.parametrize(
    ("line", "way"),
    [
        ('optim = "adamw_bnb_8bit"', "use adamw_torch or adafactor"),
        ('optim = "paged_adamw_32bit"', "use adamw_torch or adafactor"),
        ("load_in_4bit = true", "[model.quantization] is MLX's"),
        ('bnb_4bit_quant_type = "nf4"', "[model.quantization] is MLX's"),
        ('quantization_config = "nf4"', "[model.quantization] is MLX's"),
    ],
)
def test_an_argument_of_bitsandbytes_is_refused_with_mlxs_way(tmp_path: Path, line: str, way: str) -> None:
    said = error_of(tmp_path, GRPO + line + "\n")
    assert said.startswith(f"x.toml: [trainer] {line.split()[0]}: ")
    assert way in said


def test_nothing_here_imports_it() -> None:
    for path in [*(ROOT / "rl").rglob("*.py"), *(ROOT / "evals").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "bitsandbytes" for name in names), path
