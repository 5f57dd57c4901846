"""Nothing that is not finite reaches the weights, and a policy that has collapsed stops the run.

transformers' Trainer steps the optimizer whatever the gradient is: one NaN norm turns clipping into a multiplication by
NaN and every weight with it, while the loss stays finite and |dlogp| reads 0 (TRL maps NaN logprobs to ratio 1).
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rl import processes

# so many skipped steps among the last WINDOW stop the run
MOST_SKIPPED, WINDOW = 3, 20
# sizes of the tensors that tell whether a maximum finds NaN: less than a block's and more than a chunk's
PROBE = (1, 37, 70_001)
BY_MAXIMUM = {"cuda"}  # a CPU has no launches to save
# so many steps in a row with all completions alike, no reward and no entropy stop the run
COLLAPSED_STEPS, COLLAPSED_ENTROPY = 5, 1e-2


@dataclass
class Health:
    """What the guard has seen; `reason` is set when the run has to stop."""

    skipped: int = 0
    causes: list[str] = field(default_factory=list)
    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW))
    collapsed_for: int = 0
    reason: str | None = None

    @property
    def good(self) -> bool:
        """Whether a checkpoint written now is one to go back to."""
        return self.collapsed_for == 0 and self.reason is None


class Guard(TrainerCallback):
    """Looks at each step before the optimizer does. `trainer` is set once the trainer exists."""

    def __init__(self, warn: Callable[[str], None]):
        self.health = Health()
        self.warn = warn
        self.trainer: Any = None
        self.batch: dict[str, Any] | None = None  # the inputs of the loss under way

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop every gradient of a step in which anything was not finite: the optimizer then changes nothing."""
        generation = getattr(self.trainer, "vllm_generation", None)
        cause = generation.broken if generation is not None else None
        if generation is not None:
            generation.broken = None
        gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        if processes.anywhere(cause is not None or not _finite(gradients)):
            cause = cause or self._name_the_term()
        self.health.recent.append(cause is not None)
        if cause is None:
            return
        if self.trainer.accelerator.scaler is None:  # an fp16 scaler skips by itself and needs the gradients to see it
            self.trainer.optimizer.zero_grad(set_to_none=True)
        self.health.skipped += 1
        self.health.causes.append(f"step {state.global_step + 1}: {cause}")
        self.warn(f"step {state.global_step + 1} skipped, the weights are as before: not finite: {cause}")
        if sum(self.health.recent) >= MOST_SKIPPED:
            self.health.reason = (
                f"{sum(self.health.recent)} of the last {len(self.health.recent)} steps were not finite ({cause})"
            )
            control.should_training_stop = True

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A finite gradient may still overflow a weight: then nothing after it can be trusted."""
        trained = [p for p in self.trainer.model.parameters() if p.requires_grad]
        if processes.anywhere(not _finite(trained)):
            names = [n for n, p in self.trainer.model.named_parameters() if not _finite([p])]
            self.health.reason = f"weights not finite after step {state.global_step + 1}: {', '.join(names[:3])}"
            control.should_training_stop = True

    def watch_collapse(self, metrics: dict[str, float], completions_alike: bool, control: TrainerControl) -> None:
        """Count steps at which the policy says one thing, earns nothing and has no entropy left to change."""
        if "reward" not in metrics:
            return  # a step that reuses a rollout says nothing new
        dead = (
            completions_alike
            and abs(metrics.get("reward", 1.0)) < 1e-9
            and (metrics.get("entropy") if metrics.get("entropy") is not None else 1.0) < COLLAPSED_ENTROPY
        )
        dead = not processes.anywhere(not dead)
        self.health.collapsed_for = self.health.collapsed_for + 1 if dead else 0
        if self.health.collapsed_for >= COLLAPSED_STEPS:
            self.health.reason = (
                f"the policy collapsed: for {COLLAPSED_STEPS} steps every completion was alike, reward 0 and "
                f"entropy below {COLLAPSED_ENTROPY}; lower learning_rate or set beta > 0"
            )
            control.should_training_stop = True

    def _name_the_term(self) -> str:
        """Where the first value that is not finite appears: a tensor of the batch, the loss, or a module's gradient."""
        batch = self.batch or {}
        for name, value in batch.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                return f"{name} of the batch"
        if not batch:
            return "gradient (the batch was not kept)"
        if processes.count() > 1:  # looking for it computes again, and only some processes might
            return "gradient (not traced in several processes)"
        return trace(self.trainer, batch)


