"""Settings of PPO that are each valid and impossible together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rl import trl_fields
from rl.config.reading import Source

if TYPE_CHECKING:
    from rl.config import Config


def check(config: Config, source: Source) -> None:
    """Raise UserError for the first setting that training would trip over, or that it would silently not follow."""
    args = config.trainer.args
    for name in ("gamma", "lam"):
        if (found := _value(args, name)) > 1:
            raise source.error(("trainer", name), f"found {found}, valid: ≥ 0 and ≤ 1")
    if not 0 < _value(args, "cliprange") < 1:
        raise source.error(("trainer", "cliprange"), f"found {_value(args, 'cliprange')}, valid: > 0 and < 1")
    if args.get("remove_unused_columns"):
        raise source.error(("trainer", "remove_unused_columns"), "found true, valid: false, rewards read the columns")
    if config.model.lora is not None and config.model.lora.dropout:
        found = f"found {config.model.lora.dropout} with algorithm 'ppo', valid there: 0, or every ratio is noise"
        raise source.error(("model", "lora", "dropout"), found)
    if (size := rollout_size(args)) > config.data.train_size:
        made = "per_device_train_batch_size × gradient_accumulation_steps × num_mini_batches"
        found = f"found {config.data.train_size}, valid: ≥ {size}, the prompts of one rollout ({made})"
        raise source.error(("data", "train_size"), found)


def rollout_size(args: dict[str, Any]) -> int:
    """Prompts, and so completions, of one rollout."""
    a_step = _value(args, "per_device_train_batch_size") * _value(args, "gradient_accumulation_steps")
    return a_step * _value(args, "num_mini_batches")


def period(args: dict[str, Any]) -> int:
    """Optimizer steps between two rollouts; checkpoints are exact at multiples of it."""
    return _value(args, "num_ppo_epochs") * _value(args, "num_mini_batches")


def _value(args: dict[str, Any], name: str) -> Any:
    return trl_fields.value("ppo", args, name)
