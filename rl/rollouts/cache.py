"""Keys and values of a batch that decodes: prompts, and a ring of columns for what was drawn since.

All rows write the same column of the ring, number `now % max_tokens`; a row that joined later simply sees fewer columns
back (`born` is the step at which its first drawn token was written). So rows come and go without moving anybody's keys,
no row is padded, and all shapes stay as they are. Positions, for RoPE and for windows, are counted and not stored.

Three layouts of the same thing:
- `grouped.Grouped` holds each prompt once for all its completions, and their queries meet its keys in one product:
  for backends where a product costs more than launching it (CPU).
- `Joined` holds prompt and ring of each row in one array for one fused attention a layer: for backends where launches
  are the floor (GPUs).
- `parted.Parted` holds each prompt once where the kernels of rl/rollouts/kernels.py attend (CUDA).
"""

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import numpy as np

from rl.rollouts import attention
from rl.rollouts.forward import Prefilled

RING_STEP = 64  # a ring starts with so many columns and grows as it is used
Arrays = list[mx.array]


def bytes_per_token(model: Any) -> int:
    """Bytes that one cached token takes: keys and values of all layers in the dtype of the activations."""
    attention, args = model.model.layers[0].self_attn, model.args
    width = getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads
    return 2 * len(model.model.layers) * attention.n_kv_heads * width * model.model.norm.weight.dtype.size


class Joined:
    """Keys (B, kv_heads, L + W, D): L columns of the row's prompt, then its ring."""

    joined, once = True, False

    def __init__(self, max_tokens: int) -> None:
        self.own: tuple[Arrays, Arrays] = ([], [])
        self.group = np.zeros(0, np.int64)
        self.width = 0
        self.ring, self.period = min(RING_STEP, max_tokens), max_tokens

    def held(self) -> set[int]:
        """As `Grouped.held`: here, of those that some row holds, be it idle."""
        return {int(g) for g in self.group if g >= 0}

    def place(self, rows: np.ndarray, groups: np.ndarray, fresh: Prefilled | None, keep: list[int], total: int) -> None:
        """As `Grouped.place`; a kept group's prompt is copied from a row that has it."""
        width = max(bucket(fresh.keys[0].shape[2]) if fresh is not None else 0, self.width)
        if fresh is not None and not self.own[0]:
            self.group = np.full(total, -1)
            shape = (total, fresh.keys[0].shape[1], width + self.ring, fresh.keys[0].shape[3])
            for part in self.own:
                part[:] = [mx.zeros(shape, array.dtype) for array in fresh.keys]
        elif width > self.width:
            for part in self.own:
                part[:] = [self._spaced(array, width) for array in part]
        self.width = width
        old = mx.array(np.array([np.flatnonzero(self.group == g)[0] for g in keep], np.int64))
        target, source = mx.array(rows), mx.array(groups)
        news = (fresh.keys, fresh.values) if fresh is not None else ([], [])
        for part, new in zip(self.own, news, strict=True):
            for i, array in enumerate(part):
                bank = array[old, :, :width]
                bank = mx.concatenate([bank, widened(new[i], width)]) if new else bank
                array[target, :, :width] = bank[source]
        self.group = np.array([keep.index(g) if g in keep else -1 for g in self.group])
        self.group[rows] = groups

    def _spaced(self, array: mx.array, width: int) -> mx.array:
        prompt, ring = array[:, :, : self.width], array[:, :, self.width :]
        return mx.concatenate([widened(prompt, width), ring], axis=2)

    def keep(self, rows: np.ndarray) -> list[int]:
        """As `Grouped.keep`."""
        kept = self.group[rows]
        groups = np.unique(kept[kept >= 0]).tolist()
        self.group = np.array([groups.index(g) if g >= 0 else -1 for g in kept])
        for part in self.own:
            part[:] = [array[mx.array(rows)] for array in part]
        return groups

    def narrow(self, width: int) -> None:
        """As `Grouped.narrow`, in steps, so that shapes come again."""
        width = bucket(width)
        if width < self.width:
            for part in self.own:
                part[:] = [mx.concatenate([a[:, :, :width], a[:, :, self.width :]], axis=2) for a in part]
            self.width = width

    def grow(self, ring: int) -> None:
        """As `Grouped.grow`."""
        if ring > self.ring:
            self.ring = ring
            for part in self.own:
                part[:] = [widened(array, self.width + ring) for array in part]

    def seen(self, windows: Iterable[int | None], *told: Any) -> list[mx.array]:
        """As `Grouped.seen`."""
        return masks(windows, *told, self.width, self.period)

    def arrays(self) -> Any:
        """As `Grouped.arrays`."""
        return {"own": [list(part) for part in self.own]}

    def store(self, own: Any) -> None:
        """As `Grouped.store`, unless the step gives new arrays."""
        if own:
            self.own = tuple(own)

    @staticmethod
    def attend(
        arrays: Any,
        layer: int,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        column: mx.array,
        mask: mx.array,
    ) -> mx.array:
        """As `Grouped.attend`; `column` counts from the prompt's first."""
        own_k, own_v = _put(arrays["own"], layer, keys, values, column)
        used = mask.shape[-1]
        return attention.one_query(queries, own_k[:, :, :used], own_v[:, :, :used], scale, mask)


def masks(
    windows: Iterable[int | None],
    length_B: np.ndarray,
    age_T_B: np.ndarray,
    now_T: np.ndarray,
    used: int,
    width: int,
    ring: int,
) -> list[mx.array]:
    """What each row's coming token sees at each of T steps, (T, B, 1, width + used) for each window: its prompt, and
    its own drawn tokens.

    `age_T_B` is how many tokens the row has stored before that one; `ring` is the period of the columns, of which
    `used` are looked at. The coming token always sees itself, so no row is without anything to see.
    """
    # steps since each column was written
    back_T_U = mx.array(((now_T[:, None] - np.arange(used)[None]) % ring).astype(np.int32))
    age, length_B = mx.array(age_T_B.astype(np.int32)), mx.array(length_B.astype(np.int32))
    shape = age.shape
    prompt_L = mx.arange(width)[None]
    prompts = mx.broadcast_to((prompt_L < length_B[:, None])[None], (*shape, width))
    seen = mx.concatenate([prompts, back_T_U[:, None] <= age[..., None]], axis=-1)
    out = []
    for window in windows:
        near = seen
        if window is not None:
            to_prompt = (length_B + age)[..., None] - prompt_L
            distance = mx.concatenate([to_prompt, mx.broadcast_to(back_T_U[:, None], (*shape, used))], axis=-1)
            near = seen & (distance < window)
        out.append(near[:, :, None])
    return out


def _put(own: Any, layer: int, keys: mx.array, values: mx.array, column: mx.array) -> tuple[mx.array, mx.array]:
    """Keys and values with the new ones in `column`. In one operation each: a slice whose place is on the device takes
    one more, to find it."""
    where = mx.broadcast_to(column.reshape(1, 1, 1, 1), keys.shape)
    for part, new in zip(own, (keys, values), strict=True):
        part[layer] = mx.put_along_axis(part[layer], where, new, axis=2)
    return own[0][layer], own[1][layer]


def widened(array: mx.array, width: int) -> mx.array:
    """More columns (axis 2) of zeros on the right."""
    missing = width - array.shape[2]
    return mx.pad(array, [(0, 0), (0, 0), (0, missing), (0, 0)]) if missing > 0 else array


def bucket(width: int) -> int:
    """Columns of a prompt, in steps, so that shapes come again."""
    return -(-width // RING_STEP) * RING_STEP
