"""How probable given tokens are: float32 logprobs at the positions asked for, with logits nowhere else."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from rl.rollouts.forward import Prefilled, head, prefill

# columns of a batch are a multiple of this: few shapes, so that freed buffers fit again
BUCKET = 32
# logits held at once, in numbers (256 MiB of float32): a row of a 49,152-token vocabulary takes 192 KiB
LOGITS = 1 << 26


def read(model: Any, tokens: Sequence[int]) -> Prefilled:
    """One prompt's keys and values, to be the `common` of rows that continue it."""
    common = prefill(model, [tokens])[1]
    mx.eval(common.keys, common.values)
    return common


def score(
    model: Any,
    inputs: Sequence[Sequence[int]],
    targets: Sequence[Sequence[Sequence[int]]],
    common: Prefilled | None = None,
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """For each input, of each of its `targets`: (logprobs float32, is it the likeliest token bool), both (n,).

    A target of n tokens belongs to the last n positions of its input: the token at position i is predicted from input
    tokens up to i, so an input ends one token before its target does. Inputs continue `common`, which is not read
    again, and are padded on the right, where causal attention does not look. Of equally likely tokens the one with the
    lowest id counts as the likeliest.

    Raises ValueError for a target that has no tokens or more than its input.
    """
    for row, asked in zip(inputs, targets, strict=True):
        if not all(0 < len(target) <= len(row) for target in asked):
            raise ValueError(f"targets of {[len(t) for t in asked]} tokens for an input of {len(row)}")
    width = -(-max(map(len, inputs)) // BUCKET) * BUCKET
    # not kept in a variable: the second of the two holds keys and values of all layers
    hidden_B_N_D = prefill(model, [[*row, *[0] * (width - len(row))] for row in inputs], common)[0]
    spans = [max(map(len, asked)) for asked in targets]
    ends = [b * width + len(row) for b, row in enumerate(inputs)]
    where_K = [i for end, n in zip(ends, spans, strict=True) for i in range(end - n, end)]
    hidden_K_D = hidden_B_N_D.reshape(-1, hidden_B_N_D.shape[-1])[mx.array(where_K)]
    mx.eval(hidden_K_D)
    # a target's last token is predicted at the last of its input's places among the K
    flat = [(int(end), t) for end, asked in zip(np.cumsum(spans), targets, strict=True) for t in asked]
    place_Q = np.concatenate([np.arange(end - len(t), end) for end, t in flat])
    token_Q = np.concatenate([np.asarray(t, np.int64) for _, t in flat])
    logp_Q, best_Q = np.zeros(len(place_Q), np.float32), np.zeros(len(place_Q), bool)
    step = max(1, LOGITS // model.args.vocab_size)
    for start in range(0, len(where_K), step):
        here = np.flatnonzero((place_Q >= start) & (place_Q < start + step))
        rows, tokens = mx.array(place_Q[here] - start), mx.array(token_Q[here])
        logits_K_V = head(model, hidden_K_D[start : start + step]).astype(mx.float32)
        chosen = logits_K_V[rows, tokens] - mx.logsumexp(logits_K_V, axis=-1)[rows]
        best = mx.argmax(logits_K_V, axis=-1)[rows] == tokens
        mx.eval(chosen, best)
        logp_Q[here], best_Q[here] = np.array(chosen), np.array(best)
    cuts = np.cumsum([len(t) for _, t in flat])[:-1]
    answers = iter(zip(np.split(logp_Q, cuts), np.split(best_Q, cuts), strict=True))
    return [[next(answers) for _ in asked] for asked in targets]
