"""The decode loop: prompts are read once, rows come and go, completions end with EOS or a stop, logprobs are float32.

What all prompts share (few-shot examples, a system message) is read once for the whole call, a prompt once for all its
completions. When rows finish, waiting prompts take their places, so that one long completion does not hold the others;
when none waits, the batch shrinks.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from rl.errors import UserError
from rl.rollouts import attention, cache, device, fused, parted, torch_step, turns
from rl.rollouts.forward import head, hidden_states, prefill, prefill_last
from rl.rollouts.result import Completion, Sampling, Totals
from rl.rollouts.sampling import sample, uniforms_for
from rl.rollouts.stops import stopped_at
from rl.rollouts.transfer import to_mlx

# waiting prompts are read together, when this share of the rows is free
REFILL_SHARE = 0.25


class Engine:
    """Decodes completions from a model that `load.load_sampler` made.

    `max_batch` bounds the rows that decode at once, `max_batch_tokens` the tokens whose keys and values are held at
    once (`cache.bytes_per_token` each; while rows are moved, one layer more). `stop` are texts that end a completion,
    `decode` the tokenizer's function from ids to text, needed for them alone. `grouped` and `compiled` are the
    backend's choice where None (rl/rollouts/device.py).
    """

    def __init__(
        self,
        model: Any,
        eos_ids: Sequence[int],
        *,
        max_batch: int = 256,
        max_batch_tokens: int | None = None,
        context: int | None = None,
        stop: Sequence[str] = (),
        decode: Callable[[list[int]], str] | None = None,
        grouped: bool | None = None,
        compiled: bool | None = None,
    ):
        self.model = model
        self.eos_ids = tuple(eos_ids)
        self.max_batch, self.max_batch_tokens = max_batch, max_batch_tokens
        self.context = context
        self.stop, self.decode = tuple(stop), decode
        self.grouped = device.groups_share_keys() if grouped is None else grouped
        if not self.grouped:
            attention.prepare()
        self.compiled = device.compiles_steps() if compiled is None else compiled
        self.look_every = device.steps_between_syncs()
        self.steps: dict[tuple[Sampling, type], Callable[..., Any]] = {}  # compiled steps
        self.totals = Totals()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        max_tokens: int,
        seed: int = 0,
        step: int = 0,
        stop: Sequence[Sequence[str]] | None = None,
        heard: Callable[[int, list[int]], None] | None = None,
    ) -> list[Completion]:
        """One completion per prompt, in order; equal prompts share one prefill.

        `heard(row, tokens)` is told each row's tokens so far whenever it has more, to show them while they come.

        Row i draws from the stream (seed, step, i); `stop` gives each row its own texts in place of the engine's.
        Raises ValueError for an empty prompt or one that leaves no room for `max_tokens` in the model's context, and
        UserError for one that `max_batch_tokens` has no room for.
        """
        for row, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ValueError(f"prompt {row} has no tokens")
            if self.context is not None and len(prompt) + max_tokens > self.context:
                raise ValueError(
                    f"prompt {row} has {len(prompt)} tokens and {max_tokens} more may follow, "
                    f"but the model's context is {self.context}"
                )
        if not prompts:
            return []
        stops = [self.stop] * len(prompts) if stop is None else [tuple(texts) for texts in stop]
        if self.decode is None and any(stops):
            raise ValueError("stop texts need the tokenizer's decode")
        started = time.perf_counter()
        pool = _Pool(self, [tuple(p) for p in prompts], sampling, max_tokens, (seed, step), stops)
        if heard is not None:
            pool.heard = _Teller(heard, len(prompts))
        try:
            done = pool.run()
        finally:
            torch_step.let_go(self.model)
        new = sum(len(c.tokens) for c in done)
        self.totals.add(sum(len(p) for p in prompts), new, time.perf_counter() - started)
        return done

    def step(self, sampling: Sampling, layout: type) -> Callable[..., Any]:
        """A decode step, compiled where the engine compiles."""
        if not self.compiled:
            return decode_step(self.model, layout, sampling)
        kind = (sampling, layout)
        if kind not in self.steps:
            # the weights are an input: compiled in as constants they would stay those of the first sync
            products = fused.of(self.model)
            weights = (
                [self.model.state] if products is None else [fused.rest(self.model), products.state, products.turns]
            )
            self.steps[kind] = mx.compile(decode_step(self.model, layout, sampling), inputs=weights)
        return self.steps[kind]


def decode_step(model: Any, layout: type, sampling: Sampling | None) -> Callable[..., Any]:
    """A function that stores one token of each row and draws the next: (tokens, logprobs, finite), each (B,), and the
    cache's arrays where they are new. Without `sampling` it gives logits (B, V) instead of the three.

    No number that changes from rollout to rollout is part of it: with CUDA each kernel that a number is compiled into
    takes seconds to make.
    """
    windows = model.args.windows
    kinds = list(dict.fromkeys(windows))
    few = layout is parted.Parted
    views = torch_step.views(model) if layout is cache.Grouped and torch_step.knows(model) else None

    def step(
        token_B: mx.array,
        position_B: mx.array,
        seen: list[mx.array],
        column: mx.array,
        uniforms_B_2: mx.array | None,
        arrays: Any,
    ) -> tuple[Any, Any]:
        own = arrays.get("own", [])
        masks = [seen[kinds.index(window)] for window in windows]
        if few:
            prompts, rings = (list(zip(*arrays[name], strict=True)) for name in ("prompt", "ring"))
            hidden_B_D = parted.hidden_states(model, token_B, position_B, prompts, rings, masks, column)
            logits_B_V, own = head(model, hidden_B_D), []  # written in place
        elif views is not None:

            def attended(i: int, *q_k_v_scale: Any) -> Any:
                return layout.attended(arrays, i, *q_k_v_scale, column, masks[i])

            logits = torch_step.logits(model, views, token_B, position_B, attended)
            if sampling is not None:
                return torch_step.sample(logits, uniforms_B_2, sampling), own
            logits_B_V = to_mlx(logits)
        else:

            def attend(i: int, *q_k_v_scale: Any) -> mx.array:
                return layout.attend(arrays, i, *q_k_v_scale, column, masks[i])

            logits_B_V = head(model, hidden_states(model, token_B[:, None], position_B, attend)[:, -1])
        if sampling is None:
            return logits_B_V, own
        return sample(logits_B_V, uniforms_B_2, sampling), own

    return step


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts start with, leaving each at least one token of its own."""
    shortest = min(len(p) for p in prompts) - 1
    first = prompts[0]
    for i in range(shortest):
        if any(p[i] != first[i] for p in prompts):
            return i
    return shortest


