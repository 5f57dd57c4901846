"""`nox -s bench`: rollouts, sync and the parts of a GRPO step, against what they replace, on this machine.

One process, contestants in turns, ratios within a repetition. Nothing is timed before the contestants have agreed on
greedy completions with the trainer's own logits, and nothing counts whose lengths are not the forced ones.
"""

import gc
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl import bench_table as tables
from rl import config as configs
from rl import device as devices
from rl import files, record
from rl.bench_models import Subject, sizes_of, subject
from rl.bench_table import BATCH, ENGINE, HF, Contest, Report, Sizes, Steps, Sync, Work
from rl.errors import RunFailed

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("rollouts", "sync", "step")
PACKAGES = ("torch", "mlx", "mlx-lm", "transformers", "trl", "peft", "accelerate", "numpy")
TORCH_DEVICE = {"cpu": "cpu", "cuda": "cuda", "metal": "mps"}  # of MLX's backends
SEED = 0
GREEDY_TOKENS = 16  # a row, for the agreement
TAIL = 4  # completions of the long-tailed work end, on average, at about 1/TAIL of the longest


@dataclass(frozen=True)
class Setting:
    """What holds for the whole bench. `prompt` and `new` in tokens."""

    device: "torch.device"
    dtype: str
    quick: bool
    repeats: int
    folder: Path
    say: Callable[[str], None]

    @property
    def prompt(self) -> int:
        return 32 if self.quick else 256

    @property
    def new(self) -> int:
        return 16 if self.quick else 128


def main(
    shapes: Sequence[str] = ("tiny",),
    *,
    quick: bool = False,
    repeats: int | None = None,
    dtype: str | None = None,
    parts: Sequence[str] = PARTS,
    root: Path = ROOT,
) -> int:
    """Bench `shapes` and write `root/build/bench-<device>.md` and `.json`, also after each shape. Returns 0.

    Raises RunFailed when contestants disagree, or torch lacks the device that MLX runs on.
    """
    from rich.console import Console

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before its import: TRL reports every trainer to the hub
    from rl.rollouts import device as mlx_device

    backend = mlx_device.backend()
    device = devices.pick(TORCH_DEVICE[backend]) if TORCH_DEVICE[backend] in devices.available() else None
    if device is None:
        raise RunFailed(f"bench: MLX runs on {backend}, and torch has no such device here: they must share one")
    devices.prepare(device)
    import rl.train

    rl.train.quiet()
    dtype = dtype or ("float32" if backend == "cpu" else "float16")
    repeats = repeats or (2 if quick else 5)
    command = ["nox -s bench --", *(f"--shape {shape}" for shape in shapes), *(["--quick"] if quick else [])]
    command += [
        f"--repeats {repeats} --dtype {dtype}",
        *(f"--part {part}" for part in parts if len(parts) < len(PARTS)),
    ]
    about = _about(" ".join(command), device, root)
    (root / "build").mkdir(parents=True, exist_ok=True)
    console, reports = Console(), []
    with tempfile.TemporaryDirectory(prefix="bench-", dir=root / "build") as folder, console.status("") as status:
        setting = Setting(device, dtype, quick, repeats, Path(folder), lambda text: status.update(f"{text} ..."))
        for shape in shapes:
            setting.say(f"{shape}: model and prompts")
            reports.append(bench(subject(shape, setting.prompt, setting.folder, root), setting, parts))
            _write(root / "build" / f"bench-{device.type}", reports, about)
    print((root / "build" / f"bench-{device.type}.md").read_text(), end="")
    print(f"\nwritten to build/bench-{device.type}.md and .json")
    return 0


