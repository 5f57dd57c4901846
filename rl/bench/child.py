"""`python -m rl.bench.child JOB`: one contestant of the peers' bench in a process of its own.

JOB is a JSON file of `rl.bench.peers`. A peer's steps go to `rows.jsonl` beside it as they are done; this project's run
writes its own metrics. `memory.json` is kept up to date, so that one which is stopped has told its peak too.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rl import device as devices
from rl import files, rewards
from rl.config import load
from rl.errors import UserError

OURS = "this project"
EVERY_S = 1.0


def differing(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A reward that differs within every group: it depends on each character."""
    return [float(sum(map(ord, text)) % 11) for text in completions]


def main(path: Path) -> int:
    """Run the job; the current folder is where this project's run goes."""
    job = json.loads(path.read_text())
    began = time.monotonic()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    config = load(Path(job["config"]), job["overrides"])
    done = threading.Event()
    watching = threading.Thread(target=watch, args=(path.with_name("memory.json"), done), daemon=True)
    watching.start()
    if job["name"] == OURS:
        import rl.train

        code = rl.train.main(Path(job["config"]), job["overrides"])
    else:
        sys.path.append(job["peers_path"])  # last: what both have is this project's
        _peer(job, config, path.with_name("rows.jsonl"), began)
        code = 0
    done.set()  # two writers of one file would take each other's away
    watching.join()
    return code


def _peer(job: dict[str, Any], config: Any, out: Path, began: float) -> None:
    from rl.rollouts import peers

    functions = rewards.build(config.rewards)
    rows = {row["prompt"]: row for row in job["rows"]}

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        asked = [rows[prompt] for prompt in prompts]
        columns = {key: [row[key] for row in asked] for key in asked[0] if key != "prompt"}
        given = [(one.weight, one(prompts=prompts, completions=completions, **columns)) for one in functions]
        return [sum(weight * (values[i] or 0.0) for weight, values in given) for i in range(len(prompts))]

    step = [0]

    def done(mean: float, tokens: int) -> None:
        step[0] += 1
        told = {"step": step[0], "wall_s": time.monotonic() - began, "reward": mean, "tokens": tokens}
        with out.open("a") as file:
            file.write(json.dumps(told) + "\n")

    work = job["work"]
    work = peers.Work(**{**work, "model": Path(work["model"]), "tokenizer": Path(work["tokenizer"])})
    drive: Callable[..., None] = peers.PEERS[job["name"]]
    drive(work, reward, done, out.parent)


def watch(path: Path, done: threading.Event) -> None:
    """Keep `memory()` in `path`, until `done`, and what it is then."""
    files.write_json(path, memory())
    while not done.wait(EVERY_S):
        files.write_json(path, memory())
    files.write_json(path, memory())


def memory() -> dict[str, int]:
    """Peak bytes so far: the process's resident size; on CUDA also what its allocators gave, torch's and MLX's added.

    The two peaks need not have been at one time, so the sum is at least what was held. On a CPU torch keeps no count,
    and MLX's alone would make a trainer in torch look small.
    """
    found = {"resident": devices.memory_bytes("cpu")}
    mlx, torch = sys.modules.get("mlx.core"), sys.modules.get("torch")
    if hasattr(mlx, "cuda") and hasattr(mlx, "get_peak_memory") and mlx.cuda.is_available():
        found["allocated"] = int(mlx.get_peak_memory())
        if hasattr(torch, "cuda") and torch.cuda.is_initialized():
            found["allocated"] += torch.cuda.max_memory_allocated()
    return found


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1])))
    except UserError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
