"""SFT: next-token cross-entropy on gold completions, prompts masked, through TRL's SFTTrainer.

The loss is on completion tokens and their EOS only, averaged over the tokens of the optimizer step. `[trainer]
packing = true` lays short examples end to end in rows of `max_length` tokens, with positions that begin again at each
(TRL's best-fit-decreasing "bfd", Ding et al. 2024, 2404.10830): no padding is computed, the loss is the same.

TRL hands packed rows to the model as one long row without a mask. No attention kernel of variable lengths is needed for
that to be right: transformers reads the documents off the positions and masks each from the others, in "sdpa" and in
"eager" attention alike (tests/test_sft.py changes one document and finds the others' logprobs as they were). What it
costs is a mask of (batch x max_length)^2: keep `per_device_train_batch_size` small and `max_length` near the longest
few examples; an example that is longer is cut.

Departure from TRL: `packing_strategy = "wrapped"`, which cuts examples anywhere and lets each attend to its neighbours,
is refused.
"""

from dataclasses import fields
from typing import Any

from trl import SFTConfig, SFTTrainer

from rl.algorithms import offline
from rl.algorithms.base import Job, Outcome, arguments
from rl.algorithms.guard import Watched
from rl.algorithms.learner import score_completions_only
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
    return train_on(job, [{"prompt": row["prompt"], "completion": row["completion"]} for row in job.train])


def train_on(job: Job, rows: list[dict[str, Any]]) -> Outcome:
    """Run SFT on `rows` as TRL takes them: texts or messages, or `input_ids` with their `labels`."""
    score_completions_only()
    settings = SFTConfig(**arguments(job, {f.name for f in fields(SFTConfig)}))
    return offline.run(job, settings, DuetSFTTrainer, rows)
