"""A Hugging Face folder -> an mlx-lm model whose logits are the trainer's (which families: rl/rollouts/families.py)."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from rl.rollouts.families import sampler_config, windows

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def load_sampler(folder: Path, dtype: str = "float32", *, packed: bool = False) -> nn.Module:
    """The model in `folder`, its floating-point weights in `dtype`; `packed` reads the quantized weights in `mlx/`.

    Raises UserError as `sampler_config` does; every tensor of the file must find its place (strict loading).
    """
    from mlx_lm.utils import load_model

    told = json.loads((folder / "config.json").read_text())
    config = sampler_config(told)
    source = folder / "mlx" if packed else folder
    if packed:
        config |= {"quantization": json.loads((source / "config.json").read_text())["quantization"]}
    model, _ = load_model(source, lazy=True, strict=True, model_config=config)
    model.args.windows = windows(told)  # read by rl/rollouts/forward.py; mlx-lm knows no windows for some families
    model.set_dtype(DTYPES[dtype])
    model.eval()
    mx.eval(model.parameters())
    return model


def parameter_count(model: nn.Module) -> int:
    """Numbers held by `model`, packed ones counted as stored words."""
    return sum(value.size for _, value in tree_flatten(model.parameters()))
