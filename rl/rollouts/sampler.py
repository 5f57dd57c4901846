"""The sampler a trainer talks to: an MLX copy of the policy that is synced, checked and drawn from.

Under `copy` precision it is a quantized one of the merged weights, made anew at every sync. That is another policy than
the trainer's, and an adapter's small steps are lost between the quantization's: it exists to measure that.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from rl.rollouts import device, fused, handover, once, parity, sync
from rl.rollouts.engine import Engine
from rl.rollouts.load import load_sampler
from rl.rollouts.result import Completion, Sampling
from rl.rollouts.sync import SyncReport


@dataclass
class SyncTotals:
    """Hand-overs so far: count, seconds of the last and of all, bytes of one, and the way they took."""

    count: int = 0
    last_s: float = 0.0
    total_s: float = 0.0
    bytes: int = 0
    tensors: int = field(default=0)
    way: str | None = None


class MLXSampler:
    """Holds the sampler's weights; `sync` copies the trainer's, `generate` draws completions."""

    name = "mlx"

    def __init__(
        self,
        model: nn.Module,
        engine: Engine,
        *,
        folder: Path,
        dtype: str,
        precision: str,
        packed: bool,
        quantize: tuple[int, int] | None = None,
    ):
        self.model, self.engine, self.folder = model, engine, folder
        self.dtype, self.precision, self.packed, self.quantize = dtype, precision, packed, quantize
        self.adapted = False
        self.syncs = SyncTotals()
        self.base_shared_bytes = 0

    def sync(self, policy: Any) -> SyncReport:
        """Copy the policy's adapter (if it has one) or all its weights; raises SyncError when they do not fit."""
        report = None
        if self.adapted and self.quantize is None and hasattr(policy, "peft_config"):
            report = handover.hand_over(self.model, policy)
        report = self._sync_each(policy) if report is None else report
        self.syncs.count += 1
        self.syncs.last_s = report.seconds
        self.syncs.total_s += report.seconds
        self.syncs.bytes, self.syncs.tensors, self.syncs.way = report.bytes, report.tensors, report.way
        return report

    def _sync_each(self, policy: Any) -> SyncReport:
        """Tensor by tensor, into the model's layers, and from there into its products."""
        if self.quantize is not None:
            report = sync.sync_quantized(self.model, sync.merged_weights(policy), *self.quantize)
        elif hasattr(policy, "peft_config"):
            adapters = sync.adapter_tensors(policy)
            if not self.adapted:
                sync.attach_adapter(self.model, adapters)
                self.adapted = True
            report = sync.sync_adapter(self.model, adapters)
        else:
            report = sync.sync_weights(self.model, policy.named_parameters())
        if (products := fused.of(self.model)) is not None:
            started = time.perf_counter()
            products.refresh(self.model)
            report = replace(report, seconds=report.seconds + time.perf_counter() - started)
        return report

    def hold_once(self, policy: Any) -> int:
        """Let a frozen base of `policy` lie in the sampler's memory (`rl.rollouts.once`); returns the bytes saved."""
        self.base_shared_bytes += once.hold_once(policy, self.model)
        return self.base_shared_bytes

    def check(self, policy: Any, vocabulary: int) -> parity.Parity:
        """Teacher-forced logprobs against the trainer's; raises RunFailed naming the layer when they differ.

        A `copy` differs by design: there the same weights unquantized are checked so, and its difference is told.
        """
        if self.quantize is not None:
            exact = load_sampler(self.folder, self.dtype)
            fused.fuse(exact)  # whose products are not MLX's on a CPU (rl/rollouts/lent.py)
            sync.sync_weights(exact, sync.merged_weights(policy))
            parity.check(policy, exact, self.dtype, vocabulary)
            return parity.compare(policy, self.model, parity.probe(vocabulary))
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
    max_batch_tokens: int | None = None,
    quantize: tuple[int, int] | None = None,
    stop: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
) -> MLXSampler:
    """Load `folder` for sampling. Under `shared` the packed weights in `mlx/`, under `copy` those of `quantize` (bits,
    group size), are used where quantized products are fast, and their dequantized values elsewhere: the same policy
    either way. Raises UserError where the group size does not divide a layer's inputs.
    """
    device.share_memory()
    packed = precision == "shared" and device.keeps_packed_weights() and (folder / "mlx" / "config.json").exists()
    model = load_sampler(folder, dtype, packed=packed)
    if quantize is not None:
        bits, group_size = quantize
        sync.check_group_size(model, group_size)
        if packed := device.keeps_packed_weights():
            nn.quantize(model, group_size=group_size, bits=bits)
    fused.fuse(model)
    engine = Engine(
        model,
        eos_ids,
        max_batch=max_batch,
        max_batch_tokens=max_batch_tokens,
        context=context,
        stop=stop,
        decode=decode,
    )
    return MLXSampler(model, engine, folder=folder, dtype=dtype, precision=precision, packed=packed, quantize=quantize)
