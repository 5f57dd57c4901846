"""A decode step on a CPU, all of it torch's: MLX computes in a thread of its own, and where its products and torch's
attention take turns each waits for the other's threads. Its arrays are read where they lie.

For float32 models without codes, which is what a CPU decodes; others go rl/rollouts/forward.py's way.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import torch
from torch.nn import functional

from rl.rollouts import device, fused, lent
from rl.rollouts.result import Sampling
from rl.rollouts.sampling import block_of
from rl.rollouts.sampling import sample as filtered_sample
from rl.rollouts.transfer import to_mlx

# layer, queries (B, heads, D), keys and values (B, kv_heads, D), scale -> (B, heads, D)
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


def knows(model: Any) -> bool:
    """Whether `logits` may decode this model: a float32 one, of weights as they are. Call it after a prefill."""
    products = fused.of(model)
    if products is None or not products.turns or not device.torch_is_faster():
        return False
    if products.views is not None:  # asked before every step, and known since the first
        return True
    ends = (model.model.embed_tokens, model.get("lm_head", {}))
    coded = any("scales" in part for part in [*ends, *products.state])
    return model.model.norm.weight.dtype == mx.float32 and not coded


def views(model: Any) -> "Views":
    """The model's arrays as tensors, the same until `let_go`."""
    products = fused.of(model)
    products.views = products.views or Views(model)
    return products.views


def let_go(model: Any) -> None:
    """Hold the arrays no longer: a sync brings others, and would find the old ones still there."""
    if (products := fused.of(model)) is not None:
        products.views = None


class Views:
    """A model's arrays as tensors over their memory."""

    def __init__(self, model: Any) -> None:
        inner, products = model.model, fused.of(model)
        self.gemma = model.args.model_type == "gemma3_text"
        self.embedding = lent.view(inner.embed_tokens.weight)[0]
        self.head = lent.view(model.lm_head.weight)[0] if "lm_head" in model else self.embedding
        self.scale = inner.args.hidden_size**0.5 if self.gemma else 1.0
        self.norm = self._norm(inner.norm)
        self.turns = lent.view(*products.turns)
        self.products = [dict(zip(state, lent.view(*state.values()), strict=True)) for state in products.state]
        self.norms = [
            {name: self._norm(part) for name, part in [*layer.items(), *layer.self_attn.items()] if "norm" in name}
            for layer in inner.layers
        ]

    def _norm(self, module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        weight = lent.view(module.weight)[0]
        weight = weight + 1 if self.gemma else weight
        return lambda x: functional.rms_norm(x, weight.shape, weight, module.eps)


@torch.no_grad()
def logits(model: Any, views: Views, token_B: mx.array, position_B: mx.array, attend: Attend) -> torch.Tensor:
    """Logits (B, V) of one token a row; as rl/rollouts/forward.py's way through the layers, operation by operation."""
    inner, products = model.model, fused.of(model)
    token_ids, positions = lent.view(token_B, position_B)
    x = functional.embedding(token_ids, views.embedding)
    x = x * views.scale if views.gemma else x
    turns = [table[positions][:, None].chunk(2, dim=-1) for table in views.turns]
    for i, layer in enumerate(inner.layers):
        qkv, o, gate_up, down = views.products[4 * i : 4 * i + 4]
        norms, module = views.norms[i], layer.self_attn
        heads, kv_heads = module.n_heads, module.n_kv_heads
        every = lent.linear_of(qkv, norms["input_layernorm"](x)).view(len(x), heads + 2 * kv_heads, -1)
        queries, keys, values = every.split([heads, kv_heads, kv_heads], dim=1)
        if "q_norm" in norms:
            turned = _turn(
                torch.cat([norms["q_norm"](queries), norms["k_norm"](keys)], dim=1), turns[products.turn_of[i]]
            )
        else:
            turned = _turn(every[:, : heads + kv_heads], turns[products.turn_of[i]])
        queries, keys = turned.split([heads, kv_heads], dim=1)
        attended = lent.linear_of(o, attend(i, queries, keys, values, module.scale).reshape(len(x), -1))
        if views.gemma:
            x = x + norms["post_attention_layernorm"](attended)
            gate, up = lent.linear_of(gate_up, norms["pre_feedforward_layernorm"](x)).chunk(2, dim=-1)
            fed = lent.linear_of(down, functional.gelu(gate, approximate="tanh") * up)
            x = x + norms["post_feedforward_layernorm"](fed)
        else:
            x = attended.add_(x)
            gate, up = lent.linear_of(gate_up, norms["post_attention_layernorm"](x)).chunk(2, dim=-1)
            x = lent.linear_of(down, functional.silu(gate).mul_(up)).add_(x)
    return lent.linear(views.norm(x), views.head)


@torch.no_grad()
def sample(logits_B_V: torch.Tensor, uniforms_B_2: mx.array, sampling: Sampling) -> tuple[mx.array, mx.array, mx.array]:
    """As `sampling.sample`, which also does it where the distribution is filtered."""
    if sampling.filtered:
        return filtered_sample(to_mlx(logits_B_V), uniforms_B_2, sampling)
    finite_B = logits_B_V.sum(-1).isfinite()
    if sampling.temperature not in (0.0, 1.0):
        logits_B_V = logits_B_V / sampling.temperature
    most_B = logits_B_V.amax(-1)
    weights_B_V = (logits_B_V - most_B[:, None]).exp_()
    greedy = sampling.temperature == 0.0
    tokens_B = logits_B_V.argmax(-1) if greedy else _draw(weights_B_V, lent.view(uniforms_B_2)[0])
    chosen_B = logits_B_V.gather(-1, tokens_B[:, None])[:, 0]
    logprobs_B = chosen_B - most_B - weights_B_V.sum(-1).log_()
    return to_mlx(tokens_B.int()), to_mlx(logprobs_B), to_mlx(finite_B)


def _draw(weights_B_V: torch.Tensor, uniforms_B_2: torch.Tensor) -> torch.Tensor:
    """As `sampling.draw`: a block of the vocabulary by the first number, a token of it by the second."""
    block = block_of(weights_B_V.shape[1])
    weights_B_V = functional.pad(weights_B_V, (0, -weights_B_V.shape[1] % block))
    weights_B_K_N = weights_B_V.view(len(weights_B_V), -1, block)
    block_B = _invert(weights_B_K_N.sum(-1), uniforms_B_2[:, 0])
    within_B = _invert(weights_B_K_N[torch.arange(len(block_B)), block_B], uniforms_B_2[:, 1])
    return block_B * block + within_B


def _invert(weights_B_N: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    sums_B_N = weights_B_N.cumsum(-1)
    return (sums_B_N <= uniform_B[:, None] * sums_B_N[:, -1:]).sum(-1)


def _turn(x_B_H_D: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """RoPE: numbers d and d + D / 2 turn together."""
    (cosine, sine), (first, second) = turn, x_B_H_D.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
