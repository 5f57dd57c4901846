"""Keys and values of a batch that decodes: prompts, and a ring of columns for what was drawn since.

All rows write the same column of the ring, number `now % max_tokens`; a row that joined later simply sees fewer columns
back (`born` is the step at which its first drawn token was written). So rows come and go without moving anybody's keys,
no row is padded, and all shapes stay as they are. Positions, for RoPE and for windows, are counted and not stored.

Three layouts of the same thing:
- `Grouped` holds each prompt once for all its completions, and their queries meet its keys in one product. Fewer and
  larger products, and a G-th of the memory: for backends where a product costs more than launching it (CPU).
- `Joined` holds prompt and ring of each row in one array for one fused attention a layer: for backends where launches
  are the floor (GPUs).
- `parted.Parted` holds each prompt once where the kernels of rl/rollouts/kernels.py attend (CUDA).
"""

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from rl.rollouts import attention, lent
from rl.rollouts.forward import Prefilled
from rl.rollouts.transfer import to_mlx

RING_STEP = 64  # a ring starts with so many columns and grows as it is used
Arrays = list[mx.array]
Tensors = list[torch.Tensor]


def bytes_per_token(model: Any) -> int:
    """Bytes that one cached token takes: keys and values of all layers in the dtype of the activations."""
    attention, args = model.model.layers[0].self_attn, model.args
    width = getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads
    return 2 * len(model.model.layers) * attention.n_kv_heads * width * model.model.norm.weight.dtype.size


