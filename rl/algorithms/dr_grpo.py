"""Dr. GRPO: GRPO done right (Liu et al. 2025, arXiv 2503.20783, section 3.2), a recipe over `rl.algorithms.grpo`.

GRPO divides a completion's loss by its own length, so that long wrong answers cost less a token, and its advantages by
the group's standard deviation, so that questions nearly always or never solved weigh more. Both divisors go:

    A_i = r_i - mean(r)                              `scale_rewards` "none"
    loss = -1/(B L) sum_i sum_t min(rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i)      `loss_type` "dr_grpo"

with B sequences and the constant L = `[rollout] max_completion_length`. The paper's advantage is RLOO's up to the
factor (G - 1) / G.

Departures: none in the loss. L multiplies the gradient, so the learning rate and `max_grad_norm` mean something else
at another completion length. The sampler's correction (`[rollout] correction`) multiplies each token's term.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl.algorithms.base import Job, Outcome

DEFAULTS: dict[str, Any] = {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0}


def train(job: "Job") -> "Outcome":
    """Run Dr. GRPO to the end of `job`; the policy in `job.model` is trained in place."""
    from rl.algorithms import grpo  # here: checking a config reads DEFAULTS and must not import TRL

    return grpo.train(job)
