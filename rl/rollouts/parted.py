"""The cache of a CUDA decode step: each prompt once, and a ring of drawn tokens a row, for the kernels to read.

Like `grouped.Grouped` it holds a prompt once for all its completions, but in MLX's memory, and a kernel reads it once
for the rows that have it (rl/rollouts/attend.cu). Rows stay where they are when others come and go: a block takes rows
that are neighbours in `seen`, where they stand by prompt, and which is made at each look of the host and not at each
step.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from rl.rollouts import cache, fused, kernels, streamed, whole
from rl.rollouts import grouped as grouped_by_torch
from rl.rollouts.forward import Prefilled


def layout_of(model: Any, *, grouped: bool) -> type:
    """The cache's layout for this model: `grouped` where torch attends, else one for the kernels where they may decode
    it as it is now, or one that any attention reads."""
    if grouped:
        return grouped_by_torch.Grouped
    if (products := fused.of(model)) is not None:
        products.refresh(model)
    if not kernels.usable(model):
        return cache.Joined
    streamed.usable(model)  # tried now: not while a step is compiled
    return Told if whole.usable(model) else Parted


def steps(model: Any, position_T_B: mx.array, seen: list[mx.array], column_T: mx.array, arrays: Any) -> whole.Step:
    """A function (t, tokens (B,)) -> hidden states (B, width), normed, of step t of those that are put together, by the
    kernels that `layout_of` has found to do it; `arrays` as its layout gives them."""
    if "cached" in arrays:
        return whole.steps(model, arrays["cached"], position_T_B, seen, column_T)
    prompts, rings = (list(zip(*arrays[name], strict=True)) for name in ("prompt", "ring"))
    kinds = list(dict.fromkeys(model.args.windows))
    which = [kinds.index(window) for window in model.args.windows]
    hidden_states = (streamed if streamed.chosen(model) else kernels).hidden_states

    def step(t: int, token_B: mx.array) -> mx.array:
        spans = [seen[kind][t] for kind in which]
        return hidden_states(model, token_B, position_T_B[t], prompts, rings, spans, column_T[t])

    return step


def pack(
    position_T_B: np.ndarray,
    seen: Sequence[np.ndarray],
    column_T: np.ndarray,
    uniforms_T_B_2: np.ndarray,
) -> np.ndarray:
    """All that the host says of T steps as one array (T, words), int32: each array that goes to the card or comes back
    waits for the card, and moves pages of memory; a dozen took longer than two steps (seen on an H200)."""
    steps = len(position_T_B)
    parts = [column_T[:, None], position_T_B]
    parts += [np.ascontiguousarray(uniforms_T_B_2, np.float32).view(np.int32).reshape(steps, -1)]
    return np.concatenate([*parts, *(spans.reshape(steps, -1) for spans in seen)], axis=1, dtype=np.int32)


def unpack(packed_T_W: mx.array, kinds: int) -> tuple[mx.array, list[mx.array], mx.array, mx.array]:
    """What `pack` was given, of so many kinds of windows."""
    steps, words = packed_T_W.shape
    rows = (words - 1) // (3 + 5 * kinds)
    ends = [1, 1 + rows, *(1 + rows * (3 + 5 * n) for n in range(kinds))]
    # in one piece each: a kernel would make it so at every step
    column, position, uniforms, *seen = map(mx.contiguous, mx.split(packed_T_W, ends, axis=1))
    spans = [one.reshape(steps, rows, 5) for one in seen]
    return position, spans, column.reshape(-1), uniforms.view(mx.float32).reshape(steps, rows, 2)


def pack_drawn(drawn: Sequence[tuple[mx.array, mx.array, mx.array]]) -> mx.array:
    """(3, T, B), int32: tokens, logprobs and whether logits were finite, for the way back."""
    tokens, logprobs, finite = (mx.stack(part) for part in zip(*drawn, strict=True))
    return mx.stack([tokens, logprobs.view(mx.int32), finite.astype(mx.int32)])


def unpack_drawn(drawn_3_T_B: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What `pack_drawn` was given."""
    tokens, logprobs, finite = drawn_3_T_B
    return list(zip(tokens, logprobs.view(np.float32), finite.astype(bool), strict=True))