class Grouped:
    """`prompt` keys (P, kv_heads, L, D) once a group; `own` keys (B, kv_heads, W, D) of each row's drawn tokens.

    In torch's memory, and attention by torch (rl/rollouts/lent.py says why): a drawn token is written in place.
    """

    joined, once = False, True  # whether prompt and ring are one array; whether a prompt is held once for its rows

    def __init__(self, max_tokens: int) -> None:
        self.prompt: tuple[Tensors, Tensors] = ([], [])
        self.own: tuple[Tensors, Tensors] = ([], [])
        self.group = np.zeros(0, np.int64)  # group of each row
        self.slots: tuple[torch.Tensor | None, torch.Tensor | None] | None = None  # of these rows, once asked for
        self.width = 0
        self.ring, self.period = min(RING_STEP, max_tokens), max_tokens

    def held(self) -> set[int]:
        """Groups whose prompt is still there."""
        return set(range(len(self.prompt[0][0]))) if self.prompt[0] else set()

    def place(self, rows: np.ndarray, groups: np.ndarray, fresh: Prefilled | None, keep: list[int], total: int) -> None:
        """Put new prompts behind the groups in `keep`, and rows into the places `rows` of `total`.

        `groups[i]` counts in the new order: first those kept, then the fresh ones.
        """
        news = [lent.view(*fresh.keys), lent.view(*fresh.values)] if fresh is not None else None
        if news is not None and not self.own[0]:
            shape = (total, news[0][0].shape[1], self.ring, news[0][0].shape[3])
            for part in self.own:
                part[:] = [tensor.new_zeros(shape) for tensor in news[0]]
            self.group = np.zeros(total, np.int64)
            self.prompt = ([tensor[:0] for tensor in news[0]], [tensor[:0] for tensor in news[1]])
        for part in self.prompt:
            part[:] = [tensor[keep] for tensor in part]
        if news is not None:
            self.width = max(news[0][0].shape[2], self.width)
            for part, new in zip(self.prompt, news, strict=True):
                both = [(_wider(a, self.width), _wider(b, self.width)) for a, b in zip(part, new, strict=True)]
                part[:] = [torch.cat(pair) for pair in both]
        # a row whose group has gone is idle: any group will do
        self.group = np.array([keep.index(g) if g in keep else 0 for g in self.group])
        self.group[rows] = groups
        self.slots = None

    def keep(self, rows: np.ndarray) -> list[int]:
        """Keep `rows`, in that order, and the groups that they belong to: these are returned, in their new order."""
        groups, self.group = np.unique(self.group[rows], return_inverse=True)
        self.slots = None
        for part in self.prompt:
            part[:] = [tensor[groups] for tensor in part]
        for part in self.own:
            part[:] = [tensor[rows] for tensor in part]
        return groups.tolist()

    def narrow(self, width: int) -> None:
        """Forget the prompt columns from `width` on: no prompt reaches there any more."""
        if width < self.width:
            self.width = width
            for part in self.prompt:
                part[:] = [tensor[:, :, :width] for tensor in part]

    def grow(self, ring: int) -> None:
        """Make room for `ring` columns of drawn tokens."""
        if ring > self.ring:
            self.ring = ring
            for part in self.own:
                part[:] = [_wider(tensor, ring) for tensor in part]

    def seen(self, windows: Iterable[int | None], *told: Any) -> list[mx.array]:
        """What each row's coming token sees, for each window: `masks`, told lengths, ages, steps and columns in use."""
        return masks(windows, *told, self.width, self.period)

    def arrays(self) -> Any:
        """What one decode step reads and writes."""
        if self.slots is None:
            self.slots = _slots(self.group)
        slots_PG, places_B = self.slots
        return {"prompt": list(self.prompt), "ring": list(self.own), "slots_PG": slots_PG, "places_B": places_B}

    def store(self, own: Any) -> None:
        """The step wrote in place."""

    @staticmethod
    @torch.no_grad()
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
        """Attention of one drawn token a row over its prompt and what it drew; `mask` (B, 1, L + used)."""
        q, k, v = (x[:, :, 0] for x in lent.view(queries, keys, values))
        return to_mlx(Grouped.attended(arrays, layer, q, k, v, scale, column, mask)[:, :, None])

    @staticmethod
    def attended(
        arrays: Any,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        column: mx.array,
        mask: mx.array,
    ) -> torch.Tensor:
        """The same of tensors (B, heads, D) and (B, kv_heads, D)."""
        if "column" not in arrays:  # the same for all layers
            arrays["column"] = int(column.item())
        at = arrays["column"]
        (prompt_k, prompt_v), (own_k, own_v) = ([part[layer] for part in arrays[name]] for name in ("prompt", "ring"))
        own_k[:, :, at], own_v[:, :, at] = k, v
        rows, heads, width = q.shape
        groups, kv_heads, length, _ = prompt_k.shape
        used = mask.shape[-1] - length
        slots, places = arrays["slots_PG"], arrays["places_B"]

        def to_groups(x: torch.Tensor) -> torch.Tensor:  # (B, kv_heads, repeats, …) -> (P, kv_heads, G × repeats, …)
            x = x if slots is None else x[slots]
            return x.reshape(groups, -1, *x.shape[1:]).transpose(1, 2).reshape(groups, kv_heads, -1, x.shape[-1])

        def to_rows(x: torch.Tensor) -> torch.Tensor:
            x = x.reshape(groups, kv_heads, -1, heads // kv_heads, x.shape[-1]).transpose(1, 2)
            x = x.reshape(-1, *x.shape[2:])
            return x if places is None else x[places]

        if id(mask) not in arrays:  # (P, 1, G, 1, L + used), the same for all layers of one window
            unseen = ~lent.view(mask)[0][:, 0]
            unseen = unseen if slots is None else unseen[slots]
            arrays[id(mask)] = unseen.view(groups, 1, -1, 1, mask.shape[-1])
        # scores of a group lie together: only what is the drawn tokens' is moved there and back
        q = (q * scale).reshape(rows, kv_heads, heads // kv_heads, width)
        to_prompt = to_groups(q) @ prompt_k.transpose(-1, -2)
        to_own = to_groups(q @ own_k[:, :, :used].transpose(-1, -2))
        scores = torch.cat([to_prompt, to_own], dim=-1)
        scores.view(groups, kv_heads, -1, heads // kv_heads, mask.shape[-1]).masked_fill_(
            arrays[id(mask)], torch.finfo(scores.dtype).min
        )
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        out = to_rows(weights[..., :length] @ prompt_v) + to_rows(weights[..., length:]) @ own_v[:, :, :used]
        return out.reshape(rows, heads, width)


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


def _wider(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """As `widened`, of torch's."""
    return torch.nn.functional.pad(tensor, (0, 0, 0, max(0, width - tensor.shape[2])))


def bucket(width: int) -> int:
    """Columns of a prompt, in steps, so that shapes come again."""
    return -(-width // RING_STEP) * RING_STEP


def _slots(group_B: np.ndarray) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The row in each of P × G places, short groups filled up with row 0, and the place of each row; None twice where
    the rows already lie so."""
    count = np.bincount(group_B)
    size = int(count.max())
    if len(group_B) == len(count) * size and (group_B == np.repeat(np.arange(len(count)), size)).all():
        return None, None
    slots = np.zeros((len(count), size), np.int64)
    places = np.zeros(len(group_B), np.int64)
    filled = np.zeros(len(count), np.int64)
    for row, group in enumerate(group_B):
        slots[group, filled[group]] = row
        places[row] = group * size + filled[group]
        filled[group] += 1
    return torch.from_numpy(slots.reshape(-1)), torch.from_numpy(places)