def bench(subject: Subject, setting: Setting, parts: Sequence[str]) -> Report:
    """Everything about one model; `parts` of it."""
    import torch

    from rl import models
    from rl.rollouts import sampler as samplers

    reference = models.load_policy(subject.base, torch.float32, setting.device)
    never = reference.config.vocab_size  # one past the last token: nothing ends early
    sampler = samplers.build(
        subject.base.path, precision="full", dtype=setting.dtype, eos_ids=[never], context=None, max_batch=256
    )
    setting.say(f"{subject.shape}: agreement")
    sampler.check(reference, never)
    same = setting.dtype == "float32"
    policy = reference if same else models.load_policy(subject.base, setting.dtype, setting.device)
    agreements = agree(subject, setting, reference, policy, sampler.model, never)
    sizes = sizes_of(policy)
    setting.say(f"{subject.shape}: bandwidth, sums and launches of this machine")
    machine = measure_machine(setting, sampler.model)
    contests = []
    if "rollouts" in parts:
        for work in works(setting):
            contests.append(contest(work, subject, setting, policy, sampler.model, never, sizes, machine))
    parameters = sum(p.numel() for p in reference.parameters())
    del policy, sampler
    syncs = sync_times(subject, setting, reference) if "sync" in parts else []
    del reference
    _free(setting.device)
    return Report(
        shape=subject.shape,
        parameters=parameters,
        device=setting.device.type,
        dtype=setting.dtype,
        full=not setting.quick,
        agreements=agreements,
        machine=machine,
        contests=contests,
        syncs=syncs,
        steps=step_times(subject, setting) if "step" in parts else [],
    )


def works(setting: Setting) -> list[Work]:
    """GRPO-shaped rollouts, and prompts that no two rows share, where an engine for groups must not lose."""
    sizes = (setting.prompt, setting.new)
    return [
        Work("8 × 8", 8, 8, *sizes),
        Work("1 × 16", 1, 16, *sizes),
        Work("8 × 8, long tail", 8, 8, *sizes, long_tail=True),
        Work("16 × 1", 16, 1, *sizes),
    ]


def agree(
    subject: Subject, setting: Setting, reference: Any, policy: Any, model: Any, never: int
) -> list[tables.Agreement]:
    """Greedy completions of every contestant on 4 prompts, each twice, judged by the trainer's logits in float32.

    Raises RunFailed where one falls short of the best tokens, or gives other logprobs, by more than its dtype explains.
    """
    from rl.rollouts import bench as contestants
    from rl.rollouts.parity import TOLERANCE

    prompts = [p for p in subject.prompts[:4] for _ in range(2)]
    new = min(GREEDY_TOKENS, setting.new)
    ours = contestants.engine(model, prompts, new, ending=[never], temperature=0.0)
    batch = contestants.batch_generator(model, prompts, [new] * 8, temperature=0.0, logprobs=True)
    hf = contestants.hf_generate(policy, prompts, [new] * 8, temperature=0.0)
    answers = {
        ENGINE: ([c.tokens for c in ours], [c.logprobs for c in ours]),
        BATCH: ([c.tokens for c in batch], [c.logprobs for c in batch]),
        HF: (hf, None),
    }
    found = []
    for name, (tokens, logprobs) in answers.items():
        one = judge(name, reference, prompts, tokens, logprobs)
        limit = TOLERANCE[setting.dtype]
        if not (one.regret <= limit and (one.dlogp is None or one.dlogp <= limit)):
            raise RunFailed(
                f"bench: {name} is not the same policy: its greedy tokens are {one.regret:.2g} below the best, its "
                f"logprobs {one.dlogp} off (at most {limit} in {setting.dtype})"
            )
        found.append(one)
    return found


def judge(
    name: str,
    reference: Any,
    prompts: list[list[int]],
    tokens: list[list[int]],
    logprobs: list[list[float]] | None,
) -> tables.Agreement:
    """Completions of one length against the logits of `reference` on the same text."""
    import torch

    new = len(tokens[0])
    device = next(reference.parameters()).device
    ids = torch.tensor([p + t for p, t in zip(prompts, tokens, strict=True)], device=device)
    with torch.no_grad():
        logits = reference(input_ids=ids, logits_to_keep=new + 1, use_cache=False).logits[:, :-1].float()
    exact = logits.log_softmax(-1)
    chosen = exact.gather(-1, ids[:, -new:, None])[..., 0]
    short = exact.max(-1).values - chosen
    off = None
    if logprobs is not None:
        off = (torch.tensor(logprobs, device=device) - chosen).abs().mean().item()
    return tables.Agreement(name, ids.shape[0] * new, short.mean().item(), off, (short == 0).float().mean().item())


