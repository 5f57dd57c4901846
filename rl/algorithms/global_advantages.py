"""REINFORCE++'s advantages (`rl.algorithms.reinforce_pp`): returns of tokens, normalised over the batch."""

from typing import Any

import torch

from rl.algorithms.grpo import DuetGRPOTrainer
from rl.algorithms.tool_turns import loss_mask

# least standard deviation: rewards that are all alike differ by rounding
LEAST_STD = 1e-4


def advantages(
    rewards_B: torch.Tensor, kl_B_T: torch.Tensor | None, mask_B_T: torch.Tensor, beta: float
) -> torch.Tensor:
    """A_it of every token, (B, T): R_it = r_i - beta * sum_{s >= t} kl_is less its mean, over its std; 0 on padding.

    `mask_B_T` is 1 on completion tokens; `kl_B_T` None stands for none. A row whose reward is NaN is left out.
    """
    scored_B = ~torch.isnan(rewards_B)
    mask = mask_B_T.bool() & scored_B[:, None]
    returns = rewards_B.nan_to_num(0.0)[:, None].expand(mask.shape)
    if kl_B_T is not None:
        kl = kl_B_T.masked_fill(~mask, 0.0)
        returns = returns - beta * kl.flip(1).cumsum(1).flip(1)
    if not bool(mask.any()):
        return torch.zeros_like(returns)
    inside = returns[mask]
    std = inside.std(correction=0).clamp(min=LEAST_STD)
    return ((returns - inside.mean()) / std).masked_fill(~mask, 0.0)


class GlobalTrainer(DuetGRPOTrainer):
    """GRPO's trainer with advantages of tokens over the batch, and the KL in them instead of in the loss."""

    def _score(self, inputs: Any) -> dict[str, torch.Tensor]:
        batch = super()._score(inputs)
        weighted = self.rewards_B_F * self.reward_weights.to(self.rewards_B_F)
        rewards = weighted.nansum(1).masked_fill(torch.isnan(weighted).all(1), torch.nan)
        mask = loss_mask(batch)
        kl = None
        if self.beta:
            kl = (self._old_logps(batch) - batch["ref_per_token_logps"]) * mask
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["kl"].append((kl.sum() / mask.sum().clamp(min=1)).item())
        batch["advantages"] = advantages(rewards, kl, mask, self.beta)
        return batch

    @torch.no_grad()
    def _old_logps(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """log pi_old of the completion tokens, (B, T), also where TRL's loss does without it."""
        if batch.get("old_per_token_logps") is not None:
            return batch["old_per_token_logps"]
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        logps, _, _ = self._get_per_token_logps_and_entropies(self.model, ids, mask, batch["completion_ids"].shape[1])
        return logps

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        beta, self.beta = self.beta, 0.0  # the KL is in the advantages already
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self.beta = beta
