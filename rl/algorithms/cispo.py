"""CISPO: clipped importance-sampling weights (MiniMax-M1, 2025, arXiv 2506.13585, section 3.1), a recipe over GRPO.

PPO's clip drops the gradient of the tokens it clips, often the rare ones that turn a chain of thought. CISPO clips
the weight, holds it constant and keeps every token's gradient:

    loss = -1/N sum_i sum_t sg(min(rho_it, eps_max)) A_i log pi(y_it | x, y_i<t)      `loss_type` "cispo"

over the N tokens of the batch, with sg the stop-gradient and GRPO's group-normalised A_i.

`epsilon_high` is TRL's name for eps_max itself, not for a distance from 1: left unset TRL takes `epsilon` 0.2 and
would shrink every weight to a fifth without a word. The recipe sets 5, from ScaleRL (Khatri et al. 2025, arXiv
2510.13786); the MiniMax paper gives no number. There is no lower bound, as there.

It differs from GRPO only where a rollout serves several optimizer steps (`steps_per_generation`, `num_iterations`).

Departures: no KL term (the paper has none either); ScaleRL's other choices (batch-normalised advantages, prompt-level
averages) are not taken. The sampler's correction (`[rollout] correction`) multiplies each token's term.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl.algorithms.base import Job, Outcome

DEFAULTS: dict[str, Any] = {"loss_type": "cispo", "epsilon_high": 5.0, "beta": 0.0}


def train(job: "Job") -> "Outcome":
    """Run CISPO to the end of `job`; the policy in `job.model` is trained in place."""
    from rl.algorithms import grpo  # here: checking a config reads DEFAULTS and must not import TRL

    return grpo.train(job)
