"""Online DPO: direct alignment from online feedback (Guo et al. 2024, arXiv 2402.04792, algorithm 1), a reward judging.

At every step the policy of that step samples `[rollout] samples` completions to each prompt of the batch, `[[reward]]`
(a verifier, a learned reward model, any sum) scores them, and the best and the worst make a pair. On these pairs one
step of DPO's loss is taken against the start (`rl.algorithms.dpo`, equation 7 of DPO's paper; `loss_type`, `beta` and
the rest mean the same). Where best and worst earn alike there is no preference: the prompt is skipped.

The loss is the mean over the step's pairs, however many each micro-batch of `gradient_accumulation_steps` holds; a step
without any pair has gradient 0.

The loop is ours over TRL's DPOTrainer: TRL's own online trainer is experimental and does not resume exactly. All
completions of an optimizer step come from one rollout, keyed by (seed, step, row), and the order of prompts is the
loader's, so every step is one that a resumed run continues from without a difference.

Departures from the paper:
- the judge is a reward instead of a language model, so ties exist and are skipped;
- n completions (8 unless `[rollout] samples` says otherwise) instead of two: with a verifier, two mostly tie;
- the sampler's numerics need no correction: the loss holds for pairs of any origin.
"""

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import datasets
import torch
from trl import DPOConfig

from rl import judge
from rl.algorithms import online, trace
from rl.algorithms.base import Job, Outcome, Recorder, Timer, arguments, run_trainer
from rl.algorithms.dpo import DuetDPOTrainer, reference
from rl.algorithms.guard import Guard
from rl.algorithms.learner import score_completions_only
from rl.algorithms.seam import MLXGeneration
from rl.measure import prompt_ids
from rl.pairs import SAMPLES
from rl.rollouts.result import Sampling
from rl.rollouts.torch_sampler import TorchSampler

Row = dict[str, Any]

# rewards no further apart than this are alike
ALIKE = 1e-6


def best_and_worst(scores: list[float]) -> tuple[int, int] | None:
    """Index of the highest and of the lowest score, the first of equals; None where they are alike.

    A NaN, a completion without a reward, is neither.
    """
    scored = [i for i, score in enumerate(scores) if not math.isnan(score)]
    if not scored:
        return None
    best, worst = max(scored, key=lambda i: scores[i]), min(scored, key=lambda i: scores[i])
    return (best, worst) if scores[best] - scores[worst] > ALIKE else None


