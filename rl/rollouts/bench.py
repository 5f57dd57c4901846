"""The contestants of `nox -s bench` on equal work: this engine, mlx-lm's BatchGenerator, transformers' generate and its
continuous batching.

Each takes the same prompts and returns completions of given lengths. Every new token is drawn from the whole
vocabulary at temperature 1 (or greedily, for the checks); lengths are forced, not hoped for:
- the engine stops at tokens of a set that the caller chose, or at `max_tokens`;
- the others are given the lengths that came out, one limit a row, by their own means.
"""

import gc
import io
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache as once
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from rl.device import total_memory_bytes
from rl.errors import RunFailed
from rl.rollouts import device, parted, turns
from rl.rollouts.engine import Engine, decode_step
from rl.rollouts.forward import head, prefill_last
from rl.rollouts.load import load_sampler
from rl.rollouts.result import Completion, Sampling

# graph nodes that only describe an array anew; all others are work for the device
VIEWS = {"Broadcast", "Transpose", "Flatten", "Unflatten", "ExpandDims", "Reshape", "Squeeze", "Slice", "StopGradient"}
CHAIN = 1000
PAGE = 256  # tokens of a page of continuous batching's cache, its default
STUCK = 180  # seconds

# `batch_generator` of one model: prompts, limits and its keywords -> completions and the seconds they took
Batch = Callable[..., tuple[list[Completion], float]]


def engine(
    ours: Engine,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    ending: Sequence[int],
    temperature: float = 1.0,
    seed: int = 0,
) -> list[Completion]:
    """This project's engine, one for all calls as in a run: it compiles a kind of step once. A completion ends with the
    first token in `ending` or after `max_tokens`.

    Raises RunFailed when logits were not finite: such a row ends early and would count as fast.
    """
    ours.eos_ids, ours.max_batch = tuple(ending), max(256, len(prompts))
    done = ours.generate(prompts, Sampling(temperature=temperature), max_tokens=max_tokens, seed=seed)
    if not all(c.finite for c in done):
        raise RunFailed("bench: logits of the engine are not finite")
    return done


def batch_generator(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    *,
    temperature: float = 1.0,
    seed: int = 0,
    logprobs: bool = False,
) -> list[Completion]:
    """mlx-lm's BatchGenerator, `limits[i]` tokens for row i; logprobs (untempered) only on request, since they cost it.

    All rows fit its batches (its defaults would cut them in waves), and MLX may keep a quarter of the memory for reuse
    while it runs: this project's own bound is far less, and without one a long rollout has filled 24 GB.
    """
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.sample_utils import make_sampler

    memory = torch.cuda.mem_get_info()[1] if device.backend() == "cuda" else total_memory_bytes()
    bound = mx.set_cache_limit(memory // 4)
    try:
        mx.random.seed(seed)
        generator = BatchGenerator(
            model,
            sampler=make_sampler(temp=temperature),
            completion_batch_size=len(prompts),
            prefill_batch_size=len(prompts),
        )
        rows = {uid: i for i, uid in enumerate(generator.insert([list(p) for p in prompts], list(limits)))}
        tokens: list[list[int]] = [[] for _ in prompts]
        chosen: list[list[float]] = [[] for _ in prompts]
        while responses := generator.next_generated():
            for response in responses:
                tokens[rows[response.uid]].append(response.token)
                if logprobs:
                    chosen[rows[response.uid]].append(response.logprobs[response.token].item())
        generator.close()
    finally:
        mx.set_cache_limit(bound)
    return [Completion(t, p) for t, p in zip(tokens, chosen, strict=True)]


def batch_here(model: Any) -> Batch:
    """`batch_generator` of `model`, timed."""

    def run(prompts: Sequence[Sequence[int]], limits: Sequence[int], **how: Any) -> tuple[list[Completion], float]:
        started = time.perf_counter()
        done = batch_generator(model, prompts, limits, **how)
        return done, time.perf_counter() - started

    return run


def batch_apart(folder: Path, dtype: str) -> Batch:
    """`batch_here` of the model in `folder`, in a process that ends when the function is let go.

    For a CPU, where MLX's own products would from the first on halve the speed of all that torch does in the process
    (rl/rollouts/lent.py), which is the others' work and not this one's.
    """
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))  # a fork would lack the threads of torch and MLX

    def run(prompts: Sequence[Sequence[int]], limits: Sequence[int], **how: Any) -> tuple[list[Completion], float]:
        return pool.submit(_batch_of, folder, dtype, prompts, limits, how).result()

    return run


def _batch_of(folder: Path, dtype: str, prompts: Any, limits: Any, how: dict[str, Any]) -> Any:
    run = _loaded(folder, dtype)
    gc.collect()
    return run(prompts, limits, **how)


@once
def _loaded(folder: Path, dtype: str) -> Batch:
    return batch_here(load_sampler(folder, dtype))


class _Limits(StoppingCriteria):
    """Ends row i after `limits[i]` new tokens, as transformers' own EOS criterion would end it there."""

    eos_token_id = None  # its presence makes generate pad the rows that are done

    def __init__(self, limits: torch.Tensor, prompt: int):
        self.limits, self.prompt = limits, prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids.shape[1] - self.prompt >= self.limits


