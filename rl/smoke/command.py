"""`nox -s mps_smoke`: a minute of numbers from this machine's device, each against a reference, each with a tolerance.

It says in its first and last line which device it ran on. Where that is not mps, nothing it prints is about MPS.
"""

import os
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rl import device as devices
from rl import files
from rl.errors import RunFailed, UserError
from rl.smoke import checks, page, steps
from rl.smoke.checks import Bench, Check, Found

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
LOG_WIDTH = 180  # columns where no terminal says how many it has
# what torch says when MPS lacks an operator and the CPU takes it
FALLBACK = re.compile(r"operator '([^']+)' is not currently supported on the MPS backend and will fall back")


@dataclass(frozen=True)
class Row:
    """One line of the table; `seconds` of wall time."""

    name: str
    found: Found
    seconds: float


def main(root: Path = ROOT) -> int:
    """Run the checks, print the table, write it to `root/build/smoke.md`; 0 when all passed. On MPS it also goes to
    `root/evals/published/mps-<chip>.md`, to be committed.

    Raises RunFailed (exit code 1) with the names of the checks that did not.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    started = time.perf_counter()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before its import: TRL reports every trainer to the hub
    device = devices.pick("auto")
    devices.prepare(device)
    print(f"smoke test on {place(device)}. {about_mps(device)}", flush=True)
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    fallen: Counter[str] = Counter()
    with (
        tempfile.TemporaryDirectory(prefix="duet-smoke-") as folder,
        console.status("") as status,
        steps.without_garbage(),
    ):
        bench = Bench(device, Path(folder), devices.memory_bytes(device))
        rows = list(run(checks.checks(device), bench, lambda name: status.update(f"{name} ..."), fallen))
    if device.type == "mps":
        rows.append(Row("operations that fell back to the CPU", fallbacks(fallen), 0.0))
    failed = [row.name for row in rows if not row.found.ok]
    table = Table("check", "value", "tolerance", "seconds", "result")
    for row in rows:
        result = "[green]ok[/]" if row.found.ok else "[red]failed[/]"
        # an error's text is no markup
        table.add_row(row.name, escape(row.found.value), row.found.tolerance, f"{row.seconds:.2f}", result)
    console.print(table)
    summary = (
        f"{len(rows) - len(failed)} of {len(rows)} checks passed in {time.perf_counter() - started:.0f} s "
        f"on {place(device)}. {about_mps(device)}"
    )
    written = [Path("build", "smoke.md")]
    if device.type == "mps":
        written.append(Path("evals", "published", f"mps-{page.chip_name()}.md"))
    text = page.markdown(rows, summary, root)
    for path in written:
        files.write_text(root / path, text)
    print(f"table, machine and versions: {' and '.join(map(str, written))}")
    print(summary, flush=True)
    if failed:
        raise RunFailed(
            f"{len(failed)} of {len(rows)} checks on {device.type}: {'; '.join(failed)}. {about_mps(device)}"
        )
    return 0


def place(device: "torch.device") -> str:
    """The devices of both sides: "cpu: x86_64, 2 cores, 23.4 GiB (torch) and cpu (MLX 0.32.4)"."""
    try:
        from rl.rollouts.device import describe

        told = describe()
        mlx = f"{told['backend']} (MLX {told['version']})"
    except Exception as error:  # a broken install may raise anything; the checks that need MLX will say so too
        mlx = f"no MLX ({type(error).__name__})"
    return f"{devices.describe(device)} (torch) and {mlx}"


def about_mps(device: "torch.device") -> str:
    """What these checks say of MPS: something only where the device is mps, and less where torch may leave it."""
    if device.type != "mps":
        return "MPS is absent here: nothing in this test says anything about MPS"
    if os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK") == "1":
        return "MPS was used, with PYTORCH_ENABLE_MPS_FALLBACK=1: some operations may have run on the CPU"
    return "MPS was used"


def run(
    checks: Iterable[Check],
    bench: Bench,
    say: Callable[[str], None] = lambda name: None,
    fallen: Counter[str] | None = None,
) -> Iterable[Row]:
    """One row a check; one that raises is a failed row with the error as its value.

    `fallen` counts the warnings of operations that left MPS for the CPU, by operator.
    """
    import torch

    for name, check in checks:
        say(name)
        started, always = time.perf_counter(), torch.is_warn_always_enabled()
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            torch.set_warn_always(True)  # torch tells the first operation of a process alone
            try:
                found = check(bench)
            except Exception as error:  # a device that lacks an operation raises anything
                kind = "" if isinstance(error, RunFailed | UserError) else f"{type(error).__name__}: "
                found = Found((kind + " ".join(str(error).split()))[:300], "no error", False)
            finally:
                torch.set_warn_always(always)
        if fallen is not None:
            fallen.update(match[1] for warning in heard for match in FALLBACK.finditer(str(warning.message)))
        yield Row(name, found, time.perf_counter() - started)


def fallbacks(fallen: Counter[str]) -> Found:
    """How often an operation of the checks left MPS for the CPU, and which."""
    which = ", ".join(f"{operator} {count}" for operator, count in fallen.most_common())
    return Found(f"{fallen.total()}{f': {which}' if which else ''}", "0", not fallen)
