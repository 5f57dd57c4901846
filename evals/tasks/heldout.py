"""The two functions that heldout.yaml names: where the rows come from, and how a completion is scored."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset

from rl.config import Reward
from rl.rewards import grader


def dataset(rows: str, **_: Any) -> dict[str, Dataset]:
    """{"test": rows}, from the jsonl file that `evals.measure` wrote; prompts are text there, chat template applied.

    Built in memory: `load_dataset("json", …)` would leave a copy of every run's rows in the user's cache folder.
    """
    lines = Path(rows).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Strict, lenient and well-formed marks of one completion, by the verifier the run was trained with."""
    score = _grader(doc["rewards"])(results[0], json.loads(doc["row"]))
    return {"strict": float(score.strict), "lenient": float(score.lenient), "wellformed": float(score.wellformed)}


@functools.cache
def _grader(rewards: str) -> Callable[..., Any]:
    # the same for all rows of a run, and a reasoning-gym scorer takes seconds to import
    return grader(tuple(Reward(**reward) for reward in json.loads(rewards)))
