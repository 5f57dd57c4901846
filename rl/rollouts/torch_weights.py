"""A model's arrays as torch sees them, for one rollout on a CPU, and the parts of a layer that prompts and steps
share."""

from typing import Any, NamedTuple

import mlx.core as mx
import torch
from torch.nn import functional

from rl.rollouts import device, fused, lent, turns

State = dict[str, torch.Tensor]


class Norm(NamedTuple):
    """x / √(mean of x² + ε) × weight: the weight times √n, and √(n ε)."""

    weight: torch.Tensor
    least: torch.Tensor


class Layer(NamedTuple):
    """One layer: its products (rl/rollouts/fused.py), norms by name, those of queries and keys together, and RoPE's
    cosines and sines (positions, D) for both halves."""

    qkv: State
    o: State
    gate_up: State
    down: State
    norms: dict[str, Norm]
    q_k_norm: Norm | None
    turns: tuple[torch.Tensor, torch.Tensor]
    heads: int
    kv_heads: int
    width: int
    scale: float
    window: int | None


class Weights:
    """All of it, with memory that is MLX's but for norms and RoPE."""

    def __init__(self, model: Any) -> None:
        inner, products = model.model, fused.of(model)
        self.gemma = model.args.model_type == "gemma3_text"
        self.embedding = lent.view(inner.embed_tokens.weight)[0]
        self.head = lent.view(model.lm_head.weight)[0] if "lm_head" in model else self.embedding
        self.scale = inner.args.hidden_size**0.5 if self.gemma else 1.0
        self.norm = self._norm(inner.norm)
        kinds = [_both_halves(table) for table in lent.view(*products.turns)]
        states = [dict(zip(state, lent.view(*state.values()), strict=True)) for state in products.state]
        self.layers = [
            self._layer(layer, states[4 * i : 4 * i + 4], kinds[products.turn_of[i]], model.args.windows[i])
            for i, layer in enumerate(inner.layers)
        ]
        self.windows = list(dict.fromkeys(model.args.windows))

    def _layer(self, layer: Any, states: list[State], turned: Any, window: int | None) -> Layer:
        module = layer.self_attn
        heads, kv_heads, width = module.n_heads, module.n_kv_heads, turns.head_size(module)
        both = None
        if "q_norm" in module:
            of_q, of_k = self._norm(module.q_norm), self._norm(module.k_norm)
            weight = torch.cat([of_q.weight.expand(heads, -1), of_k.weight.expand(kv_heads, -1)])
            least = torch.cat([of_q.least.expand(heads, 1), of_k.least.expand(kv_heads, 1)])
            both = Norm(weight, least)
        norms = {name: self._norm(part) for name, part in layer.items() if "norm" in name}
        return Layer(*states, norms, both, turned, heads, kv_heads, width, module.scale, window)

    def _norm(self, module: Any) -> Norm:
        weight = lent.view(module.weight)[0]
        size = len(weight)
        return Norm((weight + 1 if self.gemma else weight) * size**0.5, torch.tensor((size * module.eps) ** 0.5))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Of tokens of any shape, in memory of their own."""
        x = functional.embedding(ids, self.embedding)
        return x.mul_(self.scale) if self.gemma else x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of normed hidden states (…, width)."""
        return lent.linear(hidden, self.head)


def knows(model: Any) -> bool:
    """Whether torch may do all of this model's rollout: a float32 one, of weights as they are. Ask after
    `turns.reach`."""
    products = fused.of(model)
    if products is None or not products.turns or not device.torch_is_faster():
        return False
    ends = (model.model.embed_tokens, model.get("lm_head", {}))
    coded = any("scales" in part for part in [*ends, *products.state])
    return model.model.norm.weight.dtype == mx.float32 and not coded


def norm(x: torch.Tensor, by: Norm) -> torch.Tensor:
    """RMSNorm in four operations, two of them of one number a row: torch's own takes twice as long."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(by.least)
    return x.div(size).mul_(by.weight)


def turn(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """RoPE of (…, D): numbers d and d + D / 2 turn together; the sines' first half is negative."""
    return (x * cosine).addcmul_(x.roll(x.shape[-1] // 2, -1), sine)


def feed(weights: Weights, layer: Layer, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """From attention's heads, side by side, to the layer's end; `x` is overwritten, all (rows, width)."""
    if not weights.gemma:
        lent.add_linear(x, layer.o, attended)
        gate, up = lent.linear_of(layer.gate_up, norm(x, layer.norms["post_attention_layernorm"])).chunk(2, dim=-1)
        return lent.add_linear(x, layer.down, functional.silu(gate).mul_(up))
    x.add_(norm(lent.linear_of(layer.o, attended), layer.norms["post_attention_layernorm"]))
    gate, up = lent.linear_of(layer.gate_up, norm(x, layer.norms["pre_feedforward_layernorm"])).chunk(2, dim=-1)
    fed = lent.linear_of(layer.down, functional.gelu(gate, approximate="tanh").mul_(up))
    return x.add_(norm(fed, layer.norms["post_feedforward_layernorm"]))


def _both_halves(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cosine, sine = table.chunk(2, dim=-1)
    return torch.cat([cosine, cosine], dim=-1), torch.cat([-sine, sine], dim=-1)
