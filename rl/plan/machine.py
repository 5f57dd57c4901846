"""Machines: how much memory a run may take there, and how fast it moves and multiplies.

Bandwidth of Apple's chips is Apple's own (apple.com press releases of each chip). Throughput is computed from public
databases' core counts and clocks: GPU cores x 128 lanes x 2 operations x clock, the same in float16 (M1 to M4 have no
faster half precision). Where a chip is sold in several sizes the largest is listed. NVIDIA's figures are its data
sheets' dense ones, with TF32 off as torch leaves it. None of Apple's was measured by this project.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rl.device import GIB, MPS_SHARE, cores, total_memory_bytes
from rl.errors import UserError
from rl.plan.memory import Device

# Metal's recommendedMaxWorkingSetSize: 0.74 of 16 and 24 GB, 0.84 of 128 GB in users' reports, 2/3 on older macOS
METAL_SHARE = 0.74
# blocks that an allocator holds and nobody uses, as a share of torch's peak
SLACK = {"mps": 0.10, "cuda": 0.10, "cpu": 0.05}
MLX_CACHE = 1 << 30  # rl.rollouts.device.CACHE_BYTES, off a CPU
# where a container's limit stands (control groups of version 2 and 1)
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
LIBRARIES = 3 * GIB // 2  # torch, transformers, trl and mlx in memory; a CUDA context takes about as much of its card

# name -> (bandwidth in GB/s, TFLOP/s in float32, in half precision)
APPLE: dict[str, tuple[float, float, float]] = {
    "m1": (68, 2.6, 2.6),
    "m1-pro": (200, 5.2, 5.2),
    "m1-max": (400, 10.4, 10.4),
    "m1-ultra": (800, 20.8, 20.8),
    "m2": (100, 3.6, 3.6),
    "m2-pro": (200, 6.8, 6.8),
    "m2-max": (400, 13.6, 13.6),
    "m2-ultra": (800, 27.2, 27.2),
    "m3": (100, 3.6, 3.6),
    "m3-pro": (150, 6.4, 6.4),
    "m3-max": (400, 14.3, 14.3),
    "m3-ultra": (819, 28.6, 28.6),
    "m4": (120, 3.8, 3.8),
    "m4-pro": (273, 8.1, 8.1),
    "m4-max": (546, 17.2, 17.2),
}
NEWEST = 4  # generation of the table above
NVIDIA: dict[str, tuple[float, float, float]] = {
    "a100": (2039, 19.5, 312),
    "h100": (3350, 67, 989),
    "h200": (4800, 67, 989),
    "l4": (300, 30, 121),
    "l40s": (864, 91.6, 362),
    "rtx-4090": (1008, 82.6, 165),
}


@dataclass(frozen=True)
class Machine:
    """`memory` in bytes; `bandwidth` in bytes/s, `flops` in float32 and half precision a second, 0 where unknown."""

    name: str
    device: Device
    memory: float
    bandwidth: float
    flops: float
    half_flops: float
    source: str  # where the speeds come from

    @property
    def usable(self) -> float:
        """Bytes that a run may take: less what is kept for the system, the libraries and an allocator not measured."""
        if self.device == "mps":
            return METAL_SHARE * self.memory
        return 0.95 * self.memory - LIBRARIES

    @property
    def torch_limit(self) -> float:
        """Bytes that torch's allocator is allowed: `rl.device.prepare` caps it on MPS."""
        return self.usable * MPS_SHARE if self.device == "mps" else self.usable

    @property
    def reserve(self) -> str:
        """What is kept back, for people."""
        if self.device == "mps":
            return (
                f"{METAL_SHARE:.0%} of memory, about what Metal recommends (older macOS: two thirds); torch may take "
                f"{MPS_SHARE:.0%} of that. Metal's allocator was not measured by this project"
            )
        return "95 % of memory, less 1.5 GiB for the libraries"

    def needs(self, torch: float, mlx: float) -> tuple[float, float]:
        """(bytes in all, torch's own) with what the allocators keep beside two peaks."""
        own = torch * (1 + SLACK[self.device])
        return own + mlx + (MLX_CACHE if self.device != "cpu" and mlx else 0), own


