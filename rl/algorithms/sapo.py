"""SAPO: Soft Adaptive Policy Optimization (Gao et al. 2025, arXiv 2511.20347), a recipe over `rl.algorithms.grpo`.

A sigmoid gate in place of the hard clip: off-policy tokens fade out instead of being dropped at an edge.

    f(rho) = 4 / tau * sigmoid(tau (rho - 1))            f'(1) = 1: on-policy the gradient is GRPO's
    tau = tau_pos where A_i > 0, else tau_neg            `sapo_temperature_pos` 1, `sapo_temperature_neg` 1.05
    loss = -1/B sum_i 1/|y_i| sum_t f(rho_it) A_i        `loss_type` "sapo"

with GRPO's group-normalised A_i. Negative advantages get the hotter gate because they push up all tokens that were
not sampled, which is the less stable direction.

It differs from GRPO only where a rollout serves several optimizer steps (`steps_per_generation`, `num_iterations`).

Departures: none in the loss. The value of f is not the ratio (f(1) = 2 / tau), so the logged loss is not comparable
with GRPO's, only its gradient. The sampler's correction (`[rollout] correction`) multiplies each token's term.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl.algorithms.base import Job, Outcome

DEFAULTS: dict[str, Any] = {
    "loss_type": "sapo",
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "beta": 0.0,
}


def train(job: "Job") -> "Outcome":
    """Run SAPO to the end of `job`; the policy in `job.model` is trained in place."""
    from rl.algorithms import grpo  # here: checking a config reads DEFAULTS and must not import TRL

    return grpo.train(job)