class Parted:
    """`prompt` keys (P, kv_heads, L, D) once a group; `own` keys (B, kv_heads, W, D) of each row's drawn tokens, which
    the kernels write in place."""

    joined, once = False, True

    def __init__(self, max_tokens: int) -> None:
        self.prompt: tuple[cache.Arrays, cache.Arrays] = ([], [])
        self.own: tuple[cache.Arrays, cache.Arrays] = ([], [])
        self.group = np.zeros(0, np.int64)  # group of each row
        self.width = 0
        self.ring = min(cache.RING_STEP, max_tokens)

    def held(self) -> set[int]:
        """As `Grouped.held`."""
        return set(range(len(self.prompt[0][0]))) if self.prompt[0] else set()

    def place(self, rows: np.ndarray, groups: np.ndarray, fresh: Prefilled | None, keep: list[int], total: int) -> None:
        """As `Grouped.place`; no row's ring is moved, or emptied: it sees no column from before it came."""
        news = ([], []) if fresh is None else (fresh.keys, fresh.values)
        if fresh is not None and not self.own[0]:
            shape = (total, fresh.keys[0].shape[1], self.ring, fresh.keys[0].shape[3])
            for part in self.own:
                part[:] = [mx.zeros(shape, array.dtype) for array in fresh.keys]
            self.group = np.zeros(total, np.int64)
        if fresh is not None:
            self.width = max(cache.bucket(fresh.keys[0].shape[2]), self.width)
        kept = mx.array(np.array(keep, np.int64))
        for part, new in zip(self.prompt, news, strict=True):
            old = [cache.widened(array[kept], self.width) for array in part] if keep else []
            more = [cache.widened(array, self.width) for array in new]
            part[:] = [mx.concatenate(pair) for pair in zip(old, more, strict=True)] if old and more else old or more
        # a row whose group has gone is idle: any group will do
        self.group = np.array([keep.index(g) if g in keep else 0 for g in self.group])
        self.group[rows] = groups

    def keep(self, rows: np.ndarray) -> list[int]:
        """As `Grouped.keep`."""
        groups, self.group = np.unique(self.group[rows], return_inverse=True)
        for part, index in ((self.prompt, mx.array(groups)), (self.own, mx.array(rows))):
            for arrays in part:
                arrays[:] = [array[index] for array in arrays]
        return groups.tolist()

    def narrow(self, width: int) -> None:
        """As `Joined.narrow`, in steps too."""
        width = cache.bucket(width)
        if width < self.width:
            self.width = width
            for part in self.prompt:
                part[:] = [mx.contiguous(array[:, :, :width]) for array in part]

    def grow(self, ring: int) -> None:
        """As `Grouped.grow`."""
        if ring > self.ring:
            self.ring = ring
            for part in self.own:
                part[:] = [cache.widened(array, ring) for array in part]

    def seen(
        self,
        windows: Iterable[int | None],
        length_B: np.ndarray,
        age_T_B: np.ndarray,
        now_T: np.ndarray,
        used: int,
    ) -> list[np.ndarray]:
        """What each row's coming token sees at each of T steps, (T, B, 5) for each window: the row, its prompt, the
        first of that prompt's columns and the one behind the last, and columns of the ring, backwards from the coming
        token's own. Rows of one prompt are neighbours; idle ones, of length 0, see that token alone and come last.
        """
        idle_B = length_B == 0
        order_B = np.argsort(np.where(idle_B, len(length_B), self.group), kind="stable")
        out = []
        for window in windows:
            first_T_B, back_T_B = np.zeros_like(age_T_B), np.minimum(age_T_B + 1, self.ring)
            if window is not None:
                first_T_B = np.maximum(length_B + age_T_B - window + 1, 0)
                back_T_B = np.minimum(back_T_B, window)
            columns = (np.arange(len(length_B)), self.group, first_T_B, length_B, np.where(idle_B, 1, back_T_B))
            every = np.stack([np.broadcast_to(column, age_T_B.shape) for column in columns], axis=-1)
            out.append(every[:, order_B].astype(np.int32))
        return out

    def arrays(self) -> Any:
        """As `Grouped.arrays`."""
        return {"prompt": [list(part) for part in self.prompt], "ring": [list(part) for part in self.own]}

    def store(self, own: Any) -> None:
        """The step wrote in place."""


class Told(Parted):
    """The same for the kernel that is told where arrays lie (rl/rollouts/whole.py)."""

    def __init__(self, max_tokens: int) -> None:
        super().__init__(max_tokens)
        self.told: list[mx.array] = []  # whose addresses `table` has
        self.table: mx.array | None = None

    def arrays(self) -> Any:
        """As `Grouped.arrays`."""
        now = [array for part in (*self.prompt, *self.own) for array in part]
        if len(now) != len(self.told) or any(a is not b for a, b in zip(now, self.told, strict=True)):
            self.told = now
            self.table = whole.cache_table(list(zip(*self.prompt, strict=True)), list(zip(*self.own, strict=True)))
        return {"cached": self.table}
