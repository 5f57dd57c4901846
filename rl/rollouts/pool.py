"""The requests of one call and the rows in which they decode: rows come and go, and between that the batch steps.

What changes from step to step (tokens, positions, numbers to draw by) is the host's; a GPU gets it at each look.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from rl.errors import UserError
from rl.rollouts import device, grouped, parted, turns
from rl.rollouts.result import Completion, Sampling
from rl.rollouts.routes import Route, route_of
from rl.rollouts.sampling import uniforms_for
from rl.rollouts.sight import Drawn, Sight

if TYPE_CHECKING:
    from rl.rollouts.engine import Engine

# waiting prompts are read together, when this share of the rows is free
REFILL_SHARE = 0.25


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts start with, leaving each at least one token of its own."""
    shortest = min(len(p) for p in prompts) - 1
    first = prompts[0]
    for i in range(shortest):
        if any(p[i] != first[i] for p in prompts):
            return i
    return shortest


class Pool:
    """See above. `sight` is what has been drawn for the requests."""

    def __init__(
        self,
        engine: "Engine",
        prompts: list[tuple[int, ...]],
        sampling: Sampling,
        max_tokens: int,
        stream: tuple[int, int],
        stops: Sequence[tuple[str, ...]],
    ):
        self.engine, self.prompts, self.sampling, self.max_tokens = engine, prompts, sampling, max_tokens
        self.stream = stream
        self.sight = Sight(stops, engine.decode, engine.eos_ids, engine.model.args.vocab_size, max_tokens)
        # long prompts first: the room that a row's prompt takes shrinks when the last of them is done
        self.waiting = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i], i))
        self.groups: list[tuple[int, ...]] = []  # the prompt of each group of the layout
        self.last_P_D: Any = None  # the hidden state after each group's prompt
        self.owner = np.zeros(0, np.int64)  # request of each row, -1 where it is idle
        self.live = np.zeros(0, np.int64)  # rows that are not idle
        self.born = np.zeros(0, np.int64)
        self.now = 0
        self.ahead: mx.array | None = None  # what steps draw that were begun before those before them were looked at
        self.heard: Callable[[Sight], None] = lambda sight: None
        turns.reach(engine.model, max(map(len, prompts)) + max_tokens + 1)
        self.layout = parted.layout_of(engine.model, grouped=engine.grouped)(max_tokens)
        self.route: Route = route_of(engine.model, self.layout)
        distinct = sorted(set(prompts))
        self.shared = common_prefix(distinct) if len(distinct) > 1 else 0
        self.common = self.route.read([distinct[0][: self.shared]], None)[1] if self.shared else None

    def run(self) -> list[Completion]:
        """All completions, in order."""
        rows = min(self.engine.max_batch, len(self.prompts))
        while rows > 1 and not self._fits(rows, self._distinct(rows), len(self.prompts[self.waiting[0]])):
            rows -= 1
        if not self._fits(rows, 1, len(self.prompts[self.waiting[0]])):
            raise UserError(
                f"[rollout] max_batch_tokens: found {self.engine.max_batch_tokens}, valid: ≥ the longest prompt's "
                f"{len(self.prompts[self.waiting[0]])} tokens and {self.max_tokens} more"
            )
        self.owner, self.born = np.full(rows, -1), np.zeros(rows, np.int64)
        self.token_B, self.length_B = np.zeros(rows, np.int32), np.ones(rows, np.int32)
        self.uniforms_B_T_2 = np.zeros((rows, self.max_tokens, 2), np.float32)
        try:
            while self.waiting or len(self.live):
                if self.ahead is None:
                    self._make_room()
                self.heard(self.sight)
                if len(self.live):
                    self._decode()
                    self.heard(self.sight)
                else:
                    self._wait()
        finally:
            self._wait()
        return [c for c in self.sight.done if c is not None]

    def _wait(self) -> None:
        """Until nothing is under way: it writes into memory that others may be given."""
        if self.ahead is not None:
            mx.eval(self.ahead)
            self.ahead = None

    def _distinct(self, rows: int) -> int:
        return len({self.prompts[i] for i in self.waiting[:rows]})

    def _fits(self, rows: int, groups: int, width: int) -> bool:
        held = width * (groups if self.layout.once else rows) + rows * self.max_tokens
        return self.engine.max_batch_tokens is None or held + self.shared <= self.engine.max_batch_tokens

    def _has_room(self) -> bool:
        """Whether so many rows are free that waiting requests come in, or where none waits the batch shrinks."""
        rows, alive = len(self.owner), len(self.live)
        if self.waiting:
            return rows - alive >= max(1, REFILL_SHARE * rows)
        # of a compiled step few sizes, so that it is compiled for few
        return 0 < alive <= (rows // 2 if self.engine.compiled else (1 - REFILL_SHARE) * rows)

    def _make_room(self) -> None:
        """Let waiting requests in where enough rows are free; where none waits, let go of rows that are free."""
        if not self._has_room():
            return
        free = np.flatnonzero(self.owner < 0)
        if self.waiting:
            self._admit(free)
        elif self.engine.compiled:
            self._shrink(np.sort(np.concatenate([self.live, free])[: -(-len(self.owner) // 2)]))
        else:
            self._shrink(self.live)

    def _admit(self, free: np.ndarray) -> None:
        """Put waiting requests into the rows `free`, as many as memory has room for; read the prompts that are new."""
        alive = {int(g) for g in self.layout.group[self.live]} if len(self.layout.group) else set()
        width = max(len(self.prompts[i]) for i in [*self.owner[self.live], self.waiting[0]])
        new: list[tuple[int, ...]] = []
        taken: list[int] = []
        kept = {self.groups[g] for g in alive}
        for request in self.waiting[: len(free)]:
            prompt = self.prompts[request]
            more = prompt not in kept and prompt not in new
            if taken and not self._fits(len(self.owner), len(kept) + len(new) + more, width):
                break
            taken.append(request)
            if more and (found := self._group_of(prompt)) is not None:
                alive.add(found)
                kept.add(prompt)
            elif more:
                new.append(prompt)
        del self.waiting[: len(taken)]
        keep = sorted(alive)
        fresh = None
        last = [] if self.last_P_D is None else [self.route.take(self.last_P_D, np.array(keep, np.int64))]
        if new:
            hidden, fresh = self.route.read([p[self.shared :] for p in new], self.common)
            last.append(hidden)
        self.last_P_D = self.route.join(last)
        self.groups = [self.groups[g] for g in keep] + new
        rows = free[: len(taken)]
        where = {prompt: g for g, prompt in enumerate(self.groups)}
        groups = np.array([where[self.prompts[request]] for request in taken])
        self.layout.place(rows, groups, fresh, keep, len(self.owner))
        self.layout.narrow(width)
        self.owner[rows], self.born[rows] = taken, self.now
        self._first_tokens(rows, np.array(taken), groups)

    def _group_of(self, prompt: tuple[int, ...]) -> int | None:
        """A group that still holds this prompt though none of its rows runs."""
        found = [g for g in self.layout.held() if self.groups[g] == prompt]
        return found[0] if found else None

    def _first_tokens(self, rows: np.ndarray, requests: np.ndarray, groups: np.ndarray) -> None:
        self.uniforms_B_T_2[rows] = uniforms = uniforms_for(*self.stream, requests, self.max_tokens)
        drawn = self.route.first(self.last_P_D, groups, uniforms[:, 0], self.sampling)
        self.token_B[rows] = drawn[0]
        self.length_B[rows] = [len(self.prompts[i]) for i in requests]
        self._note(rows, [drawn])

    def _decode(self) -> None:
        """So many steps as lie between two looks, and the look."""
        if self.now >= self.layout.ring and self.ahead is None:
            self.layout.grow(min(2 * self.layout.ring, self.max_tokens))
        if isinstance(self.layout, grouped.Grouped):
            pending = [self._step()]
            self.now += 1
        elif isinstance(self.layout, parted.Parted):
            pending = self._steps_in_place()
        else:
            pending = self._steps()
            self.now += len(pending)
        self.token_B = pending[-1][0].astype(np.int32)
        self._note(self.live, [tuple(part[self.live] for part in drawn) for drawn in pending])

    def _step(self) -> Drawn:
        """One step in torch's memory."""
        age_B = self.now - self.born
        self.layout.coming(self.engine.model.args.windows, age_B, self.now)
        position_B, coming_B = self._beyond(age_B)
        uniforms_B_2 = self.uniforms_B_T_2[np.arange(len(coming_B)), coming_B]
        if self.route.step is not None:
            return self.route.step(self.token_B, position_B, uniforms_B_2, self.sampling)
        given = [mx.array(x) for x in (self.token_B, position_B, uniforms_B_2)]
        mx.eval(given)  # once: torch would wait for MLX's thread at the first look at each
        kinds = list(dict.fromkeys(self.engine.model.args.windows))
        step = self.engine.step(self.sampling, grouped.Grouped)
        drawn, _ = step(*given[:2], kinds, None, given[2], self.layout.arrays())
        mx.eval(drawn)
        return tuple(map(np.array, drawn))

    def _count(self) -> int:
        """Steps until the next look."""
        ring, count = self.layout.ring, self.engine.look_every
        return min(count, ring - self.now) if ring < self.max_tokens else count

    def _told(self, count: int) -> tuple[np.ndarray, list[Any], np.ndarray, np.ndarray]:
        """Of the coming steps positions (T, B), what each row sees, columns (T,) and numbers to draw by (T, B, 2)."""
        ring, width = self.layout.ring, self.layout.width
        used = ring if self.engine.compiled else min(self.now + count, ring)
        now_T = self.now + np.arange(count)
        age_T_B = now_T[:, None] - self.born[None]
        windows = dict.fromkeys(self.engine.model.args.windows)
        lengths = np.array([len(self.prompts[i]) if i >= 0 else 0 for i in self.owner])
        seen = self.layout.seen(windows, lengths, age_T_B, now_T, used)
        position_T_B, coming_T_B = self._beyond(age_T_B)
        column_T = now_T % self.max_tokens + (width if self.layout.joined else 0)
        return position_T_B, seen, column_T, self.uniforms_B_T_2[np.arange(len(self.owner)), coming_T_B]

    def _steps_in_place(self) -> list[Drawn]:
        """Steps of the kernels that write in place. The next ones are begun before these are looked at where it is
        likely that the same rows go on, so that a GPU need not wait for the host."""
        drawn = self._begin(mx.array(self.token_B)) if self.ahead is None else self.ahead
        coming = self.sight.count[self.owner[self.live]].min() + drawn.shape[1]  # tokens of each row then, or more
        full = self.layout.ring < self.max_tokens and self.now >= self.layout.ring
        again = coming < self.max_tokens and not full and not self._has_room()
        self.ahead = self._begin(drawn[0, -1, :]) if again else None
        return parted.unpack_drawn(np.array(drawn))

    def _begin(self, token_B: mx.array) -> mx.array:
        """Steps from these tokens on, begun, as `parted.pack_drawn` gives what they draw."""
        told = self._told(self._count())
        self.now += len(told[0])
        step = self.engine.step(self.sampling, type(self.layout))
        drawn = step(token_B, mx.array(parted.pack(*told)), self.layout.arrays())
        mx.async_eval(drawn)
        return drawn

    def _steps(self) -> list[Drawn]:
        """Steps of MLX's; what does not depend on what is drawn comes first."""
        count, pending = self._count(), []
        position_T_B, seen, column_T, uniforms_T_B_2 = self._told(count)
        step = self.engine.step(self.sampling, type(self.layout))
        token_B, position_T_B = mx.array(self.token_B), mx.array(position_T_B)
        column_T, uniforms_T_B_2 = mx.array(column_T.astype(np.int32)), mx.array(uniforms_T_B_2)
        for t in range(count):  # each is begun before the next is put together
            given = (token_B, position_T_B[t], [a[t] for a in seen], column_T[t], uniforms_T_B_2[t])
            if device.torch_is_faster():
                mx.eval(given)  # once: torch would wait for MLX's thread at the first look at each
            drawn, own = step(*given, self.layout.arrays())
            self.layout.store(own)
            token_B = drawn[0]
            mx.async_eval(drawn, own)
            pending.append(drawn)
        mx.eval(pending)
        return [tuple(map(np.array, drawn)) for drawn in pending]

    def _beyond(self, age: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions, int32, of tokens before which (…, B) were stored, and which of its numbers each row draws by."""
        # an idle row ages on, beyond all positions
        position = self.length_B + np.minimum(age, self.max_tokens).astype(np.int32)
        # a row that goes on after its end, until the look, has no numbers of its own left
        return position, np.minimum(age + 1, self.max_tokens - 1)

    def _note(self, rows: np.ndarray, pending: list[Drawn]) -> None:
        """Write down what was drawn in `rows`, none of them idle; those that have ended are."""
        ended = self.sight.note(self.owner[rows], pending)
        self.owner[rows[ended]] = -1
        self.live = np.flatnonzero(self.owner >= 0)

    def _shrink(self, rows: np.ndarray) -> None:
        """Keep `rows` alone."""
        kept = self.layout.keep(rows)
        self.groups = [self.groups[g] for g in kept]
        self.last_P_D = None if not kept else self.route.take(self.last_P_D, np.array(kept))
        self.owner, self.born = self.owner[rows], self.born[rows]
        self.live = np.flatnonzero(self.owner >= 0)
        self.token_B, self.length_B = self.token_B[rows], self.length_B[rows]
        self.uniforms_B_T_2 = self.uniforms_B_T_2[rows]
        self.layout.narrow(max(len(self.prompts[i]) for i in self.owner[self.live]))
