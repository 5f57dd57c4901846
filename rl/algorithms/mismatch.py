"""How far apart sampler and trainer are, and the alarm for when the correction leaves nothing of the gradient.

An importance weight has mean 1 under the sampler. Where the two policies are far apart, most samples have weights near
0 and a few have huge ones, which are truncated or masked: what is left multiplies the gradient by nearly nothing, while
loss and reward look as ever.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rl.algorithms.guard import Health
from rl.config import Rollout

# a rollout is bad when the weights' mean or their effective share is below these, or more than LEAST_KEPT are masked
LEAST_KEPT, LEAST_ESS = 0.5, 0.2
# an effective share says something from so many weights on
LEAST_WEIGHTS = 8
# so many bad rollouts in a row stop the run
PATIENCE = 10


@dataclass(frozen=True)
class Mismatch:
    """Of one rollout: quantiles of the ratios pi_trainer / pi_sampler before the cap, the share of them above it, the
    mean of the weights that are left (`kept`) and their effective share (sum w)^2 / (n sum w^2) (`effective`).

    Of tokens, or of sequences where the correction weighs those.
    """

    p05: float
    p50: float
    p95: float
    clipped: float
    kept: float
    effective: float
    count: int

    def metrics(self) -> dict[str, float]:
        """For the log, by name."""
        ratios = {f"sampling/ratio_{name}": getattr(self, name) for name in ("p05", "p50", "p95")}
        return ratios | {"sampling/clipped": self.clipped, "sampling/kept_weight": self.kept}


def measure(
    difference_B_T: torch.Tensor, mask_B_T: torch.Tensor, weights: torch.Tensor, correction: str, cap: float
) -> Mismatch | None:
    """Measure log pi_trainer - log pi_sampler of the tokens in `mask_B_T` and the `weights` made of them.

    `weights` are (B, T), or (B,) or (B, 1) where all tokens of a sequence have one. None where no token counts or one
    is not finite: that is the guard's matter.
    """
    mask = mask_B_T.bool()
    difference = difference_B_T.float().masked_fill(~mask, 0.0)
    if correction.startswith("sequence"):
        rows = mask.any(1)
        logs, applied = difference.sum(1)[rows], weights.reshape(len(mask), -1)[:, 0][rows]
    else:
        logs, applied = difference[mask], weights.reshape(len(mask), -1).expand_as(mask)[mask]
    if not len(logs) or not bool(torch.isfinite(logs).all()):
        return None
    ratios, applied = logs.exp().cpu(), applied.float().cpu()
    p05, p50, p95 = torch.quantile(ratios[:: 1 + len(ratios) // 2**24], torch.tensor([0.05, 0.5, 0.95])).tolist()
    squares = float((applied**2).sum())
    return Mismatch(
        p05=p05,
        p50=p50,
        p95=p95,
        clipped=float((ratios > cap).float().mean()),
        kept=float(applied.mean()),
        effective=float(applied.sum()) ** 2 / (len(applied) * squares) if squares else 0.0,
        count=len(applied),
    )


class Alarm:
    """Warns at the first bad rollout and stops the run when they go on; `health` is the guard's."""

    def __init__(self, rollout: Rollout, health: Health, warn: Callable[[str], None]):
        self.rollout, self.health, self.warn = rollout, health, warn
        self.bad = 0  # rollouts in a row

    def hear(self, step: int, found: Mismatch) -> None:
        """Judge the rollout of `step`."""
        masked = found.clipped if self.rollout.correction.endswith("mask") else 0.0
        few = found.count >= LEAST_WEIGHTS and found.effective < LEAST_ESS
        if not (found.kept < LEAST_KEPT or masked > LEAST_KEPT or few):
            self.bad = 0
            return
        self.bad += 1
        if self.bad == 1:
            self.warn(f"step {step}: {self._said(found, masked)}; {PATIENCE} rollouts like this in a row stop the run")
        if self.bad >= PATIENCE and self.health.reason is None:
            self.health.reason = f"for {PATIENCE} rollouts {self._said(found, masked)}"

    def _said(self, found: Mismatch, masked: float) -> str:
        rollout = self.rollout
        cause = f"the sampler ({self._sampler()}) is another policy than the trainer"
        hurt = f"'{rollout.correction}' leaves {found.kept:.0%} of the gradient"
        if masked:
            hurt += f", {masked:.0%} masked"
        seen = f"effective share {found.effective:.2f}, ratios {found.p05:.2g} to {found.p95:.2g}"
        return f"{cause}: {hurt} ({seen}); {self._remedy()}"

    def _sampler(self) -> str:
        copied = self.rollout.precision == "copy"
        return f"a {self.rollout.bits}-bit copy" if copied else f"{self.rollout.precision} precision"

    def _remedy(self) -> str:
        if self.rollout.precision == "copy":
            return "set [rollout] precision = 'shared' with [model.quantization], or more bits"
        if self.rollout.correction.startswith("sequence"):
            return "set [rollout] correction = 'token_truncate', max_completion_length lower, or dtype = 'float32'"
        return "set [rollout] dtype = 'float32', or lower the learning rate"
