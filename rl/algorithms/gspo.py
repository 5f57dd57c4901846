"""GSPO: Group Sequence Policy Optimization (Zheng et al. 2025, arXiv 2507.18071), a recipe over `rl.algorithms.grpo`.

The reward is given to a sequence, so the ratio is taken and clipped for a sequence, by its length's root (section 4.1):

    s_i = (pi(y_i | x) / pi_old(y_i | x))^(1 / |y_i|)          `importance_sampling_level` "sequence"
    loss = -1/B sum_i min(s_i A_i, clip(s_i, 1 - eps, 1 + eps_high) A_i)      `loss_type` "grpo"

with GRPO's group-normalised A_i. The geometric mean moves far less than a token's ratio, hence eps 3e-4 and eps_high
4e-4 (section 5.1).

It differs from GRPO only where a rollout serves several optimizer steps: the paper uses four (`steps_per_generation`
4 over `gradient_accumulation_steps` 1). At one step a rollout every ratio is 1 and the gradient is GRPO's.

Departures: the clipping range is the paper's for its own models and four steps a rollout, settable under [trainer]. The
sampler's correction (`[rollout] correction`) multiplies each token's share of the sequence's term by default; choose
"sequence_truncate" to weight whole sequences.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl.algorithms.base import Job, Outcome

DEFAULTS: dict[str, Any] = {
    "loss_type": "grpo",
    "importance_sampling_level": "sequence",
    "epsilon": 3e-4,
    "epsilon_high": 4e-4,
    "beta": 0.0,
}


def train(job: "Job") -> "Outcome":
    """Run GSPO to the end of `job`; the policy in `job.model` is trained in place."""
    from rl.algorithms import grpo  # here: checking a config reads DEFAULTS and must not import TRL

    return grpo.train(job)
