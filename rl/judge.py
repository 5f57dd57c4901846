"""One number for a completion: what a run's `[[reward]]` terms give it in sum."""

import math
from collections.abc import Sequence
from typing import Any

from rl.data.prompts import says
from rl.rewards import RewardFunction

# what TRL's trainers keep from a reward among the row's columns
NOT_COLUMNS = ("prompt", "completion", "completion_ids")


def totals(
    functions: Sequence[RewardFunction], rows: Sequence[dict[str, Any]], texts: Sequence[str], ids: Sequence[list[int]]
) -> list[float]:
    """Weighted sum of the rewards of each completion, one a row; NaN where every reward gave None (see `each`)."""
    return summed(functions, each(functions, rows, texts, ids), len(rows))


def each(
    functions: Sequence[RewardFunction], rows: Sequence[dict[str, Any]], texts: Sequence[str], ids: Sequence[list[int]]
) -> list[list[float | None]]:
    """What each reward gives each completion, (functions, rows).

    `rows` holds each completion's question (all with the columns of the first), `texts` what was said to it without
    special tokens, `ids` its tokens. Rewards are called as TRL's trainers call them: messages where the prompt is chat.
    """
    columns = {name: [row[name] for row in rows] for name in rows[0] if name not in NOT_COLUMNS}
    prompts = [row["prompt"] for row in rows]
    completions = [says(t) if isinstance(p, list) else t for p, t in zip(prompts, texts, strict=True)]
    return [f(prompts=prompts, completions=completions, completion_ids=list(ids), **columns) for f in functions]


def summed(functions: Sequence[RewardFunction], given: Sequence[Sequence[float | None]], rows: int) -> list[float]:
    """The weighted sum of what `each` gave."""
    sums = [0.0 if not functions else math.nan] * rows
    for function, values in zip(functions, given, strict=True):
        for i, reward in enumerate(values):
            if reward is not None:
                sums[i] = function.weight * reward + (0.0 if math.isnan(sums[i]) else sums[i])
    return sums
