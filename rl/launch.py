"""`python -m rl train CONFIG --accelerate FILE`: the same run, in processes that accelerate starts as FILE says.

FILE is one of accelerate's own (`accelerate config` writes such files, configs/accelerate/ has some). It is checked
here, with the run's config, before anything is started. Its `mixed_precision` becomes `[trainer] bf16` or `fp16`, so
that the run's record says what was computed, and its device becomes `[run] device`.

`accelerate launch` starts several CPU processes through MPI only; those (MULTI_CPU) are torch's own launcher's.
"""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rl import config as configs
from rl import processes
from rl.algorithms import PREFERENCES
from rl.config import Config
from rl.config.reading import nearest
from rl.errors import UserError

Kind = Literal["NO", "MULTI_CPU", "MULTI_GPU", "FSDP"]
KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")
# rows are there before the first step: each process takes its share of them
OFFLINE = ("sft", "bon", *(name for name in PREFERENCES if name != "reward"))
# each process samples for its own share of the prompts, on its own device, with a sampler of its own
SAMPLING = ("grpo", "dr_grpo", "gspo", "cispo", "sapo", "rloo")
# trainers whose weights, checkpoints and reference FSDP is known to hold together here
SHARDED = ("sft", "bon")
TAIL = 25  # lines of a crash that are shown
# accelerate's other ways of training, none of which a run here has been made for
FOREIGN = ("deepspeed_config", "megatron_lm_config", "fp8_config", "parallelism_config", "mpirun_config", "tpu_name")


@dataclass(frozen=True)
class Launch:
    """What a file of accelerate asks for."""

    path: Path
    kind: Kind
    processes: int
    precision: str  # no, fp16, bf16
    cpu: bool


def main(
    config: Path,
    overrides: Sequence[str],
    file: Path,
    *,
    resume: bool = False,
    restart: bool = False,
    force: bool = False,
    seeds: Sequence[int] | None = None,
) -> int:
    """Check both files, start the run's processes and wait; returns the run's exit code.

    Ctrl-C and SIGTERM go to the processes, which save and stop as a single one does. Raises UserError (2) for a file
    that is wrong and for what cannot work in several processes.
    """
    launch = read(file)
    more = [*overrides, *settings(launch, configs.load(config, overrides))]
    check(launch, configs.load(config, more), config)
    if not force and launch.kind != "FSDP":  # a plan knows one machine; there each process holds a part
        from rl.plan import command

        command.refuse(config, more)
    asked = ["train", str(config), "--force", *(part for text in more for part in ("--set", text))]
    asked += ["--resume"] * resume + ["--restart"] * restart
    asked += ["--seeds", ",".join(map(str, seeds))] if seeds else []
    return _run(launch, asked)


def read(path: Path) -> Launch:
    """The file, checked. Raises UserError: one line with the file, the key, what was found and what is valid."""
    import yaml

    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        beside = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = nearest(path.name, beside) if beside else "configs/accelerate/ has some"
        raise UserError(f"{path}: no such file; {hint}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a YAML file: {' '.join(str(error).split())[:160]}") from None
    if not isinstance(told, dict):
        raise UserError(f"{path}: found {type(told).__name__}, valid: accelerate's keys, e.g. distributed_type: 'NO'")
    known, sharding = _keys()
    for key in told:
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}, {nearest(str(key), known)}")
        if key in FOREIGN and told[key]:
            raise UserError(f"{path}: {key}: not used here, valid: distributed_type {', '.join(KINDS)}")
    for key in told.get("fsdp_config") or {}:
        if key not in sharding:
            raise UserError(f"{path}: fsdp_config: unknown key {key!r}, {nearest(str(key), sharding)}")
    _one_of(path, told, "compute_environment", ("LOCAL_MACHINE",), "LOCAL_MACHINE")
    _one_of(path, told, "num_machines", (1,), 1)
    if "distributed_type" not in told:
        raise UserError(f"{path}: missing key 'distributed_type', valid: {', '.join(KINDS)}")
    kind = _one_of(path, told, "distributed_type", KINDS, None)
    precision = _one_of(path, told, "mixed_precision", ("no", "fp16", "bf16"), "no")
    cpu = _one_of(path, told, "use_cpu", (True, False), False)
    many = told.get("num_processes", 1 if kind == "NO" else None)
    if type(many) is not int or many < 1 or (kind == "NO" and many != 1):
        valid = "1 for distributed_type NO" if kind == "NO" else "a whole number ≥ 1"
        raise UserError(f"{path}: num_processes: found {many!r}, valid: {valid}")
    if kind == "MULTI_CPU" or cpu:
        if kind not in ("NO", "MULTI_CPU") or not cpu:
            raise UserError(f"{path}: use_cpu: found {cpu}, which does not go with distributed_type {kind}")
        if precision == "fp16":
            raise UserError(f"{path}: mixed_precision: found 'fp16', which accelerate leaves out on a CPU, valid: bf16")
    if kind == "FSDP" and str((told.get("fsdp_config") or {}).get("fsdp_version")) != "2":
        raise UserError(f"{path}: fsdp_config: fsdp_version: found no 2, valid: 2 (weights come back whole from it)")
    return Launch(path, kind, many, precision, cpu)


def settings(launch: Launch, config: Config) -> list[str]:
    """The file's precision and device as settings of the run. Raises UserError where the config says otherwise."""
    found = []
    half = {name for name in ("bf16", "fp16") if config.trainer.args.get(name)}
    if launch.precision != "no":
        if half - {launch.precision}:
            raise UserError(
                f"{launch.path}: mixed_precision: found {launch.precision!r}, and {config.path}: [trainer] "
                f"{half.pop()} = true: say one of them"
            )
        found += [f"trainer.{launch.precision}=true"] if not half else []
    device = "cpu" if launch.cpu else "cuda" if launch.kind in ("MULTI_GPU", "FSDP") else None
    if device and config.run.device not in ("auto", device):
        raise UserError(
            f"{launch.path}: trains on {device}, and {config.path}: [run] device = {config.run.device!r}: say one"
        )
    return found + ([f"run.device={device}"] if device and config.run.device != device else [])


