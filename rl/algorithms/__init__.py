"""One file per algorithm; TRL is imported here and nowhere else, and only once training starts."""

import importlib
from typing import Any

# recipes over grpo: TRL's GRPO with other arguments
RECIPES = ("dr_grpo", "dapo", "gspo", "cispo", "sapo", "reinforce_pp")
# TRL's trainers that sample groups of completions
GROUPED = ("grpo", *RECIPES, "rloo")
# these sample while they train and need a reward
ONLINE = (*GROUPED, "ppo", "online_dpo")
# these learn from preferences: rows of a file, of another run, or sampled by the run itself (rl.pairs)
PREFERENCES = ("dpo", "kto", "orpo", "cpo", "reward")
ALGORITHMS = ("sft", "bon", *ONLINE, *PREFERENCES)
# algorithms that take the arguments of another one
ALIKE = {**dict.fromkeys(RECIPES, "grpo"), "bon": "sft", "online_dpo": "dpo"}


def defaults(algorithm: str) -> dict[str, Any]:
    """The arguments of TRL that a recipe sets where the config does not; {} for what is no recipe."""
    return dict(importlib.import_module(f"rl.algorithms.{algorithm}").DEFAULTS) if algorithm in RECIPES else {}
