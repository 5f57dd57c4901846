"""GRPO: Group Relative Policy Optimization (Shao et al. 2024, DeepSeekMath, section 4.1), through TRL's GRPOTrainer.

For each prompt a group of G completions is sampled; a completion's advantage is its reward less the group's mean, over
the group's standard deviation (eq. in section 4.1.2), and the clipped surrogate of PPO is maximised without a critic.

Departures from the paper, all TRL's or the field's defaults and all settable under [trainer]:
- `beta` 0: no KL penalty (the paper has 0.04); the KL to the start is still measured where that costs little;
- the loss is averaged over the batch's tokens (`loss_type` "dapo"; Yu et al. 2025), not per sequence;
- sampler and trainer are two programs, so each token's term is weighted by min(pi_trainer / pi_sampler, cap)
  (`[rollout] correction`; truncated importance sampling, Yao et al. 2025).
"""

from dataclasses import fields

from trl import GRPOConfig, GRPOTrainer

from rl.algorithms import online, tool_turns
from rl.algorithms.base import Job, Outcome, arguments


class DuetGRPOTrainer(tool_turns.Turns, online.Online, GRPOTrainer):
    """TRL's trainer with the MLX sampler, a resumable order of prompts and a forward without repeated work."""


def train(job: Job, trainer_class: type[DuetGRPOTrainer] = DuetGRPOTrainer) -> Outcome:
    """Run GRPO, or the recipe over it that `job.config` names, to the end of `job`; `job.model` is trained in place."""
    rollout = job.config.rollout
    args = arguments(job, {f.name for f in fields(GRPOConfig)}) | online.sampling_arguments(job)
    args["vllm_importance_sampling_correction"] = rollout.correction != "none"
    if rollout.correction != "none":
        args |= {
            "vllm_importance_sampling_mode": rollout.correction,
            "vllm_importance_sampling_clip_max": rollout.correction_cap,
        }
    if job.toolbox is not None:
        args["max_tool_calling_iterations"] = rollout.max_turns - 1
    return online.run(job, GRPOConfig(**args), trainer_class)
