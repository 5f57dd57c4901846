"""`build/smoke.md`: the smoke test's table with what is needed to read it later."""

import platform
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rl import device as devices
from rl import record

if TYPE_CHECKING:
    from rl.smoke import Row

PACKAGES = ("torch", "mlx", "mlx-lm", "transformers", "trl", "peft", "accelerate", "numpy")


def markdown(rows: "Iterable[Row]", summary: str, root: Path) -> str:
    """The table with what is needed to read it later: machine, system, versions, commit and time."""
    from rl.doctor import chip

    lines = ["# Smoke test", "", f"{summary}.", "", "| check | value | tolerance | seconds | result |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for row in rows:
        cells = (
            row.name,
            row.found.value,
            row.found.tolerance,
            f"{row.seconds:.2f}",
            "ok" if row.found.ok else "failed",
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    system = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.platform(terse=True)
    git = record.git_state(root)
    commit = "unknown" if git is None else f"{git['commit']}{', with changes not committed' if git['dirty'] else ''}"
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in record.versions(PACKAGES).items())
    lines += [
        "",
        f"- machine: {chip()}, {devices.cores()} cores, {devices.total_memory_bytes() / devices.GIB:.1f} GiB",
        f"- system: {system}, {platform.machine()}, Python {platform.python_version()}",
        f"- packages: {versions}",
        f"- commit: {commit}",
        f"- time: {record.now()}",
        "- command: `python -m rl smoke` (`nox -s mps_smoke`)",
    ]
    return "\n".join(lines) + "\n"


def chip_name() -> str:
    """The chip in a file's name: "m4-max" for an Apple M4 Max."""
    from rl.doctor import chip

    return re.sub(r"[^a-z0-9]+", "-", chip().lower().removeprefix("apple ")).strip("-")
