"""Does it fit; if not, which settings would: found by trying, the least harm first, each try a config that checks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from rl import config as configs
from rl import trl_fields
from rl.algorithms import GROUPED
from rl.config import Config
from rl.errors import UserError
from rl.plan import architecture, memory, time, workload
from rl.plan.architecture import Architecture
from rl.plan.machine import Machine
from rl.plan.workload import Workload


@dataclass(frozen=True)
class Plan:
    """A config on a machine: what it needs, in bytes, and how long a step takes (None where speeds are unknown)."""

    config: Config
    shape: Architecture
    work: Workload
    machine: Machine
    peaks: memory.Prediction
    seconds: time.Seconds | None

    @property
    def needed(self) -> float:
        """Bytes with the allocators' slack."""
        return self.machine.needs(self.peaks.torch, self.peaks.mlx)[0]

    @property
    def fits(self) -> bool:
        """Whether all of it, and torch's part, stay below what the machine gives."""
        needed, own = self.machine.needs(self.peaks.torch, self.peaks.mlx)
        return needed <= self.machine.usable and own <= self.machine.torch_limit


def make(config: Config, machine: Machine, root: Path, prompt: int | None = None) -> Plan:
    """The plan of `config`; `prompt` in tokens where the caller knows better. Raises UserError as `find` does."""
    shape = architecture.find(config, root)
    work = workload.of(config, prompt=prompt, converted=architecture.converted(config, root))
    peaks = memory.predict(shape, work, machine.device)
    weights = peaks.sampler.get("sampler weights", peaks.trainer["trainer weights"])
    return Plan(config, shape, work, machine, peaks, time.predict(shape, work, machine, weights))


def fitting(
    path: Path, overrides: Sequence[str], machine: Machine, root: Path, prompt: int | None = None
) -> list[str] | None:
    """The settings to add so that the run fits, None when none of those tried does."""
    config = configs.load(path, overrides)
    for ways in _ladder(config):
        if not _fits(path, [*overrides, *ways[-1]], machine, root, prompt):
            continue  # not even in the smallest pieces
        return next(more for more in ways if _fits(path, [*overrides, *more], machine, root, prompt))
    return None


def _fits(path: Path, overrides: list[str], machine: Machine, root: Path, prompt: int | None) -> bool:
    try:
        return make(configs.load(path, overrides), machine, root, prompt).fits
    except UserError:
        return False  # the file says something that does not go with it


def _ladder(config: Config) -> Iterator[list[list[str]]]:
    """Sets of overrides, from those that change nothing but speed to those that change what is trained; each with its
    batches from the largest to the smallest."""
    lora, quantization, algorithm = config.model.lora, config.model.quantization, config.trainer.algorithm
    adapter = [] if lora is not None else ["model.lora.rank=16"]
    methods: list[list[str]] = [[]]
    if algorithm != "reward":
        methods += [adapter] if adapter else []
        coarser = (8, 4) if quantization is None else (4,) if quantization.bits == 8 else ()
        methods += [[*adapter, f"model.quantization.bits={bits}"] for bits in coarser]
    half = config.rollout.max_completion_length // 2
    shorter = [[], [f"rollout.max_completion_length={half}"]] if half >= 32 else [[]]
    checkpointed = config.trainer.args.get("gradient_checkpointing")
    ways = [[]] if checkpointed else [[], ["trainer.gradient_checkpointing=true"]]
    widths = [[], ["rollout.max_batch=32"]] if config.rollout.max_batch > 32 else [[]]
    batches = list(_batches(config))
    for method, length, way, width in product(methods, shorter, ways, widths):
        yield [[*batch, *width, *way, *length, *method] for batch in batches]


def _batches(config: Config) -> Iterator[list[str]]:
    """The same rows a step in ever smaller pieces."""
    algorithm, args = config.trainer.algorithm, config.trainer.args
    rows = trl_fields.value(algorithm, args, "per_device_train_batch_size")
    pieces = trl_fields.value(algorithm, args, "gradient_accumulation_steps")
    smaller, factor = rows, 1
    yield []
    while smaller % 2 == 0:
        smaller, factor = smaller // 2, factor * 2
        batch = [
            f"trainer.per_device_train_batch_size={smaller}",
            f"trainer.gradient_accumulation_steps={pieces * factor}",
        ]
        if algorithm in GROUPED and args.get("steps_per_generation"):
            batch.append(f"trainer.steps_per_generation={args['steps_per_generation'] * factor}")
        yield batch
