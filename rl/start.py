"""Where a run starts: the base (packaged, local, from the hub, or another run's result), its policy and its sampler."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl import files, models, processes
from rl.errors import UserError
from rl.hf_folder import check_folder, weights_sha256
from rl.models import Base

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from rl.config import Config
    from rl.display import Display
    from rl.rewards import RewardFunction


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
    path = adapter_base(root, parent, where)
    lora = config.model.lora
    own = config.trainer.algorithm == "reward"  # there the adapter is merged, and [model.lora] is one of its own
    if not own and (lora is None or (lora.rank, lora.alpha) != (peft["r"], peft["lora_alpha"])):
        raise UserError(
            f"{where}: that run is an adapter of rank {peft['r']}, alpha {peft['lora_alpha']}; training goes on in it, "
            "so [model.lora] must say the same"
        )
    base = Base(peft["base_model_name_or_path"], path, weights_sha256(check_folder(path, where)))
    adapter = files.sha256_file(parent / "adapter_model.safetensors")
    return Start(base, files.sha256_json([base.sha256, adapter]), parent)


def load_policy(config: "Config", start: Start, device: "torch.device") -> Any:
    """The policy on `device`, with its adapter when the config has one; weights drawn from the run's seed.

    A quantized base is held as codes or as values (`rl.device.holds_codes`): the same policy.
    """
    import torch

    from rl.device import dtype_for, holds_codes

    torch.manual_seed(config.run.seed)
    if holds_codes(config, device):
        from rl import packed

        model = packed.load_policy(start.base.path, dtype_for(device), device)
    else:
        model = models.load_policy(start.base, dtype_for(device), device)
    if start.adapter is not None:
        from peft import PeftModel

        return PeftModel.from_pretrained(model, start.adapter, is_trainable=True)
    return model if config.model.lora is None else models.add_lora(model, config.model.lora)


def load_whole(
    config: "Config",
    start: Start,
    weights: "Mapping[str, torch.Tensor]",
    tokenizer: Any,
    stop_ids: list[int],
    device: "torch.device",
) -> tuple[Any, Any]:
    """The policy that FSDP has trained, in the machine's memory, and a sampler of it on `device`.

    `weights` are all those that were trained (`rl.processes.whole_weights`). What training held on the card is given
    back first: MLX cannot take what torch's allocator keeps.
    """
    from rl.device import give_back

    give_back(device)
    policy = load_policy(config, start, processes.loading_place(device))
    policy.load_state_dict(weights, strict=False)
    return policy, load_sampler(config, start, policy, tokenizer, stop_ids)


def load_reference(config: "Config", root: Path, folder: Path | None, tokenizer: Any, device: "torch.device") -> Any:
    """The frozen policy in the finished run `folder` that [model] reference names, its adapter merged; None for none.

    Raises UserError where its vocabulary is not the policy's.
    """
    if folder is None:
        return None
    from rl.device import dtype_for

    where = f"{config.path}: [model] reference"
    if models.load_tokenizer(Base(folder.name, folder, "")).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{where}: {folder.name} has another vocabulary than the policy: probabilities do not compare")
    return _whole(root, folder, where, dtype_for(device), device).eval().requires_grad_(False)


def load_scorer(config: "Config", start: Start, tokenizer: Any, device: "torch.device") -> Any:
    """A reward model on `device`: the start with a head of one output in place of its vocabulary's.

    The head is drawn from the run's seed and trained with the adapter when the config has one; the adapter of a start
    is merged. `tokenizer` pads. Raises UserError for an architecture without a sequence classifier, or missing weights.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from rl.device import dtype_for

    where, dtype = f"{config.path}: [model]", dtype_for(device)
    torch.manual_seed(config.run.seed)
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            start.base.path,
            num_labels=1,
            dtype=dtype,
            attn_implementation="sdpa",
            device_map=None,  # "auto" segfaults on MPS when it also changes the dtype
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except ValueError as error:
        raise UserError(f"{where}: no reward model can be made of {start.base.id}: {error!s:.200}") from error
    if missing := sorted(set(info["missing_keys"]) - {"score.weight"}):
        raise UserError(f"{where}: {start.base.path} lacks the weight {missing[0]}: fetch the model again")
    if start.adapter is not None:
        from peft import PeftModel

        causal = PeftModel.from_pretrained(models.load_policy(start.base, dtype, "cpu"), start.adapter)
        merged = causal.merge_and_unload().base_model
        model.base_model.load_state_dict(merged.state_dict())
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model = model.to(device)
    return model if config.model.lora is None else models.add_lora(model, config.model.lora, head="score")


