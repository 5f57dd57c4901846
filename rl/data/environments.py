"""Rows that an environment makes itself: its `rows(count, seed)`, split into held-out and training rows."""

import random
from typing import TYPE_CHECKING, Any

from rl.errors import UserError

if TYPE_CHECKING:
    from rl.config import Config


def rows(config: "Config") -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(train, held-out) rows of [rollout] environment: the first `eval.size` are held out, the rest trained on.

    A row has `prompt` (chat messages) and whatever `reset` takes; `id`, `answer` and `task` are filled in. Raises
    UserError for an environment without rows(), too few rows, two of one id, or rows without a chat prompt.
    """
    from rl.tools import toolbox

    data, size = config.data, config.eval.size
    where = f"{config.path}: [rollout] environment = '{config.rollout.environment}'"
    made = toolbox.environment_maker(config)()
    if not callable(getattr(made, "rows", None)):
        raise UserError(f"{where}: has no rows(count, seed), which [data] source = 'environment' asks for")
    try:
        found = list(made.rows(size + data.train_size, data.seed))[: size + data.train_size]
    except Exception as error:
        raise UserError(f"{where}: rows() failed: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if len(found) <= size:
        raise UserError(f"{where}: rows() gives {len(found)}, and [eval] size = {size} are held out: lower it")
    whole = [_row(row, i, where) for i, row in enumerate(found)]
    ids = [row["id"] for row in whole]
    if len(set(ids)) < len(ids):
        double = next(name for name in ids if ids.count(name) > 1)
        raise UserError(f"{where}: rows() gives two rows with the id '{double}'")
    heldout, train = whole[:size], whole[size:]
    random.Random(data.seed).shuffle(train)
    return train, heldout


def _row(row: Any, number: int, where: str) -> dict[str, Any]:
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, list) or not prompt or not all(isinstance(m, dict) and "role" in m for m in prompt):
        raise UserError(f"{where}: row {number} of rows() has no 'prompt', a list of chat messages")
    named = {"id": str(row.get("id", number)), "answer": str(row.get("answer", "")), "task": "environment"}
    return {**named, **row, "id": named["id"], "answer": named["answer"]}
