"""Best-of-n into SFT: one round of rejection sampling, as in RAFT (Dong et al. 2023, arXiv 2304.06767, algorithm 1),
STaR (Zelikman et al. 2022, 2203.14465) and expert iteration.

The start policy samples n = `[rollout] samples` completions to each training question. Kept are those that the
verifier calls right ([eval] metric) and that ended by themselves; of these the ones with the highest sum of
`[[reward]]`, each once (`rl.pairs`). With a verifier alone that is every distinct right completion, with a reward that
grades finer it is the best one. On the kept ones the policy is fine-tuned as by `rl.algorithms.sft`: prompts masked,
the very tokens that were sampled. The rows lie in the run's folder (pairs.jsonl), so a resume trains on the same.

A further round is a further config whose `[model] from` names this one.

Departures:
- RAFT keeps the best of n whatever it is worth; here a question without a right completion is left out, as in STaR;
- STaR goes back to the base model before each round and shows the answer where it failed; neither is done here.
"""

from rl.algorithms import sft
from rl.algorithms.base import Job, Outcome
from rl.data import preferences
from rl.errors import UserError


def train(job: Job) -> Outcome:
    """Run SFT on the best of the sampled completions in `job.train`; raises UserError when they were not sampled."""
    for row in job.train:
        if missing := [f"'{column}'" for column in preferences.IDS["bon"] if column not in row]:
            raise UserError(
                f"{job.config.path}: [data] row '{row.get('id')}' has no {', '.join(missing)}; bon takes questions "
                "(prompt, answer) and samples its completions itself; sft takes ready ones"
            )
    rows = []
    for row in job.train:
        prompt, said = row["prompt_ids"], row["completion_ids"]
        rows.append({"input_ids": prompt + said, "labels": [-100] * len(prompt) + said})
    return sft.train_on(job, rows)
