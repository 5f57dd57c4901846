"""Settings of the algorithms that learn from preferences which are each valid and impossible together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rl import trl_fields
from rl.config.reading import Source

if TYPE_CHECKING:
    from rl.config import Config

# losses of DPO in the difference of the two rewards alone, where the f-divergence's log Z(x) cancels
_ANY_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")


def check(config: Config, source: Source) -> None:
    """Raise UserError for the first impossible combination."""
    if config.trainer.algorithm != "reward":
        _check_losses(config, source)
    if config.trainer.algorithm == "reward":
        _check_reward_model(config, source)


def _check_losses(config: Config, source: Source) -> None:
    """What TRL's trainers refuse only once the base is loaded, or what would not be their loss."""
    args, algorithm = config.trainer.args, config.trainer.algorithm

    def effective(name: str) -> Any:
        return trl_fields.value(algorithm, args, name)

    if effective("beta") == 0:
        raise source.error(("trainer", "beta"), "found 0, valid: > 0, or the loss says nothing of the policy")
    if args.get("sync_ref_model"):
        moving = "refused: a reference that moves is in no checkpoint, so --resume would not be exact"
        raise source.error(("trainer", "sync_ref_model"), moving)
    if algorithm == "online_dpo" and args.get("precompute_ref_log_probs"):
        raise source.error(("trainer", "precompute_ref_log_probs"), "refused: the completions are not there beforehand")
    if algorithm in ("dpo", "online_dpo"):
        _check_dpo_losses(args, effective, source)
    elif algorithm == "cpo":
        _check_cpo_losses(effective, source)
    elif algorithm == "kto" and effective("loss_type") == "kto":
        # its KL term pairs each prompt with the completion of its batch neighbour
        if (batch := effective("per_device_train_batch_size")) < 2:
            raise source.error(("trainer", "per_device_train_batch_size"), f"found {batch}, valid for loss 'kto': ≥ 2")
        if (order := effective("train_sampling_strategy")) != "sequential":
            found = f"found '{order}', valid for loss 'kto': sequential (the rows are shuffled by the seed before)"
            raise source.error(("trainer", "train_sampling_strategy"), found)


def _check_dpo_losses(args: dict[str, Any], effective: Callable[[str], Any], source: Source) -> None:
    given = args.get("loss_type", ["sigmoid"])
    kinds = [given] if isinstance(given, str) else given
    if not kinds:
        raise source.error(("trainer", "loss_type"), "found an empty list, valid: at least one loss")
    weights = args.get("loss_weights")
    if weights is not None and len(weights) != len(kinds):
        found = f"found {len(weights)} for {len(kinds)} in loss_type, valid: one for each"
        raise source.error(("trainer", "loss_weights"), found)
    smoothing = effective("label_smoothing")
    if "exo_pair" in kinds and not 0 < smoothing < 1:
        found = f"found {smoothing} with loss_type 'exo_pair', valid: > 0 and < 1 (its paper takes 1e-3)"
        raise source.error(("trainer", "label_smoothing"), found)
    if not 0 <= smoothing < (0.5 if "robust" in kinds else 1):
        valid = "≥ 0 and < 0.5 with loss_type 'robust'" if "robust" in kinds else "≥ 0 and < 1"
        raise source.error(("trainer", "label_smoothing"), f"found {smoothing}, valid: {valid}")
    without = [kind for kind in kinds if kind not in _ANY_DIVERGENCE]
    if effective("f_divergence_type") != "reverse_kl" and without:
        found = f"found '{effective('f_divergence_type')}' with loss_type '{without[0]}', valid there: reverse_kl"
        raise source.error(("trainer", "f_divergence_type"), found)
    if effective("use_weighting") and (aot := [kind for kind in kinds if kind.startswith("aot")]):
        found = f"found true with loss_type '{aot[0]}', which sorts the pairs, valid there: false"
        raise source.error(("trainer", "use_weighting"), found)


def _check_cpo_losses(effective: Callable[[str], Any], source: Source) -> None:
    """What TRL's CPOTrainer takes in silence: settings that its loss does not read, or reads as something else."""
    kind, smoothing = effective("loss_type"), effective("label_smoothing")
    if not 0 <= smoothing < 0.5:
        raise source.error(("trainer", "label_smoothing"), f"found {smoothing}, valid: ≥ 0 and < 0.5")
    if smoothing and kind in ("hinge", "ipo"):
        found = f"found {smoothing} with loss_type '{kind}', which has no such term, valid there: 0"
        raise source.error(("trainer", "label_smoothing"), found)
    if effective("cpo_alpha") < 0:
        raise source.error(("trainer", "cpo_alpha"), f"found {effective('cpo_alpha')}, valid: ≥ 0")


def _check_reward_model(config: Config, source: Source) -> None:
    """What would change the texts behind the reward model's back, or leave nothing to learn."""
    for name in ("eos_token", "pad_token", "chat_template_path"):
        if name in config.trainer.args:
            raise source.error(("trainer", name), "refused: the base's tokenizer decides, here and where it will serve")
    coefficient = config.trainer.args.get("center_rewards_coefficient")
    if coefficient is not None and coefficient < 0:
        raise source.error(("trainer", "center_rewards_coefficient"), f"found {coefficient}, valid: ≥ 0")