@torch.no_grad()
def hf_generate(
    policy: Any, prompts: Sequence[Sequence[int]], limits: Sequence[int], *, temperature: float = 1.0, seed: int = 0
) -> list[list[int]]:
    """transformers' generate, `limits[i]` tokens for row i, set up as TRL sets it up; tokens only, as TRL asks for.

    Raises ValueError for prompts of different lengths.
    """
    width = len(prompts[0])
    if any(len(p) != width for p in prompts):
        raise ValueError("prompts of one length only: padding would be extra work for one contestant")
    device = next(policy.parameters()).device
    ids = torch.tensor([list(p) for p in prompts], device=device)
    drawn = {"do_sample": False} if temperature == 0.0 else {"do_sample": True, "temperature": temperature}
    config = GenerationConfig(
        max_new_tokens=max(limits), top_k=0, top_p=1.0, pad_token_id=0, disable_compile=True, **drawn
    )
    kept, attention = policy.generation_config, policy.config._attn_implementation
    paged = attention.startswith("paged|")  # continuous batching is ready beside it, on the same model
    if paged:
        policy.set_attn_implementation(attention.removeprefix("paged|"))
    # generate fills what is not set from here, and an EOS there would end rows early
    policy.generation_config = GenerationConfig()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            out = policy.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([_Limits(torch.tensor(limits, device=device), width)]),
            )
    finally:
        policy.generation_config = kept
        if paged:
            policy.set_attn_implementation(attention)
    rows = out[:, width:].tolist()
    if len(rows[0]) != max(limits):
        raise ValueError(f"generate gave {len(rows[0])} columns, not {max(limits)}")
    return [row[:limit] for row, limit in zip(rows, limits, strict=True)]


@contextmanager
def continuous(
    policy: Any, rows: int, prompt: int, most: int, *, temperature: float = 1.0
) -> Iterator[Callable[[Sequence[Sequence[int]], Sequence[int]], list[list[int]]]]:
    """transformers' continuous batching, started for `rows` prompts of `prompt` tokens and at most `most` new ones.

    Yields a function like `hf_generate`, `limits[i]` tokens for row i. Its cache is sized by the work: by default it
    takes most of the memory that is free, which the others need. Raises RunFailed when its thread died or is stuck.
    """
    from transformers import ContinuousBatchingConfig  # not in every version 5

    drawn = {"do_sample": False} if temperature == 0.0 else {"do_sample": True, "temperature": temperature}
    config = GenerationConfig(max_new_tokens=most, top_k=0, top_p=1.0, pad_token_id=0, eos_token_id=-1, **drawn)
    device = next(policy.parameters()).device
    pages = rows * ((prompt + most) // PAGE + 2)
    sizes = ContinuousBatchingConfig(num_blocks=pages, max_batch_tokens=512 if device.type == "cpu" else 8192)
    kept = policy.config._attn_implementation
    try:
        with policy.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=sizes, block=True, timeout=5
        ) as manager:

            def generate(prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[list[int]]:
                asked = [manager.add_request(list(p), max_new_tokens=n) for p, n in zip(prompts, limits, strict=True)]
                done: dict[Any, list[int]] = {}
                heard = time.monotonic()
                while len(done) < len(asked):
                    result = manager.get_result(timeout=1)
                    if result is not None:
                        heard = time.monotonic()
                        if getattr(result, "error", None):
                            raise RunFailed(str(result.error))
                        if result.is_finished():
                            done[result.request_id] = list(result.generated_tokens)
                    elif not manager.is_running():
                        raise RunFailed("its thread ended before the requests did")
                    elif time.monotonic() - heard > STUCK:
                        raise RunFailed(f"it gave nothing for {STUCK} seconds")
                return [done[name] for name in asked]

            yield generate
    finally:
        policy.set_attn_implementation(kept)


def launches(model: Any, rows: int) -> int:
    """Operations of one decode step of `rows` rows of one prompt in MLX's graph, views not counted; sampling not
    included, nor what compiling the step would fuse."""
    most = 8
    _, fresh = prefill_last(model, [[0, 0]])
    layout = parted.layout_of(model, grouped=False)(most)
    turns.reach(model, most)
    every = np.arange(rows)
    layout.place(every, np.zeros(rows, np.int64), fresh, [], rows)
    arrays, zeros = layout.arrays(), mx.zeros((rows,), mx.int32)
    windows, now_1 = dict.fromkeys(model.args.windows), np.zeros(1, np.int64)
    seen = layout.seen(windows, np.full(rows, 2), np.zeros((1, rows), np.int64), now_1, 1)
    mx.eval(arrays)
    with device.mlx_alone():
        if isinstance(layout, parted.Parted):
            spans = [mx.array(one) for one in seen]
            step, own = parted.steps(model, zeros[None] + 2, spans, mx.zeros((1,), mx.int32), arrays), []
            logits = head(model, step(0, zeros))
        else:
            step, column = decode_step(model, layout.__class__, None), mx.array(layout.width if layout.joined else 0)
            logits, own = step(zeros, zeros + 2, [a[0] for a in seen], column, None, arrays)
    graph = io.StringIO()
    mx.export_to_dot(graph, logits, own)
    names = re.findall(r'\[label ?= ?"(\w+)", shape=rectangle\]', graph.getvalue())
    return sum(name not in VIEWS for name in names)


def launch_seconds() -> float:
    """Seconds for one operation on one number, each waiting for the one before: the least of 5 chains of 1,000."""
    best = np.inf
    for _ in range(5):
        x = mx.zeros((1,))
        mx.eval(x)
        started = time.perf_counter()
        for _ in range(CHAIN):
            x = x + 1
        mx.eval(x)
        best = min(best, time.perf_counter() - started)
    return float(best) / CHAIN