def parse_memory(text: str) -> float:
    """ "64GB" -> bytes; memory is sold in units of 1024^3, so GB, GiB and G mean the same. Raises UserError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:G|GB|GiB)?\s*", text, re.IGNORECASE)
    if match is None or float(match.group(1)) <= 0:
        raise UserError(f"--memory: found {text!r}, valid: a size such as 64GB")
    return float(match.group(1)) * GIB


def named(chip: str | None, memory: str | None, device: str = "auto") -> Machine:
    """The machine that --chip and --memory describe, what is not given taken from this one. Raises UserError."""
    if chip is None:
        here = this(device)
        return here if memory is None else _with(here, parse_memory(memory))
    key = chip.lower().removeprefix("apple ").replace(" ", "-")
    known = APPLE | NVIDIA
    newer = re.fullmatch(r"m(\d+)(?:-pro|-max|-ultra)?", key)
    if newer and int(newer[1]) > NEWEST and memory is not None:  # what fits is known without its speed
        return Machine(key, "mps", parse_memory(memory), 0, 0, 0, "not a chip of the table")
    if key not in known:
        raise UserError(f"--chip: found {chip!r}, valid: {', '.join(known)}")
    if memory is None:
        raise UserError(f"--chip {chip}: give its memory too, e.g. --memory 64GB")
    return _listed(key, parse_memory(memory))


def this(device: str = "auto", timed: bool = True) -> Machine:
    """This machine, without importing torch; `device` as `[run] device` names it. Not `timed`, a CPU's speed is 0."""
    if device in ("auto", "mps") and platform.system() == "Darwin" and platform.machine() == "arm64":
        brand = _said("sysctl", "-n", "machdep.cpu.brand_string").lower().removeprefix("apple ").replace(" ", "-")
        if brand in APPLE:
            return _listed(brand, total_memory_bytes())
        return Machine(brand or "Apple", "mps", total_memory_bytes(), 0, 0, 0, "not a chip of the table")
    if device in ("auto", "cuda") and shutil.which("nvidia-smi"):
        said = _said("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits").split("\n")[0]
        name, _, size = said.rpartition(",")
        if size.strip().isdecimal():
            key = next((k for k in NVIDIA if k in name.lower().replace(" ", "-")), None)
            memory = int(size) * 1024**2
            return _listed(key, memory) if key else Machine(name, "cuda", memory, 0, 0, 0, "not a card of the table")
    bandwidth, flops = _cpu_speed() if timed else (0.0, 0.0)
    source = f"measured here just now on {cores()} cores"
    return Machine(f"{platform.machine()} CPU", "cpu", _cpu_memory(), bandwidth, flops, flops, source)


def _listed(key: str, memory: float) -> Machine:
    bandwidth, flops, half = (APPLE | NVIDIA)[key]
    apple = key in APPLE
    source = "an estimate from published bandwidth and throughput, not measured" + (" on a Mac" if apple else "")
    return Machine(key, "mps" if apple else "cuda", memory, bandwidth * 1e9, flops * 1e12, half * 1e12, source)


def _with(machine: Machine, memory: float) -> Machine:
    return Machine(**{**machine.__dict__, "memory": memory})


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _cpu_memory() -> float:
    """The machine's memory, or less where a container's limit is lower."""
    limits = [float(total_memory_bytes())]
    for path in LIMITS:
        text = Path(path).read_text().strip() if Path(path).is_file() else ""
        if text.isdecimal():
            limits.append(float(text))
    return min(limits)


# bytes/s that a copy reads and writes, and float32 operations/s of a product, from a tenth of a second of each
_SPEED = """
import time
import numpy as np

def best(work, count=4):
    times = []
    for _ in range(count):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)

matrix, flat = np.ones((768, 768), np.float32), np.ones(1 << 23, np.float32)
print(2 * flat.nbytes / best(flat.copy), 2 * 768**3 / best(lambda: matrix @ matrix))
"""
_ALONE = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "VECLIB_MAXIMUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def _cpu_speed() -> tuple[float, float]:
    """(bytes/s, float32 operations/s), measured.

    Threads that wait for each other on a busy machine show a tenth of what it does when it has time for a run: a single
    one is asked too, and up to four count as so many of it.
    """
    both = [_measured({}), _measured(_ALONE)]
    bandwidth = max(found[0] for found in both)
    return bandwidth, max(both[0][1], both[1][1] * min(cores(), 4))


def _measured(environment: dict[str, str]) -> tuple[float, float]:
    """In a process of its own: numpy asks for the number of its threads once."""
    done = subprocess.run(
        [sys.executable, "-c", _SPEED], env=os.environ | environment, capture_output=True, text=True, timeout=60
    )
    bandwidth, flops = done.stdout.split()
    return float(bandwidth), float(flops)
