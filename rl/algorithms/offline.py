"""What the trainers share that learn from rows made before the first step."""

from collections.abc import Callable
from typing import Any

import datasets

from rl.algorithms.base import Job, Outcome, Recorder, run_trainer
from rl.algorithms.guard import Guard


def run(
    job: Job, settings: Any, trainer_class: Callable[..., Any], rows: list[dict[str, Any]], **given: Any
) -> Outcome:
    """Train `job.model` in place on `rows` with a trainer of `trainer_class` (of `guard.Watched`).

    `settings` is TRL's config for it, `given` what else its constructor takes. Every step is a boundary of a resume.
    """
    guard = Guard(job.hooks.warn)
    recorder = Recorder(job, guard, period=1)
    trainer = trainer_class(
        guard,
        model=job.model,
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=job.tokenizer,
        callbacks=[guard, recorder],
        **given,
    )
    return run_trainer(job, trainer, guard, recorder)
