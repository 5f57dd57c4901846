"""Checkpoints that count only when whole, and what happens when the disk is full.

transformers writes `checkpoint-<step>/` file by file, so after a kill the newest folder may be half of one. A
checkpoint counts from the moment its `complete.json` is there, written after everything else has reached the disk.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rl.errors import RunFailed


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint known to be whole, as its `complete.json` says. `rows`: lines of metrics.jsonl at that moment."""

    path: Path
    step: int
    wall_s: float
    tokens: dict[str, int]
    rows: int


def complete_checkpoints(folder: Path) -> list[Checkpoint]:
    """Checkpoints with a readable marker, oldest step first. Touches nothing."""
    found = []
    for path in folder.glob("checkpoint-*"):
        # no marker, or one torn by the disk: not whole
        with suppress(OSError, ValueError, TypeError, KeyError):
            marker = json.loads((path / "complete.json").read_text(encoding="utf-8"))
            found.append(Checkpoint(path, marker["step"], marker["wall_s"], marker["tokens"], marker["rows"]))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint, after removing every partial one; hold the folder's lock."""
    whole = complete_checkpoints(folder)
    for path in set(folder.glob("checkpoint-*")) - {checkpoint.path for checkpoint in whole}:
        remove_checkpoint(path)
    return whole[-1] if whole else None


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, its marker first: a kill half-way must not leave a gutted one that counts."""
    (path / "complete.json").unlink(missing_ok=True)
    sync(path)
    shutil.rmtree(path)


@contextmanager
def disk_guard(folder: Path) -> Iterator[None]:
    """Turn a full disk into RunFailed: one line with the path, the bytes free and what is safe in `folder`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RunFailed) or not is_full(error):
            raise
        path = getattr(error, "filename", None) or folder
        raise RunFailed(f"{path}: the disk is full ({free_bytes(folder):,} bytes free); {_safe(folder)}") from error


def check_space(folder: Path, needed_bytes: int) -> None:
    """RunFailed when `folder`'s disk has fewer than `needed_bytes` free; call it before saving something large."""
    if (free := free_bytes(folder)) < needed_bytes:
        raise RunFailed(f"{folder}: {needed_bytes:,} bytes are needed and {free:,} are free; {_safe(folder)}")


def is_full(error: BaseException | None) -> bool:
    """Whether the disk was full: Python says ENOSPC, safetensors and MLX in words, torch.save loses its place."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        text = str(error)
        if (
            "No space left on device" in text
            or "Unable to write" in text
            or ("inline_container" in text and "unexpected pos" in text)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _safe(folder: Path) -> str:
    whole = complete_checkpoints(folder)
    if not whole:
        return "no checkpoint was saved yet; free some space and start again"
    return f"{whole[-1].path.name} is whole: free some space, then --resume"


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk of `folder`, which need not be there yet."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def sync_tree(folder: Path) -> None:
    """fsync a folder and everything in it."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
