"""What the smoke test measures: numbers of torch's device against a reference, and training steps as runs take them."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl import attention_check, record
from rl import device as devices
from rl.smoke import steps

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")
HALVES = ("float16", "bfloat16")
ALGORITHMS = ("sft", "dpo", "reward", "grpo")
# largest |error| over the rms of the exact product: a few roundings of the result in a half precision; in float32 the
# order of 515 sums, which leaves no room for TF32 (1e-3)
MATMUL = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
# largest |error| of averages of normal numbers; a mask that is lost or shifted gives about 1
ATTENTION = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}
BACKWARD = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1.5e-1}
GRADIENT = 1e-4  # relative, of all weights together
AUTOCAST = {"float16": 5e-3, "bfloat16": 5e-2}
AUTOCAST_DLOGP = 5e-2  # bfloat16 moves a logprob by .03
DLOGP = 1e-3  # largest |Δlogp| of a token, sampler in float32
SEED = 0
MIB = 1024**2


@dataclass(frozen=True)
class Found:
    """What a check measured, what it may be, and whether it was."""

    value: str
    tolerance: str
    ok: bool


@dataclass(frozen=True)
class Bench:
    """What the checks share: the device, a folder of their own, and memory in bytes before the first."""

    device: "torch.device"
    folder: Path
    memory: int


Check = tuple[str, Callable[[Bench], Found]]


def checks(device: "torch.device") -> list[Check]:
    """Names and functions, cheap ones first."""
    found: list[Check] = [("import of torch, MLX and TRL", packages)]
    found += [(f"linear layer in {dtype}", functools.partial(matmul, dtype=dtype)) for dtype in DTYPES]
    found += [(f"attention, left-padded, in {dtype}", functools.partial(attention, dtype=dtype)) for dtype in DTYPES]
    name = "attention backward, scores near -120, in"
    found += [(f"{name} {dtype}", functools.partial(attention_backward, dtype=dtype)) for dtype in DTYPES]
    found += [(f"hand-over to MLX in {dtype}", functools.partial(handover, dtype=dtype)) for dtype in DTYPES]
    found += [("gradient of a tiny Llama, left-padded", gradient)]
    found += [(f"the same under autocast to {dtype}", functools.partial(gradient, autocast=dtype)) for dtype in HALVES]
    found += [("trainer and sampler, all weights", functools.partial(parity, shared=False))]
    found += [("trainer and sampler, shared 4-bit base", functools.partial(parity, shared=True))]
    for algorithm in ALGORITHMS:
        for lora in (False, True):
            name = f"a step of {algorithm.upper()}, {'LoRA' if lora else 'all weights'}"
            found.append((name, functools.partial(train, algorithm=algorithm, lora=lora)))
    for short, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if short == "bf16" or device.type != "cpu":  # accelerate leaves fp16 out on a CPU
            name = f"a step of SFT under autocast to {dtype}"
            found.append((name, functools.partial(train, algorithm="sft", lora=False, **{short: True})))
    return [*found, ("memory over 20 steps of varying lengths", varying_lengths), ("memory", memory)]


def within(error: float, limit: float, what: str) -> Found:
    """A measured error below its limit; NaN is not."""
    return Found(f"{what} {error:.1e}", f"< {limit:g}", error < limit)


def packages(bench: Bench) -> Found:
    """Imports that take most of the time, so that no other row is charged with them."""
    import importlib

    import rl.train

    rl.train.quiet()
    for name in ("rl.rollouts.engine", *(f"rl.algorithms.{algorithm}" for algorithm in ALGORITHMS)):
        importlib.import_module(name)
    found = record.versions(("torch", "mlx", "trl"))
    return Found(", ".join(f"{name} {version}" for name, version in found.items()), "no error", True)


def matmul(bench: Bench, dtype: str) -> Found:
    """x (96, 515) times w (257, 515) transposed, against float64 on the CPU from the same rounded numbers."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    x, w = (torch.randn(rows, 515, generator=generator).to(getattr(torch, dtype)) for rows in (96, 257))
    exact = x.double() @ w.double().T
    found = torch.nn.functional.linear(x.to(bench.device), w.to(bench.device)).cpu().double()
    error = (found - exact).abs().max() / exact.square().mean().sqrt()
    return within(error.item(), MATMUL[dtype], "largest error / rms")


def attention(bench: Bench, dtype: str) -> Found:
    """torch's SDPA, causal, rows of 5, 11 and 16 tokens padded on the left, against softmax(q k' / sqrt(d)) v.

    Only the real tokens' outputs count: a padding token has nothing to see.
    """
    import torch

    lengths = torch.tensor([5, 11, 16])
    size, width = 16, 32
    generator = torch.Generator().manual_seed(SEED)
    q, k, v = (torch.randn(3, 4, size, width, generator=generator).to(getattr(torch, dtype)) for _ in range(3))
    real = torch.arange(size)[None] >= size - lengths[:, None]
    seen = real[:, None, None, :] & torch.ones(size, size, dtype=torch.bool).tril()
    scores = (q.double() @ k.double().mT / width**0.5).masked_fill(~seen, float("-inf"))
    exact = scores.softmax(-1) @ v.double()
    q, k, v, mask = (tensor.to(bench.device) for tensor in (q, k, v, seen))
    found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).cpu().double()
    error = (found - exact).transpose(1, 2)[real].abs().max()
    return within(error.item(), ATTENTION[dtype], "largest error")


def attention_backward(bench: Bench, dtype: str) -> Found:
    """The case in which cuDNN's kernel is NaN: see rl/attention_check.py."""
    import torch

    return within(
        attention_check.gradient_error(bench.device, getattr(torch, dtype)), BACKWARD[dtype], "relative error"
    )


