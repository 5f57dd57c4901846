"""Run folders: one run at a time in each, resumed or refused but never mixed, its result moved out whole.

`models/checkpoints/<run>/` while it runs: `.lock`, `run.json`, `metrics.jsonl`, `checkpoint-<step>/`.
`models/final/<run>/` once finished.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

from rl import completions, files, processes, record, reporting
from rl.checkpoints import (
    Checkpoint,
    complete_checkpoints,
    disk_guard,
    last_checkpoint,
    remove_checkpoint,
    sync,
    sync_tree,
)
from rl.errors import RunFailed, UserError
from rl.record import Record

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}  # they run code when loaded; a result holds safetensors only
SHOWN = 5  # differences named where inputs differ


@dataclass
class OpenRun:
    """A run's folders and record. While `state` is not "finished" this process holds the folder's lock.

    `earlier_s`: seconds of the record's `wall_s` that were spent before this process took over.
    """

    state: Literal["fresh", "resumed", "finished"]
    folder: Path
    final: Path
    record: Record
    checkpoint: Checkpoint | None = None
    lock: IO[str] | None = None
    began: float = 0.0
    earlier_s: float = 0.0


def folders(root: Path, name: str) -> tuple[Path, Path]:
    """`models/checkpoints/<name>/` and `models/final/<name>/` under `root`."""
    return root / "models" / "checkpoints" / name, root / "models" / "final" / name


def run_name(name: str, seed: int, overridden: bool) -> str:
    """The config's name, with `-seed<N>` when the seed was overridden on the command line."""
    return f"{name}-seed{seed}" if overridden else name


def start(root: Path, fresh: Record, *, resume: bool = False, restart: bool = False) -> OpenRun:
    """Open the folder of the run that `fresh` (from `rl.record.new`) describes.

    - finished with the same inputs: state "finished", nothing is opened; `restart` trains it again;
    - unfinished with a checkpoint: `resume` continues ("resumed": metrics are cut back to the checkpoint, partial
      checkpoints removed), `restart` throws it away;
    - anything else: state "fresh". A folder without a whole checkpoint holds nothing to lose and is started over.

    A finished result stays where it is until a new one replaces it. Raises UserError when another process is in the
    folder, when the inputs differ (naming the keys), and for an unfinished run when neither flag is given.
    """
    if resume and restart:
        raise UserError("--resume and --restart: one continues the unfinished run, the other throws it away; give one")
    folder, final = folders(root, fresh.name)
    # the common answers need no lock, and so write nothing
    if not folder.exists() and not _stage(final).exists() and (done := _finished(final, fresh, restart)):
        return done
    lock = _acquire(folder)
    try:
        with disk_guard(folder):
            run = _open(folder, final, fresh, resume, restart)
    except BaseException:
        _release(folder, lock)
        raise
    if run.state == "finished":
        _release(folder, lock)
    else:
        run.lock, run.began = lock, time.monotonic()
    return run


def start_together(root: Path, fresh: Record, resume: bool, restart: bool) -> OpenRun:
    """`start` by the main process of several; the others get what it found, without the lock."""
    mine: list[OpenRun] = []

    def make() -> OpenRun:
        mine.append(start(root, fresh, resume=resume, restart=restart))
        return replace(mine[0], lock=None)

    shared = processes.share(make)
    return mine[0] if mine else shared


def _open(folder: Path, final: Path, fresh: Record, resume: bool, restart: bool) -> OpenRun:
    """`start` with the lock held."""
    _recover(final)
    unfinished = record.read(folder) if (folder / "run.json").exists() else None
    if unfinished and final.exists() and unfinished.started == record.read(final).started:
        _empty(folder)  # killed after the result had moved out: only the clearing up was left
        unfinished = None
    if restart:
        _empty(folder)
    checkpoint = next(reversed(complete_checkpoints(folder)), None)
    if not (resume and checkpoint):
        try:
            if done := _finished(final, fresh, restart):
                return done
        except UserError:
            if not checkpoint:
                raise
    if not checkpoint:
        _empty(folder)
        record.save(fresh, folder)
        return OpenRun("fresh", folder, final, fresh)
    if unfinished is None:
        raise UserError(f"{folder}: holds checkpoints but no run.json, so they cannot be trusted; --restart removes it")
    if not resume:
        raise UserError(
            f"{folder}: unfinished run ({unfinished.status}), last checkpoint at step {checkpoint.step}; "
            "--resume continues it, --restart throws it away"
        )
    if changed := record.differences(unfinished, fresh):
        raise UserError(
            f"{folder}: cannot resume with other inputs: {_some(changed)}; "
            "undo that, or choose another [run] name, or --restart to throw the unfinished run away"
        )
    last_checkpoint(folder)  # clears partial ones away
    record.cut_metrics(folder / "metrics.jsonl", checkpoint.rows)
    completions.cut(folder, checkpoint.step)
    resumed = _continued(unfinished, fresh, checkpoint)
    record.save(resumed, folder)
    return OpenRun("resumed", folder, final, resumed, checkpoint, earlier_s=checkpoint.wall_s)


