"""What [[data.mix]] and [data.curriculum] ask of the rest of a config."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rl.algorithms import ONLINE
from rl.config.reading import Source
from rl.errors import UserError

if TYPE_CHECKING:
    from rl.config import Config


def check(config: Config, source: Source) -> None:
    """Raise UserError for the first impossible combination."""
    _check_mix(config, source)
    _check_curriculum(config, source)


def _check_mix(config: Config, source: Source) -> None:
    from rl.config import checks
    from rl.data import mix

    data, algorithm = config.data, config.trainer.algorithm
    if (data.source == "mix") != bool(data.mix):
        if data.mix:
            raise source.error(("data", "source"), f"found '{data.source}' with [[data.mix]], valid: mix")
        raise source.table_error(("data",), "mix: missing, source = 'mix' needs at least one [[data.mix]]")
    if not data.mix:
        return
    if algorithm == "reward":
        raise source.error(("data", "source"), "found 'mix' for algorithm 'reward', valid there: one source")
    for total, where in ((data.train_size, ("data", "train_size")), (config.eval.size, ("eval", "size"))):
        if 0 in mix.shares(config, total):
            valid = "valid: more, or weights that are closer together"
            raise source.error(where, f"found {total}, of which a [[data.mix]] gets no row, {valid}")
    for i, part in enumerate(mix.parts(config)):
        try:
            checks.check_data(part, source)
        except UserError as error:
            raise UserError(str(error).replace("[data]", f"[[data.mix]] {i}", 1)) from None


def _check_curriculum(config: Config, source: Source) -> None:
    wanted, algorithm = config.data.curriculum, config.trainer.algorithm
    if wanted is None:
        return
    where = ("data", "curriculum")
    if algorithm not in ONLINE:
        raise source.error(where, f"found for algorithm '{algorithm}', valid for {', '.join(ONLINE)} only")
    if wanted.min_pass > wanted.max_pass:
        raise source.error((*where, "min_pass"), f"found {wanted.min_pass}, valid: ≤ max_pass {wanted.max_pass}")
    if config.rollout.tools or config.rollout.environment:
        raise source.error(where, "found with [rollout] tools or environment, whose episodes are not asked beforehand")
