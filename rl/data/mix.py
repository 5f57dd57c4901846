"""Several sources as one: each gives its share of the rows, and what one holds out no other trains on."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from rl.data import gym
from rl.errors import UserError

if TYPE_CHECKING:
    from rl.config import Config

Row = dict[str, Any]
Reader = Callable[["Config"], tuple[list[Row], list[Row]]]


def shares(config: "Config", total: int) -> list[int]:
    """`total` rows split by the weights of [[data.mix]]."""
    return gym.shares(total, [part.weight for part in config.data.mix or ()])


def parts(config: "Config") -> list["Config"]:
    """For each [[data.mix]] the config of it alone: its source, its share of the sizes, the rest as it is."""
    from rl.config import Rows

    data, found = config.data, []
    counts = zip(shares(config, data.train_size), shares(config, config.eval.size), strict=True)
    for part, (train, heldout) in zip(data.mix or (), counts, strict=True):
        own = {f.name: getattr(part, f.name) for f in fields(Rows)}
        alone = replace(data, **own, train_size=train, mix=None, curriculum=None)
        found.append(replace(config, data=alone, eval=replace(config.eval, size=heldout)))
    return found


def rows(config: "Config", readers: dict[str, Reader]) -> tuple[list[Row], list[Row]]:
    """(train, held-out) rows of all [[data.mix]], shuffled together by [data] seed; ids begin with the part's number.

    A row whose question another source holds out (the same prompt; for arithmetic and reasoning-gym also the same
    question in another wording or order) is left out of training. A source with fewer rows than its share repeats
    them, so that the shares are those of the weights. Raises UserError as the sources do, and where nothing of one is
    left to train on.
    """
    configs = parts(config)
    read = [readers[part.data.source](part) for part in configs]
    held = {name for _, heldout in read for row in heldout for name in _names(row)}
    train: list[Row] = []
    measured: list[Row] = []
    for i, (part, (own, heldout)) in enumerate(zip(configs, read, strict=True)):
        left = [row for row in own if not held & _names(row)]
        if not left:
            raise UserError(
                f"{config.path}: [[data.mix]] {i} ({part.data.source}): every one of its questions is held out by "
                "another source: lower [eval] size, or leave it out"
            )
        measured += [row | {"id": f"{i}/{row['id']}"} for row in heldout]
        for n in range(part.data.train_size):
            row, again = left[n % len(left)], n // len(left)
            train.append(row | {"id": f"{i}/{row['id']}" + (f"#{again + 1}" if again else "")})
    for side in (train, measured):
        random.Random(config.data.seed).shuffle(side)
    return train, measured


def _names(row: Row) -> set[str]:
    """What a row's question is known by: rows that share one must lie on the same side."""
    prompt, task = row["prompt"], row.get("task")
    names = {json.dumps(prompt, sort_keys=True)}
    if task == "arithmetic" and (pair := re.fullmatch(r"(\d+)(\D)(\d+)", row["id"])):
        names.add(f"arithmetic {pair[2]} {sorted((int(pair[1]), int(pair[3])))}")
    elif row.get("metadata") is not None:
        last = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        question = last.rpartition("Question: ")[2].removesuffix("\nAnswer:")
        names.add(gym.keys(str(task), question.strip())[1])
    return names
