"""`nox -s doctor`: what this machine is, what is installed against the lock, and what to do about what is not right."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rl.device import GIB, available, cores, describe, macos_major, total_memory_bytes
from rl.errors import RunFailed
from rl.plan.machine import METAL_SHARE
from rl.record import unlocked, versions

ROOT = Path(__file__).resolve().parent.parent
# a SmolLM2-135M run keeps a few checkpoints of 60 MB and one float32 base of 540 MB
NEEDED_DISK = 5 * GIB
NEEDED_MEMORY = 4 * GIB
KEPT_FOR_MACOS = 4 * GIB


@dataclass(frozen=True)
class Check:
    """One line of the table. "warn" works with limits, "bad" stops training; `advice` says what to do about it."""

    name: str
    found: str
    state: Literal["ok", "warn", "bad"] = "ok"
    advice: str = ""


def main() -> None:
    """Print the table. Raises RunFailed when something stands in the way of training."""
    from rich.console import Console
    from rich.table import Table

    checks = examine(ROOT)
    table = Table("", "found", "state", "what to do", title="duet doctor", title_justify="left")
    colours = {"ok": "green", "warn": "yellow", "bad": "red"}
    for check in checks:
        table.add_row(check.name, check.found, f"[{colours[check.state]}]{check.state}[/]", check.advice)
    Console().print(table)
    bad = [check.name for check in checks if check.state == "bad"]
    if bad:
        raise RunFailed(f"{len(bad)} to put right before training: {', '.join(bad)}")


def examine(root: Path) -> list[Check]:
    """All checks, for the repository at `root`; no check raises."""
    return [
        *machine(root),
        *wired_limit(),
        *packages(root / "pyproject.toml", root / "uv.lock"),
        torch_device(),
        mlx_device(),
    ]


def machine(root: Path) -> list[Check]:
    """Chip, system, memory, disk and Python."""
    memory, free = total_memory_bytes(), shutil.disk_usage(root).free
    system = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.platform(terse=True)
    supported = (sys.platform, platform.machine()) in (("darwin", "arm64"), ("linux", "x86_64"))
    old = sys.platform == "darwin" and macos_major() < 14
    absent = "the lock has no wheels here"
    if sys.platform == "darwin" and ask("sysctl", "-n", "sysctl.proc_translated") == "1":
        absent = "this Python is Intel's, run by Rosetta: install one built for arm64 (docs/setup.md)"
    return [
        Check("chip", f"{chip()}, {cores()} cores"),
        Check(
            "system",
            f"{system}, {platform.machine()}",
            "bad" if old or not supported else "ok",
            "update to macOS 14: torch's wheels need it" if old else "" if supported else absent,
        ),
        Check(
            "memory",
            f"{memory / GIB:.1f} GiB",
            "warn" if memory < NEEDED_MEMORY else "ok",
            "" if memory >= NEEDED_MEMORY else f"configs/grpo.toml wants {NEEDED_MEMORY // GIB} GiB; try configs/tiny",
        ),
        Check(
            "disk",
            f"{free / GIB:.1f} GiB free",
            "warn" if free < NEEDED_DISK else "ok",
            "" if free >= NEEDED_DISK else f"free {NEEDED_DISK // GIB} GiB: nox -s clean, or remove runs in models/",
        ),
        Check(
            "python",
            platform.python_version(),
            "ok" if sys.version_info[:2] == (3, 13) else "warn",
            "" if sys.version_info[:2] == (3, 13) else "the lock is for Python 3.13 (.python-version)",
        ),
    ]


def chip() -> str:
    """The processor's name as its maker writes it; the architecture where the system does not tell."""
    if sys.platform == "darwin":
        return ask("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def wired_limit() -> list[Check]:
    """On a Mac, how much of its memory the GPU may hold: macOS's own share, or what `iogpu.wired_limit_mb` says."""
    if sys.platform != "darwin":
        return []
    memory, said = total_memory_bytes(), ask("sysctl", "-n", "iogpu.wired_limit_mb")
    if not said.isdecimal():
        return [
            Check("wired limit", "not told", "warn", "sysctl knows no iogpu.wired_limit_mb: is this Apple silicon?")
        ]
    limit = int(said) * 1024**2
    if limit == 0:
        return [
            Check(
                "wired limit", f"macOS's own, about {METAL_SHARE:.0%} of memory: {METAL_SHARE * memory / GIB:.1f} GiB"
            )
        ]
    found = f"{limit / GIB:.1f} GiB, set by hand"
    default = "sudo sysctl iogpu.wired_limit_mb=0 sets macOS's own back"
    if memory - limit < KEPT_FOR_MACOS:
        kept = f"leaves macOS {max(0, memory - limit) / GIB:.1f} GiB, and it wants {KEPT_FOR_MACOS // GIB}"
        return [Check("wired limit", found, "warn", f"{kept}: {default}")]
    if limit < METAL_SHARE * memory:
        return [Check("wired limit", found, "warn", f"below macOS's own, which the planner reckons with: {default}")]
    return [Check("wired limit", found)]


def ask(*command: str) -> str:
    """What a program of the system prints, stripped; "" where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def packages(pyproject: Path, lock: Path) -> list[Check]:
    """Versions of the direct dependencies, then one check of everything installed against the lock."""
    from packaging.requirements import Requirement

    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    wanted = [Requirement(line) for line in project["project"]["dependencies"]]
    wanted += [Requirement(line) for line in project["dependency-groups"]["dev"]]
    direct = sorted({item.name for item in wanted if item.marker is None or item.marker.evaluate()})
    checks = []
    sync = "uv sync --locked, or any nox session, installs what is locked"
    for name, version in versions(direct).items():
        wrong = unlocked(lock, {name: version})
        checks.append(
            Check(
                name,
                version or "absent",
                "bad" if version is None else "warn" if wrong else "ok",
                sync if wrong else "",
            )
        )
    locked = {package["name"] for package in tomllib.loads(lock.read_text(encoding="utf-8"))["package"]}
    names = {
        item.metadata["Name"].lower().replace("_", "-").replace(".", "-") for item in importlib.metadata.distributions()
    }
    differing = unlocked(lock, versions(sorted(names & locked)))
    found = f"{len(names & locked) - len(differing)} packages as locked"
    if differing:
        found += f", {len(differing)} not: {'; '.join(differing)}"
    return [*checks, Check("lock", found, "warn" if differing else "ok", sync if differing else "")]


def torch_device() -> Check:
    """The device training takes."""
    try:
        device = available()[0]
        found = describe(device)
    except Exception as error:  # a broken install may raise anything, and the table is to say so
        return Check("torch device", f"{type(error).__name__}: {error}", "bad", "see the torch line above")
    slow = "works, slowly; a Mac's GPU or a CUDA card would be used" if device == "cpu" else ""
    if sys.platform == "darwin" and device == "cpu":
        return Check("torch device", found, "warn", "torch sees no MPS: is this Python built for arm64?")
    fallback = os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK")
    return Check("torch device", found + (", MPS fallback on" if fallback == "1" else ""), "ok", slow)


def mlx_device() -> Check:
    """The device rollouts take."""
    try:
        from rl.rollouts.device import describe as describe_mlx

        told = describe_mlx()
    except Exception as error:  # as above
        return Check("mlx device", f"{type(error).__name__}: {error}", "bad", 'or set [rollout] engine = "torch"')
    found = told["backend"] if told["device"] == told["backend"] else f"{told['backend']}: {told['device']}"
    if sys.platform == "darwin" and told["backend"] != "metal":
        return Check("mlx device", found, "warn", "MLX sees no Metal: is this Python built for arm64?")
    with suppress(Exception):  # a broken torch has a line of its own
        if told["backend"] == "cpu" and "cuda" in available():
            return Check("mlx device", found, "warn", "DUET_CUDA=1 nox … installs MLX for CUDA 13 (driver ≥ 580)")
    return Check("mlx device", found)