def check(launch: Launch, config: Config, path: Path) -> None:
    """Refuse what cannot work in several processes, in `config` and in what it builds on. Raises UserError."""
    if launch.processes == 1 and launch.kind != "FSDP":
        return
    algorithm, engine = config.trainer.algorithm, config.rollout.engine
    where = f"{path}: [trainer] algorithm {algorithm!r}"
    if algorithm not in (*OFFLINE, *SAMPLING):
        raise UserError(
            f"{where}: not in several processes (it compares or resamples across the whole batch), "
            f"valid there: {', '.join((*OFFLINE, *SAMPLING))}"
        )
    if launch.kind == "FSDP" and algorithm not in SHARDED:
        raise UserError(
            f"{where}: not with FSDP, where no process holds whole weights to sample from or to compare with, "
            f"valid there: {', '.join(SHARDED)}; with whole weights on each card: distributed_type MULTI_GPU"
        )
    if algorithm in SAMPLING and engine == "torch":
        raise UserError(f"{where}: [rollout] engine 'torch' draws the same on every process, valid there: 'mlx'")
    if config.rollout.tools or config.rollout.environment is not None:
        raise UserError(f"{path}: [rollout] tools and environment: not in several processes, whose turns would differ")
    for other in configs.builds_on(config).values():
        check(launch, configs.load(other), other)


def command(launch: Launch, asked: Sequence[str]) -> list[str]:
    """The command line that starts the processes, each of them `python -m rl` with the arguments `asked`."""
    if launch.kind == "MULTI_CPU":
        many = ["--standalone", "--nproc-per-node", str(launch.processes)]
        return [sys.executable, "-m", "torch.distributed.run", *many, "-m", "rl", *asked]
    front = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch.path.resolve()), "--quiet"]
    return [*front, "-m", "rl", *asked]


def _run(launch: Launch, asked: Sequence[str]) -> int:
    from rl.device import cores

    control = Path(tempfile.mkdtemp(prefix="duet-launch-"))
    environment = os.environ | {
        processes.CONTROL: str(control),
        processes.COMMAND: " ".join(["nox -s train --", *sys.argv[sys.argv.index("train") + 1 :]])
        if "train" in sys.argv
        else "",
        # accelerate gives each process a single thread unless told
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // launch.processes))),
    }
    if launch.kind == "MULTI_CPU":
        environment["ACCELERATE_USE_CPU"] = "true"
    try:
        with (control / "log").open("wb") as log:
            # a session of its own: Ctrl-C comes here alone, since launchers die of it before a run has saved
            child = subprocess.Popen(command(launch, asked), env=environment, stderr=log, start_new_session=True)
            _wait(child, control)
        return _code(child.returncode, control)
    finally:
        shutil.rmtree(control, ignore_errors=True)


def _wait(child: "subprocess.Popen[bytes]", control: Path) -> None:
    """Until the launcher is gone; signals go on to the processes it started."""

    def forward(number: int, _frame: Any) -> None:
        pids = [int(path.read_text()) for path in control.glob("*.pid")]
        if not pids:  # still loading: there is nothing to save
            os.killpg(child.pid, signal.SIGTERM)
            (control / "0.code").write_text(str(processes.INTERRUPTED))
            (control / "0.line").write_text("interrupted\n")
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    before = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _code(returned: int, control: Path) -> int:
    """The main process's exit code, or another's that is not 0, with its line on stderr; 1 for a crash."""
    codes = {int(path.stem): int(path.read_text()) for path in control.glob("*.code")}
    bad = next((number for number in sorted(codes) if codes[number]), None)
    if bad is not None:
        line = control / f"{bad}.line"
        if line.exists():
            print(line.read_text(), end="", file=sys.stderr)
        return codes[bad]
    if returned == 0 and 0 in codes:
        return 0
    lines = (control / "log").read_text(encoding="utf-8", errors="replace").splitlines()
    told = f"failed: the run's processes ended without a result ({returned}); --resume goes on from its last checkpoint"
    print("\n".join([*lines[-TAIL:], told]), file=sys.stderr)
    return 1


def _one_of(path: Path, told: dict[str, Any], key: str, valid: Sequence[Any], default: Any) -> Any:
    found = told.get(key, default)
    found = default if found is None else found
    if found not in valid or type(found) is not type(valid[0]):
        shown = ", ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in valid)
        quoted = ", in quotes" if isinstance(found, bool) and isinstance(valid[0], str) else ""
        raise UserError(f"{path}: {key}: found {found!r}, valid: {shown}{quoted}")
    return found


def _keys() -> tuple[list[str], list[str]]:
    """Keys of accelerate's files and of their `fsdp_config`, read from its sources: importing it imports torch."""
    import importlib.util

    spec = importlib.util.find_spec("accelerate")
    if spec is None or spec.origin is None:
        raise UserError("the package 'accelerate' is not installed: run `uv sync --locked`")
    commands = Path(spec.origin).parent / "commands"
    tree = ast.parse((commands / "config" / "config_args.py").read_text(encoding="utf-8"))
    known = [
        item.target.id
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name in ("BaseConfig", "ClusterConfig")
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    ]
    options = re.findall(r'"--(fsdp_\w+)"', (commands / "launch.py").read_text(encoding="utf-8"))
    return known, sorted(set(options))