def _continued(old: Record, fresh: Record, checkpoint: Checkpoint) -> Record:
    """This process's record, going on from the checkpoint; time lost after it counts for nothing, like its steps."""
    git = fresh.git
    if git and old.git and old.git.get("commit") != git["commit"]:
        git = {**git, "resumed_from": old.git.get("commit")}
    return replace(
        fresh,
        git=git,
        started=old.started,
        wall_s=checkpoint.wall_s,
        steps=checkpoint.step,
        tokens=dict(checkpoint.tokens),
        peak_memory_bytes=old.peak_memory_bytes,
        rollout=old.rollout,
        result=old.result,
    )


def _finished(final: Path, fresh: Record, restart: bool) -> OpenRun | None:
    """The run's finished result when it has the same inputs, None when there is none; UserError when they differ."""
    if restart or not final.exists():
        return None
    old = record.read(final)
    if changed := record.differences(old, fresh):
        raise UserError(
            f"{final}: finished with other inputs: {_some(changed)}; "
            "choose another [run] name, or --restart to train again and replace it"
        )
    return OpenRun("finished", final, final, old)


def log(run: OpenRun, step: int, metrics: dict[str, Any]) -> None:
    """Append a row to metrics.jsonl and note the step in the record (written with the next checkpoint)."""
    run.record.steps = max(run.record.steps, step)
    with disk_guard(run.folder):
        record.append_metrics(run.folder / "metrics.jsonl", step, wall_s(run), metrics)


def wall_s(run: OpenRun) -> float:
    """Seconds spent on the run, this process and those it was resumed from."""
    return run.earlier_s + time.monotonic() - run.began


def save(run: OpenRun) -> None:
    """Write the record as it now is into the run's folder."""
    run.record.wall_s = round(wall_s(run), 3)
    with disk_guard(run.folder):
        record.save(run.record, run.folder)


