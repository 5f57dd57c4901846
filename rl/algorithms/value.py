"""A policy and its value function as one module, and copies of a model that share what is frozen."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Scores:
    """What the models say of each completion token, (B, T) float32; `values` of the state the token is chosen in."""

    logps_B_T: torch.Tensor
    entropies_B_T: torch.Tensor
    values_B_T: torch.Tensor


def copy_trained(module: nn.Module) -> nn.Module:
    """A copy with trained weights of its own that shares every frozen one: of a LoRA model only the adapter is new."""
    shared = [p for p in module.parameters() if not p.requires_grad] + list(module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})


def frozen_copy(policy: Any) -> Any:
    """The policy as it is now, for the KL to the start."""
    return copy_trained(policy).eval().requires_grad_(False)


class ActorCritic(nn.Module):
    """`policy` (a causal LM, with PEFT's adapters or without) and a scalar head on a backbone.

    `kind` "separate" gives the head a trainable copy of the policy's backbone (frozen weights are shared), "shared"
    the policy's own last hidden state, so that the value loss trains the policy's weights too. The head starts at zero.
    """

    def __init__(self, policy: Any, kind: str):
        super().__init__()
        self.policy, self.config = policy, policy.config
        self.critic = copy_trained(_backbone(policy)) if kind == "separate" else None
        self.head = nn.Linear(policy.config.get_text_config().hidden_size, 1, device=policy.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: dict[str, torch.Tensor], temperature: float) -> Scores:
        """Score the completions of `batch`: prompt_ids, prompt_mask, completion_ids, completion_mask."""
        logps, entropies, hidden = policy_scores(self.policy, batch, temperature, hidden=self.critic is None)
        if self.critic is not None:
            ids, mask, positions = _joined(batch)
            out = self.critic(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
            hidden = _before_each(out.last_hidden_state, batch)
        return Scores(logps, entropies, self.head(hidden.to(self.head.weight.dtype)).squeeze(-1).float())

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """What Trainer calls for `gradient_checkpointing`."""
        for model in (self.policy, self.critic):
            if model is not None:
                model.activation_checkpointing_enable(**kwargs)

    def trained(self) -> dict[str, torch.Tensor]:
        """The weights that training changes, by name; one that two modules share is there once."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def policy_scores(
    policy: Any, batch: dict[str, torch.Tensor], temperature: float, *, hidden: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Logprobs and entropies of the *tempered* distribution, and with `hidden` the last hidden states (B, T, D).

    The entropies carry no gradient.
    """
    ids, mask, positions = _joined(batch)
    columns = batch["completion_ids"].shape[1]
    out = policy(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        logits_to_keep=columns + 1,
        output_hidden_states=hidden,
        use_cache=False,
    )
    logits = out.logits[:, :-1].float() / temperature
    logsumexp = logits.logsumexp(-1)
    logps = logits.gather(-1, batch["completion_ids"][..., None]).squeeze(-1) - logsumexp
    with torch.no_grad():
        entropies = logsumexp - (logits.softmax(-1) * logits).sum(-1)
    return logps, entropies, _before_each(out.hidden_states[-1], batch) if hidden else None


def _joined(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and positions of prompt (padded on the left) and completion (on the right) in one row."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1).long()
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def _before_each(hidden: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The hidden state that each completion token is predicted from: one column to its left."""
    return hidden[:, -batch["completion_ids"].shape[1] - 1 : -1]


def _backbone(policy: Any) -> nn.Module:
    """The policy without its head, adapters inside."""
    model = policy.get_base_model() if hasattr(policy, "peft_config") else policy
    return model.base_model
