"""What has to stand beside a measured number to read it later: machine, system, devices, packages, commit, time."""

import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rl import device as devices
from rl import record

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "mlx", "mlx-lm", "transformers", "trl", "peft", "accelerate", "numpy")


def machine() -> str:
    """Chip, cores and memory."""
    from rl.doctor import chip

    return f"{chip()}, {devices.cores()} cores, {devices.total_memory_bytes() / devices.GIB:.1f} GiB"


def system() -> str:
    """Operating system, architecture and Python."""
    name = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.platform(terse=True)
    return f"{name}, {platform.machine()}, Python {platform.python_version()}"


def packages(names: Sequence[str] = PACKAGES) -> str:
    """Their versions in a line."""
    return ", ".join(f"{name} {version or 'absent'}" for name, version in record.versions(names).items())


def commit(root: Path) -> str:
    """Of the checkout, and whether files differ from it."""
    git = record.git_state(root)
    return "unknown" if git is None else f"{git['commit']}{', with changes not committed' if git['dirty'] else ''}"


def about(command: str, device: "torch.device", root: Path, names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """All of it, in the order of a table's last lines; `device` is torch's, `names` are packages."""
    import torch

    from rl.rollouts.device import describe

    return {
        "command": f"`{command}`",
        "machine": machine(),
        "devices": f"torch {devices.describe(device)}, {torch.get_num_threads()} threads; MLX {describe()['backend']}",
        "system": system(),
        "packages": packages(names),
        "commit": commit(root),
        "time": record.now(),
    }