def ending_ids(tokens: Sequence[int], share: float) -> list[int]:
    """Ids that together make up at least `share` of `tokens`: whoever ends there has completions with a long tail."""
    import numpy as np

    ids, counts = np.unique(np.asarray(tokens), return_counts=True)
    order = np.random.default_rng(SEED).permutation(len(ids))
    needed = int(np.searchsorted(np.cumsum(counts[order]), share * len(tokens))) + 1
    return sorted(int(i) for i in ids[order[:needed]])


def contest(
    work: Work,
    subject: Subject,
    setting: Setting,
    policy: Any,
    model: Any,
    never: int,
    sizes: Sizes,
    machine: tables.Machine,
) -> Contest:
    """Rollouts of `work` in turns. The engine goes first; its lengths are the others' limits, row by row."""
    from rl.rollouts import bench as contestants

    prompts = [p for p in subject.prompts[: work.prompts] for _ in range(work.group)]
    ending = [never]
    if work.long_tail:
        probe = contestants.engine(model, prompts, min(32, work.max_tokens), ending=[never], seed=SEED)
        ending = ending_ids([t for c in probe for t in c.tokens], TAIL / work.max_tokens)
    found = Contest(work, [], [], {ENGINE: [], BATCH: [], HF: []}, [])
    for repeat in range(-1, setting.repeats):
        # MLX compiles at the first sight of a kind of batch, on a CPU one of a single row too: the tail has all of them
        short = repeat < 0 and setting.device.type == "cpu" and not work.long_tail
        most = min(8, work.max_tokens) if short else work.max_tokens
        limits: list[int] = []
        for name in (ENGINE, BATCH, HF):
            turn = "warm-up" if repeat < 0 else f"{repeat + 1} of {setting.repeats}"
            setting.say(f"{subject.shape}: rollout {work.name}, {name}, {turn}")
            gc.collect()
            seed, started = SEED + 1 + repeat, time.perf_counter()
            if name == ENGINE:
                done = [c.tokens for c in contestants.engine(model, prompts, most, ending=ending, seed=seed)]
            elif name == BATCH:
                done = [c.tokens for c in contestants.batch_generator(model, prompts, limits, seed=seed)]
            else:
                done = contestants.hf_generate(policy, prompts, limits, seed=seed)
            seconds = time.perf_counter() - started
            lengths = [len(tokens) for tokens in done]
            limits = limits or lengths
            if lengths != limits or (not work.long_tail and set(lengths) != {most}):
                raise RunFailed(f"bench: {name} gave {sum(lengths)} new tokens in {work.name}, not {sum(limits)}")
            if repeat >= 0:
                found.seconds[name].append(seconds)
        if repeat >= 0:
            found.tokens.append(sum(limits))
            found.longest.append(max(limits))
            found.floors.append(tables.floor(sizes, machine, work.prompts, work.prompt_tokens, limits))
    return found


