"""`python -m rl plan`: what a config needs and takes, on this machine or another, and a verdict."""

from collections.abc import Sequence
from pathlib import Path

from rl import config as configs
from rl.device import GIB
from rl.errors import UserError
from rl.plan import machine as machines
from rl.plan.machine import Machine
from rl.plan.verdict import Plan, fitting, make

ROOT = Path()


def main(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    memory: str | None = None,
    chip: str | None = None,
    prompt: int | None = None,
) -> int:
    """Print the plan of a config; 0 when it fits as it is, 1 when not. Raises UserError for what cannot be planned."""
    config = configs.load(path, overrides)
    machine = machines.named(chip, memory, config.run.device)
    plan = make(config, machine, ROOT, prompt)
    print(describe(plan))
    if plan.fits:
        print("\nverdict: fits")
        return 0
    print("\nverdict: " + _remedy(path, overrides, machine, prompt))
    return 1


def refuse(path: Path, overrides: Sequence[str]) -> None:
    """Raise UserError when the run of a config would not fit this machine; one that cannot be planned may go on."""
    config = configs.load(path, overrides)
    machine = machines.this(config.run.device, timed=False)
    try:
        plan = make(config, machine, ROOT)
    except UserError:
        return  # what is wrong with the model is said better where it is loaded
    if plan.fits:
        return
    from rl.plan import prompts

    counted = prompts.longest(config, ROOT)  # some seconds: an assumption is not to refuse a run
    if counted is not None:
        plan = make(config, machine, ROOT, counted)
    if not plan.fits:
        known = "" if counted is None else f" with prompts of {counted} tokens, counted,"
        gives = f"{machine.usable / GIB:.1f} of {machine.memory / GIB:.0f} ({machine.reserve})"
        raise UserError(
            f"{path}:{known} needs about {plan.needed / GIB:.1f} GiB and this machine gives {gives}: "
            f"{_remedy(path, overrides, machine, counted)}; `plan` shows the parts, --force trains all the same"
        )


def describe(plan: Plan) -> str:
    """The plan as lines of text; sizes in GiB."""
    shape, work, machine = plan.shape, plan.work, plan.machine
    method = "all weights" if not work.lora_rank else f"LoRA of rank {work.lora_rank}"
    if work.bits:
        method += f" on a {work.bits}-bit base"
    lines = [
        f"{plan.config.path}: {plan.config.model.base or plan.config.model.from_}, {_count(shape.parameters)} "
        f"parameters ({shape.family}), {work.algorithm}, {method}",
        f"{work.rows} rows a micro-batch, {work.micro_steps} a step, {work.length} tokens a row; {work.assumed}; "
        f"completions of at most {work.completion}",
        "",
        f"trainer (torch), fullest at {plan.peaks.moment}",
        *_parts(plan.peaks.trainer),
    ]
    if plan.peaks.sampler:
        lines += ["sampler (MLX)", *_parts(plan.peaks.sampler)]
    slack = plan.needed - plan.peaks.total
    lines += [f"  {'allocator slack':22} {slack / GIB:8.2f}", f"  {'all of it':22} {plan.needed / GIB:8.2f}", ""]
    name = f"{machine.name} with {machine.memory / GIB:.0f} GiB"
    lines.append(f"{name}: {machine.usable / GIB:.1f} GiB usable ({machine.reserve})")
    if plan.seconds is None:
        lines.append(f"time: unknown, {machine.name} is {machine.source}")
    else:
        s = plan.seconds
        lines.append(
            f"a step takes about {_time(s.step)} (rollout {_time(s.rollout)}, sync {_time(s.sync)}, learner "
            f"{_time(s.learner)}, optimizer {_time(s.optimizer)}): {machine.source}"
        )
    return "\n".join(lines)


def _remedy(path: Path, overrides: Sequence[str], machine: Machine, prompt: int | None) -> str:
    more = fitting(path, overrides, machine, ROOT, prompt)
    if more is None:
        return "use a larger machine: no setting tried makes it fit"
    return "fits with " + " ".join(f"--set {override}" for override in more)


def _parts(parts: dict[str, float]) -> list[str]:
    return [f"  {name:22} {size / GIB:8.2f}" for name, size in parts.items() if size >= GIB / 200]


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def _time(seconds: float) -> str:
    if seconds < 0.01:
        return "0 s"
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 180 * 60 else f"{seconds / 3600:.1f} h"
