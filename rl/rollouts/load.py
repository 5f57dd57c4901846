"""A Hugging Face folder -> an mlx-lm model whose logits are the trainer's.

mlx-lm 0.32.2 reads `rope_theta` and `rope_scaling` from the top level of config.json, transformers 5 writes them inside
`rope_parameters`: without the copy below every Llama would run with theta 10000 (mean |dlogp| 0.39) and no warning.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from rl.errors import UserError
from rl.hf_folder import top_level_rope

FAMILIES = ("llama", "qwen2", "qwen3")
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def sampler_config(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of config.json that mlx-lm reads, with RoPE's moved to where it looks.

    Raises UserError for a family the engine has not been checked with, and for sliding windows.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"[model] base is of the {family!r} family; the MLX engine decodes {', '.join(FAMILIES)}: "
            'choose one of these or set rollout.engine = "torch"'
        )
    kinds = set(config.get("layer_types") or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UserError(
            f"[model] base has {', '.join(sorted(kinds))} layers; the MLX engine decodes full attention only: "
            'set rollout.engine = "torch"'
        )
    return top_level_rope(config)


def load_sampler(folder: Path, dtype: str = "float32", *, packed: bool = False) -> nn.Module:
    """The model in `folder`, its floating-point weights in `dtype`; `packed` reads the quantized weights in `mlx/`.

    Raises UserError as `sampler_config` does; every tensor of the file must find its place (strict loading).
    """
    from mlx_lm.utils import load_model

    config = sampler_config(json.loads((folder / "config.json").read_text()))
    source = folder / "mlx" if packed else folder
    if packed:
        config |= {"quantization": json.loads((source / "config.json").read_text())["quantization"]}
    model, _ = load_model(source, lazy=True, strict=True, model_config=config)
    model.set_dtype(DTYPES[dtype])
    model.eval()
    mx.eval(model.parameters())
    return model


def parameter_count(model: nn.Module) -> int:
    """Numbers held by `model`, packed ones counted as stored words."""
    return sum(value.size for _, value in tree_flatten(model.parameters()))
