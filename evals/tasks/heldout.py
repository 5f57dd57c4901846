"""What heldout.yaml names: where the rows come from, and how a completion, or several samples of one, are scored."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from datasets import Dataset

from evals.catalog import ks
from evals.stats import majority_at_k, pass_at_k
from rl.config import Reward
from rl.rewards import grader
from rl.rewards.answers import Score, default_extract, extract
from rl.rewards.functions import VERIFYING

RIGHT = "right"


def dataset(rows: str, **_: Any) -> dict[str, Dataset]:
    """{"test": rows}, from the jsonl file that `evals.measure` wrote; prompts are text there, chat template applied.

    Built in memory: `load_dataset("json", …)` would leave a copy of every run's rows in the user's cache folder.
    """
    lines = Path(rows).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Strict, lenient and well-formed marks of one completion, by the verifier the run was trained with."""
    return _marks(_grader(doc["rewards"])(results[0], json.loads(doc["row"])))


def process_samples(doc: dict[str, Any], results: list[list[str]]) -> dict[str, float]:
    """Means of the marks over a question's samples (strict is then pass@1), pass@k and maj@k without bias.

    Right is strictly right. A vote is the answer in the asked-for form, all right ones being one; else there is none.
    """
    samples, row = results[0], json.loads(doc["row"])
    scores = [_grader(doc["rewards"])(sample, row) for sample in samples]
    found = {name: fmean(_marks(score)[name] for score in scores) for name in ("strict", "lenient", "wellformed")}
    votes = [
        RIGHT if score.strict else _value(doc["rewards"], sample, row) if score.wellformed else None
        for sample, score in zip(samples, scores, strict=True)
    ]
    for k in ks(len(samples)):
        found[f"pass@{k}"] = pass_at_k(len(samples), votes.count(RIGHT), k)
        found[f"maj@{k}"] = majority_at_k(votes, RIGHT, k)
    return found


def _marks(score: Score) -> dict[str, float]:
    return {"strict": float(score.strict), "lenient": float(score.lenient), "wellformed": float(score.wellformed)}


def _value(rewards: str, said: str, row: dict[str, Any]) -> tuple[str | None]:
    """What a completion gives as its answer; in a tuple, so that no text equals RIGHT."""
    options = next((r["options"] for r in json.loads(rewards) if r["name"] in VERIFYING), {})
    how = options.get("extract") or default_extract(row["prompt"])
    return (extract(said, how, stop=options.get("stop") or "\n", multiline="\n" in str(row["answer"]).strip()),)


@functools.cache
def _grader(rewards: str) -> Callable[..., Any]:
    # the same for all rows of a run, and a reasoning-gym scorer takes seconds to import
    return grader(tuple(Reward(**reward) for reward in json.loads(rewards)))
