"""`nox -s mps_smoke`: a minute of numbers from this machine's device, each against a reference, each with a tolerance.

It says in its first and last line which device it ran on. Where that is not mps, nothing it prints is about MPS.
"""

import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rl import attention_check, files, record, smoke_page
from rl import config as configs
from rl import device as devices
from rl.errors import RunFailed, UserError

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
DTYPES = ("float32", "float16", "bfloat16")
# largest |error| over the rms of the exact product: a few roundings of the result in a half precision; in float32 the
# order of 515 sums, which leaves no room for TF32 (1e-3)
MATMUL = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
# largest |error| of averages of normal numbers; a mask that is lost or shifted gives about 1
ATTENTION = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}
BACKWARD = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1.5e-1}
GRADIENT = 1e-4  # relative, of all weights together
DLOGP = 1e-3  # largest |Δlogp| of a token, sampler in float32
SEED = 0
LOG_WIDTH = 180  # columns where no terminal says how many it has


@dataclass(frozen=True)
class Found:
    """What a check measured, what it may be, and whether it was."""

    value: str
    tolerance: str
    ok: bool


@dataclass(frozen=True)
class Row:
    """One line of the table; `seconds` of wall time."""

    name: str
    found: Found
    seconds: float


@dataclass(frozen=True)
class Bench:
    """What the checks share: the device, a folder of their own, and memory in bytes before the first."""

    device: "torch.device"
    folder: Path
    memory: int


Check = tuple[str, Callable[[Bench], Found]]


