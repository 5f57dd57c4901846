"""What [rollout] tools and environment need, seen from their source alone: checking a config runs no user code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rl.algorithms import GROUPED
from rl.config.reading import Source
from rl.tools import signatures

if TYPE_CHECKING:
    from rl.config import Config

# of TRL's trainers only GRPO's has tools
ALGORITHMS = tuple(name for name in GROUPED if name != "rloo")


def check(config: Config, source: Source) -> None:
    """Raise UserError for the first thing that is wrong with the config's tools."""
    rollout, data = config.rollout, config.data
    asked = "tools" if rollout.tools else "environment"
    _check_environment(config, source)
    if not rollout.tools and rollout.environment is None:
        if rollout.max_turn_length is not None:
            raise source.error(("rollout", "max_turn_length"), "only with [rollout] tools or environment")
        return
    if (turn := rollout.max_turn_length) is not None and turn > rollout.max_completion_length:
        valid = f"valid: up to [rollout] max_completion_length = {rollout.max_completion_length}"
        raise source.error(("rollout", "max_turn_length"), f"found {turn}, {valid}")
    if config.trainer.algorithm not in ALGORITHMS:
        found = f"found for algorithm '{config.trainer.algorithm}', valid for: {', '.join(ALGORITHMS)}"
        raise source.error(("rollout", asked), found)
    if data.source in ("arithmetic", "reasoning-gym") and data.form != "chat":
        raise source.error(
            ("data", "form"), f"found '{data.form}' with [rollout] {asked}, valid: chat, calls are turns"
        )
    for dotted in rollout.tools:
        if said := signatures.problem(dotted, "function"):
            raise source.error(("rollout", "tools"), said)
    if double := next((d for d in rollout.tools if rollout.tools.count(d) > 1), None):
        raise source.error(("rollout", "tools"), f"found '{double}' twice, valid: each once")


def _check_environment(config: Config, source: Source) -> None:
    rollout = config.rollout
    if rollout.environment is None:
        if rollout.environment_options:
            raise source.error(("rollout", "environment_options"), "only with [rollout] environment")
        if config.data.source == "environment":
            valid = "valid: with [rollout] environment, whose rows() they are"
            raise source.error(("data", "source"), f"found 'environment', {valid}")
        i = next((i for i, reward in enumerate(config.rewards) if reward.name == "environment"), None)
        if i is not None:
            valid = "valid: with [rollout] environment, whose get_reward() it is"
            raise source.error(("reward", i, "name"), f"found 'environment', {valid}")
        return
    if said := signatures.problem(rollout.environment, "class"):
        raise source.error(("rollout", "environment"), said)
