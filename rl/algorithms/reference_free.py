"""Losses of pairs without a reference, ORPO's and CPO's, as `trl.experimental` has them.

TRL may drop either in any release: this file is all that leans on that package (trl 1.16.0), `rl.algorithms.orpo` and
`rl.algorithms.cpo` say what they are. What it leans on, held by tests/test_orpo.py and tests/test_cpo.py:
`tokenize_row` makes a row's ids, masks and labels; `concatenated_forward` returns (chosen logprobs, rejected logprobs,
chosen logits, rejected logits, cross-entropy of the chosen); `odds_ratio_loss` takes mean logprobs.

Departure for both: TRL puts a BOS token in front of every prompt where the tokenizer has one. Here rows are tokenised
as DPO's are, and sampled ones keep their very tokens, so that the policy is trained on the prompts it samples from.
"""

import os
from types import SimpleNamespace
from typing import Any

import datasets
import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # the version is pinned and the leaning tested

from trl import DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from rl.algorithms.guard import Guard, Watched
from rl.data import preferences

__all__ = ["KEEP_COLUMNS", "CPOConfig", "DuetCPOTrainer", "DuetORPOTrainer", "ORPOConfig"]

# what TRL's collator needs, and sets with a warning where it is not
KEEP_COLUMNS = {"remove_unused_columns": False}

# mean logprob of a token from which on a completion counts as certain: its odds are infinite and their slope is NaN
CERTAIN = -1e-6


class ReferenceFree(Watched):
    """Mixed in before TRL's trainer: rows as DPO's, the batch kept for the guard."""

    def __init__(
        self, guard: Guard, *, train_dataset: datasets.Dataset, processing_class: Any, args: Any, **kwargs: Any
    ):
        columns = list(preferences.IDS["dpo"])
        if "chosen_ids" not in train_dataset.column_names:
            self._tokenizer = processing_class
            # what DPO's method reads of its config
            like = SimpleNamespace(dataset_num_proc=None, max_length=args.max_length, truncation_mode="keep_start")
            train_dataset = DPOTrainer._prepare_dataset(self, train_dataset, processing_class, like, "train")
        super().__init__(
            guard,
            train_dataset=train_dataset.select_columns(columns),
            processing_class=processing_class,
            args=args,
            **kwargs,
        )

    def tokenize_row(self, feature: dict[str, list[int]], model: Any = None) -> dict[str, list[int]]:
        """What TRL's collator pads; sequences over `max_length` lose the end of their completion."""
        prompt = feature["prompt_ids"]
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for kind in ("chosen", "rejected"):
            ids = (prompt + feature[f"{kind}_ids"])[: self.max_length]
            labels = ([-100] * len(prompt) + feature[f"{kind}_ids"])[: self.max_length]
            row |= {f"{kind}_input_ids": ids, f"{kind}_attention_mask": [1] * len(ids), f"{kind}_labels": labels}
        return row


class DuetCPOTrainer(ReferenceFree, CPOTrainer):
    """TRL's loss on our rows."""


class DuetORPOTrainer(ReferenceFree, ORPOTrainer):
    """TRL's odds ratio on our rows, with the cross-entropy of the paper."""

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """As TRL's, but the cross-entropy is of the completion: TRL's is of the prompt too."""
        chosen_logps_B, rejected_logps_B, chosen_logits, rejected_logits, _, *more = super().concatenated_forward(
            model, batch
        )
        return chosen_logps_B, rejected_logps_B, chosen_logits, rejected_logits, -chosen_logps_B.mean(), *more

    def odds_ratio_loss(self, chosen_logps_B: torch.Tensor, rejected_logps_B: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As TRL's, finite and without a slope where a completion is certain."""
        return super().odds_ratio_loss(chosen_logps_B.clamp(max=CERTAIN), rejected_logps_B.clamp(max=CERTAIN))
