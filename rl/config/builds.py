"""What a config may build on: whether another config makes what is wanted where it is named."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rl import trl_fields
from rl.algorithms import GROUPED, PREFERENCES
from rl.config.reading import Source, Where

if TYPE_CHECKING:
    from rl.config import Config

# algorithms whose loss or reward has a KL to a reference
REFERENCED = ("dpo", "kto", *GROUPED)


def check(config: Config, source: Source) -> None:
    """Raise UserError where the algorithm has no use for a run that the config builds on."""
    algorithm = config.trainer.algorithm
    if config.data.from_ is not None and algorithm not in PREFERENCES:
        found = f"found '{config.data.from_}' for algorithm '{algorithm}', valid for {', '.join(PREFERENCES)} only"
        raise source.error(("data", "from"), found)
    reference = config.model.reference
    if reference is not None and algorithm not in REFERENCED:
        found = f"found '{reference}', and algorithm '{algorithm}' has no KL term, valid for {', '.join(REFERENCED)}"
        raise source.error(("model", "reference"), found)
    if reference is not None and not trl_fields.value(algorithm, config.trainer.args, "beta"):
        raise source.error(("model", "reference"), f"found '{reference}' with [trainer] beta = 0, valid: beta > 0")
    if reference is not None and config.trainer.args.get("sync_ref_model"):
        raise source.error(("model", "reference"), f"found '{reference}' with [trainer] sync_ref_model, valid: one")


def check_parent(where: Where, other: Config, source: Source, algorithm_here: str) -> None:
    """Raise UserError where `other`, the config named at `where`, makes something else than is wanted there."""
    algorithm, named = other.trainer.algorithm, f"found '{other.path.name}', whose algorithm is"
    if where[0] == "reward" and algorithm != "reward":
        raise source.error(where, f"{named} '{algorithm}', valid: a config of algorithm 'reward'")
    if where[0] == "model" and algorithm == "reward":
        raise source.error(where, f"{named} 'reward': a reward model scores texts and cannot say any")
    pairing = [name for name in PREFERENCES if name != "kto"]
    if where[0] == "data" and algorithm not in (PREFERENCES if algorithm_here == "kto" else pairing):
        raise source.error(where, f"{named} '{algorithm}', valid: one that samples pairs: {', '.join(pairing)}")
