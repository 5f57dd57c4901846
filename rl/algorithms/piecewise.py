"""One pass through a model for a batch in pieces: what several rows share goes through its layers once, beside them.

All tokens of all pieces lie in one row, so that everything but attention, which looks at one token at a time, is done
in one go. Attention is done piece by piece: a piece's rows see themselves, and the rows of the piece before that they
continue, with what those see. A pass of its own for each piece, over a cache, costs a GPU as many launches again for
each: at 135M parameters more than the multiplying.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "duet_pieces"
# model types whose layers mix tokens in attention alone, and call it through transformers' registry with its usual
# arguments: each of them is compared with whole rows by a test
KNOWN = ("llama", "mistral", "smollm3", "qwen2", "qwen3", "gemma3_text", "phi3", "olmo2", "granite", "starcoder2")
BEHIND = 1 << 30  # the position of what nobody sees


@dataclass
class Piece:
    """Some rows of equal width: `positions` (rows, width) of their tokens, `BEHIND` where there is none, and which row
    of the piece before each row continues."""

    positions: torch.Tensor
    of_row: torch.Tensor | None = None


@dataclass
class Layout:
    """The pieces of a batch, in the order in which their tokens lie."""

    pieces: list[Piece]
    masks: dict[tuple[int, int | None], torch.Tensor | None] = field(default_factory=dict)  # by piece and window

    @property
    def positions(self) -> torch.Tensor:
        """(1, tokens), zero where there is none."""
        every = torch.cat([piece.positions.reshape(-1) for piece in self.pieces])[None]
        return every.masked_fill(every == BEHIND, 0)

    def mask(self, number: int, window: int | None) -> torch.Tensor | None:
        """(rows, 1, width, keys): what each token of a piece sees, of the last `window` tokens if given; None where
        all that is said is that nobody sees what comes later."""
        if (number, window) not in self.masks:
            self.masks[number, window] = self._mask(number, window)
        return self.masks[number, window]

    def _mask(self, number: int, window: int | None) -> torch.Tensor | None:
        own = self.pieces[number].positions
        if number == 0 and (window is None or own.shape[1] <= window):
            return None
        keys = self._keys(number)[:, None, None]
        asking = own[:, None, :, None]
        seen = keys <= asking
        if window is not None:
            seen &= asking - keys < window
        # a token that is not there sees itself: a row of a softmax must not be empty
        return seen

    def _keys(self, number: int) -> torch.Tensor:
        piece = self.pieces[number]
        if number == 0:
            return piece.positions
        return torch.cat([self._keys(number - 1)[piece.of_row], piece.positions], dim=1)


def knows(model: Any) -> bool:
    """Whether a batch may go through this model (transformers', or PEFT's around it) in pieces."""
    config = model.config
    return config.model_type in KNOWN and config._attn_implementation == "sdpa"


@contextmanager
def attending(config: Any) -> Iterator[None]:
    """Within the block the model of `config` wants `layout=` with each call, and attends by it."""
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    layout: Layout,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers asks for it: queries (1, heads, tokens, D), keys and values (1, kv_heads, tokens, D)
    to (1, tokens, heads, D)."""
    start, parts = 0, []
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    for number, piece in enumerate(layout.pieces):
        rows, width = piece.positions.shape
        stop = start + rows * width
        q, k, v = (_rows(x[0, :, start:stop], rows, width) for x in (query, key, value))
        if keys is not None and values is not None:
            k = torch.cat([keys[piece.of_row], k], dim=2)
            v = torch.cat([values[piece.of_row], v], dim=2)
        out, _ = sdpa_attention_forward(module, q, k, v, layout.mask(number, sliding_window), **kwargs)
        parts.append(out.reshape(1, rows * width, *out.shape[2:]))
        keys, values, start = k, v, stop
    return torch.cat(parts, dim=1), None


def _rows(x_H_N_D: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    return x_H_N_D.unflatten(1, (rows, width)).transpose(0, 1)


AttentionInterface.register(NAME, attend)
