"""Where the offline tasks' questions come from: the held-out side of rl.data's split, which no trainer is given.

The split is by a hash of `[data] seed` and the question (reordered operands are the same question), so what lies on
the held-out side for seed 0 is never trained on by a config with seed 0, whatever its other settings. The worked
examples are the ones a config with the same options shows, and no question.
"""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from rl.config import Config, Data, Eval, Model, Run, Task, Trainer
from rl.data import build

SEED = 0


def gym_rows(family: str, options: dict[str, Any], questions: int, shots: int, **_: Any) -> dict[str, Dataset]:
    """{"test": `questions` rows} of a reasoning-gym family, plain form with `shots` worked examples."""
    data = Data(
        source="reasoning-gym",
        train_size=1,
        seed=SEED,
        shots=shots,
        form="plain",
        tasks=(Task(name=family, options=options),),
    )
    return _dataset(data, questions, {"name": "reasoning-gym", "options": {"extract": "plain"}})


def sums(questions: int, shots: int, max_a: int, max_b: int, **_: Any) -> dict[str, Dataset]:
    """{"test": `questions` rows} a + b =, the very questions that configs/grpo.toml keeps for measuring."""
    data = Data(source="arithmetic", train_size=1, seed=SEED, shots=shots, form="plain", max_a=max_a, max_b=max_b)
    return _dataset(data, questions, {"name": "exact", "options": {"extract": "plain"}})


def _dataset(data: Data, questions: int, reward: dict[str, Any]) -> dict[str, Dataset]:
    """The held-out rows as heldout.process_results reads them."""
    config = Config(
        path=Path("evals/tasks"),
        run=Run(name="eval"),
        model=Model(base="tiny"),
        data=data,
        trainer=Trainer(algorithm="sft"),
        eval=Eval(size=questions),
    )
    rewards = json.dumps([reward])
    rows = [
        {
            "id": row["id"],
            "prompt": row["prompt"],
            "answer": row["answer"],
            "task": row["task"],
            "row": json.dumps(row, ensure_ascii=False),
            "rewards": rewards,
        }
        for row in build(config).heldout
    ]
    return {"test": Dataset.from_list(rows)}
