"""A trained adapter in the form that `mlx_lm.generate --adapter-path` and `mlx_lm.fuse` read."""

from pathlib import Path
from typing import Any

import mlx.core as mx

from rl.errors import UserError
from rl.files import write_json
from rl.rollouts.sync import adapter_tensors, to_mlx


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
