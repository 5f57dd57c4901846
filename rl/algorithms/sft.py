"""SFT: next-token cross-entropy on gold completions, prompts masked, through TRL's SFTTrainer.

No departure from TRL; the loss is on completion tokens and their EOS only.
"""

from dataclasses import fields

import datasets
from trl import SFTConfig, SFTTrainer

from rl.algorithms.base import Job, Outcome, Recorder, arguments, run_trainer
from rl.algorithms.guard import Guard, Watched
from rl.errors import UserError


class DuetSFTTrainer(Watched, SFTTrainer):
    """TRL's trainer, with the batch kept for the guard."""


def train(job: Job) -> Outcome:
    """Run SFT to the end of `job`; raises UserError when the data has no gold completions."""
    missing = [row["id"] for row in job.train if not row.get("completion")]
    if missing:
        raise UserError(
            f"{job.config.path}: [data] source {job.config.data.source!r} has no gold completion in row "
            f"{missing[0]!r}; sft needs the columns prompt and completion"
        )
    settings = SFTConfig(**arguments(job, {f.name for f in fields(SFTConfig)}))
    guard = Guard(job.hooks.warn)
    recorder = Recorder(job, guard, period=1)
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in job.train]
    trainer = DuetSFTTrainer(
        guard,
        model=job.model,
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=job.tokenizer,
        callbacks=[guard, recorder],
    )
    return run_trainer(job, trainer, guard, recorder)
