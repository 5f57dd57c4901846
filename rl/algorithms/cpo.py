"""CPO: Contrastive Preference Optimization (Xu et al. 2024, arXiv 2401.08417), and SimPO (Meng et al. 2024, arXiv
2405.14734), both by TRL's experimental CPOTrainer.

Both leave DPO's reference out. CPO takes it as uniform and holds the policy by cross-entropy instead (eq. 3 and 5):

    loss = -log sigmoid(beta * (log pi(chosen|x) - log pi(rejected|x))) - alpha * log pi(chosen|x)

with `[trainer] cpo_alpha` alpha. SimPO (`loss_type = "simpo"`, `cpo_alpha = 0.0`) compares mean logprobs of a token, as
decoding does, and asks for a margin gamma, `simpo_gamma` (its eq. 6):

    loss = -log sigmoid(beta / |chosen| * log pi(chosen|x) - beta / |rejected| * log pi(rejected|x) - gamma)

`loss_type = "simpo"` with `cpo_alpha` > 0 is both (CPO-SimPO). "hinge" and "ipo" are DPO's relatives of these names;
"alphapo" (Gupta et al. 2025, 2501.03884) is SimPO with the reward (1 - p^-alpha) / alpha.

Departures from the papers:
- the pairs are the start policy's own completions, graded by its verifier (`rl.pairs`), unless the data has pairs;
- TRL averages the cross-entropy over the batch's tokens; the paper sums it over each completion.
"""

from dataclasses import fields

from rl.algorithms import offline
from rl.algorithms.base import Job, Outcome, arguments
from rl.algorithms.dpo import preference_rows
from rl.algorithms.reference_free import KEEP_COLUMNS, CPOConfig, DuetCPOTrainer


def train(job: Job) -> Outcome:
    """Run CPO, or SimPO as `loss_type` says, to the end of `job`; raises UserError when its rows are no pairs."""
    rows = preference_rows(job, "cpo")
    args = arguments(job, {f.name for f in fields(CPOConfig)}) | KEEP_COLUMNS
    settings = CPOConfig(**args)
    return offline.run(job, settings, DuetCPOTrainer, rows)
