"""The processes of one run without their launcher, forked from a program that has imported everything once.

A launch of two processes spends its time in importing torch and trl twice; these start in a blink, so that a test can
start, break and resume runs. Each is what `rl.launch` starts: `python -m rl` with a rank and a control folder.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2
# what a run of two steps imports, most of it late
WANTED = [
    "accelerate.utils.fsdp_utils",
    "matplotlib.pyplot",
    "mlx_lm.models.llama",
    "torch.distributed.tensor",
    "transformers.models.llama.modeling_llama",
    "rl.algorithms.grpo",
    "rl.algorithms.sft",
    "rl.curriculum",
    "rl.measure",
    "rl.pairs",
    "rl.rollouts.sampler",
]
Run = Callable[..., list[int | None]]


@contextlib.contextmanager
def ranks(log: Path) -> Iterator[Run]:
    """A function `run(folder, name, *more, breaks=None, fsdp=None)`, which trains `folder`/x.toml in two processes.

    It returns the exit code that each has left, None for one that died. `more` are further arguments of `train`,
    `breaks` is (rank, step, name of a signal): what that rank gets as it logs that step. `fsdp` is the environment
    that accelerate's launcher makes of a file for FSDP. What the processes print goes to `log`.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as told:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.ranks_helper"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=told,
            text=True,
        )

    def run(folder: Path, name: str, *more: str, **given: Any) -> list[int | None]:
        asked = {"folder": str(folder), "arguments": ["--set", f"run.name={name}", *more], **given}
        print(json.dumps(asked), file=server.stdin, flush=True)
        line = server.stdout.readline()
        assert line, log.read_text()
        return json.loads(line)

    try:
        yield run
    finally:
        server.stdin.close()
        server.wait(10)


def _serve() -> None:
    """Answer each line of stdin, one run, with a line of exit codes."""
    for module in WANTED:
        importlib.import_module(module)
    gc.freeze()  # what was imported is never looked through again, nor copied for it
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what runs print is no answer
    for line in sys.stdin:
        print(json.dumps(_run(**json.loads(line))), file=answers)


def _run(
    folder: str, arguments: list[str], breaks: list[Any] | None = None, fsdp: dict[str, str] | None = None
) -> list[int | None]:
    from rl import processes

    control = Path(folder, f"control-{time.monotonic_ns()}")
    control.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= (fsdp or {}) | {
        processes.CONTROL: str(control),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    pids = []
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            _rank(folder, ["train", "x.toml", "--force", *arguments], breaks if breaks and breaks[0] == rank else None)
        pids.append(pid)
    for name in fsdp or {}:
        del os.environ[name]
    while pids:
        pid, status = os.wait()
        pids.remove(pid)
        if not os.WIFEXITED(status):  # launchers take the others with one that died
            for other in pids:
                os.kill(other, signal.SIGKILL)
    found = [control / f"{rank}.code" for rank in range(RANKS)]
    return [int(path.read_text()) if path.exists() else None for path in found]


def _rank(folder: str, arguments: list[str], breaks: list[Any] | None) -> None:
    """One process of a run; does not return."""
    import traceback

    from rl import __main__ as cli
    from rl import report

    code = 70
    try:
        os.chdir(folder)
        report.curves = lambda *_: None  # drawing takes longer than all the rest here
        if "ACCELERATE_USE_FSDP" in os.environ:
            _shard_on_cpu()
        if breaks is not None:
            _break(*breaks[1:])
        code = cli.main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _break(step: int, what: str) -> None:
    from rl.algorithms.base import Recorder

    on_log = Recorder.on_log

    def breaking(self: Recorder, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_log(self, args, state, control, **kwargs)
        if state.global_step == step:
            os.kill(os.getpid(), getattr(signal, what))

    Recorder.on_log = breaking


def _shard_on_cpu() -> None:
    """accelerate shards on devices of their own only, where torch's FSDP2 runs on a CPU through gloo as well.

    The classes of the modules that are made units go to units-<rank>.json.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    def set_device(self: PartialState) -> None:
        self.device = torch.device("cpu")

    fully_shard, units = torch.distributed.fsdp.fully_shard, []

    def noted(module: Any, *args: Any, **kwargs: Any) -> Any:
        units.append(type(module).__name__)
        Path(f"units-{os.environ['RANK']}.json").write_text(json.dumps(units))
        return fully_shard(module, *args, **kwargs)

    torch.distributed.fsdp.fully_shard = noted
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = set_device


if __name__ == "__main__":
    _serve()
