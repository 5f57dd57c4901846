"""DAPO's dynamic sampling (Yu et al. 2025, arXiv 2503.14476, section 3.2): groups that teach nothing are replaced.

A group of G completions whose rewards are all alike has advantage 0 throughout. After a rollout such groups are sampled
again from other prompts, at most ROUNDS times; groups that vary are kept.
"""

from typing import Any

import torch
from trl.trainer.utils import pad

from rl.algorithms.grpo import DuetGRPOTrainer
from rl.algorithms.tool_turns import loss_mask

# further rollouts a step; uniform groups that are left after them stay in the batch
ROUNDS = 3
# rewards within a group that are no further apart than this are alike
ALIKE = 1e-6


def varied(rewards_B_F: torch.Tensor, group: int) -> torch.Tensor:
    """Which groups have a reward that varies, (B / group,) bool.

    `rewards_B_F` holds each reward function's values, NaN where it gave none, groups in neighbouring rows.
    """
    grouped = rewards_B_F.view(-1, group, rewards_B_F.shape[1])
    missing = torch.isnan(grouped)
    highest = grouped.masked_fill(missing, -torch.inf).amax(1)
    lowest = grouped.masked_fill(missing, torch.inf).amin(1)
    return (highest - lowest > ALIKE).any(1)


def take_rows(batch: dict[str, torch.Tensor], rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Some rows of a generation batch; single numbers stay."""
    return {name: value if value.ndim == 0 else value[rows] for name, value in batch.items()}


def join(parts: list[dict[str, torch.Tensor]], pad_token: int) -> dict[str, torch.Tensor]:
    """One generation batch of several, padded to the longest as TRL pads: prompts left, completions right."""
    joined = {}
    for name, first in parts[0].items():
        if first.ndim == 0:
            continue
        if first.ndim == 1:
            joined[name] = torch.cat([part[name] for part in parts])
            continue
        rows = [row for part in parts for row in part[name]]
        side = "left" if name.startswith("prompt") else "right"
        joined[name] = pad(rows, padding_value=pad_token if name.endswith("_ids") else 0, padding_side=side)
    joined["num_items_in_batch"] = loss_mask(joined).sum()
    return joined


class DynamicTrainer(DuetGRPOTrainer):
    """GRPO's trainer whose batch is refilled with groups that vary."""

    def _on_policy(self) -> bool:
        return False  # the batch the loss sees is not the one a forward was kept for

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        kept: list[dict[str, torch.Tensor]] = []
        try:
            for sampling_round in range(1 + ROUNDS):
                self.sampling_round = sampling_round
                batch = super()._generate_and_score_completions(inputs)
                good = varied(self.rewards_B_F * (self.reward_weights != 0).to(self.rewards_B_F), self.num_generations)
                if sampling_round == 0:
                    self._metrics["train"]["dynamic_sampling/varied_at_first"].append(good.float().mean().item())
                last = sampling_round == ROUNDS or bool(good.all())
                rows = (good | last).repeat_interleave(self.num_generations).nonzero().squeeze(1)
                if len(rows):
                    kept.append(take_rows(batch, rows))
                if last:
                    break
                inputs = self._others(int((~good).sum()), sampling_round)
        finally:
            self.sampling_round = 0
        self._metrics["train"]["dynamic_sampling/rounds"].append(1.0 + sampling_round)
        return kept[0] if len(kept) == 1 else join(kept, self._tokenizer.pad_token_id)

    def _others(self, groups: int, sampling_round: int) -> list[dict[str, Any]]:
        """Rows of other prompts, each G times: a function of (seed, step, round), so that a resume draws the same."""
        generator = torch.Generator().manual_seed(
            (self.args.seed * 1_000_003 + self.state.global_step * (ROUNDS + 1) + sampling_round) % 2**63
        )
        replacement = groups > len(self.train_dataset)
        weights = torch.ones(len(self.train_dataset))
        chosen = torch.multinomial(weights, groups, replacement=replacement, generator=generator).tolist()
        return [self.train_dataset[i] for i in chosen for _ in range(self.num_generations)]
