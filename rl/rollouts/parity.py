"""Before a run: are the sampler's logprobs the trainer's? And if not, which layer is the first to differ?"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch

from rl.errors import RunFailed
from rl.rollouts.forward import head, prefill

# mean |dlogp| on random tokens above which the two are not the same policy, by the sampler's dtype
TOLERANCE = {"float32": 2e-3, "float16": 3e-2, "bfloat16": 2e-1}
# relative error of one module's output above which it is where the difference comes from
OUTPUT_TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class Parity:
    """Mean and largest |dlogp| over the probe's tokens."""

    mean: float
    largest: float
    tokens: int


def probe(vocabulary: int, lengths: tuple[int, ...] = (5, 9, 14), seed: int = 0) -> list[list[int]]:
    """Random token rows of mixed lengths, so that padding and positions are part of the check."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocabulary, n).tolist() for n in lengths]


def sampler_logprobs(model: nn.Module, rows: list[list[int]]) -> list[np.ndarray]:
    """Teacher-forced float32 logprobs of tokens 1… of each row, read together as the engine reads prompts."""
    longest = max(len(r) for r in rows)
    hidden, _ = prefill(model, rows)
    logits = head(model, hidden).astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    tokens = mx.array([r + [0] * (longest - len(r)) for r in rows])
    chosen = mx.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    mx.eval(chosen)
    return [np.array(chosen[i, : len(r) - 1]) for i, r in enumerate(rows)]


@torch.no_grad()
def trainer_logprobs(model: Any, rows: list[list[int]]) -> list[np.ndarray]:
    """The same from the torch model, one row at a time, without padding: the plainest reference."""
    device = next(model.parameters()).device
    out = []
    for row in rows:
        ids = torch.tensor([row], device=device)
        logprobs = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        out.append(logprobs[0, :-1].gather(-1, ids[0, 1:, None])[:, 0].cpu().numpy())
    return out


def compare(trainer: Any, sampler: nn.Module, rows: list[list[int]]) -> Parity:
    """|dlogp| between the two on `rows` (trainer in eval mode; left as it was)."""
    training = trainer.training
    trainer.eval()
    try:
        ours, theirs = sampler_logprobs(sampler, rows), trainer_logprobs(trainer, rows)
    finally:
        trainer.train(training)
    difference = np.abs(np.concatenate(ours) - np.concatenate(theirs))
    return Parity(float(difference.mean()), float(difference.max()), len(difference))


def check(trainer: Any, sampler: nn.Module, dtype: str, vocabulary: int) -> Parity:
    """`compare` on a probe; raises RunFailed naming the first layer that differs when it is above the tolerance."""
    rows = probe(vocabulary)
    parity = compare(trainer, sampler, rows)
    if not parity.mean <= TOLERANCE[dtype]:  # also true for NaN
        layer, error = first_difference(trainer, sampler, rows[-1], OUTPUT_TOLERANCE[dtype])
        raise RunFailed(
            f"trainer and sampler are not the same policy: mean |dlogp| {parity.mean:.3g} on {parity.tokens} tokens, "
            f"at most {TOLERANCE[dtype]} expected in {dtype}; first to differ is {layer} (relative error {error:.2g})"
        )
    return parity


@torch.no_grad()
def first_difference(trainer: Any, sampler: nn.Module, row: list[int], threshold: float) -> tuple[str, float]:
    """Name and relative error of the first module whose output differs by more than `threshold` on `row`.

    Walks embedding, then attention, feed-forward and sum of each layer, then the head.
    """
    base = trainer.get_base_model() if hasattr(trainer, "get_base_model") else trainer
    seen: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            seen[name] = value.float().cpu().numpy().reshape(-1, value.shape[-1])

        return hook

    hooks = [base.model.embed_tokens.register_forward_hook(keep("model.embed_tokens"))]
    for i, layer in enumerate(base.model.layers):
        for part, module in ((".self_attn", layer.self_attn), (".mlp", layer.mlp), ("", layer)):
            hooks.append(module.register_forward_hook(keep(f"model.layers.{i}{part}")))
    try:
        logits = trainer(
            input_ids=torch.tensor([row], device=next(trainer.parameters()).device), use_cache=False
        ).logits
    finally:
        for hook in hooks:
            hook.remove()

    def error(name: str, ours: mx.array) -> float:
        mine = np.array(ours.astype(mx.float32)).reshape(-1, ours.shape[-1])
        value = float(np.linalg.norm(mine - seen[name]) / (np.linalg.norm(seen[name]) + 1e-30))
        return value if np.isfinite(value) else float("inf")

    found: list[tuple[str, float]] = []

    def look(name: str, value: mx.array) -> None:
        found.append((name, error(name, value)))

    hidden, _ = prefill(sampler, [row], look=look)
    seen["lm_head"] = logits.float().cpu().numpy().reshape(-1, logits.shape[-1])
    found.append(("lm_head", error("lm_head", head(sampler, hidden))))
    return next((pair for pair in found if pair[1] > threshold), found[-1])
