"""Who reads prompts and draws tokens: torch all of it, on a CPU, or MLX with what torch lends it there."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import torch

from rl.rollouts import fused, grouped, torch_prefill, torch_step, torch_weights
from rl.rollouts.forward import head, prefill_last
from rl.rollouts.result import Sampling
from rl.rollouts.sampling import sample
from rl.rollouts.sight import Drawn


class Route(NamedTuple):
    """`read` prompts that continue what was read: their last hidden states (P, width) and what a layout holds of them.

    `take` and `join` hidden states; `first` draws a token after each of some, (hidden, which (B,), numbers (B, 2),
    sampling); `step` one after each row's token, (tokens, positions, numbers, sampling), where it is all torch's.
    """

    read: Callable[[Sequence[Sequence[int]], Any], tuple[Any, Any]]
    take: Callable[[Any, np.ndarray], Any]
    join: Callable[[Sequence[Any]], Any]
    first: Callable[[Any, np.ndarray, np.ndarray, Sampling], Drawn]
    step: Callable[[np.ndarray, np.ndarray, np.ndarray, Sampling], Drawn] | None


def route_of(model: Any, layout: Any) -> Route:
    """By what the model is and where its keys are held; it may be used until a sync, and holds the weights so long."""
    if isinstance(layout, grouped.Grouped) and torch_weights.knows(model):
        fused.of(model).refresh(model)
        return _torch(torch_weights.Weights(model), layout)
    return Route(
        read=lambda prompts, common: prefill_last(model, prompts, common),
        take=lambda hidden, which: hidden[mx.array(which)],
        join=mx.concatenate,
        first=lambda *given: _first(model, *given),
        step=None,
    )


def _first(model: Any, last_P_D: mx.array, groups: np.ndarray, uniforms: np.ndarray, sampling: Sampling) -> Drawn:
    logits_P_V = head(model, last_P_D)
    drawn = sample(logits_P_V[mx.array(groups)], mx.array(uniforms), sampling)
    mx.eval(drawn)
    return tuple(map(np.array, drawn))


def _torch(weights: torch_weights.Weights, layout: grouped.Grouped) -> Route:
    def first(last_P_D: torch.Tensor, groups: np.ndarray, uniforms: np.ndarray, sampling: Sampling) -> Drawn:
        return torch_step.sample(weights.logits(last_P_D)[groups], uniforms, sampling)

    def step(tokens: np.ndarray, positions: np.ndarray, uniforms: np.ndarray, sampling: Sampling) -> Drawn:
        return torch_step.sample(torch_step.logits(weights, layout, tokens, positions), uniforms, sampling)

    return Route(
        read=lambda prompts, common: torch_prefill.read(weights, prompts, common),
        take=lambda hidden, which: hidden[which],
        join=torch.cat,
        first=first,
        step=step,
    )
