"""`python -m rl.bench_child JOB`: one contestant of the peers' bench in a process of its own.

JOB is a JSON file of `rl.bench_peers`. A peer's steps go to `rows.jsonl` beside it as they are done; this project's run
writes its own metrics. `memory.json` follows at the end.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rl import device as devices
from rl import files, rewards
from rl.config import load
from rl.errors import UserError

OURS = "this project"


def differing(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A reward that differs within every group: it depends on each character."""
    return [float(sum(map(ord, text)) % 11) for text in completions]


def main(path: Path) -> int:
    """Run the job; the current folder is where this project's run goes."""
    job = json.loads(path.read_text())
    began = time.monotonic()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    config = load(Path(job["config"]), job["overrides"])
    if job["name"] == OURS:
        import rl.train

        code = rl.train.main(Path(job["config"]), job["overrides"])
    else:
        sys.path.append(job["peers_path"])  # last: what both have is this project's
        _peer(job, config, path.with_name("rows.jsonl"), began)
        code = 0
    files.write_json(path.with_name("memory.json"), _memory(job["name"] == OURS))
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


def _memory(torch_too: bool) -> dict[str, int]:
    """Peak bytes: the process's resident size, and what its allocators gave on the device, torch's and MLX's added."""
    from rl.rollouts import device as mlx_device

    found = {"resident": devices.memory_bytes("cpu"), "allocated": mlx_device.peak_memory_bytes()}
    if torch_too:
        import torch

        if torch.cuda.is_available():
            found["allocated"] += torch.cuda.max_memory_allocated()
    return found


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1])))
    except UserError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
