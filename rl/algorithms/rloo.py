"""RLOO: REINFORCE with a leave-one-out baseline (Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740).

For each prompt G completions are sampled; the baseline of one is the mean reward of the others, and a completion is
one action:

    A_i = r_i - 1 / (G - 1) sum_{j != i} r_j
    loss = -1/B sum_i A_i log pi(y_i | x)

TRL's RLOOTrainer takes PPO's clipped surrogate of the whole sequence's ratio, whose gradient is the one above where a
rollout serves one optimizer step, and puts the KL to the start into the reward: r_i - `beta` log pi / pi_ref (y_i | x).

Sampler and trainer are two programs, and TRL 1.16 throws the sampler's logprobs away. Since the loss is of whole
sequences, the importance weight is exact there: the advantage of each is multiplied by

    w_i = pi_trainer(y_i | x) / pi_sampler(y_i | x), min(w_i, cap) for `[rollout] correction` "sequence_truncate",
    0 where w_i > cap for "sequence_mask", 1 for "none".

A token's weight has no place in a loss of sequences: token_truncate and token_mask are refused.

Departures from the paper: the clipped ratio (TRL's), and the weights.
"""

import math
from dataclasses import fields
from typing import Any

import torch
from trl import RLOOConfig, RLOOTrainer
from trl.trainer.utils import pad

from rl.algorithms import online
from rl.algorithms.base import Job, Outcome, arguments


def sequence_weights(difference_B_T: torch.Tensor, correction: str, cap: float) -> torch.Tensor:
    """Importance weight of each sequence, (B,), from log pi_trainer - log pi_sampler of its tokens, 0 on padding.

    `correction` is "sequence_truncate", "sequence_mask" or "none". Raises ValueError for any other.
    """
    weights = difference_B_T.sum(1).exp()
    if correction == "sequence_truncate":
        return weights.clamp(max=cap)
    if correction == "sequence_mask":
        return weights.masked_fill(weights > cap, 0.0)
    if correction == "none":
        return torch.ones_like(weights)
    raise ValueError(f"rollout.correction {correction!r} weights tokens, and RLOO's loss is of whole sequences")


class DuetRLOOTrainer(online.Online, RLOOTrainer):
    """TRL's trainer with the MLX sampler, its logprobs, a resumable order of prompts and no repeated forward."""

    old_B_T: torch.Tensor | None = None  # the policy's logprobs of the last rollout, by token

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        out = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if not torch.is_grad_enabled() and model is self.model and self._policy_active():
            self.old_B_T = out[0].detach()  # TRL keeps the sum alone
        return out

    def _score(self, inputs: Any) -> dict[str, torch.Tensor]:
        batch = super()._score(inputs)
        batch["old_per_token_logps"] = self.old_B_T
        if self.use_vllm:
            self._correct(batch)
        return batch

    def _correct(self, batch: dict[str, torch.Tensor]) -> None:
        """Weigh the advantages, and log what GRPO's trainer logs of the two programs' difference."""
        rollout, mask = self.job.config.rollout, batch["completion_mask"]
        rows = [torch.tensor(logprobs, dtype=torch.float32) for logprobs in self.vllm_generation.logprobs]
        sampled = pad(rows, padding_value=0.0, pad_to_multiple_of=self.pad_to_multiple_of).to(mask.device)
        difference = (batch["old_per_token_logps"] - sampled).masked_fill(mask == 0, 0.0)
        difference = difference.nan_to_num(0.0)  # of a row that the seam has marked: the guard skips this step
        weights = sequence_weights(difference, rollout.correction, rollout.correction_cap)
        batch["advantages"] = batch["advantages"] * weights
        batch["sampling_per_token_logps"] = sampled
        batch["importance_sampling_ratio"] = weights
        of_tokens = difference.abs()[mask.bool()]
        if not len(of_tokens):
            return
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["sampling/sampling_logp_difference/mean"].append(of_tokens.mean().item())
        metrics["sampling/sampling_logp_difference/max"].append(of_tokens.max().item())
        for name, value in (("min", weights.min()), ("mean", weights.mean()), ("max", weights.max())):
            metrics[f"sampling/importance_sampling_ratio/{name}"].append(value.item())
        above = difference.sum(1) > math.log(rollout.correction_cap)
        metrics["sampling/sequences_above_cap"].append(above.float().mean().item())


def train(job: Job) -> Outcome:
    """Run RLOO to the end of `job`; the policy in `job.model` is trained in place."""
    args = arguments(job, {f.name for f in fields(RLOOConfig)}) | online.sampling_arguments(job)
    return online.run(job, RLOOConfig(**args), DuetRLOOTrainer)
