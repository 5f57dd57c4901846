"""A key/value cache for one batch of completions: shared prefix, left-padded suffixes, fixed size.

Columns are filled from the left, the same column for every row: `[common prefix | padding + suffix | completion]`.
A row's padding columns stay invalid for ever; positions (for RoPE and for windows) count only its valid columns.
Stands in for mlx-lm's own caches: its models call `offset`, `update_and_fetch` and `make_mask` (mlx-lm 0.32.2).
"""

from typing import Any

import mlx.core as mx


class Columns:
    """What is in each cache column, shared by all layers: validity and position, both (rows, capacity)."""

    def __init__(self, rows: int, capacity: int):
        self.used = 0  # columns filled by finished forward passes
        self.coming = 0  # columns of the forward pass under way
        self.valid_B_S = mx.zeros((rows, capacity), dtype=mx.bool_)
        self.position_B_S = mx.zeros((rows, capacity), dtype=mx.int32)
        self.offset_B = mx.zeros((rows,), dtype=mx.int32)  # position of the first coming column

    def begin(self, valid_B_N: mx.array) -> None:
        """Announce a forward pass over N columns; padding must be on the left of each row."""
        length = valid_B_N.shape[1]
        self.coming = length
        padding_B = length - valid_B_N.sum(axis=1).astype(mx.int32)
        self.offset_B = self.offset_B - padding_B
        end = self.used + length
        self.valid_B_S[:, self.used : end] = valid_B_N
        self.position_B_S[:, self.used : end] = self.offset_B[:, None] + mx.arange(length, dtype=mx.int32)[None]

    def commit(self) -> None:
        """The announced forward pass is done: its columns now count as used."""
        self.offset_B = self.offset_B + self.coming
        self.used += self.coming
        self.coming = 0

    def mask(self, window: int | None) -> mx.array:
        """Boolean (rows, 1, N, used + N): causal, padding hidden, at most `window` positions back.

        A padding query sees itself alone: a row with nothing to see would be NaN, and 0 × NaN spreads to its readers.
        """
        end = self.used + self.coming
        query_B_N = self.position_B_S[:, self.used : end]
        key_B_S = self.position_B_S[:, :end]
        distance = query_B_N[:, :, None] - key_B_S[:, None, :]
        seen = self.valid_B_S[:, None, :end] & (distance >= 0)
        if window is not None:
            seen = seen & (distance < window)
        own = mx.arange(self.used, end)[:, None] == mx.arange(end)[None]
        return (seen | own[None])[:, None]

    def take(self, rows: mx.array) -> None:
        """Keep (or repeat) `rows`, in that order."""
        self.valid_B_S = self.valid_B_S[rows]
        self.position_B_S = self.position_B_S[rows]
        self.offset_B = self.offset_B[rows]


class LayerCache:
    """One layer's keys and values, (rows, kv_heads, capacity, head_dim)."""

    def __init__(self, columns: Columns, capacity: int):
        self.columns = columns
        self.capacity = capacity
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    @property
    def offset(self) -> mx.array:
        """Position of the first coming token of each row, (rows,): what RoPE needs."""
        return self.columns.offset_B

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store the coming columns and return all columns so far."""
        if self.keys is None:
            rows, heads = keys.shape[:2]
            self.keys = mx.zeros((rows, heads, self.capacity, keys.shape[3]), keys.dtype)
            self.values = mx.zeros((rows, heads, self.capacity, values.shape[3]), values.dtype)
        start, end = self.columns.used, self.columns.used + keys.shape[2]
        self.keys[..., start:end, :] = keys
        self.values[..., start:end, :] = values
        return self.keys[..., :end, :], self.values[..., :end, :]

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """The mask of the coming columns (mlx-lm's `create_attention_mask` calls this)."""
        return self.columns.mask(window_size)

    def take(self, rows: mx.array) -> None:
        """Keep (or repeat) `rows`, in that order."""
        self.keys = self.keys[rows]
        self.values = self.values[rows]


class Cache:
    """The caches of all layers of one model and their common columns."""

    def __init__(self, layers: int, rows: int, capacity: int):
        self.columns = Columns(rows, capacity)
        self.layers = [LayerCache(self.columns, capacity) for _ in range(layers)]

    def forward(self, model: Any, tokens_B_N: mx.array, valid_B_N: mx.array) -> mx.array:
        """Run `model` over N more columns; hidden or logits (rows, N, …) as the model returns them."""
        self.columns.begin(valid_B_N)
        out = model(tokens_B_N, cache=self.layers)
        self.columns.commit()
        return out

    def take(self, rows: mx.array) -> None:
        """Keep (or repeat) `rows` in every layer."""
        self.columns.take(rows)
        for layer in self.layers:
            layer.take(rows)
