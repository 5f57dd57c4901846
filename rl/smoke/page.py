"""`build/smoke.md` (on a Mac `evals/published/mps-<chip>.md`): the table with what is needed to read it later."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rl import measured, record

if TYPE_CHECKING:
    from rl.smoke.command import Row


def markdown(rows: "Iterable[Row]", summary: str, root: Path) -> str:
    """The table with what is needed to read it later: machine, system, versions, commit and time."""
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
    lines += [
        "",
        f"- machine: {measured.machine()}",
        f"- system: {measured.system()}",
        f"- packages: {measured.packages()}",
        f"- commit: {measured.commit(root)}",
        f"- time: {record.now()}",
        "- command: `python -m rl smoke` (`nox -s mps_smoke`)",
    ]
    return "\n".join(lines) + "\n"


def chip_name() -> str:
    """The chip in a file's name: "m4-max" for an Apple M4 Max."""
    from rl.doctor import chip

    return re.sub(r"[^a-z0-9]+", "-", chip().lower().removeprefix("apple ")).strip("-")
