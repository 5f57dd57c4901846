"""Where a run starts: the base (packaged, local, from the hub, or another run's result), its policy and its sampler."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl import files, models
from rl.errors import UserError
from rl.hf_folder import check_folder, weights_sha256
from rl.models import Base

if TYPE_CHECKING:
    import torch

    from rl.config import Config


@dataclass(frozen=True)
class Start:
    """`base` holds the weights that torch loads; `adapter` is a PEFT folder to go on from; `sha256` of both."""

    base: Base
    sha256: str
    adapter: Path | None = None


def find(config: "Config", root: Path, parent: Path | None) -> Start:
    """The run's start: [model] base, or the finished run in `parent` that [model] from names.

    With [model.quantization] the base becomes a folder whose dequantized values torch trains on and whose packed
    weights MLX samples from. Raises UserError as `rl.models.resolve_base` does.
    """
    if parent is None:
        base = models.resolve_base(config, root)
    elif (parent / "adapter_config.json").exists():
        return _from_adapter(config, root, parent)
    else:
        base = Base(parent.name, parent, weights_sha256(check_folder(parent, f"{config.path}: [model] from")))
    if config.model.quantization is None:
        return Start(base, base.sha256)
    from rl.rollouts import quantized

    q = config.model.quantization
    folder = root / "models" / "base" / f"{base.path.name}-q{q.bits}g{q.group_size}"
    digest = quantized.build(base.path, base.gguf, q.bits, q.group_size, folder, source=base.sha256)
    return Start(replace(base, path=folder, sha256=digest), digest)


def _from_adapter(config: "Config", root: Path, parent: Path) -> Start:
    where = f"{config.path}: [model] from"
    peft = json.loads((parent / "adapter_config.json").read_text())
    path = root / peft["base_model_name_or_path"]
    if not path.is_dir():
        raise UserError(f"{where}: its base {path} is gone; train the run again with --restart")
    lora = config.model.lora
    if lora is None or (lora.rank, lora.alpha) != (peft["r"], peft["lora_alpha"]):
        raise UserError(
            f"{where}: that run is an adapter of rank {peft['r']}, alpha {peft['lora_alpha']}; training goes on in it, "
            "so [model.lora] must say the same"
        )
    base = Base(peft["base_model_name_or_path"], path, weights_sha256(check_folder(path, where)))
    adapter = files.sha256_file(parent / "adapter_model.safetensors")
    return Start(base, files.sha256_json([base.sha256, adapter]), parent)


def load_policy(config: "Config", start: Start, device: "torch.device") -> Any:
    """The policy on `device`, with its adapter when the config has one; weights drawn from the run's seed."""
    import torch

    from rl.device import dtype_for

    torch.manual_seed(config.run.seed)
    model = models.load_policy(start.base, dtype_for(device), device)
    if start.adapter is not None:
        from peft import PeftModel

        return PeftModel.from_pretrained(model, start.adapter, is_trainable=True)
    return model if config.model.lora is None else models.add_lora(model, config.model.lora)


def load_sampler(config: "Config", start: Start, policy: Any, tokenizer: Any, stop_ids: list[int]) -> Any:
    """The rollout engine that [rollout] names, synced with `policy` and checked against it.

    Raises RunFailed naming the layer when the MLX copy is not the policy.
    """
    rollout = config.rollout
    if rollout.engine == "torch":
        from rl.rollouts.torch_sampler import TorchSampler

        return TorchSampler(policy, stop_ids, tokenizer.pad_token_id, rollout.max_batch)
    from rl.rollouts import sampler
    from rl.rollouts.device import backend

    precision = rollout.precision or "full"
    exact = backend() == "cpu" or precision == "shared"
    built = sampler.build(
        start.base.path,
        precision=precision,
        dtype=rollout.dtype or ("float32" if exact else "float16"),
        eos_ids=stop_ids,
        context=policy.config.max_position_embeddings,
        max_batch=rollout.max_batch,
    )
    built.sync(policy)
    return built
