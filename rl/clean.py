"""`nox -s clean`: remove what can be made again. Caches and tables always; runs and models only when asked by name."""

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHES = (".pytest_cache", ".ruff_cache", ".hypothesis", ".nox", "build", "evals/tables")
SOURCES = ("rl", "evals", "tests", "papers")
MADE = ("models/base", "models/checkpoints", "models/final", "models/exports")
MADE += ("data/processed", "data/splits", "evals/results")
MB = 1e6


def main(everything: bool = False, dry_run: bool = False, root: Path = ROOT) -> None:
    """Remove caches, and with `everything` also runs, models and results; with `dry_run` only say what would go.

    Downloads (data/raw), the virtual environment, and every run that a process is working on stay in any case.
    """
    freed = clean(root, everything, dry_run, say=print)
    kept = [folder for folder in ("models/checkpoints", "models/final") if any((root / folder).glob("*/run.json"))]
    print(f"{'would free' if dry_run else 'freed'} {freed / MB:.1f} MB")
    if kept and not everything:
        print(f"kept the runs in {' and '.join(kept)}; --all removes them too")


def clean(root: Path, everything: bool, dry_run: bool, say: Callable[[str], None]) -> int:
    """Bytes freed. What is removed, and what stays because a process uses it, is told to `say`, a line each."""
    freed = 0
    for path in found(root, everything):
        name = path.relative_to(root).as_posix()
        if busy(path):
            say(f"in use, stays: {name}")
            continue
        bytes_ = size(path)
        say(f"{'would remove' if dry_run else 'removed'} {name} ({bytes_ / MB:.1f} MB)")
        freed += bytes_
        if dry_run:
            continue
        # a link goes, what it points to is somebody's
        if path.is_symlink() or path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path)
    return freed


def found(root: Path, everything: bool) -> list[Path]:
    """What `clean` removes, sorted, each run and base by itself; nothing inside something else that goes."""
    paths = [root / name for name in CACHES]
    paths += [path for top in SOURCES for path in (root / top).rglob("__pycache__")]
    paths.append(root / "__pycache__")
    if everything:
        # .gitkeep and the like are the repository's
        paths += [path for name in MADE for path in (root / name).glob("*") if not _tracked(path)]
    else:
        # what a killed process was writing when it died
        paths += [path for top in ("evals", "build") for path in (root / top).rglob(".*.tmp")]
    there = sorted({path for path in paths if path.exists() or path.is_symlink()})
    return [path for path in there if not any(parent in there for parent in path.parents)]


def size(path: Path) -> int:
    """Bytes of the files below `path`; links count for nothing."""
    if path.is_symlink():
        return 0
    if path.is_file():
        return path.stat().st_size
    return sum(item.stat().st_size for item in path.rglob("*") if item.is_file() and not item.is_symlink())


def busy(path: Path) -> bool:
    """Whether a process holds the lock of this run folder (`rl.run`)."""
    lock = path / ".lock"
    if not lock.is_file():
        return False
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _tracked(path: Path) -> bool:
    return path.name in (".gitkeep", ".gitignore", "README.md")
