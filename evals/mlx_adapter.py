"""A PEFT folder's LoRA adapter on an MLX model, unmerged."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.errors import UserError
from rl.hf_folder import check_safetensors

if TYPE_CHECKING:
    import torch

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# keys of adapter_config.json that any plain LoRA may have with any value; `init_lora_weights` and `bias` are looked at
PLAIN = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("megatron_core", "qalora_group_size"),  # say nothing while megatron_config and use_qalora are not set
}
STARTS = (True, False, "gaussian", "eva", "orthogonal")  # the others change the base's weights too


def attach(model: Any, folder: Path) -> None:
    """Put the adapter in `folder` on `model`: x·W' + (alpha / r) · x·A'·B', nothing merged (LoRA, Hu et al. 2021,
    section 4.1; with `use_rslora` alpha / √r, Kalajdzievski 2023).

    Raises:
        UserError: a file that is missing, broken or not finite, an adapter that is more than plain LoRA, or one that
            is not of this model.
    """
    from rl.rollouts import sync

    adapters = _read(folder)
    try:
        sync.attach_adapter(model, adapters)
        sync.sync_adapter(model, adapters)
    except sync.SyncError as error:
        raise UserError(
            f"{folder}: this adapter is not of this model: {error}: name the base it was trained on"
        ) from error


def _read(folder: Path) -> dict[str, "tuple[torch.Tensor, torch.Tensor, float]"]:
    """{module path: (A (rank, in), B (out, rank), scale)}."""
    from safetensors.torch import load_file

    path = folder / "adapter_config.json"
    for file in (path, folder / WEIGHTS):
        if not file.is_file():
            raise UserError(f"{folder}: no {file.name}: it is not a PEFT adapter folder, or not a whole one")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = config["r"], config["lora_alpha"]
        odd = [key for key, value in config.items() if key not in PLAIN and value]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not the settings of a LoRA adapter ({type(error).__name__}): save it again"
        ) from error
    odd += ["peft_type"] if config.get("peft_type", "LORA") != "LORA" else []
    odd += ["bias"] if config.get("bias", "none") != "none" else []
    odd += ["init_lora_weights"] if config.get("init_lora_weights", True) not in STARTS else []
    if odd:
        told = ", ".join(f"{key} = {config[key]!r}" for key in sorted(odd))
        raise UserError(f"{path}: {told}: MLX applies plain LoRA only: use --backend hf")
    check_safetensors(folder / WEIGHTS)
    tensors = load_file(folder / WEIGHTS)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    paths = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    expected = {f"{path}.lora_{part}.weight" for path in paths for part in "AB"}
    if not paths or expected != tensors.keys():
        found = next(iter(sorted(expected ^ tensors.keys())), "nothing")
        raise UserError(f"{folder / WEIGHTS}: not pairs of LoRA matrices ({found} stands alone): save it again")
    return {
        path.removeprefix(PREFIX): (tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"], float(scale))
        for path in paths
    }