class _Teller:
    """Tells `heard` what is new in each row: of one that has ended no more than its completion."""

    def __init__(self, heard: Callable[[int, list[int]], None], rows: int):
        self.heard, self.told = heard, [0] * rows

    def __call__(self, pool: "_Pool") -> None:
        for row, before in enumerate(self.told):
            done = pool.done[row]
            tokens = pool.tokens[row, : pool.count[row]].tolist() if done is None else done.tokens
            if len(tokens) > before:
                self.told[row] = len(tokens)
                self.heard(row, tokens)


class _Pool:
    """The requests of one call, and the rows in which they decode."""

    def __init__(
        self,
        engine: Engine,
        prompts: list[tuple[int, ...]],
        sampling: Sampling,
        max_tokens: int,
        stream: tuple[int, int],
        stops: Sequence[tuple[str, ...]],
    ):
        self.engine, self.prompts, self.sampling, self.max_tokens = engine, prompts, sampling, max_tokens
        self.stream, self.stops = stream, stops
        # long prompts first: the room that a row's prompt takes shrinks when the last of them is done
        self.waiting = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i], i))
        self.tokens = np.zeros((len(prompts), max_tokens), np.int64)
        self.logprobs = np.zeros((len(prompts), max_tokens), np.float32)
        self.count = np.zeros(len(prompts), np.int64)  # tokens drawn for each request
        self.done: list[Completion | None] = [None] * len(prompts)
        self.layout = parted.layout_of(engine.model, grouped=engine.grouped)(max_tokens)
        self.groups: list[tuple[int, ...]] = []  # the prompt of each group of the layout
        self.last_P_D: mx.array | None = None  # the hidden state after each group's prompt
        self.owner = np.zeros(0, np.int64)  # request of each row, -1 where it is idle
        self.born = np.zeros(0, np.int64)
        self.now = 0
        self.heard: Callable[[_Pool], None] = lambda pool: None
        turns.reach(engine.model, max(map(len, prompts)) + max_tokens + 1)
        distinct = sorted(set(prompts))
        self.shared = common_prefix(distinct) if len(distinct) > 1 else 0
        self.common = prefill(engine.model, [distinct[0][: self.shared]])[1] if self.shared else None

    def run(self) -> list[Completion]:
        rows = min(self.engine.max_batch, len(self.prompts))
        while rows > 1 and not self._fits(rows, self._distinct(rows), len(self.prompts[self.waiting[0]])):
            rows -= 1
        if not self._fits(rows, 1, len(self.prompts[self.waiting[0]])):
            raise UserError(
                f"[rollout] max_batch_tokens: found {self.engine.max_batch_tokens}, valid: ≥ the longest prompt's "
                f"{len(self.prompts[self.waiting[0]])} tokens and {self.max_tokens} more"
            )
        self.owner, self.born = np.full(rows, -1), np.zeros(rows, np.int64)
        self.token_B, self.length_B = mx.zeros(rows, mx.int32), mx.ones(rows, mx.int32)
        self.uniforms_B_T_2 = mx.zeros((rows, self.max_tokens, 2))
        while self.waiting or (self.owner >= 0).any():
            self._make_room()
            self.heard(self)
            if (self.owner >= 0).any():
                self._decode()
                self.heard(self)
        return [c for c in self.done if c is not None]

    def _distinct(self, rows: int) -> int:
        return len({self.prompts[i] for i in self.waiting[:rows]})

    def _fits(self, rows: int, groups: int, width: int) -> bool:
        held = width * (groups if self.layout.once else rows) + rows * self.max_tokens
        return self.engine.max_batch_tokens is None or held + self.shared <= self.engine.max_batch_tokens

    def _make_room(self) -> None:
        """Let waiting requests in where enough rows are free; where none waits, let go of rows that are free."""
        free = np.flatnonzero(self.owner < 0)
        alive = np.flatnonzero(self.owner >= 0)
        if self.waiting:
            if len(free) >= max(1, REFILL_SHARE * len(self.owner)):
                self._admit(free)
        elif self.engine.compiled:
            if 0 < len(alive) <= len(self.owner) // 2:  # few sizes, so that a step is compiled for few
                self._shrink(np.sort(np.concatenate([alive, free])[: -(-len(self.owner) // 2)]))
        elif 0 < len(alive) <= (1 - REFILL_SHARE) * len(self.owner):
            self._shrink(alive)

    def _admit(self, free: np.ndarray) -> None:
        """Put waiting requests into the rows `free`, as many as memory has room for; read the prompts that are new."""
        alive = {int(g) for g in self.layout.group[self.owner >= 0]} if len(self.layout.group) else set()
        width = max([len(self.prompts[i]) for i in self.owner[self.owner >= 0]] + [len(self.prompts[self.waiting[0]])])
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
        last = [] if self.last_P_D is None else [self.last_P_D[mx.array(np.array(keep, np.int64))]]
        if new:
            hidden, fresh = prefill_last(self.engine.model, [p[self.shared :] for p in new], self.common)
            last.append(hidden)
        self.last_P_D = mx.concatenate(last)
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
        uniforms = mx.array(uniforms_for(*self.stream, requests, self.max_tokens))
        logits_P_V = head(self.engine.model, self.last_P_D)
        drawn = sample(logits_P_V[mx.array(groups)], uniforms[:, 0], self.sampling)
        mx.eval(drawn)
        where = mx.array(rows)
        self.uniforms_B_T_2[where] = uniforms
        self.token_B[where] = drawn[0]
        self.length_B[where] = mx.array([len(self.prompts[i]) for i in requests], dtype=mx.int32)
        self._note(rows, [drawn])

    def _decode(self) -> None:
        """So many steps as lie between two looks, and the look; what does not depend on what is drawn comes first."""
        if self.now >= self.layout.ring:
            self.layout.grow(min(2 * self.layout.ring, self.max_tokens))
        ring, width, count = self.layout.ring, self.layout.width, self.engine.look_every
        if ring < self.max_tokens:
            count = min(count, ring - self.now)
        used = ring if self.engine.compiled else min(self.now + count, ring)
        now_T = self.now + np.arange(count)
        age_T_B = now_T[:, None] - self.born[None]
        windows = dict.fromkeys(self.engine.model.args.windows)
        lengths = np.array([len(self.prompts[i]) if i >= 0 else 0 for i in self.owner])
        seen = self.layout.seen(windows, lengths, age_T_B, now_T, used)
        # an idle row ages on, beyond all positions
        position_T_B = self.length_B + mx.array(np.minimum(age_T_B, self.max_tokens).astype(np.int32))
        column_T = mx.array((now_T % self.max_tokens + (width if self.layout.joined else 0)).astype(np.int32))
        # a row that goes on after its end, until the look, has no numbers of its own left
        coming_B_T = mx.array(np.minimum(age_T_B.T + 1, self.max_tokens - 1).astype(np.int32))
        uniforms_B_T_2 = mx.take_along_axis(self.uniforms_B_T_2, coming_B_T[..., None], axis=1)
        step, pending = self.engine.step(self.sampling, type(self.layout)), []
        for t in range(count):
            given = (self.token_B, position_T_B[t], [a[t] for a in seen], column_T[t], uniforms_B_T_2[:, t])
            if device.torch_is_faster():
                mx.eval(given)  # once: torch would wait for MLX's thread at the first look at each
            drawn, own = step(*given, self.layout.arrays())
            self.layout.store(own)
            self.token_B = drawn[0]
            mx.async_eval(drawn, own)
            pending.append(drawn)
        self.now += count
        mx.eval(pending)
        self._note(np.arange(len(self.owner)), pending)

    def _note(self, rows: np.ndarray, pending: list[tuple[mx.array, mx.array, mx.array]]) -> None:
        """Write down what was drawn in `rows`, and end the requests that are at their end."""
        rows_here = np.flatnonzero(self.owner[rows] >= 0)
        requests = self.owner[rows][rows_here]
        before = self.count[requests]
        finite = np.ones(len(requests), bool)
        ends = np.zeros(len(requests), bool)
        for token, logprob, fine in pending:
            going = np.flatnonzero(self.count[requests] < self.max_tokens)
            into, at = requests[going], self.count[requests[going]]
            self.tokens[into, at] = np.array(token)[rows_here[going]]
            self.logprobs[into, at] = np.array(logprob)[rows_here[going]]
            # what is not finite after a row's end is not its own
            finite[going] &= np.array(fine)[rows_here[going]] | ends[going]
            ends[going] |= np.isin(self.tokens[into, at], self.engine.eos_ids)
            self.count[into] += 1
        # of most rows nothing is to be said at most steps
        over = ends | ~finite | (self.count[requests] == self.max_tokens)
        over |= np.array([bool(self.stops[request]) for request in requests], bool)
        for i in np.flatnonzero(over):
            row, request = rows[rows_here[i]], requests[i]
            length = self._length(request, before[i])
            if not finite[i]:
                self.done[request] = Completion([self.engine.eos_ids[0]], [float("nan")], finite=False)
            elif length is not None:
                tokens, logprobs = self.tokens[request, :length].tolist(), self.logprobs[request, :length].tolist()
                self.done[request] = Completion(tokens, logprobs)
            if self.done[request] is not None:
                self.owner[row] = -1

    def _length(self, request: int, before: int) -> int | None:
        """Tokens of a completion that has ended since it had `before` of them; None when it goes on."""
        count = int(self.count[request])
        ends = np.flatnonzero(np.isin(self.tokens[request, before:count], self.engine.eos_ids))
        length = int(before + ends[0]) + 1 if len(ends) else None
        if self.stops[request]:
            until = self.tokens[request, : length or count].tolist()
            stopped = stopped_at(until, len(until) - before, self.stops[request], self.engine.decode)
            length = length if stopped is None else stopped
        return count if length is None and count == self.max_tokens else length

    def _shrink(self, rows: np.ndarray) -> None:
        """Keep `rows` alone."""
        kept = self.layout.keep(rows)
        self.groups = [self.groups[g] for g in kept]
        self.last_P_D = None if not kept else self.last_P_D[mx.array(kept)]
        self.owner, self.born = self.owner[rows], self.born[rows]
        index = mx.array(rows)
        self.token_B, self.length_B = self.token_B[index], self.length_B[index]
        self.uniforms_B_T_2 = self.uniforms_B_T_2[index]
        self.layout.narrow(max(len(self.prompts[i]) for i in self.owner[self.owner >= 0]))