class Watched:
    """Mixed in before a TRL trainer that learns from given rows: keeps each batch for `guard`."""

    def __init__(self, guard: Guard, **kwargs: Any):
        super().__init__(**kwargs)
        self.guard = guard

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Keep `inputs` so that the guard can find where a value stopped being finite."""
        self.guard.batch = inputs
        return super().compute_loss(model, inputs, *args, **kwargs)


def trace(trainer: Any, batch: dict[str, Any]) -> str:
    """Run loss and backward on `batch` again with hooks; name the first module whose output, or else whose gradient,
    is not finite where what came in was. Leaves no gradient behind."""
    found: list[str] = []
    hooks = []

    def forward_hook(name: str) -> Callable:
        def hook(_module: Any, inputs: Any, output: Any) -> None:
            if not found and _finite(_tensors(inputs)) and not _finite(_tensors(output)):
                found.append(f"output of {name}")

        return hook

    def backward_hook(name: str) -> Callable:
        def hook(_module: Any, into: Any, out_of: Any) -> None:
            if found:
                return
            if not _finite(_tensors(out_of)):  # made by an operation without a module: attention, residual, loss
                found.append(f"gradient arriving at the output of {name}")
            elif not _finite(_tensors(into)):
                found.append(f"gradient through {name}")

        return hook

    for name, module in trainer.model.named_modules():
        if name and not list(module.children()):
            hooks += [
                module.register_forward_hook(forward_hook(name)),
                module.register_full_backward_hook(backward_hook(name)),
            ]
    try:
        with torch.enable_grad(), trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, batch)
        if found:
            return found[0]
        if not bool(torch.isfinite(loss)):
            return "loss"
        loss.backward()
        if found:
            return found[0]
        bad = [n for n, p in trainer.model.named_parameters() if p.grad is not None and not _finite([p.grad])]
        return f"gradient of {', '.join(bad[:3])}" if bad else "gradient (finite when computed again: not repeatable)"
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values] if values.is_floating_point() else []
    if isinstance(values, tuple | list):
        return [t for v in values for t in _tensors(v)]
    return []


def _finite(tensors: list[torch.Tensor]) -> bool:
    """Whether all values of all tensors are finite, with one wait for the device."""
    own = [t.detach().to_local() if hasattr(t, "to_local") else t.detach() for t in tensors if t is not None]
    own = [t for t in own if t.numel()]
    if not own:
        return True
    if own[0].device.type in BY_MAXIMUM and all(_maximum_tells(*kind) for kind in {(t.device, t.dtype) for t in own}):
        return math.isfinite(_maximum(own))  # a few launches for all of them, where `isfinite` takes several for each
    return bool(torch.stack([torch.isfinite(t).all() for t in own]).all())


def _maximum(tensors: list[torch.Tensor]) -> float:
    """The largest absolute value of all tensors."""
    return torch.nn.utils.get_total_norm(tensors, norm_type=math.inf).item()


@cache
def _maximum_tells(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether on this device `_maximum` is finite for finite values, the largest too, and not for others, wherever
    they are: the maximum of NaN and a number may be the number."""
    if not dtype.is_floating_point:
        return False
    most = torch.finfo(dtype).max
    tensors = [torch.full((size,), most, dtype=dtype, device=device) for size in PROBE]
    if not math.isfinite(_maximum(tensors)):
        return False
    for tensor in tensors:
        for place in {0, len(tensor) // 2, len(tensor) - 1}:
            for value in (math.nan, math.inf, -math.inf):
                tensor[place] = value
                if math.isfinite(_maximum(tensors)):
                    return False
            tensor[place] = most
    return True