class OnlineDPOTrainer(DuetDPOTrainer):
    """DPO's trainer whose rows are questions: the pairs of a step are sampled when it begins."""

    def __init__(self, guard: Guard, *, job: Job, timer: Timer, **kwargs: Any):
        super().__init__(guard, **kwargs)
        self.job, self.timer = job, timer
        self.collate, self.data_collator = self.data_collator, list  # TRL's is for the pairs, the loader has questions
        rollout = job.config.rollout
        self.samples = rollout.samples or SAMPLES
        self.completions: list[list[int]] = []  # of the last rollout
        self.vllm_generation = MLXGeneration(  # the guard looks here for logits that were not finite
            job.sampler or TorchSampler(job.model, job.stop_ids, self._tokenizer.pad_token_id, rollout.max_batch),
            policy=lambda: self.accelerator.unwrap_model(self.model),
            sampling=Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.min_p),
            max_tokens=rollout.max_completion_length,
            seed=job.config.run.seed,
            step=lambda: self.state.global_step,
        )

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Row]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], None]:
        """The micro-batches of one optimizer step: TRL's collated pairs of each, and `share` in the step's loss."""
        questions, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not questions:
            return [], None
        pairs = self._sample([row for batch in questions for row in batch])
        total = sum(pair is not None for pair in pairs)
        batches, done = [], 0
        for batch in questions:
            own = [pair for pair in pairs[done : done + len(batch)] if pair is not None]
            done += len(batch)
            share = len(own) * len(questions) / max(1, total)
            batches.append((self.collate(own) if own else {}) | {"share": torch.tensor(share)})
        return batches, None

    def _sample(self, rows: list[Row]) -> list[Row | None]:
        """A pair for each question, None where all its completions earn alike."""
        asked = [row for row in rows for _ in range(self.samples)]
        asked_ids = prompt_ids(self._tokenizer, [row["prompt"] for row in rows])
        prompts = [ids for ids in asked_ids for _ in range(self.samples)]
        with self.timer.part("rollout"):
            if self.job.sampler is not None:
                self.vllm_generation.sync_weights()
            _, said, _, _ = self.vllm_generation.generate(prompts, None, self.samples)
        self.completions = said
        self.job.tokens["prompt"] += sum(map(len, prompts))
        self.job.tokens["completion"] += sum(map(len, said))
        texts = [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in said]
        with self.timer.part("reward"):
            given = judge.each(self.job.rewards, asked, texts, said)
        scores = judge.summed(self.job.rewards, given, len(asked))
        pairs: list[Row | None] = []
        sides: list[str | None] = [None] * len(asked)
        for i in range(0, len(asked), self.samples):
            chosen = best_and_worst(scores[i : i + self.samples])
            if chosen is None:
                pairs.append(None)
                continue
            best, worst = (said[i + j] for j in chosen)
            sides[i + chosen[0]], sides[i + chosen[1]] = "chosen", "rejected"
            pairs.append({"prompt_ids": prompts[i], "chosen_ids": best, "rejected_ids": worst})
        self._note(scores, pairs)
        if trace.is_due(self.job, self.state.global_step, 1):
            rewards = {f.name: values for f, values in zip(self.job.rewards, given, strict=True)}
            trace.note(self.job, self.state.global_step, 0, asked, said, rewards, group=self.samples, pair=sides)
        return pairs

    def _note(self, scores: list[float], pairs: list[Row | None]) -> None:
        """Metrics of the rollout under the names of the other trainers that sample."""
        metrics, lengths = self._metrics["train"], [len(ids) for ids in self.completions]
        known = [score for score in scores if not math.isnan(score)]
        metrics["reward"].append(sum(known) / max(1, len(known)))
        metrics["completions/mean_length"].append(sum(lengths) / len(lengths))
        ended = [ids[-1] in self.job.stop_ids for ids in self.completions]
        metrics["completions/clipped_ratio"].append(1.0 - sum(ended) / len(ended))
        metrics["pairs/share"].append(sum(pair is not None for pair in pairs) / len(pairs))

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """DPO's loss of the pairs, weighed so that each pair of the step counts the same."""
        share = inputs["share"]
        if "input_ids" not in inputs:
            return sum(p.sum() for p in model.parameters() if p.requires_grad) * 0.0
        pairs = {name: value for name, value in inputs.items() if name != "share"}
        loss = super().compute_loss(model, pairs, *args, **kwargs) * share
        self.guard.batch = inputs
        return loss


def train(job: Job) -> Outcome:
    """Run online DPO to the end of `job`; the policy in `job.model` is trained in place."""
    args = arguments(job, {f.name for f in fields(DPOConfig)})
    settings = DPOConfig(**args | {"remove_unused_columns": False})  # rewards read the columns
    score_completions_only()
    guard, timer = Guard(job.hooks.warn), Timer()
    recorder = Recorder(job, guard, period=1)
    trainer = OnlineDPOTrainer(
        guard,
        job=job,
        timer=timer,
        model=job.model,
        ref_model=reference(job, settings),
        args=settings,
        train_dataset=datasets.Dataset.from_list(job.train),
        processing_class=job.tokenizer,
        callbacks=[guard, recorder],
    )
    recorder.alike = lambda: len({tuple(ids) for ids in trainer.completions}) == 1
    recorder.extra = lambda: timer.take() | online._sampler_metrics(job)
    return run_trainer(job, trainer, guard, recorder)
