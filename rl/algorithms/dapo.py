"""DAPO: Decoupled Clip and Dynamic sampling Policy Optimization (Yu et al. 2025, arXiv 2503.14476), over GRPO.

Section 3 of the paper, part by part:

- clip-higher (3.1): the ratio is clipped to [1 - eps, 1 + eps_high], eps 0.2 and eps_high 0.28, so that unlikely tokens
  may still grow and entropy does not collapse;
- dynamic sampling (3.2): a group whose completions all earn the same teaches nothing (every advantage is 0), so it is
  replaced by a group of another prompt (`rl.algorithms.dynamic_sampling`);
- token-level loss (3.3): `loss_type` "dapo", every token of the batch weighs the same;
- overlong (3.4): completions cut off at `[rollout] max_completion_length` are left out of the loss
  (`mask_truncated_completions`), and `[[reward]] name = "overlong"` with `limit` and `cache` is the soft punishment of
  eq. 13: 0 up to limit - cache tokens, falling to -1 at limit;
- no KL term (2.3): `beta` 0.

Departures:
- dynamic sampling ends after `dynamic_sampling.ROUNDS` further rollouts and keeps what uniform groups are left (the
  paper goes on until the batch is full): a policy that solves nothing would otherwise sample for ever;
- the new prompts are drawn at random from the training rows by (seed, step, round), beside the epoch's own order, so
  that a resumed run draws the same ones;
- the paper keeps groups by accuracy, here any `[[reward]]` that varies within the group keeps it;
- the overlong reward is a `[[reward]]` of the config, not implied by the algorithm.
The sampler's correction (`[rollout] correction`) multiplies each token's term.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl.algorithms.base import Job, Outcome

DEFAULTS: dict[str, Any] = {
    "loss_type": "dapo",
    "epsilon": 0.2,
    "epsilon_high": 0.28,
    "mask_truncated_completions": True,
    "beta": 0.0,
}


def train(job: "Job") -> "Outcome":
    """Run DAPO to the end of `job`; the policy in `job.model` is trained in place."""
    # here: checking a config reads DEFAULTS and must not import TRL
    from rl.algorithms import grpo
    from rl.algorithms.dynamic_sampling import DynamicTrainer

    return grpo.train(job, DynamicTrainer)