def mark_complete(run: OpenRun, path: Path, step: int, keep: int = 2) -> Checkpoint:
    """Make the saved `checkpoint-<step>/` at `path` count: fsync its files, then write its marker, then prune.

    Call it once everything of the checkpoint is in the folder. The record's tokens and time are written with it; only
    the newest `keep` whole checkpoints stay.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least one checkpoint must stay")
    metrics = run.folder / "metrics.jsonl"
    with disk_guard(run.folder):
        sync_tree(path)
        if metrics.exists():
            sync(metrics)
        rows = len(record.read_metrics(metrics))
        checkpoint = Checkpoint(path, step, round(wall_s(run), 3), dict(run.record.tokens), rows)
        files.write_json(path / "complete.json", {k: v for k, v in asdict(checkpoint).items() if k != "path"})
        sync(path)
        sync(run.folder)
    run.record.steps = step
    save(run)
    for old in complete_checkpoints(run.folder)[:-keep]:
        remove_checkpoint(old.path)
    return checkpoint


def staging(run: OpenRun) -> Path:
    """An empty folder beside the final one; save weights, tokenizer and adapter there, then call `finish`."""
    stage = _stage(run.final)
    with disk_guard(run.folder):
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
    return stage


def finish(run: OpenRun) -> Path:
    """Complete the staged result with run.json, metrics.jsonl, curves.png and README.md and move it to `run.final`.

    An older result is replaced only now; the checkpoints folder goes afterwards and the lock with it. RunFailed when
    the staged folder has no safetensors file or holds a pickle.
    """
    from rl import report  # matplotlib: not needed to open a folder

    stage = _stage(run.final)
    if not any(stage.rglob("*.safetensors")):
        raise RunFailed(f"{stage}: no .safetensors file was saved there, so there is no result to keep")
    if pickles := sorted(path.name for path in stage.rglob("*") if path.suffix in PICKLES):
        raise RunFailed(f"{stage}: {', '.join(pickles)} would be in the result; only safetensors may hold weights")
    done = replace(run.record, status="finished", finished=record.now(), wall_s=round(wall_s(run), 3), error=None)
    with disk_guard(run.folder):
        rows = record.read_metrics(run.folder / "metrics.jsonl")
        files.write_text(stage / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        if (run.folder / reporting.EVENTS).is_dir():
            shutil.copytree(run.folder / reporting.EVENTS, stage / reporting.EVENTS)
        completions.merge(run.folder, stage / completions.FILE)
        report.curves(stage / "metrics.jsonl", stage / "curves.png")
        files.write_text(stage / "README.md", report.model_card(done))
        sync_tree(stage)
        record.save(done, stage)  # last: `_recover` takes it for the sign that the rest is there
        sync(stage)
        _swap(stage, run.final)
    run.record = done
    _empty(run.folder)  # run.json after the checkpoints: a kill in here still leaves a folder that explains itself
    shutil.rmtree(run.folder, ignore_errors=True)
    if run.lock:
        run.lock.close()
        run.lock = None
    return run.final


def close(run: OpenRun, status: record.Status, error: str | None = None) -> None:
    """Write how the run ended into its folder and give the lock back. A full disk does not hide the first error.

    After `finish` this does nothing: the result has moved out and stays finished.
    """
    if run.record.status == "finished":
        return
    run.record.status, run.record.error = status, error
    with suppress(OSError, RunFailed):
        save(run)
    if run.lock:
        run.lock.close()
        run.lock = None


@contextmanager
def recording(run: OpenRun) -> Iterator[OpenRun]:
    """Around the work on an open run: Ctrl-C is recorded as interrupted, any other error as failed; both go on up.

    Bad input (UserError) that is found before there is anything to resume leaves nothing behind.
    """
    try:
        yield run
    except UserError as error:
        if run.state == "fresh" and run.lock and run.folder.exists() and not complete_checkpoints(run.folder):
            _empty(run.folder)
            _release(run.folder, run.lock)
            run.lock = None
        else:
            close(run, "failed", " ".join(f"UserError: {error}".split())[:500])
        raise
    except KeyboardInterrupt:
        close(run, "interrupted")
        raise
    except BaseException as error:
        close(run, "failed", " ".join(f"{type(error).__name__}: {error}".split())[:500])
        raise
    close(run, "interrupted")  # only where the work ended early without an error


def _acquire(folder: Path) -> IO[str]:
    """Take the folder's advisory lock; the kernel gives it back when the process ends, however it ends."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = (folder / ".lock").open("a+", encoding="utf-8")
        except FileNotFoundError:
            continue  # the folder went between the two calls
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip()
            lock.close()
            raise UserError(
                f"{folder}: process {owner or '(starting)'} is training in this folder; wait for it or stop it"
            ) from None
        # a run that finished meanwhile has removed the file: a lock on that ghost would guard nothing
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), (folder / ".lock").stat()):
                lock.truncate(0)
                lock.write(f"{os.getpid()}\n")
                lock.flush()
                return lock
        lock.close()


def _release(folder: Path, lock: IO[str]) -> None:
    """Give the lock back, and remove the folder if the lock is all it holds."""
    if [path.name for path in folder.iterdir()] == [".lock"]:
        shutil.rmtree(folder)
    lock.close()


def _empty(folder: Path) -> None:
    """Remove everything in the folder but its lock; markers first, as in `remove_checkpoint`."""
    for path in sorted(folder.glob("checkpoint-*")):
        remove_checkpoint(path)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def _some(changed: list[str]) -> str:
    """The first differences, on a line that a terminal can show."""
    more = f"; and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    return "; ".join(changed[:SHOWN]) + more


def _stage(final: Path) -> Path:
    return final.with_name(f".{final.name}.tmp")


def _swap(stage: Path, final: Path) -> None:
    """Rename `stage` to `final`; an older `final` steps aside first and is removed last."""
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    stage.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _recover(final: Path) -> None:
    """Carry a `finish` that was killed to its end, or clear away a staged result that was not complete."""
    stage, old = _stage(final), final.with_name(f".{final.name}.old")
    if (stage / "run.json").exists() and record.read(stage).status == "finished":
        _swap(stage, final)
    elif old.exists() and not final.exists():
        old.rename(final)
    shutil.rmtree(stage, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
