"""The trainer's forward, without work that changes nothing.

Three savings, gradient-equal to TRL's own forward (tests/test_learner.py):
- what all prompts of the batch share (few-shot examples, a system message) goes through the model once, its keys and
  values are repeated for the rows, and gradients flow back through that one pass;
- on-policy, the forward that gives the old logprobs *is* the loss forward: it is run once with its graph and reused;
- the head, a quarter of a small model, runs on completion tokens alone.
"""

from dataclasses import dataclass
from typing import Any

import torch
import trl.trainer.utils
from transformers import DynamicCache

from rl.device import padded

# below this many shared tokens a second pass costs more than it saves
SHORTEST_PREFIX = 8


def score_completions_only() -> None:
    """Make TRL's fused head project completion tokens only on CPU too, as it does where Triton is.

    trl 1.16 asks `trl.trainer.utils._use_triton` whether to drop the other positions, and its kernels ask their own
    module; on MPS all positions stay, since a shape of its own for every batch leaks memory there.
    """
    trl.trainer.utils._use_triton = lambda device: device.type != "mps"


@dataclass
class Forward:
    """Per-token logprobs and entropies, (rows, completion columns), with the batch they belong to."""

    rows: dict[bytes, int]
    logps_B_T: torch.Tensor
    entropies_B_T: torch.Tensor

    def reorder(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor | None:
        """Index of each row of another batch in this one, or None when one is missing (TRL shuffles its batch)."""
        found = [self.rows.get(key) for key in row_keys(input_ids, attention_mask)]
        if any(i is None for i in found):
            return None
        return torch.tensor(found, device=self.logps_B_T.device)


def row_keys(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[bytes]:
    """One key a row: its ids and its mask."""
    both = torch.cat([input_ids, attention_mask.to(input_ids.dtype)], dim=1).cpu().numpy()
    return [row.tobytes() for row in both]


def shared_prefix(input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_columns: int) -> int:
    """Tokens that every row's prompt starts with, leaving each prompt at least one token of its own."""
    prompts = input_ids[:, :-completion_columns]
    mask = attention_mask[:, :-completion_columns].bool()
    lengths = mask.sum(1)
    shortest = int(lengths.min())
    if shortest < 2:
        return 0
    start = prompts.shape[1] - lengths  # prompts are left-padded
    columns = start[:, None] + torch.arange(shortest, device=prompts.device)[None]
    heads = prompts.gather(1, columns)
    same = (heads == heads[:1]).all(0)
    equal = shortest if bool(same.all()) else int((~same).int().argmax())
    return min(equal, shortest - 1)


def forward(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_columns: int, prefix: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logprobs and entropies (rows, completion columns) as TRL's fused head gives them, zero on padding.

    `input_ids` (rows, prompt + completion columns) with prompts padded on the left and completions on the right;
    `prefix` is `shared_prefix`'s. The rows go through the model without their left padding.
    """
    rows, total = input_ids.shape
    prompt_columns = total - completion_columns
    lengths = attention_mask[:, :prompt_columns].sum(1)
    width = padded(total - int(prompt_columns - lengths.max()) - prefix, input_ids.device)
    # where each row's own tokens (prompt after the prefix, then completion) come from
    source = (prompt_columns - lengths)[:, None] + prefix + torch.arange(width, device=input_ids.device)[None]
    inside = source < total
    source = source.clamp(max=total - 1)
    tokens = input_ids.gather(1, source)
    valid = attention_mask.gather(1, source).bool() & inside
    labels = torch.where(valid & (source >= prompt_columns), tokens, -100)
    prefix_ids = input_ids.gather(1, (prompt_columns - lengths)[:1, None] + torch.arange(prefix, device=tokens.device))

    cache = DynamicCache()
    model.get_base_model().model(input_ids=prefix_ids, past_key_values=cache, use_cache=True) if hasattr(
        model, "get_base_model"
    ) else model.model(input_ids=prefix_ids, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(rows)
    seen = torch.cat([valid.new_ones(rows, prefix), valid], dim=1).to(attention_mask.dtype)
    positions = (prefix + torch.arange(width, device=tokens.device))[None].expand(rows, -1)
    out = model(
        input_ids=tokens,
        attention_mask=seen,
        position_ids=positions,
        past_key_values=cache,
        labels=labels,
        fused_lm_head=True,
    )
    # the fused head scores token j + 1 at column j of `width - 1`
    target = source[:, 1:] - prompt_columns
    keep = (labels[:, 1:] != -100).to(out.log_probs.dtype)
    target = target.clamp(min=0)

    def back(values: torch.Tensor) -> torch.Tensor:
        zeros = values.new_zeros(rows, completion_columns)
        return zeros.scatter_add(1, target, values * keep)

    return back(out.log_probs), None if out.entropy is None else back(out.entropy)
