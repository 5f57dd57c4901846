"""REINFORCE++ (Hu 2025, arXiv 2501.03262, first version): no critic and no group, one baseline for the whole batch.

PPO's objective where the return of a token is the completion's reward less the KL still to come (section 2.2, k1):

    kl_it = log pi_old(y_it) - log pi_ref(y_it)
    R_it  = r_i - beta * sum_{s >= t} kl_is                            gamma 1: the reward comes at the last token
    A_it  = (R_it - mean R) / std R                                    over all completion tokens of the batch
    loss  = -mean_it min(rho_it A_it, clip(rho_it, 1 - eps, 1 + eps) A_it)

A recipe over `rl.algorithms.grpo`: TRL's sampling, ratio, clip and correction stay, its group advantages are replaced.
Where all returns are equal every advantage is 0.

Departures:
- TRL samples at least two completions to a prompt (`num_generations`, 8 unless set; the paper has one). That they are
  of one prompt is not used: at 2 a batch holds the most prompts;
- rewards are not clipped before (the paper clips and whitens them): they are the verifier's or already normalised;
- a completion without any reward (every [[reward]] failed on it) has advantage 0 and no part in mean and std;
- mean and std are over one process's batch.

The later versions' REINFORCE++-baseline subtracts the group's mean before the batch's std divides, and puts the KL (k2)
into the loss: that is algorithm = "grpo" with `scale_rewards = "batch"`, but for TRL's k3 and for the std, which TRL
takes before the mean is subtracted.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl.algorithms.base import Job, Outcome

DEFAULTS: dict[str, Any] = {
    "loss_type": "dapo",  # the mean over the batch's tokens
    "importance_sampling_level": "token",
    "scale_rewards": "batch",
    "multi_objective_aggregation": "sum_then_normalize",
    "epsilon": 0.2,
    "beta": 0.01,
}


def train(job: "Job") -> "Outcome":
    """Run REINFORCE++ to the end of `job`; the policy in `job.model` is trained in place."""
    # here: checking a config reads DEFAULTS and must not import TRL
    from rl.algorithms import grpo
    from rl.algorithms.global_advantages import GlobalTrainer

    return grpo.train(job, GlobalTrainer)
