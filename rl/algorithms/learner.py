"""The trainer's forward, without work that changes nothing.

Savings, gradient-equal to TRL's own forward (tests/test_learner.py):
- what all prompts of the batch share (few-shot examples, a system message) goes through the model once, and the rest of
  each distinct prompt once, beside the completions in one pass (rl/algorithms/piecewise.py); keys and values are
  repeated for the rows. Which pieces are made is decided by the tokens they save (`share`);
- on-policy, the forward that gives the old logprobs *is* the loss forward: it is run once with its graph and reused;
- the head, a quarter of a small model, runs on completion tokens alone, and a completion's last token is scored but
  not read.
Below the first adapter autograd records nothing by itself: no weight there wants a gradient, and no input does.
"""

from dataclasses import dataclass
from typing import Any

import torch
import trl.trainer.utils

from rl.algorithms import pieces
from rl.algorithms.pieces import PIECE_TOKENS
from rl.algorithms.piecewise import BEHIND, Layout, Piece, attending
from rl.device import padded


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


@dataclass(frozen=True)
class Shared:
    """What of a batch goes through the model once.

    `prefix`: tokens that all prompts start with. `prompts`: the first row of each distinct prompt, whose rest is read
    once too, but for the last token; empty where each row reads its own. `of_row`: which of `prompts` each row has.
    """

    prefix: int
    prompts: tuple[int, ...] = ()
    of_row: tuple[int, ...] = ()


def piece_tokens(device: torch.device, config: Any) -> int:
    """How many tokens take as long as one more piece in a layer of a model of transformers' `config`."""
    if device.type not in pieces.PIECE_WEIGHTS:
        return PIECE_TOKENS
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 2 * (heads + (getattr(config, "num_key_value_heads", None) or heads)) * width
    feed_forward = 3 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    return pieces.piece_tokens(device.type, config.hidden_size * (attention + feed_forward))


def share(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_columns: int, cost: int | None = None
) -> Shared | None:
    """The way with the fewest tokens, each further piece counted as `cost` of them (`piece_tokens`; unset =
    PIECE_TOKENS); None where each row goes whole. `input_ids` (rows, prompt + completion columns) with prompts padded
    on the left.
    """
    rows, total = input_ids.shape
    device = input_ids.device
    split = total - completion_columns
    prefix = pieces.shared(shared_prefix(input_ids, attention_mask, completion_columns), device.type)
    longest = int(attention_mask[:, :split].sum(1).max())
    numbers: dict[bytes, int] = {}
    keys = row_keys(input_ids[:, :split], attention_mask[:, :split])
    of_row = tuple(numbers.setdefault(key, len(numbers)) for key in keys)
    prompts = tuple(of_row.index(i) for i in range(len(numbers)))
    sizes = pieces.Sizes(
        rows=rows,
        prompt=longest,
        completion=completion_columns,
        prompts=len(prompts),
        prefix=prefix,
        total=total,
    )
    way = pieces.choose(sizes, device.type, PIECE_TOKENS if cost is None else cost)
    if way == "whole":
        return None
    if way == "prefix":
        return Shared(prefix)
    prompts += prompts[:1] * (pieces.on_device(len(prompts), device.type) - len(prompts))  # the first one again
    return Shared(prefix, prompts, of_row)


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
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_columns: int, shared: Shared
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logprobs and entropies (rows, completion columns) as TRL's fused head gives them, zero on padding.

    `input_ids` (rows, prompt + completion columns) with prompts padded on the left and completions on the right;
    `shared` is `share`'s, the model one that `piecewise.knows`. The rows go through it without their left padding.
    """
    rows, total = input_ids.shape
    device, split = input_ids.device, total - completion_columns
    lengths = attention_mask[:, :split].sum(1)
    begin = split - lengths  # column of each row's first token
    made: list[Piece] = []
    ids: list[torch.Tensor] = []

    def add(some: torch.Tensor, positions: torch.Tensor, there: torch.Tensor, of_row: torch.Tensor | None) -> None:
        """Tokens at `positions` of the rows `some`, where they are `there`; each continues its row `of_row`."""
        source = (begin[some, None] + positions).clamp(max=total - 1)
        ids.append(input_ids[some].gather(1, source).reshape(-1))
        made.append(Piece(positions.masked_fill(~there, BEHIND), of_row if made else None))

    first, every = torch.zeros(1, dtype=torch.long, device=device), torch.arange(rows, device=device)
    of_row = torch.zeros_like(every)
    read = torch.full_like(lengths, shared.prefix)  # tokens of each row that are in an earlier piece
    if shared.prefix:
        positions = torch.arange(shared.prefix, device=device)[None]
        add(first, positions, torch.ones_like(positions, dtype=torch.bool), None)
    if shared.prompts:
        some, of_row = (torch.tensor(index, device=device) for index in (shared.prompts, shared.of_row))
        width = padded(int(lengths.max()) - 1 - shared.prefix, device)
        positions = shared.prefix + torch.arange(width, device=device)[None].expand(len(some), -1)
        add(some, positions, positions < lengths[some, None] - 1, torch.zeros_like(some))
        read = lengths - 1
    width = padded(int((lengths - read).max()) + completion_columns - 1, device)
    positions = read[:, None] + torch.arange(width, device=device)[None]
    source = begin[:, None] + positions
    target = source + 1  # the token that each one predicts
    scored = (target >= split) & (target < total)
    source, target = source.clamp(max=total - 1), target.clamp(max=total - 1)
    scored &= attention_mask.gather(1, target).bool()
    add(every, positions, attention_mask.gather(1, source).bool(), of_row)

    layout = Layout(made)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model

    def last_piece(_module: Any, _args: Any, out: Any) -> Any:
        out.last_hidden_state = out.last_hidden_state[0, -rows * width :].unflatten(0, (rows, width))
        return out

    hook = base.model.register_forward_hook(last_piece)  # before the head
    try:
        with attending(base.config):
            out = model(
                input_ids=torch.cat(ids)[None],
                position_ids=layout.positions,
                layout=layout,
                shift_labels=torch.where(scored, input_ids.gather(1, target), -100),
                fused_lm_head=True,
            )
    finally:
        hook.remove()
    column = (target - split).clamp(min=0)

    def back(values: torch.Tensor) -> torch.Tensor:
        zeros = values.new_zeros(rows, completion_columns)
        return zeros.scatter_add(1, column, values * scored)

    return back(out.log_probs), None if out.entropy is None else back(out.entropy)
