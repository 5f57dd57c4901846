"""PPO: proximal policy optimization (Schulman et al. 2017, arXiv 1707.06347) of a language model with a value model,
as in Ziegler et al. 2019 (1909.08593), Ouyang et al. 2022 (2203.02155) and Huang et al. 2024 (2403.17031, "N+").

A rollout samples one completion to each of `num_mini_batches` mini-batches of prompts; each token is an action. Then

    r_t = -kl_coef (log pi_old - log pi_ref) + [t is the last token] (score - penalty without a stop token)
    A, R = generalized advantage estimation of r and V_old
    loss = mean over tokens of  -w min(ratio A, clip(ratio) A) + vf_coef max((V - R)^2, (clip(V) - R)^2) / 2

is minimised for `num_ppo_epochs` passes (rl/algorithms/ppo_math.py has the formulas, value.py the models).

Details, with their source:
- the score at the last token, the KL penalty at every token, its reference the frozen start (Ziegler, eq. 2; Ouyang)
  or the policy of `[model] reference`;
- clipped value loss, vf_coef 0.1, cliprange 0.2 for both, gamma 1, lambda 0.95, 4 passes (N+, table of PPO settings);
- advantages whitened over the rollout's tokens, optionally token rewards too, then without a shift of the mean (N+);
- a value model on a backbone of its own (Stiennon et al. 2020, 2009.01325; N+) or on the policy's (Ziegler), which is
  the default with LoRA; its head starts at zero (openai/lm-human-preferences);
- Adam's epsilon 1e-5 and one learning rate for both models (N+); no dropout in any forward (Ziegler; N+);
- logprobs of the tempered distribution that was sampled, for policy and reference alike (Ziegler's code).

Departures:
- the value model starts from the start policy: Ouyang and N+ take the reward model, and a verifier is none;
- a fixed kl_coef, where Ziegler adapts it; no reward normalisation, which is a reward model's own affair;
- a completion without a stop token keeps its score, less `missing_eos_penalty`; N+ puts -1 in the score's place;
- means are over all tokens of a mini-batch (N+ averages micro-batches), so gradient accumulation changes no step;
- sampler and trainer are two programs: w = min(pi_old / pi_sampler, cap) and its relatives, `[rollout] correction`
  (as in GRPO here; Yao et al. 2025), on the policy term alone; the ratio itself is of the trainer's own logprobs;
- a completion that no reward scored counts in no mean.

Resume is exact at rollouts' boundaries: prompts follow the epoch's seed, draws and mini-batches (seed, step).
"""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer
from trl.trainer.utils import disable_dropout_in_model, pad

from rl.algorithms import online, trace, value
from rl.algorithms import ppo_math as m
from rl.algorithms.base import Job, Outcome, Recorder, Timer, arguments, run_trainer
from rl.algorithms.guard import Guard
from rl.algorithms.mismatch import Alarm, measure
from rl.algorithms.ppo_settings import PPOConfig
from rl.algorithms.seam import EpochSampler, MLXGeneration
from rl.data.prompts import says
from rl.errors import RunFailed, UserError
from rl.measure import prompt_ids
from rl.rollouts.result import Sampling
from rl.rollouts.torch_sampler import TorchSampler

WEIGHTS = "trained.safetensors"  # of a checkpoint: policy (or its adapter), value backbone and head
Batch = dict[str, torch.Tensor]


