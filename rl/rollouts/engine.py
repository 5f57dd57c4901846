"""The decode loop: prompts are read once, rows come and go, completions end with EOS or a stop, logprobs are float32.

What all prompts share (few-shot examples, a system message) is read once for the whole call, a prompt once for all its
completions. When rows finish, waiting prompts take their places, so that one long completion does not hold the others;
when none waits, the batch shrinks.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from rl.rollouts import attention, device, fused, parted, whole
from rl.rollouts.forward import head, hidden_states
from rl.rollouts.pool import Pool
from rl.rollouts.result import Completion, Sampling, Totals
from rl.rollouts.sampling import sample
from rl.rollouts.sight import Teller


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
        pool = Pool(self, [tuple(p) for p in prompts], sampling, max_tokens, (seed, step), stops)
        if heard is not None:
            pool.heard = Teller(heard, len(prompts))
        done = pool.run()
        new = sum(len(c.tokens) for c in done)
        self.totals.add(sum(len(p) for p in prompts), new, time.perf_counter() - started)
        return done

    def step(self, sampling: Sampling, layout: type) -> Callable[..., Any]:
        """`step_of`, compiled where the engine compiles."""
        if not self.compiled:
            return step_of(self.model, layout, sampling)
        kind = (sampling, layout)
        if kind not in self.steps:
            # the weights are an input: compiled in as constants they would stay those of the first sync
            self.steps[kind] = mx.compile(step_of(self.model, layout, sampling), inputs=self._weights(layout))
        return self.steps[kind]

    def _weights(self, layout: type) -> list[Any]:
        if layout is parted.Told:
            return whole.state(self.model)
        products = fused.of(self.model)
        return [self.model.state] if products is None else [fused.rest(self.model), products.state, products.turns]


def step_of(model: Any, layout: type, sampling: Sampling) -> Callable[..., Any]:
    """`decode_steps` where the kernels write in place, else `decode_step`."""
    if issubclass(layout, parted.Parted):
        return decode_steps(model, sampling)
    return decode_step(model, layout, sampling)


def decode_steps(model: Any, sampling: Sampling) -> Callable[[mx.array, mx.array, Any], mx.array]:
    """A function that takes all steps between two looks of the host from tokens (B,) on; in one array the host says
    what it says of them (`parted.pack`), and in one it is told what they drew (`parted.pack_drawn`).

    A compiled function looks through all its inputs at each call: for 135M's 600 that is a fifth of a GPU's step.
    """
    kinds = len(set(model.args.windows))

    def steps(token_B: mx.array, packed_T_W: mx.array, arrays: Any) -> mx.array:
        position_T_B, seen, column_T, uniforms_T_B_2 = parted.unpack(packed_T_W, kinds)
        hidden_of, drawn = parted.steps(model, position_T_B, seen, column_T, arrays), []
        for t in range(len(position_T_B)):
            drawn.append(sample(head(model, hidden_of(t, token_B)), uniforms_T_B_2[t, ...], sampling))
            token_B = drawn[-1][0]
        return parted.pack_drawn(drawn)

    return steps


def decode_step(model: Any, layout: type, sampling: Sampling | None) -> Callable[..., Any]:
    """A function that stores one token of each row and draws the next: (tokens, logprobs, finite), each (B,), and the
    cache's arrays where they are new. Without `sampling` it gives logits (B, V) instead of the three.

    No number that changes from rollout to rollout is part of it: with CUDA each kernel that a number is compiled into
    takes seconds to make.
    """
    windows = model.args.windows
    kinds = list(dict.fromkeys(windows))

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

        def attend(i: int, *q_k_v_scale: Any) -> mx.array:
            return layout.attend(arrays, i, *q_k_v_scale, column, masks[i])

        logits_B_V = head(model, hidden_states(model, token_B[:, None], position_B, attend)[:, -1])
        if sampling is None:
            return logits_B_V, own
        return sample(logits_B_V, uniforms_B_2, sampling), own

    return step
