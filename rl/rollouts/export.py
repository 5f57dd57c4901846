"""A trained policy as mlx-lm reads it: an adapter (`mlx_lm.generate --adapter-path`, `mlx_lm.fuse`) or whole."""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from mlx.utils import tree_flatten

from rl.errors import UserError
from rl.files import write_json
from rl.rollouts.families import sampler_config
from rl.rollouts.load import DTYPES, load_sampler
from rl.rollouts.sync import adapter_tensors, sync_weights
from rl.rollouts.transfer import to_mlx


def write_adapter(policy: Any, folder: Path) -> None:
    """Write `adapters.safetensors` and `adapter_config.json` of a PEFT policy into `folder`.

    mlx-lm adapts the last `num_layers` layers with one rank and scale: raises UserError for an adapter that is not so.
    """
    adapters = adapter_tensors(policy)
    layers = sorted({int(path.split(".")[2]) for path in adapters})
    total = policy.get_base_model().config.num_hidden_layers
    ranks = {a.shape[0] for a, _, _ in adapters.values()}
    scales = {scale for _, _, scale in adapters.values()}
    if layers != list(range(total - len(layers), total)) or len(ranks) > 1 or len(scales) > 1:
        raise UserError("mlx-lm reads adapters of the top layers with one rank and scale; this one is different")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, (a, b, _) in adapters.items():
        tensors[f"{path}.lora_a"] = to_mlx(a.T)
        tensors[f"{path}.lora_b"] = to_mlx(b.T)
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors, metadata={"format": "mlx"})
    keys = sorted({path.split(".", 3)[3] for path in adapters})
    write_json(
        folder / "adapter_config.json",
        {
            "fine_tune_type": "lora",
            "num_layers": len(layers),
            "lora_parameters": {"rank": ranks.pop(), "scale": scales.pop(), "dropout": 0.0, "keys": keys},
        },
    )


def write_model(
    base: Path, named: Iterable[tuple[str, torch.Tensor]], tokenizer: Any, folder: Path, dtype: str, bits: int | None
) -> None:
    """Write an mlx-lm model folder: the architecture in `base` with the merged weights `named`, in `dtype`, or
    quantized to `bits` (affine, groups of 64, or of 32 where 64 divides no width) from float32 values.

    Raises UserError as `sampler_config` does, and where no group size fits a layer.
    """
    from mlx_lm.utils import quantize_model, save_model

    told = json.loads((base / "config.json").read_text())
    config = sampler_config({key: value for key, value in told.items() if key != "dtype"})
    model = load_sampler(base, "float32")
    sync_weights(model, named)
    if bits is None:
        model.set_dtype(DTYPES[dtype])
        config["dtype"] = dtype
    else:
        group = next((g for g in (64, 32) if _fits(model, g)), None)
        if group is None:
            raise UserError(f"--quantize {bits}: neither 64 nor 32 divides the inputs of every layer; leave it out")
        with contextlib.redirect_stdout(None):  # mlx-lm prints the bits per weight
            model, config = quantize_model(model, config, group, bits)
        model.set_dtype(DTYPES[dtype])  # scales, biases, norms
    for name, value in tree_flatten(model.parameters()):
        if mx.issubdtype(value.dtype, mx.floating) and not bool(mx.isfinite(value).all()):
            raise UserError(f"{name}: holds values beyond {dtype}'s; take --dtype float32 or bfloat16")
    save_model(folder, model)
    write_json(folder / "config.json", dict(sorted(config.items())))
    tokenizer.save_pretrained(folder)


def logprobs(folder: Path, rows: list[list[int]]) -> list[np.ndarray]:
    """Float32 logprobs of tokens 1… of each row by the model that `mlx_lm.load` opens in `folder`, row by row."""
    from mlx_lm import load

    model, _ = load(str(folder))
    out = []
    for row in rows:
        logits = model(mx.array([row]))[0].astype(mx.float32)
        values = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        out.append(np.array(mx.take_along_axis(values[:-1], mx.array(row[1:])[:, None], axis=-1)[:, 0]))
    return out


def _fits(model: nn.Module, group: int) -> bool:
    return all(m.weight.shape[-1] % group == 0 for m in model.modules() if hasattr(m, "to_quantized"))