class PPOTrainer(Trainer):
    """transformers' Trainer whose rows are prompts: each rollout's first micro step samples, all learn from it."""

    def __init__(self, job: Job, guard: Guard, timer: Timer, settings: PPOConfig, **kwargs: Any):
        self.job, self.guard, self.timer = job, guard, timer
        disable_dropout_in_model(job.model)
        kind = settings.value_model or ("separate" if job.config.model.lora is None else "shared")
        self.reference = None
        if settings.kl_coef > 0:
            self.reference = value.frozen_copy(job.model) if job.reference is None else job.reference
        super().__init__(
            model=value.ActorCritic(job.model, kind),
            args=settings,
            data_collator=list,
            train_dataset=job.train,
            **kwargs,
        )
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole mini-batch
        micro_batches = settings.num_mini_batches * settings.gradient_accumulation_steps
        self.rows_a_rollout = settings.per_device_train_batch_size * micro_batches
        self.micro_steps = settings.num_ppo_epochs * micro_batches
        self.micro_step = 0  # a checkpoint is at a rollout's boundary, so it starts at 0 again after a resume
        self.rollout: Batch = {}
        self.completions: list[list[int]] = []
        self.logged: dict[str, list[float]] = {}
        self.alarm = Alarm(job.config.rollout, guard.health, guard.warn)
        rollout = job.config.rollout
        self.sampler = job.sampler or TorchSampler(
            job.model,
            job.stop_ids,
            job.tokenizer.pad_token_id,
            rollout.max_batch,
            rollout.stop,
            job.tokenizer.decode,
        )
        self.vllm_generation = MLXGeneration(  # the name under which the guard looks for a broken rollout
            self.sampler,
            policy=lambda: job.model,
            sampling=Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.min_p),
            max_tokens=rollout.max_completion_length,
            seed=settings.seed,
            step=lambda: self.state.global_step,
        )

    # --- the order of prompts

    def _get_train_sampler(self, dataset: Any = None) -> EpochSampler:
        return EpochSampler(
            data_source=self.train_dataset,
            mini_repeat_count=1,
            batch_size=self.rows_a_rollout,
            repeat_count=self.micro_steps,
            seed=self.args.seed,
        )

    def get_train_dataloader(self) -> Any:
        """A rollout's prompts, the same ones at each of its micro steps."""
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self.rows_a_rollout,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _prepare_inputs(self, rows: list[dict[str, Any]]) -> Batch:
        """The micro-batch of this step; the first of a rollout samples it."""
        accumulation = self.args.gradient_accumulation_steps
        index = self.micro_step % self.micro_steps
        self.micro_step += 1
        if index == 0:
            self.rollout = self._roll_out(rows)
        a_pass = self.args.num_mini_batches * accumulation
        if index % a_pass == 0:  # each pass cuts the rollout into other mini-batches
            generator = torch.Generator().manual_seed((self.args.seed * 1_000_003 + self.state.global_step) % 2**63)
            order = torch.randperm(self.rows_a_rollout, generator=generator)
            self.order = order.view(self.args.num_mini_batches, accumulation, -1).to(self.args.device)
        mini, micro = divmod(index % a_pass, accumulation)
        batch = {name: tensor[self.order[mini, micro]] for name, tensor in self.rollout.items()}
        batch["tokens"] = self.rollout["loss_mask"][self.order[mini].flatten()].sum()
        self.first_micro = micro == 0
        return batch

    # --- a rollout: sample, score, advantages

    @torch.no_grad()
    def _roll_out(self, rows: list[dict[str, Any]]) -> Batch:
        with self.timer.part("rollout"):
            if self.job.sampler is not None:
                self.vllm_generation.sync_weights()
            prompts = prompt_ids(self.job.tokenizer, [row["prompt"] for row in rows])
            _, self.completions, sampled, _ = self.vllm_generation.generate(prompts, None, 1)
        self.job.tokens["prompt"] += sum(len(ids) for ids in prompts)
        self.job.tokens["completion"] += sum(len(ids) for ids in self.completions)
        batch = self._padded(prompts, self.completions)
        with self.timer.part("reward"):
            scores_B = self._scores(rows)
        # a completion that nothing scored, or whose logits were not finite, is left out
        sampled_B_T = self._pad([torch.tensor([p for (p,) in row]) for row in sampled], 0.0)
        usable_B = torch.isfinite(scores_B) & torch.isfinite(sampled_B_T).all(1)
        if not torch.isfinite(sampled_B_T).all(1).any():
            raise RunFailed("the sampler's logits were not finite in every completion of a rollout")
        batch["loss_mask"] = batch["completion_mask"] & usable_B[:, None]
        with self.timer.part("score"):
            batch |= self._scored(batch)
        self._weigh(batch, sampled_B_T)
        self._add_advantages(batch, scores_B.nan_to_num(0.0))
        if trace.is_due(self.job, self.state.global_step, self.args.num_ppo_epochs * self.args.num_mini_batches):
            advantages = trace.of_tokens(batch["advantages"], batch["loss_mask"])
            trace.note(self.job, self.state.global_step, 0, rows, self.completions, self.given, advantages=advantages)
        return batch

    def _pad(self, rows: list[torch.Tensor], filler: float, side: str = "right") -> torch.Tensor:
        return pad(rows, filler, side, self.args.pad_to_multiple_of).to(self.args.device)

    def _padded(self, prompts: list[list[int]], completions: list[list[int]]) -> Batch:
        batch = {}
        for name, rows, side in (("prompt", prompts, "left"), ("completion", completions, "right")):
            ids = [torch.tensor(row) for row in rows]
            batch[f"{name}_ids"] = self._pad(ids, self.job.tokenizer.pad_token_id, side)
            batch[f"{name}_mask"] = self._pad([torch.ones_like(row) for row in ids], 0, side).bool()
        return batch

    def _scores(self, rows: list[dict[str, Any]]) -> torch.Tensor:
        """The weighted sum of the rewards (B,), NaN where none of them gave one, less the penalty for a missing EOS."""
        texts = self.job.tokenizer.batch_decode(self.completions, skip_special_tokens=True)
        prompts = [row["prompt"] for row in rows]
        said = [says(text) if isinstance(prompt, list) else text for prompt, text in zip(prompts, texts, strict=True)]
        names = dict.fromkeys(name for row in rows for name in row if name not in ("prompt", "completion"))
        columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in names}
        columns |= {"completion_ids": self.completions, "trainer_state": self.state}
        given = [f(prompts=prompts, completions=said, **columns) for f in self.job.rewards]
        self.given = {f.name: column for f, column in zip(self.job.rewards, given, strict=True)}
        rewards_F_B = torch.tensor([[math.nan if r is None else r for r in column] for column in given])
        weights_F = torch.tensor([f.weight for f in self.job.rewards])
        scores_B = (rewards_F_B * weights_F[:, None]).nansum(0)
        scores_B[rewards_F_B[weights_F != 0].isnan().all(0)] = math.nan
        stops = self.job.config.rollout.stop
        cut_B = torch.tensor(
            [
                row[-1] not in self.job.stop_ids and not any(stop in text for stop in stops)
                for row, text in zip(self.completions, texts, strict=True)
            ]
        )
        lengths_B = torch.tensor([float(len(row)) for row in self.completions])
        for f, column in zip(self.job.rewards, rewards_F_B, strict=True):
            self._log(f"rewards/{f.name}/mean", column.nanmean())
        scored_B = scores_B[~scores_B.isnan()]
        self._log("reward", scored_B.mean())
        self._log("reward_std", scored_B.std(correction=0))
        self._log("completions/mean_length", lengths_B.mean())
        self._log("completions/clipped_ratio", cut_B.float().mean())
        if not cut_B.all():
            self._log("completions/mean_terminated_length", lengths_B[~cut_B].mean())
        if self.args.missing_eos_penalty is not None:
            scores_B = scores_B - self.args.missing_eos_penalty * cut_B
        return scores_B.to(self.args.device)

    def _scored(self, batch: Batch) -> Batch:
        """Old logprobs and values, and the reference's logprobs, a micro-batch at a time."""
        parts: dict[str, list[torch.Tensor]] = {"old_per_token_logps": [], "old_values": []}
        for start in range(0, self.rows_a_rollout, self.args.per_device_train_batch_size):
            rows = slice(start, start + self.args.per_device_train_batch_size)
            part = {name: tensor[rows] for name, tensor in batch.items()}
            scores = self.model_wrapped(part, self._temperature())
            parts["old_per_token_logps"].append(scores.logps_B_T)
            parts["old_values"].append(scores.values_B_T)
            if self.reference is not None:
                with self.accelerator.autocast():
                    logps, _, _ = value.policy_scores(self.reference, part, self._temperature())
                parts.setdefault("ref_per_token_logps", []).append(logps)
        return {name: torch.cat(tensors) for name, tensors in parts.items()}

    def _temperature(self) -> float:
        return self.job.config.rollout.temperature

    def _weigh(self, batch: Batch, sampled_B_T: torch.Tensor) -> None:
        """Importance weights of the trainer against the sampler, and how far apart the two are."""
        rollout, mask = self.job.config.rollout, batch["loss_mask"]
        difference = m.masked(batch["old_per_token_logps"] - sampled_B_T, mask)
        weights = m.sampler_weights(difference, mask, rollout.correction, rollout.correction_cap)
        batch["importance_sampling_ratio"] = weights
        if found := measure(difference, mask, weights, rollout.correction, rollout.correction_cap):
            for name, number in found.metrics().items():
                self._log(name, number)
            self.alarm.hear(self.state.global_step + 1, found)
        if not bool(mask.any()):
            return
        apart, weights, ratios = difference[mask].abs(), weights[mask], difference[mask].exp()
        self._log("sampling/sampling_logp_difference/mean", apart.mean())
        self._log("sampling/sampling_logp_difference/max", apart.max())
        for name, number in (("min", weights.min()), ("mean", weights.mean()), ("max", weights.max())):
            self._log(f"sampling/importance_sampling_ratio/{name}", number)
        self._log("sampling/ess", ratios.sum() ** 2 / (len(ratios) * (ratios**2).sum()))

    def _add_advantages(self, batch: Batch, scores_B: torch.Tensor) -> None:
        args, mask, values = self.args, batch["loss_mask"], batch["old_values"]
        kl = None
        if "ref_per_token_logps" in batch:
            old, reference = batch["old_per_token_logps"], batch.pop("ref_per_token_logps")
            kl = m.kl_estimates(old, reference, args.kl_estimator)
            self._log("kl", m.masked_mean(m.kl_estimates(old, reference, "k3"), mask))
            self._log("kl/sequence", m.masked(kl, mask).sum() / mask.any(1).sum().clamp(min=1))
        rewards = m.token_rewards(scores_B, kl, mask, args.kl_coef)
        if args.whiten_rewards:
            rewards = m.whiten(rewards, mask, shift_mean=False)
        advantages, batch["returns"] = m.advantages_and_returns(rewards, values, mask, args.gamma, args.lam)
        self._log("advantages/mean", m.masked_mean(advantages, mask))
        self._log("advantages/std", m.masked_variance(advantages, mask).sqrt())
        self._log("value/mean", m.masked_mean(values, mask))
        self._log("value/explained_variance", m.explained_variance(values, batch["returns"], mask))
        batch["advantages"] = m.whiten(advantages, mask, shift_mean=True) if args.whiten_advantages else advantages

    # --- the loss

    def compute_loss(self, model: Any, inputs: Batch, *_: Any, **__: Any) -> torch.Tensor:
        """Sum over the micro-batch's tokens over the number of the mini-batch's."""
        self.guard.batch = inputs
        args, mask, old = self.args, inputs["loss_mask"], inputs["old_per_token_logps"]
        with self.timer.part("loss"):
            scores = model(inputs, self._temperature())

            def mean(terms_B_T: torch.Tensor) -> torch.Tensor:
                return m.masked(terms_B_T, mask).sum() / inputs["tokens"].clamp(min=1)

            terms, clipped = m.policy_terms(scores.logps_B_T, old, inputs["advantages"], args.cliprange)
            policy_loss = mean(inputs["importance_sampling_ratio"] * terms)
            terms, value_clipped = m.value_terms(
                scores.values_B_T, inputs["old_values"], inputs["returns"], args.cliprange_value
            )
            value_loss = mean(terms)
            with torch.no_grad():
                found = {
                    "policy/loss": policy_loss,
                    "value/loss": value_loss,
                    "entropy": mean(scores.entropies_B_T),
                    "approx_kl": mean((scores.logps_B_T - old) ** 2 / 2),
                    "clip_ratio/region_mean": mean(clipped.float()),
                    "value/clip_ratio": mean(value_clipped.float()),
                }
                for name, number in zip(found, torch.stack(list(found.values())).tolist(), strict=True):
                    self._log(name, number, add=not self.first_micro)
        return policy_loss + args.vf_coef * value_loss

    # --- metrics and checkpoints

    def _log(self, name: str, number: Any, add: bool = False) -> None:
        values = self.logged.setdefault(name, [])
        if add and values:
            values[-1] += float(number)
        else:
            values.append(float(number))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's record with the means of what was measured since the last one."""
        known = {name: [v for v in values if not math.isnan(v)] for name, values in self.logged.items()}
        super().log(logs | {name: sum(v) / len(v) for name, v in known.items() if v}, start_time)
        self.logged = {}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trained = self.accelerator.unwrap_model(self.model).trained()
        save_file({name: p.detach().contiguous() for name, p in trained.items()}, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        trained = self.accelerator.unwrap_model(self.model).trained()
        if saved.keys() != trained.keys():
            other = sorted(saved.keys() ^ trained.keys())[0]
            raise RunFailed(f"{resume_from_checkpoint}/{WEIGHTS}: not of these models, {other} is in one of them alone")
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(saved[name])


def train(job: Job) -> Outcome:
    """Run PPO to the end of `job`; the policy in `job.model` is trained in place.

    Raises UserError for several processes or GPUs: rollouts and whitening are of one.
    """
    settings = PPOConfig(**arguments(job, {f.name for f in fields(PPOConfig)}))
    if (found := settings.world_size * max(1, settings.n_gpu)) > 1:
        raise UserError(
            f"{job.config.path}: [trainer] algorithm 'ppo' trains in one process on one device, found {found}: "
            "start it without a launcher, with CUDA_VISIBLE_DEVICES=0"
        )
    guard, timer = Guard(job.hooks.warn), Timer()
    recorder = Recorder(job, guard, settings.num_ppo_epochs * settings.num_mini_batches)
    trainer = PPOTrainer(job, guard, timer, settings, callbacks=[guard, recorder])
    recorder.alike = lambda: len({tuple(c) for c in trainer.completions}) == 1
    recorder.extra = lambda: timer.take() | online._sampler_metrics(job)
    return run_trainer(job, trainer, guard, recorder)
