"""Which machine runs were made on, in words and numbers that a report can print; and which of its cores a run gets."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """{system, cpu, cores, memory_gib, gpu}: cores are those this process may use, gpu is null where none is seen."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": len(cores()),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": _gpu(),
    }


def in_words(machine: dict[str, Any]) -> str:
    """One line: "Intel Xeon ..., 16 cores, 128 GiB, NVIDIA H100"."""
    sizes = ((machine.get("cores"), "cores"), (machine.get("memory_gib"), "GiB"))
    parts = [machine["cpu"], *(f"{size:g} {what}" for size, what in sizes if size), machine.get("gpu")]
    return ", ".join(part for part in parts if part)


def cores() -> list[int]:
    """Numbers of the cores this process may use; on a Mac, which binds no process to cores, all there are."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def slots(found: Sequence[int], jobs: int, threads: int) -> list[list[int]]:
    """Disjoint groups of `threads` cores for `jobs` runs at once; fewer groups where the cores do not suffice."""
    threads = min(threads, len(found))
    groups = [list(found[i : i + threads]) for i in range(0, len(found) - threads + 1, threads)]
    return groups[:jobs]


def bind(process: int, group: Sequence[int]) -> None:
    """Keep a process, and what it starts, on these cores; nothing where the system cannot."""
    if hasattr(os, "sched_setaffinity"):
        with suppress(ProcessLookupError):  # it has ended already
            os.sched_setaffinity(process, group)


def cards() -> list[str]:
    """The NVIDIA cards this process may use, as CUDA_VISIBLE_DEVICES names them; none where there is none."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [one.strip() for one in given.split(",") if one.strip()]
    return [str(number) for number in range(len(_gpus()))]


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        if found:
            return " ".join(found[1].split())
    if platform.system() == "Darwin":
        said = _said("sysctl", "-n", "machdep.cpu.brand_string")
        if said:
            return said
    return platform.processor() or platform.machine()


def _gpu() -> str | None:
    names = _gpus()
    return None if not names else names[0] if len(names) == 1 else f"{len(names)} × {names[0]}"


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    said = _said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or ""
    return [name.strip() for name in said.split("\n") if name.strip()]


def _said(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
