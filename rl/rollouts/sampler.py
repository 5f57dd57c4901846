"""The sampler a trainer talks to: an MLX copy of the policy that is synced, checked and drawn from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from rl.rollouts import device, parity, sync
from rl.rollouts.engine import Engine
from rl.rollouts.load import load_sampler
from rl.rollouts.result import Completion, Sampling


@dataclass
class SyncTotals:
    """Hand-overs so far: count, seconds of the last and of all, bytes of one."""

    count: int = 0
    last_s: float = 0.0
    total_s: float = 0.0
    bytes: int = 0
    tensors: int = field(default=0)


class MLXSampler:
    """Holds the sampler's weights; `sync` copies the trainer's, `generate` draws completions."""

    name = "mlx"

    def __init__(self, model: nn.Module, engine: Engine, *, dtype: str, precision: str, packed: bool):
        self.model, self.engine = model, engine
        self.dtype, self.precision, self.packed = dtype, precision, packed
        self.adapted = False
        self.syncs = SyncTotals()

    def sync(self, policy: Any) -> sync.SyncReport:
        """Copy the policy's adapter (if it has one) or all its weights; raises SyncError when they do not fit."""
        if hasattr(policy, "peft_config"):
            adapters = sync.adapter_tensors(policy)
            if not self.adapted:
                sync.attach_adapter(self.model, adapters)
                self.adapted = True
            report = sync.sync_adapter(self.model, adapters)
        else:
            report = sync.sync_weights(self.model, policy.named_parameters())
        self.syncs.count += 1
        self.syncs.last_s = report.seconds
        self.syncs.total_s += report.seconds
        self.syncs.bytes, self.syncs.tensors = report.bytes, report.tensors
        return report

    def check(self, policy: Any, vocabulary: int) -> parity.Parity:
        """Teacher-forced logprobs against the trainer's; raises RunFailed naming the layer when they differ."""
        return parity.check(policy, self.model, self.dtype, vocabulary)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, max_tokens: int, seed: int = 0, step: int = 0
    ) -> list[Completion]:
        """See `Engine.generate`."""
        return self.engine.generate(prompts, sampling, max_tokens=max_tokens, seed=seed, step=step)

    def release(self) -> None:
        """Give cached buffers back to the system: trainer and sampler share one memory."""
        mx.clear_cache()


def build(
    folder: Path,
    *,
    precision: str,
    dtype: str,
    eos_ids: Sequence[int],
    context: int | None,
    max_batch: int = 256,
) -> MLXSampler:
    """Load `folder` for sampling. Under `shared` the packed weights in `mlx/` are used where quantized products are
    fast, and their dequantized values elsewhere: the same policy either way."""
    device.share_memory()
    packed = precision == "shared" and device.keeps_packed_weights() and (folder / "mlx" / "config.json").exists()
    model = load_sampler(folder, dtype, packed=packed)
    engine = Engine(model, eos_ids, max_batch=max_batch, context=context)
    return MLXSampler(model, engine, dtype=dtype, precision=precision, packed=packed)
