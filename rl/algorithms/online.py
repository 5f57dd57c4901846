"""What the trainers that sample (GRPO's family, RLOO) share over TRL's: the MLX sampler, the order of prompts, timing
and a forward without repeated work.

Leans on trl 1.16.0, where `GRPOTrainer` and `RLOOTrainer` have these methods with the same meaning.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import torch
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import add_fused_lm_head, use_adapter

from rl import processes
from rl.algorithms import piecewise, trace
from rl.algorithms.base import Job, Outcome, Recorder, Timer, run_trainer
from rl.algorithms.guard import Guard
from rl.algorithms.learner import Forward, forward, piece_tokens, row_keys, score_completions_only, share
from rl.algorithms.mismatch import Alarm, measure
from rl.algorithms.seam import EpochSampler, MLXGeneration
from rl.algorithms.tool_turns import loss_mask
from rl.rollouts.result import Sampling

# sequences a step whose KL to the start is measured when the loss has no KL term of its own
KL_ROWS = 4


class Online:
    """Mixed in before TRL's trainer: `class DuetX(Online, XTrainer)`."""

    turn = 0  # of an episode with tools (rl.algorithms.tool_turns)

    def __init__(self, job: Job, guard: Guard, timer: Timer, **kwargs: Any):
        super().__init__(**kwargs)
        self.job, self.guard, self.timer = job, guard, timer
        self.alarm = Alarm(job.config.rollout, guard.health, guard.warn)
        self.last: Forward | None = None
        self.completions: list[list[int]] = []
        self.sampling_round = 0  # a step that samples more than once draws from other streams each time
        self.eos_token_ids = job.stop_ids
        if job.reference is not None:  # in place of TRL's, which is the start
            add_fused_lm_head(job.reference, temperature=self.temperature)
            self.ref_model = self.accelerator.prepare_model(job.reference, evaluation_mode=True)
        if job.sampler is None:
            self.generation_config.eos_token_id = job.stop_ids
            return
        rollout = job.config.rollout
        self.use_vllm = True
        self.vllm_mode = "mlx"
        self._last_loaded_step = -1
        self.vllm_generation = MLXGeneration(
            job.sampler,
            policy=lambda: self.accelerator.unwrap_model(self.model),
            sampling=Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.min_p),
            max_tokens=rollout.max_completion_length,
            seed=job.config.run.seed,
            # every turn, and every process, draws from streams of its own
            step=lambda: (
                self.state.global_step + (self.sampling_round << 32) + (self.turn << 40) + (processes.rank() << 48)
            ),
        )

    def _get_train_sampler(self, dataset: Any = None) -> EpochSampler:
        dataset = self.train_dataset if dataset is None else dataset
        return EpochSampler(
            data_source=dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self.timer.part("rollout"):
            out = super()._generate_single_turn(*args, **kwargs)
        self.completions = out[0] if isinstance(out, tuple) else out  # RLOO's has no logprobs beside them
        self.job.tokens["prompt"] += processes.total(sum(len(ids) for ids in args[0]))
        self.job.tokens["completion"] += processes.total(sum(len(ids) for ids in self.completions))
        return out

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        with self.timer.part("reward"):
            self.rewards_B_F = super()._calculate_rewards(*args, **kwargs)
        self.rewarded = args[3]  # ids of whole completions, also where tokens are masked from the loss
        return self.rewards_B_F

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self.last = None
        output = self._score(inputs)
        if not self.model.training:
            return output
        self._keep_completions(inputs, output)
        if self.beta == 0.0:
            self._measure_kl(output)
        if "importance_sampling_ratio" in output:
            self._measure_ratio(output)
        return output

    def _keep_completions(self, inputs: list[dict[str, Any]], batch: dict[str, Any]) -> None:
        """Every so many steps a rollout goes into the run's log (of one process: its rows are the rollout's)."""
        period = self.args.steps_per_generation * self.num_iterations // self.args.gradient_accumulation_steps
        if self.accelerator.num_processes > 1 or not trace.is_due(self.job, self.state.global_step, max(1, period)):
            return
        trace.note(
            self.job,
            self.state.global_step,
            self.sampling_round,
            inputs,
            self.rewarded,
            trace.columns(self.job, self.rewards_B_F),
            group=self.num_generations,
            advantages=trace.of_tokens(batch["advantages"], batch["completion_mask"]),
        )

    def _score(self, inputs: Any) -> dict[str, Any]:
        """TRL's generation batch, which a trainer may complete before anything is measured on it."""
        return super()._generate_and_score_completions(inputs)

    def _measure_ratio(self, batch: dict[str, Any]) -> None:
        """Effective sample size of the tokens' untruncated weights, (sum w)^2 / (n sum w^2): 1 when on-policy; and what
        the correction leaves of the gradient, with its alarm."""
        difference = batch["old_per_token_logps"] - batch["sampling_per_token_logps"]
        mask = loss_mask(batch)
        weights = difference[mask.bool()].exp()  # MPS has no float64
        weights = weights[torch.isfinite(weights)]
        if len(weights):
            ess = weights.sum() ** 2 / (len(weights) * (weights**2).sum())
            self._metrics["train"]["sampling/ess"].append(ess.item())
        rollout, applied = self.job.config.rollout, batch["importance_sampling_ratio"]
        found = measure(difference, mask, applied, rollout.correction, rollout.correction_cap)
        if found is not None:
            for name, value in found.metrics().items():
                self._metrics["train"][name].append(value)
            self.alarm.hear(self.state.global_step + 1, found)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self.guard.batch = inputs
        with self.timer.part("loss"):
            return super()._compute_loss(model, inputs)

    def _on_policy(self) -> bool:
        """Whether the loss will be taken at the very weights that sampled, in one piece, without dropout."""
        config = self.job.config
        dropout = config.model.lora.dropout if config.model.lora else 0.0
        return (
            self.args.steps_per_generation == 1
            and self.num_iterations == 1
            and not self.args.gradient_checkpointing
            and dropout == 0.0
            and self.accelerator.num_processes == 1
        )

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        plain = any(v is not None and v is not False for v in kwargs.values())
        loss_forward = compute_entropy and torch.is_grad_enabled()
        if plain or self.accelerator.num_processes > 1:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **kwargs
            )
        if loss_forward and self.last is not None:
            order = self.last.reorder(input_ids, attention_mask)
            if order is not None:
                kept, self.last = self.last, None  # a graph is good for one backward
                return kept.logps_B_T[order], kept.entropies_B_T[order], None
        first = not torch.is_grad_enabled() and model is self.model and self.model.training and self._on_policy()
        if first and self._policy_active():
            with torch.enable_grad():
                logps, entropies = self._forward(model, input_ids, attention_mask, logits_to_keep, None)
            rows = {key: i for i, key in enumerate(row_keys(input_ids, attention_mask))}
            self.last = Forward(rows, logps, entropies)
            return logps.detach(), entropies.detach(), None
        logps, entropies = self._forward(model, input_ids, attention_mask, logits_to_keep, batch_size)
        return logps, entropies if compute_entropy else None, None

    def _policy_active(self) -> bool:
        """Whether a forward now is the policy's: the reference's has PEFT's adapters off, or the one named ref on."""
        model = self.accelerator.unwrap_model(self.model)
        if not hasattr(model, "peft_config"):
            return True
        off = any(getattr(m, "disable_adapters", False) is True for m in model.modules())
        return not off and model.active_adapters == ["default"]

    def _forward(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, columns: int, batch_size: int | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        size, parts = batch_size or len(input_ids), []
        cost = piece_tokens(input_ids.device, model.config)
        in_pieces = piecewise.knows(model) and not self.args.gradient_checkpointing
        for start in range(0, len(input_ids), size):
            ids, mask = input_ids[start : start + size], attention_mask[start : start + size]
            shared = share(ids, mask, columns, cost) if in_pieces else None
            if shared is None:
                # TRL gives the head of a reference model of its own no entropy
                logps, entropies, _ = super()._get_per_token_logps_and_entropies(
                    model, ids, mask, columns, compute_entropy=model is not self.ref_model
                )
                parts.append((logps, entropies))
                continue
            with self.accelerator.autocast():
                parts.append(forward(model, ids, mask, columns, shared))
        logps = torch.cat([p[0] for p in parts])
        return logps, None if parts[0][1] is None else torch.cat([p[1] for p in parts])

    @torch.no_grad()
    def _measure_kl(self, batch: dict[str, Any]) -> None:
        """KL(policy || start) on a few rows by the estimator k3 (Schulman 2020), where the start is an adapter away."""
        model = self.accelerator.unwrap_model(self.model)
        if not self.job.fresh_adapter or "old_per_token_logps" not in batch:
            return
        rows = slice(0, KL_ROWS)
        ids = torch.cat([batch["prompt_ids"][rows], batch["completion_ids"][rows]], dim=1)
        mask = torch.cat([batch["prompt_mask"][rows], batch["completion_mask"][rows]], dim=1)
        columns = batch["completion_ids"].shape[1]
        with (
            use_adapter(model, adapter_name="ref") if "ref" in model.peft_config else adapters_off(model),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            reference, _ = self._forward(self.model, ids, mask, columns, None)
        difference = reference - batch["old_per_token_logps"][rows]
        sampled = loss_mask(batch)[rows]
        k3 = (difference.exp() - difference - 1) * sampled
        self._metrics["train"]["kl"].append((k3.sum() / sampled.sum().clamp(min=1)).item())


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """In the block no adapter of PEFT's counts, as in its `disable_adapter`, which looks at every parameter first, and
    for hundreds of adapters takes longer than a GPU's forward does."""
    layers = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


def sampling_arguments(job: Job) -> dict[str, Any]:
    """`[rollout]` and the weights of `[[reward]]` as TRL's arguments."""
    rollout = job.config.rollout
    return {
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        "top_k": rollout.top_k,
        "min_p": rollout.min_p or None,
        "max_completion_length": rollout.max_completion_length,
        "reward_weights": [r.weight for r in job.rewards],
    }


def run(job: Job, settings: Any, trainer_class: Callable[..., Any]) -> Outcome:
    """Train `job.model` in place with a trainer of `trainer_class`; `settings` is TRL's config for it."""
    score_completions_only()
    guard, timer = Guard(job.hooks.warn), Timer()
    period = settings.steps_per_generation * settings.num_iterations // settings.gradient_accumulation_steps
    recorder = Recorder(job, guard, period)
    trainer = trainer_class(
        job,
        guard,
        timer,
        model=job.model,
        reward_funcs=list(job.rewards),
        args=settings,
        train_dataset=datasets.Dataset.from_list(job.train),
        processing_class=job.tokenizer,
        callbacks=[guard, recorder],
        **_tools(job),
    )
    recorder.alike = lambda: len({tuple(c) for c in trainer.completions}) == 1
    recorder.extra = lambda: timer.take() | _sampler_metrics(job) | _tool_metrics(job)
    return run_trainer(job, trainer, guard, recorder)


def _tools(job: Job) -> dict[str, Any]:
    """The job's tools as TRL takes them; nothing for a trainer that has none."""
    if job.toolbox is None:
        return {}
    return {"tools": job.toolbox.functions or None, "environment_factory": job.toolbox.seat}


def _tool_metrics(job: Job) -> dict[str, float]:
    return {} if job.toolbox is None else job.toolbox.runner.take()


def _sampler_metrics(job: Job) -> dict[str, float]:
    """Speed of the last rollout and cost of the last hand-over."""
    if job.sampler is None:
        return {}
    totals, syncs = job.sampler.engine.totals, job.sampler.syncs
    return {"rollout/tokens_per_s": totals.speed(), "time/sync": syncs.last_s, "sync/bytes": float(syncs.bytes)}