def measure_machine(setting: Setting, model: Any) -> tables.Machine:
    """Best of five: a copy larger than any cache, a large product in the bench's dtype, a chain of small operations."""
    import torch

    from rl.rollouts import bench as contestants

    device, dtype = setting.device, getattr(torch, setting.dtype)
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)

    def best(work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(6):
            started = time.perf_counter()
            work()
            wait()
            seconds.append(time.perf_counter() - started)
        return min(seconds[1:])

    source = torch.ones((8 if setting.quick else 64) << 20, device=device)
    target = torch.empty_like(source)
    copied = best(lambda: target.copy_(source))
    size = 512 if setting.quick else 2048 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    product = best(lambda: a @ a)
    rows = 64
    return tables.Machine(
        bandwidth=2 * source.numel() * source.element_size() / copied,
        flops=2 * size**3 / product,
        launch=contestants.launch_seconds(),
        launches=contestants.launches(model, rows),
    )


def sync_times(subject: Subject, setting: Setting, policy: Any) -> list[Sync]:
    """Hand-overs of all weights, then of a LoRA adapter on all layers, from a float32 trainer on the device.

    Wraps `policy` with the adapter, so that it is of no use afterwards.
    """
    from rl import models
    from rl.rollouts import sampler as samplers

    found = []
    for what in ("all weights", f"LoRA rank {configs.Lora().rank}"):
        setting.say(f"{subject.shape}: sync, {what}")
        if what != "all weights":
            policy = models.add_lora(policy, configs.Lora())
        sampler = samplers.build(
            subject.base.path, precision="full", dtype=setting.dtype, eos_ids=[0], context=None, max_batch=256
        )
        reports = [sampler.sync(policy) for _ in range(1 + 2 * setting.repeats)][1:]
        found.append(Sync(what, reports[0].tensors, reports[0].bytes, [r.seconds for r in reports]))
    return found


def step_times(subject: Subject, setting: Setting) -> list[Steps]:
    """GRPO steps of this project and of stock TRL: LoRA on all layers, and for the tiny model all weights too.

    Batches are 8 × 8 where their activations fit: 2 × 4 for SmolLM2 on a CPU, 2 × 8 for 1.7B.
    """
    from rl.algorithms import bench as algorithms

    small = {"smollm2": (2, 4) if setting.device.type == "cpu" else (8, 8), "1.7b": (2, 8)}
    prompts, group = small.get(subject.shape, (8, 8))
    found = []
    for lora in (configs.Lora(), None) if subject.shape == "tiny" else (configs.Lora(),):
        kind = "all weights" if lora is None else f"LoRA rank {lora.rank}"
        work = algorithms.StepWork(
            prompts=subject.texts[:prompts], group=group, max_tokens=setting.new, lora=lora, sampler_dtype=setting.dtype
        )
        seconds = algorithms.run(
            subject.base,
            subject.tokenizer,
            setting.device,
            setting.folder,
            work,
            setting.repeats,
            lambda text, kind=kind: setting.say(f"{subject.shape}: {text}, {kind}"),
        )
        found.append(Steps(kind, prompts, group, setting.prompt, setting.new, seconds))
        _free(setting.device)
    return found


def _free(device: "torch.device") -> None:
    """Give back what the last contestants held, so that the next start alike."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    devices.empty_cache(device)


def _about(command: str, device: "torch.device", root: Path) -> dict[str, str]:
    import torch

    from rl.doctor import chip
    from rl.rollouts.device import describe

    mlx = describe()
    system = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.platform(terse=True)
    git = record.git_state(root)
    commit = "unknown" if git is None else f"{git['commit']}{', with changes not committed' if git['dirty'] else ''}"
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in record.versions(PACKAGES).items())
    return {
        "command": f"`{command}`",
        "machine": f"{chip()}, {devices.cores()} cores, {devices.total_memory_bytes() / devices.GIB:.1f} GiB",
        "devices": f"torch {devices.describe(device)}, {torch.get_num_threads()} threads; MLX {mlx['backend']}",
        "system": f"{system}, {platform.machine()}, Python {platform.python_version()}",
        "packages": versions,
        "commit": commit,
        "time": record.now(),
    }


def _write(path: Path, reports: Sequence[Report], about: dict[str, str]) -> None:
    """The table, and beside it everything it was made from."""
    files.write_text(path.with_suffix(".md"), tables.markdown(reports, [f"{k}: {v}" for k, v in about.items()]))
    judged = [{"shape": r.shape, **asdict(bar), "met": bar.met} for r in reports for bar in tables.bars(r)]
    value = {"about": about, "reports": [asdict(r) for r in reports], "bars": judged}
    files.write_json(path.with_suffix(".json"), record.finite(value))