def reward_models(config: "Config", root: Path) -> dict[str, Base]:
    """The reward models that `[[reward]] model` names by folder or hub id, role -> model; runs are not among them.

    Raises UserError for what is neither, or is not whole.
    """
    found = {}
    for i, reward in enumerate(config.rewards):
        name = reward.options.get("model") if reward.name == "model" else None
        if name is None or name.endswith(".toml"):
            continue
        where = f"{config.path}: [[reward]] {i} model = {name!r}"
        local = root / Path(name).expanduser()
        if not local.is_dir() and not models.HUB_ID.fullmatch(name):
            raise UserError(f"{where}: no such folder, valid: a config (.toml), a model folder or a hub id 'org/name'")
        path = local if local.is_dir() else models.fetch(name, where)
        found[f"reward.{i}.model"] = Base(name, path, weights_sha256(check_folder(path, where)))
    return found


def open_rewards(
    functions: "Sequence[RewardFunction]", made: "Mapping[str, Path]", tokenizer: Any, device: "torch.device"
) -> None:
    """Load the model of each learned reward among a config's `functions`; `made` are folders by role."""
    from rl.rewards.learned import LearnedReward

    for i, function in enumerate(functions):
        if isinstance(function.function, LearnedReward):
            function.function.open(made[f"reward.{i}.model"], tokenizer, device)


def load_finished(root: Path, folder: Path, where: str, dtype: Any, device: "torch.device") -> Any:
    """The policy of the finished run in `folder`, its adapter (if it is one) unmerged; `where` opens the errors.

    Raises UserError where the base of the adapter is gone.
    """
    if not (folder / "adapter_config.json").exists():
        return models.load_policy(Base(folder.name, folder, weights_sha256(check_folder(folder, where))), dtype, device)
    from peft import PeftModel

    path = adapter_base(root, folder, where)
    base = Base(path.name, path, weights_sha256(check_folder(path, where)))
    return PeftModel.from_pretrained(models.load_policy(base, dtype, device), folder)


def adapter_base(root: Path, folder: Path, where: str) -> Path:
    """The folder of the base that the adapter in `folder` belongs to. Raises UserError where it is gone."""
    path = root / json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    if not path.is_dir():
        raise UserError(f"{where}: its base {path} is gone; train the run again with --restart")
    return path


def _whole(root: Path, folder: Path, where: str, dtype: Any, device: "torch.device") -> Any:
    """The policy of a finished run as one model."""
    policy = load_finished(root, folder, where, dtype, device)
    return policy.merge_and_unload() if hasattr(policy, "peft_config") else policy


def load_sampler(config: "Config", start: Start, policy: Any, tokenizer: Any, stop_ids: list[int]) -> Any:
    """The rollout engine that [rollout] names, synced with `policy`, whose frozen base it holds with it if it can.

    Raises RunFailed naming the layer when the MLX copy is not the policy.
    """
    rollout = config.rollout
    texts = [text for text in rollout.stop if len(text.encode()) > 1]  # one byte is never spread over tokens
    if rollout.engine == "torch":
        from rl.rollouts.torch_sampler import TorchSampler

        pad = tokenizer.pad_token_id
        return TorchSampler(policy, stop_ids, pad, rollout.max_batch, texts, tokenizer.decode)
    from rl.rollouts import sampler
    from rl.rollouts.device import backend, use_cpu

    if config.run.device == "cpu":
        use_cpu()
    precision = rollout.precision or "full"
    # float16 is a different policy's by .004 nats, which the correction mends and papers/quantized-rollouts cannot
    # tell from none; CUDA's own kernels take no other
    exact = backend() == "cpu" or (precision == "shared" and backend() != "cuda")
    built = sampler.build(
        start.base.path,
        precision=precision,
        dtype=rollout.dtype or ("float32" if exact else "float16"),
        eos_ids=stop_ids,
        context=policy.config.max_position_embeddings,
        max_batch=rollout.max_batch,
        max_batch_tokens=rollout.max_batch_tokens,
        quantize=(rollout.bits, rollout.group_size or 64) if precision == "copy" else None,
        stop=texts,
        decode=tokenizer.decode,
    )
    built.sync(policy)
    built.hold_once(policy)
    return built


def check_parity(config: "Config", policy: Any, sampler: Any, vocabulary: int, display: "Display") -> None:
    """Compare the sampler's logprobs with the trainer's and say so; nothing where torch samples."""
    if config.rollout.engine != "mlx":
        return
    parity = sampler.check(policy, vocabulary)
    from rl.rollouts.device import describe

    mlx = describe()
    held = "packed" if sampler.packed else sampler.dtype
    display.note(
        f"MLX {mlx['version']} on {mlx['backend']}, weights held {held}; "
        f"mean |Δlogp| to the trainer {parity.mean:.1e} on {parity.tokens} tokens"
    )
