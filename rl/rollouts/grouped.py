"""Keys and values where torch attends, on a CPU: each prompt once for all its completions, whose queries meet its keys
in one product, and each row's own ring of drawn tokens. Fewer and larger products, and a G-th of the memory.

Heads come first in every array, so that a group's queries lie together and nothing is moved between the products.
What a step reads does not change for a while: it is laid out once, in a `Plan`.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import torch

from rl.rollouts import cache, lent
from rl.rollouts.forward import Prefilled
from rl.rollouts.torch_prefill import Read
from rl.rollouts.transfer import to_mlx

USED_STEP = 16  # columns of the ring come into use so many at a time: until then the plan stays
NEVER = float("-inf")


class Plan(NamedTuple):
    """Views and sizes of the steps to come. `layers` are the keys (…, D, columns) and values (…, columns, D) of the
    prompts and of the rings; `slots` and `places` as `_slots` gives them."""

    layers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]
    groups: int
    rows: int
    length: int
    used: int
    slots: torch.Tensor | None
    places: torch.Tensor | None


class Grouped:
    """`prompt`: of each layer keys and values (2, kv_heads, P, L, D) once a group; `own` (2, kv_heads, B, W, D) of each
    row's drawn tokens. The layout of rl/rollouts/cache.py whose steps are not compiled: a drawn token is written in
    place."""

    joined, once = False, True  # whether prompt and ring are one array; whether a prompt is held once for its rows

    def __init__(self, max_tokens: int) -> None:
        self.prompt: list[torch.Tensor] = []
        self.own: list[torch.Tensor] = []
        self.group = np.zeros(0, np.int64)  # group of each row
        self.lengths = np.zeros(0, np.int64)  # of each group's prompt
        self.width = 0
        self.ring, self.period = min(cache.RING_STEP, max_tokens), max_tokens
        self.unseen = torch.zeros(0, 0)  # (B, W): 0 where a row has written the column, -inf elsewhere
        self.column = 0  # that the coming token is written to
        self.plan: Plan | None = None
        # by window, to be added to the scores: of the prompts, None where all is seen, and of the rings (B, 1, used)
        self.hidden: dict[int | None, tuple[torch.Tensor | None, torch.Tensor]] = {}

    def held(self) -> set[int]:
        """Groups whose prompt is still there."""
        return set(range(len(self.lengths)))

    def place(
        self, rows: np.ndarray, groups: np.ndarray, fresh: Prefilled | Read | None, keep: list[int], total: int
    ) -> None:
        """Put new prompts behind the groups in `keep`, and rows into the places `rows` of `total`.

        `groups[i]` counts in the new order: first those kept, then the fresh ones.
        """
        news = None if fresh is None else _tensors(fresh)
        if news is not None and not self.own:
            shape = (*news[0].shape[:2], total, self.ring, news[0].shape[4])
            self.own = [tensor.new_zeros(shape) for tensor in news]
            self.prompt = [tensor[:, :, :0] for tensor in news]
            self.group = np.zeros(total, np.int64)
            self.unseen = torch.full((total, self.ring), NEVER)
        elif self.own:
            for tensor in self.own:
                tensor[:, :, rows] = 0  # what is not finite would stay so, however little it counts
        self.unseen[rows] = NEVER
        if news is not None:
            self.width = max(news[0].shape[3], self.width)
        every = keep == list(range(len(self.lengths)))
        for i, tensor in enumerate(self.prompt):
            kept = tensor if every else tensor[:, :, keep]
            if news is not None:
                parts = [part for part in (kept, news[i]) if part.shape[2]]
                kept = torch.cat([_wider(part, self.width) for part in parts], dim=2)
            self.prompt[i] = kept
        self.lengths = np.concatenate([self.lengths[keep], [] if fresh is None else fresh.lengths]).astype(np.int64)
        # a row whose group has gone is idle: any group will do
        self.group = np.array([keep.index(g) if g in keep else 0 for g in self.group])
        self.group[rows] = groups
        self.plan = None

    def keep(self, rows: np.ndarray) -> list[int]:
        """Keep `rows`, in that order, and the groups that they belong to: these are returned, in their new order."""
        groups, self.group = np.unique(self.group[rows], return_inverse=True)
        self.lengths, self.unseen, self.plan = self.lengths[groups], self.unseen[rows], None
        for part, index in ((self.prompt, groups), (self.own, rows)):
            for i, tensor in enumerate(part):
                part[i] = tensor[:, :, index]
        return groups.tolist()

    def narrow(self, width: int) -> None:
        """Forget the prompt columns from `width` on: no prompt reaches there any more."""
        if width < self.width:
            self.width, self.plan = width, None
            self.prompt = [tensor[:, :, :, :width] for tensor in self.prompt]

    def grow(self, ring: int) -> None:
        """Make room for `ring` columns of drawn tokens."""
        if ring > self.ring:
            self.unseen = torch.nn.functional.pad(self.unseen, (0, ring - self.ring), value=NEVER)
            self.ring, self.plan = ring, None
            for i, tensor in enumerate(self.own):
                self.own[i] = _wider(tensor, ring)

    def coming(self, windows: Iterable[int | None], age_B: np.ndarray, now: int) -> Plan:
        """Make ready for the token of step `now`, before which each row has stored `age_B`: where it is written, and
        what it sees under each of `windows`."""
        self.column = now % self.period
        used = min(-(-(now + 1) // USED_STEP) * USED_STEP, self.ring)
        if self.plan is None or self.plan.used != used:
            self.plan, self.hidden = self._planned(used), {}
        self.unseen[:, self.column] = 0.0
        for window in windows:
            if window is not None or window not in self.hidden:
                self.hidden[window] = self._hidden(window, used, age_B, now)
        return self.plan

    def _planned(self, used: int) -> Plan:
        slots, places = _slots(self.group)
        layers = []
        for prompt, own in zip(self.prompt, self.own, strict=True):
            (prompt_k, prompt_v), (own_k, own_v) = prompt.flatten(1, 2), own.flatten(1, 2)
            own_k, own_v = own_k[:, :used], own_v[:, :used]
            layers.append((prompt_k.transpose(1, 2), prompt_v, own_k.transpose(1, 2), own_v))
        return Plan(layers, len(self.lengths), len(self.group), self.width, used, slots, places)

    def _hidden(
        self, window: int | None, used: int, age_B: np.ndarray, now: int
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        prompt_L, own_B_U = np.arange(self.width), self.unseen[:, :used]  # a view: later steps' columns show in it
        if window is None:
            whole = bool((self.lengths == self.width).all())
            return None if whole else _below(prompt_L < self.lengths[:, None])[:, None, None], own_B_U[:, None]
        back_U, length_B = (now - np.arange(used)) % self.period, self.lengths[self.group]
        seen_B_L = (prompt_L < length_B[:, None]) & (prompt_L > (length_B + age_B)[:, None] - window)
        prompt_B_L = _below(seen_B_L)
        if self.plan.slots is not None:
            prompt_B_L = prompt_B_L[self.plan.slots]
        # (P, G, 1, L): not all rows of a group are equally far from their prompt
        return prompt_B_L.view(self.plan.groups, -1, 1, self.width), (own_B_U + _below(back_U < window))[:, None]

    def write(self, layer: int, fresh: torch.Tensor) -> None:
        """Keys and values (2, kv_heads, B, D) of the coming token."""
        self.own[layer][:, :, :, self.column] = fresh

    def attended(self, layer: int, window: int | None, q: torch.Tensor) -> torch.Tensor:
        """Queries (kv_heads, B, repeats, D), scaled, over what is stored: (B, heads × D)."""
        plan = self.plan
        prompt_k, prompt_v, own_k, own_v = plan.layers[layer]
        hidden_prompt, hidden_own = self.hidden[window]
        kv_heads, rows, repeats, width = q.shape
        groups, slots, places, length, used = plan.groups, plan.slots, plan.places, plan.length, plan.used
        to_own = torch.bmm(q.view(-1, repeats, width), own_k).view(kv_heads, rows, repeats, used)
        to_own.add_(hidden_own)
        if slots is not None:
            q, to_own = q.index_select(1, slots), to_own.index_select(1, slots)
        to_prompt = torch.bmm(q.view(kv_heads * groups, -1, width), prompt_k)
        if hidden_prompt is not None:
            to_prompt.view(kv_heads, groups, -1, repeats, length).add_(hidden_prompt)
        scores = torch.cat([to_prompt.view(-1, length), to_own.view(-1, used)], dim=1)
        weights = scores.softmax(1, dtype=torch.float32).to(q.dtype)
        of_prompt, of_own = weights.split([length, used], dim=1)
        out = torch.bmm(of_prompt.view(kv_heads * groups, -1, length), prompt_v)
        if slots is not None:
            out = out.view(kv_heads, -1, repeats, width).index_select(1, places)
            of_own = of_own.view(kv_heads, -1, repeats, used).index_select(1, places)
        out = out.view(-1, repeats, width).baddbmm_(of_own.view(-1, repeats, used), own_v)
        return out.view(kv_heads, rows, -1).transpose(0, 1).reshape(rows, -1)

    def arrays(self) -> Any:
        """What one decode step of MLX's reads and writes."""
        return {"grouped": self}

    def store(self, own: Any) -> None:
        """The step wrote in place."""

    @staticmethod
    @torch.inference_mode()
    def attend(
        arrays: Any,
        layer: int,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        column: None,
        window: int | None,
    ) -> mx.array:
        """Attention of one drawn token a row, (B, heads, 1, D), in a step that is else MLX's."""
        q, k, v = (x[:, :, 0].transpose(0, 1) for x in lent.view(queries, keys, values))
        cached = arrays["grouped"]
        cached.write(layer, torch.stack([k, v]))
        q = (q * scale).view(len(k), -1, *q.shape[1:]).transpose(1, 2).contiguous()
        return to_mlx(cached.attended(layer, window, q).view(q.shape[1], -1, 1, q.shape[-1]))


def _tensors(fresh: Prefilled | Read) -> list[torch.Tensor]:
    """Of each layer (2, kv_heads, P, L, D)."""
    if isinstance(fresh, Read):
        return fresh.layers
    pairs = zip(lent.view(*fresh.keys), lent.view(*fresh.values), strict=True)
    return [torch.stack([keys.transpose(0, 1), values.transpose(0, 1)]) for keys, values in pairs]


def _below(seen: np.ndarray) -> torch.Tensor:
    """What is added to a score: 0 where it is seen."""
    return torch.from_numpy(np.where(seen, np.float32(0), np.float32(NEVER)))


def _wider(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """More columns (the last axis but one) of zeros on the right."""
    missing = width - tensor.shape[-2]
    return torch.nn.functional.pad(tensor, (0, 0, 0, missing)) if missing > 0 else tensor


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
