"""Small runs for the tests of run folders: a record, a checkpoint as a trainer leaves it, a crash."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from rl import files, record, run

CONFIG = {
    "run": {"name": "demo", "seed": 0, "device": "auto"},
    "model": {"base": "tiny"},
    "trainer": {"algorithm": "grpo", "learning_rate": 1e-4, "max_steps": 8},
    "rollout": {"stop": []},
}


def fresh(root: Path, **changes) -> record.Record:
    config = json.loads(json.dumps(CONFIG))
    config["trainer"] |= changes.pop("trainer", {})
    given = {
        "name": "demo",
        "config": config,
        "seed": 0,
        "device": "cpu",
        "base": {"id": "tiny", "sha256": "b" * 64},
        "data": {"source": "arithmetic", "fingerprint": "d" * 64, "rows": {"train": 64, "heldout": 32}},
    }
    return record.new(root, **(given | changes))


def checkpoint(opened: run.OpenRun, step: int, keep: int = 2) -> Path:
    """Log steps up to `step` and save a whole checkpoint there, as a trainer would."""
    for number in range(opened.record.steps + 1, step + 1):
        run.log(opened, number, {"reward": number / 10})
    path = opened.folder / f"checkpoint-{step}"
    files.write_bytes(path / "model.safetensors", b"weights %d" % step)
    opened.record.tokens = {"prompt": 10 * step, "completion": 5 * step}
    run.mark_complete(opened, path, step, keep)
    return path


def crash(opened: run.OpenRun) -> None:
    """What the kernel does on kill -9: nothing is written any more, the lock is gone."""
    opened.lock.close()


def complete(root: Path, **changes) -> run.OpenRun:
    opened = run.start(root, fresh(root, **changes))
    checkpoint(opened, 2)
    files.write_bytes(run.staging(opened) / "model.safetensors", b"final")
    run.finish(opened)
    return opened


def train_until_ctrl_c(monkeypatch: pytest.MonkeyPatch, path: Path, step: int) -> None:
    """Train `path` with a Ctrl-C as `step` is logged: it saves where a resume is exact, and stops."""
    from rl import train
    from rl.algorithms import base

    on_log = base.Recorder.on_log

    def interrupting(self: base.Recorder, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_log(self, args, state, control, **kwargs)
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(base.Recorder, "on_log", interrupting)
        with pytest.raises(KeyboardInterrupt):
            train.main(path)