def handover(bench: Bench, dtype: str) -> Found:
    """Weights of every bit pattern, from torch on the device to MLX."""
    import torch

    from rl.rollouts.checks import changed_bits

    changed, sent = changed_bits(getattr(torch, dtype), bench.device)
    return Found(f"{changed} of {sent:,} values changed", "0", changed == 0)


def gradient(bench: Bench, autocast: str | None = None) -> Found:
    """The loss's gradient on the device in float32, or under `autocast` to a half precision with its loss scaled as a
    float16 trainer does, against the same model in float64 on the CPU."""
    import torch

    from rl import models, start

    begin = start.find(steps.make_config(bench.device, "sft"), bench.folder, None)
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(2, 17, (3, 12), generator=generator)
    mask = (torch.arange(12)[None] >= torch.tensor([[0], [4], [7]])).long()

    def gradients(dtype: str, device: Any, half: str | None = None) -> torch.Tensor:
        model, scale = models.load_policy(begin.base, dtype, device), 1.0 if half is None else 2.0**10
        labels = ids.masked_fill(mask == 0, -100)
        given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        with torch.autocast(device.type, getattr(torch, half or "bfloat16"), enabled=half is not None):
            loss = model(**{name: tensor.to(device) for name, tensor in given.items()}, use_cache=False).loss
        (loss * scale).backward()
        return torch.cat([weight.grad.cpu().double().flatten() / scale for weight in model.parameters()])

    exact = gradients("float64", torch.device("cpu"))
    error = (gradients("float32", bench.device, autocast) - exact).norm() / exact.norm()
    return within(error.item(), GRADIENT if autocast is None else AUTOCAST[autocast], "relative error")


def parity(bench: Bench, shared: bool) -> Found:
    """The check that every run makes at its start, in the sampler's dtype that runs take on this backend."""
    from rl.rollouts.parity import TOLERANCE

    config = steps.make_config(bench.device, "grpo", lora=shared, shared=shared)
    sides = steps.both_sides(config, bench.folder, bench.device)
    sampler = sides.sampler
    found = sampler.check(sides.policy, len(sides.tokenizer))
    held = "packed" if sampler.packed else sampler.dtype
    return Found(
        f"mean |Δlogp| {found.mean:.1e}, largest {found.largest:.1e} on {found.tokens} tokens, sampler {held}",
        f"mean < {TOLERANCE[sampler.dtype]:g}",
        found.mean < TOLERANCE[sampler.dtype],
    )


def train(bench: Bench, algorithm: str, lora: bool, **autocast: bool) -> Found:
    """One optimizer step as runs take it, GRPO's on completions that MLX sampled; then MLX follows the new weights.

    At the first step of LoRA only the B matrices have a gradient (B starts at zero) and a reward model's head; the base
    must not move. A reward model is not sampled from.
    """
    from rl.rollouts.parity import compare, probe

    config = steps.make_config(bench.device, algorithm, lora=lora, dtype="float32", **autocast)
    step = steps.take(steps.make_job(config, bench.folder, bench.device))
    job, differences = step.job, [0.0]
    if job.sampler is not None:
        job.sampler.sync(job.model)
        differences.append(compare(job.model, job.sampler.model, probe(len(job.tokenizer))).largest)
    if algorithm == "grpo":
        differences.append(step.number("sampling/sampling_logp_difference/max"))
    limit = AUTOCAST_DLOGP if autocast else DLOGP
    largest = max(differences) if all(map(math.isfinite, differences)) else math.nan
    norm, moved = step.number("grad_norm"), len(step.moved)
    wanted = len(step.trained) // 2 if lora else len(step.trained)
    whole = step.outcome.steps == 1 and step.outcome.skipped == 0 and step.outcome.failure is None
    told = f"|gradient| {norm:.2g}, {moved} of {len(step.trained)} trained tensors moved"
    asked = f"gradient finite and not 0, {wanted} moved"
    if job.sampler is not None:
        told, asked = f"|Δlogp| max {largest:.1e}, {told}", f"|Δlogp| max < {limit:g}, {asked}"
    return Found(
        told + "".join(f", {why}" for why in step.outcome.causes),
        asked,
        whole
        and largest < limit
        and math.isfinite(norm)
        and norm > 0
        and moved >= wanted
        and step.moved <= step.trained,
    )


def varying_lengths(bench: Bench) -> Found:
    """Told, not judged: memory after 5 and after 20 SFT steps, no two of the same length, with a trainer's habits.

    On MPS what the driver holds, elsewhere a peak (`rl.device.memory_bytes`).
    """
    config = steps.make_config(bench.device, "sft", max_steps=20, dtype="float32")
    job = steps.make_job(config, bench.folder, bench.device)
    lengths = [10 + 9 * (7 * i % 20) for i in range(20)]  # 10 to 181 tokens, in no order
    job.train = [
        {"prompt": "1" * (length - 3) + "=", "completion": "12"} for length in lengths for _ in range(8)
    ]  # a batch of 8 rows is of one length
    seen: list[float] = []
    job.hooks.metrics = lambda step, values: seen.append(devices.memory_bytes(bench.device) / MIB)
    outcome = steps.trainer_of(job)(job)
    return Found(
        f"{seen[4]:,.0f} MiB after 5 steps, {seen[-1]:,.0f} after {outcome.steps}", "none", outcome.steps == 20
    )


def memory(bench: Bench) -> Found:
    """Told, not judged: how it is counted depends on the device (`rl.device.memory_bytes`)."""
    from rl.rollouts.device import peak_memory_bytes

    after, mlx = devices.memory_bytes(bench.device) / MIB, peak_memory_bytes() / MIB
    return Found(f"{bench.memory / MIB:,.0f} MiB before, {after:,.0f} after; MLX's peak {mlx:,.0f}", "none", True)
