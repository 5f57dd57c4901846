"""The decode loop: each distinct prompt is prefilled once, completions end with their EOS, logprobs are float32.

What all prompts share (few-shot examples, a system message) is prefilled once for the whole batch.
"""

import time
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from rl.rollouts.cache import Cache
from rl.rollouts.device import steps_between_syncs
from rl.rollouts.result import Completion, Sampling, Totals
from rl.rollouts.sampling import keys_for, sample


class Engine:
    """Decodes completions from an mlx-lm model of the dense attention families (see rl/rollouts/load.py)."""

    def __init__(self, model: Any, eos_ids: Sequence[int], *, max_batch: int = 256, context: int | None = None):
        self.model = model
        self.eos_ids = tuple(eos_ids)
        self.max_batch = max_batch
        self.context = context
        self.totals = Totals()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        max_tokens: int,
        seed: int = 0,
        step: int = 0,
    ) -> list[Completion]:
        """One completion per prompt, in order; equal prompts share one prefill.

        Row i draws from the stream (seed, step, i). Raises ValueError for an empty prompt or one that leaves no room
        for `max_tokens` in the model's context.
        """
        for row, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ValueError(f"prompt {row} has no tokens")
            if self.context is not None and len(prompt) + max_tokens > self.context:
                raise ValueError(
                    f"prompt {row} has {len(prompt)} tokens and {max_tokens} more may follow, "
                    f"but the model's context is {self.context}"
                )
        started = time.perf_counter()
        keys = keys_for(seed, step, np.arange(len(prompts)), max_tokens)
        results: list[Completion | None] = [None] * len(prompts)
        for rows in self._batches(prompts):
            batch = _Batch(self, [tuple(prompts[i]) for i in rows], keys[rows], sampling, max_tokens)
            for i, completion in zip(rows, batch.run(), strict=True):
                results[i] = completion
        new = sum(len(c.tokens) for c in results if c is not None)
        self.totals.add(sum(len(p) for p in prompts), new, time.perf_counter() - started)
        return [c for c in results if c is not None]

    def _batches(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Row indices in batches of at most `max_batch`, equal prompts together and lengths near each other."""
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i]), i))
        return [order[i : i + self.max_batch] for i in range(0, len(order), self.max_batch)]


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts start with, leaving each at least one token of its own."""
    shortest = min(len(p) for p in prompts) - 1
    first = prompts[0]
    for i in range(shortest):
        if any(p[i] != first[i] for p in prompts):
            return i
    return shortest


class _Batch:
    """One pass of prefill and decode over rows that fit together."""

    def __init__(
        self,
        engine: Engine,
        prompts: list[tuple[int, ...]],
        keys: np.ndarray,
        sampling: Sampling,
        max_tokens: int,
    ):
        self.engine, self.sampling, self.max_tokens = engine, sampling, max_tokens
        self.prompts = prompts
        self.keys_B_T_2 = mx.array(keys)
        self.eos = mx.array(engine.eos_ids, dtype=mx.int32)

    def run(self) -> list[Completion]:
        logits_B_V, cache = self._prefill()
        tokens, logprobs, finite = self._decode(logits_B_V, cache)
        return [self._completion(tokens[i], logprobs[i], bool(finite[i])) for i in range(len(self.prompts))]

    def _prefill(self) -> tuple[mx.array, Cache]:
        distinct = sorted(set(self.prompts))
        shared = common_prefix(distinct)
        longest = max(len(p) for p in distinct) - shared
        model = self.engine.model
        cache = Cache(len(model.layers), 1, shared + longest + self.max_tokens)
        if shared > 0:
            cache.forward(model.model, mx.array([distinct[0][:shared]]), mx.ones((1, shared), mx.bool_))
        cache.columns.take(mx.zeros(len(distinct), mx.int32))
        for layer in cache.layers:
            if layer.keys is not None:
                layer.take(mx.zeros(len(distinct), mx.int32))
        suffixes = [p[shared:] for p in distinct]
        tokens = mx.array([[0] * (longest - len(s)) + list(s) for s in suffixes], dtype=mx.int32)
        valid = mx.array([[False] * (longest - len(s)) + [True] * len(s) for s in suffixes])
        hidden = cache.forward(model.model, tokens, valid)
        logits = head(model, hidden[:, -1])
        where = {p: i for i, p in enumerate(distinct)}
        rows = mx.array([where[p] for p in self.prompts])
        cache.take(rows)
        return logits[rows], cache

    def _decode(self, logits_B_V: mx.array, cache: Cache) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens (B, T), logprobs (B, T) and finiteness (B,); what follows a row's EOS is to be ignored."""
        total = len(self.prompts)
        tokens = np.full((total, self.max_tokens), self.engine.eos_ids[0], dtype=np.int64)
        logprobs = np.zeros((total, self.max_tokens), dtype=np.float32)
        finite = np.ones(total, dtype=bool)
        alive = np.arange(total)  # which completion each batch row belongs to
        done_B = mx.zeros((total,), mx.bool_)
        pending: list[tuple[mx.array, mx.array, mx.array]] = []
        look_every = steps_between_syncs()
        one = mx.ones((total, 1), mx.bool_)
        keys_B_T_2 = self.keys_B_T_2
        for t in range(self.max_tokens):
            token_B, logprob_B, finite_B = sample(logits_B_V, keys_B_T_2[:, t], self.sampling)
            pending.append((token_B, logprob_B, finite_B | done_B))
            done_B = done_B | (token_B[:, None] == self.eos[None]).any(axis=1)
            last = t + 1 == self.max_tokens
            if last or len(pending) == look_every:
                mx.eval(pending, done_B)
                begin = t + 1 - len(pending)
                for i, (token, logprob, fine) in enumerate(pending):
                    tokens[alive, begin + i] = np.array(token)
                    logprobs[alive, begin + i] = np.array(logprob)
                    finite[alive] &= np.array(fine)
                pending = []
                going = np.flatnonzero(~np.array(done_B) & finite[alive])
                if last or len(going) == 0:
                    break
                if len(going) <= 0.75 * len(alive):
                    rows = mx.array(going)
                    cache.take(rows)
                    alive, token_B, done_B = alive[going], token_B[rows], done_B[rows]
                    keys_B_T_2, one = keys_B_T_2[rows], one[rows]
            logits_B_V = head(self.engine.model, cache.forward(self.engine.model.model, token_B[:, None], one)[:, -1])
        return tokens, logprobs, finite

    def _completion(self, tokens: np.ndarray, logprobs: np.ndarray, finite: bool) -> Completion:
        if not finite:
            return Completion([self.engine.eos_ids[0]], [float("nan")], finite=False)
        ends = np.flatnonzero(np.isin(tokens, self.engine.eos_ids))
        length = int(ends[0]) + 1 if len(ends) else len(tokens)
        return Completion(tokens[:length].tolist(), logprobs[:length].tolist())


def head(model: Any, hidden: mx.array) -> mx.array:
    """Logits of the last hidden states: the tied embedding or the head, as in mlx-lm's `Model.__call__`."""
    if getattr(model.args, "tie_word_embeddings", True):
        return model.model.embed_tokens.as_linear(hidden)
    return model.lm_head(hidden)