def main(root: Path = ROOT) -> int:
    """Run the checks, print the table, write it to `root/build/smoke.md`; 0 when all passed.

    Raises RunFailed (exit code 1) with the names of the checks that did not.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    started = time.perf_counter()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before its import: TRL reports every trainer to the hub
    device = devices.pick("auto")
    devices.prepare(device)
    print(f"smoke test on {place(device)}. {about_mps(device)}", flush=True)
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    with tempfile.TemporaryDirectory(prefix="duet-smoke-") as folder, console.status("") as status:
        bench = Bench(device, Path(folder), devices.memory_bytes(device))
        rows = list(run(checks(), bench, lambda name: status.update(f"{name} ...")))
    failed = [row.name for row in rows if not row.found.ok]
    table = Table("check", "value", "tolerance", "seconds", "result")
    for row in rows:
        result = "[green]ok[/]" if row.found.ok else "[red]failed[/]"
        # an error's text is no markup
        table.add_row(row.name, escape(row.found.value), row.found.tolerance, f"{row.seconds:.2f}", result)
    console.print(table)
    summary = (
        f"{len(rows) - len(failed)} of {len(rows)} checks passed in {time.perf_counter() - started:.0f} s "
        f"on {place(device)}. {about_mps(device)}"
    )
    files.write_text(root / "build" / "smoke.md", smoke_page.markdown(rows, summary, root))
    print("table, machine and versions: build/smoke.md")
    print(summary, flush=True)
    if failed:
        raise RunFailed(
            f"{len(failed)} of {len(rows)} checks on {device.type}: {'; '.join(failed)}. {about_mps(device)}"
        )
    return 0


def place(device: "torch.device") -> str:
    """The devices of both sides: "cpu: x86_64, 2 cores, 23.4 GiB (torch) and cpu (MLX 0.32.4)"."""
    try:
        from rl.rollouts.device import describe

        told = describe()
        mlx = f"{told['backend']} (MLX {told['version']})"
    except Exception as error:  # a broken install may raise anything; the checks that need MLX will say so too
        mlx = f"no MLX ({type(error).__name__})"
    return f"{devices.describe(device)} (torch) and {mlx}"


def about_mps(device: "torch.device") -> str:
    """What these checks say of MPS: something only where the device is mps, and less where torch may leave it."""
    if device.type != "mps":
        return "MPS is absent here: nothing in this test says anything about MPS"
    if os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK") == "1":
        return "MPS was used, with PYTORCH_ENABLE_MPS_FALLBACK=1: some operations may have run on the CPU"
    return "MPS was used"


def checks() -> list[Check]:
    """Names and functions, cheap ones first."""
    found: list[Check] = [("import of torch, MLX and TRL", packages)]
    found += [(f"linear layer in {dtype}", functools.partial(matmul, dtype=dtype)) for dtype in DTYPES]
    found += [(f"attention, left-padded, in {dtype}", functools.partial(attention, dtype=dtype)) for dtype in DTYPES]
    name = "attention backward, scores near -120, in"
    found += [(f"{name} {dtype}", functools.partial(attention_backward, dtype=dtype)) for dtype in DTYPES]
    found += [(f"hand-over to MLX in {dtype}", functools.partial(handover, dtype=dtype)) for dtype in DTYPES]
    found += [("gradient of a tiny Llama, left-padded", gradient)]
    found += [("trainer and sampler, all weights", functools.partial(parity, shared=False))]
    found += [("trainer and sampler, shared 4-bit base", functools.partial(parity, shared=True))]
    for algorithm in ("sft", "grpo"):
        for lora in (False, True):
            name = f"a step of {algorithm.upper()}, {'LoRA' if lora else 'all weights'}"
            found.append((name, functools.partial(train, algorithm=algorithm, lora=lora)))
    return [*found, ("memory", memory)]


def run(checks: Iterable[Check], bench: Bench, say: Callable[[str], None] = lambda name: None) -> Iterable[Row]:
    """One row a check; one that raises is a failed row with the error as its value."""
    for name, check in checks:
        say(name)
        started = time.perf_counter()
        try:
            found = check(bench)
        except Exception as error:  # a device that lacks an operation raises anything
            kind = "" if isinstance(error, RunFailed | UserError) else f"{type(error).__name__}: "
            found = Found((kind + " ".join(str(error).split()))[:300], "no error", False)
        yield Row(name, found, time.perf_counter() - started)


def within(error: float, limit: float, what: str) -> Found:
    """A measured error below its limit; NaN is not."""
    return Found(f"{what} {error:.1e}", f"< {limit:g}", error < limit)


def packages(bench: Bench) -> Found:
    """Imports that take most of the time, so that no other row is charged with them."""
    import importlib

    import rl.train

    rl.train.quiet()
    for name in ("rl.rollouts.engine", "rl.algorithms.sft", "rl.algorithms.grpo"):
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


def gradient(bench: Bench) -> Found:
    """The loss's gradient on the device in float32, against the same model in float64 on the CPU."""
    import torch

    from rl import models, start

    begin = start.find(_config(bench, "sft", lora=False), bench.folder, None)
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(2, 17, (3, 12), generator=generator)
    mask = (torch.arange(12)[None] >= torch.tensor([[0], [4], [7]])).long()

    def gradients(dtype: str, device: Any) -> torch.Tensor:
        model = models.load_policy(begin.base, dtype, device)
        labels = ids.masked_fill(mask == 0, -100)
        model(
            input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device), use_cache=False
        ).loss.backward()
        return torch.cat([weight.grad.cpu().double().flatten() for weight in model.parameters()])

    exact = gradients("float64", "cpu")
    error = (gradients("float32", bench.device) - exact).norm() / exact.norm()
    return within(error.item(), GRADIENT, "relative error")


def parity(bench: Bench, shared: bool) -> Found:
    """The check that every run makes at its start, in the sampler's dtype that runs take on this backend."""
    from rl.rollouts.parity import TOLERANCE

    policy, sampler, tokenizer, _ = _both_sides(bench, _config(bench, "grpo", lora=shared, shared=shared))
    found = sampler.check(policy, len(tokenizer))
    held = "packed" if sampler.packed else sampler.dtype
    return Found(
        f"mean |Δlogp| {found.mean:.1e}, largest {found.largest:.1e} on {found.tokens} tokens, sampler {held}",
        f"mean < {TOLERANCE[sampler.dtype]:g}",
        found.mean < TOLERANCE[sampler.dtype],
    )


