"""One file per algorithm; TRL is imported here and nowhere else, and only once training starts."""

import importlib
from typing import Any

# recipes over grpo: TRL's GRPO with other arguments
RECIPES = ("dr_grpo", "dapo", "gspo", "cispo", "sapo")
# these sample while they train and need a reward
ONLINE = ("grpo", *RECIPES, "rloo")
ALGORITHMS = ("sft", *ONLINE, "dpo", "kto")


def defaults(algorithm: str) -> dict[str, Any]:
    """The arguments of TRL that a recipe sets where the config does not; {} for what is no recipe."""
    return dict(importlib.import_module(f"rl.algorithms.{algorithm}").DEFAULTS) if algorithm in RECIPES else {}