def train(bench: Bench, algorithm: Literal["sft", "grpo"], lora: bool) -> Found:
    """One optimizer step as runs take it, GRPO's on completions that MLX sampled; then MLX follows the new weights.

    At the first step of LoRA only the B matrices have a gradient (B starts at zero); the base must not move.
    """
    import importlib
    import math

    import torch

    from rl import data, rewards
    from rl.algorithms import base
    from rl.rollouts.parity import compare, probe

    config = _config(bench, algorithm, lora, dtype="float32")
    policy, sampler, tokenizer, stop_ids = _both_sides(bench, config)
    before = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
    trained = {name for name, weight in policy.named_parameters() if weight.requires_grad}

    def differing(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [float(sum(map(ord, text)) % 11) for text in completions]  # no group is all alike

    logged: dict[str, float | None] = {}
    job = base.Job(
        config=config,
        folder=bench.folder / "run",
        device=bench.device,
        model=policy,
        tokenizer=tokenizer,
        train=data.build(config).train,
        rewards=[rewards.RewardFunction("differing", 1.0, differing)],
        sampler=sampler,
        stop_ids=stop_ids,
        hooks=base.Hooks(metrics=lambda step, values: logged.update(values)),
    )
    outcome = importlib.import_module(f"rl.algorithms.{algorithm}").train(job)
    moved = {name for name, weight in policy.named_parameters() if not torch.equal(weight, before[name])}
    sampler.sync(policy)
    differences = [compare(policy, sampler.model, probe(len(tokenizer))).largest]
    if algorithm == "grpo":
        differences.append(_number(logged.get("sampling/sampling_logp_difference/max")))
    largest = max(differences) if all(map(math.isfinite, differences)) else math.nan
    norm = _number(logged.get("grad_norm"))
    wanted = len(trained) // 2 if lora else len(trained)
    whole = outcome.steps == 1 and outcome.skipped == 0 and outcome.failure is None
    return Found(
        f"|Δlogp| max {largest:.1e}, |gradient| {norm:.2g}, {len(moved)} of {len(trained)} trained tensors moved"
        + "".join(f", {why}" for why in outcome.causes),
        f"|Δlogp| max < {DLOGP:g}, gradient finite and not 0, {wanted} moved",
        whole and largest < DLOGP and math.isfinite(norm) and norm > 0 and len(moved) >= wanted and moved <= trained,
    )


def memory(bench: Bench) -> Found:
    """Told, not judged: how it is counted depends on the device (`rl.device.memory_bytes`)."""
    from rl.rollouts.device import peak_memory_bytes

    mib = 1024**2
    after, mlx = devices.memory_bytes(bench.device) / mib, peak_memory_bytes() / mib
    return Found(f"{bench.memory / mib:,.0f} MiB before, {after:,.0f} after; MLX's peak {mlx:,.0f}", "none", True)


def _config(
    bench: Bench, algorithm: Literal["sft", "grpo"], lora: bool, shared: bool = False, dtype: Any = None
) -> configs.Config:
    """A run of one step on a random character-level Llama; `dtype` of the sampler, None for the backend's own."""
    args: dict[str, Any] = {
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "save_strategy": "no",
    }
    return configs.Config(
        path=Path("smoke test"),
        run=configs.Run(name="smoke", seed=SEED, device=bench.device.type),
        model=configs.Model(
            base="tiny",
            tiny=configs.TinyModel(hidden=64, layers=2, heads=4, intermediate=128),
            lora=configs.Lora(rank=4, alpha=8.0) if lora else None,
            quantization=configs.Quantization(bits=4, group_size=32) if shared else None,
        ),
        data=configs.Data(source="arithmetic", form="char", train_size=32, max_a=99),
        rollout=configs.Rollout(
            precision="shared" if shared else "full", dtype=dtype, max_completion_length=8, max_batch=8
        ),
        trainer=configs.Trainer(
            algorithm=algorithm, args=args | ({"num_generations": 4} if algorithm == "grpo" else {})
        ),
        eval=configs.Eval(size=8),
    )


def _both_sides(bench: Bench, config: configs.Config) -> tuple[Any, Any, Any, list[int]]:
    """(policy, sampler, tokenizer, ids that end a completion) as a run loads them."""
    from rl import models, start
    from rl.algorithms import seam

    begin = start.find(config, bench.folder, None)
    tokenizer = models.load_tokenizer(begin.base)
    policy = start.load_policy(config, begin, bench.device)
    stop_ids = seam.stop_ids(tokenizer, ())
    return policy, start.load_sampler(config, begin, policy, tokenizer, stop_ids), tokenizer, stop_ids


def _number(value: float | None) -> float:
    """A logged value; the recorder writes None for what was not finite, and that is no number."""
    return float("nan") if value is None else float(value)
