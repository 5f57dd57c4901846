"""`python -m papers run`: make a study's missing runs, several at a time, each on cores of its own, in bounded time.
Where there are several cards, the runs at once take them in turn.

Every run is `python -m rl train` in a child process. What is finished is reused, what was cut short goes on from its
checkpoint; a run starts when those it builds on are done. Interrupted, or at the end of its time, the runner asks its
children to save, waits for them, and says what is left: the same command goes on from there.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from papers import jobs as plans
from papers import machine, results
from papers.jobs import Job
from papers.results import Kept
from papers.study import Study
from rl import checkpoints, files, record
from rl.errors import RunFailed, UserError
from rl.hf_folder import weight_files, weights_sha256

SAVING_S = 30.0  # given to children to write a checkpoint before they are killed
COPIED = ("run.json", "metrics.jsonl", "samples.jsonl", "curves.png")
# libraries that start as many threads as they see cores
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """jobs: runs at once; threads: cores of each; budget: seconds; device: of every run; out: copies of the results."""

    jobs: int = 1
    threads: int = 2
    budget: float | None = None
    device: str | None = None
    out: Path | None = None
    quick: bool = False
    only: tuple[str, ...] = ()


@dataclass
class _Child:
    job: Job
    process: subprocess.Popen[bytes]
    slot: int
    log: Path
    began: float


@dataclass
class _State:
    """Jobs by what has become of them; `known` tells time and weights of runs that have a result."""

    known: Mapping[str, Kept] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)  # sha256 of known results' weights
    cards: Sequence[str] = ()
    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    running: dict[str, _Child] = field(default_factory=dict)


def make(
    study: Study,
    root: Path,
    settings: Settings,
    wanted: Sequence[str] | None = None,
    known: Mapping[str, Kept] | None = None,
) -> dict[str, str]:
    """Make the `wanted` jobs (all if None) and what they need; returns what failed, with the reason, by job.

    `known` are valid results: a run that only tells another its time need not be made again where its result is.

    Raises RunFailed where time was up before all was done, KeyboardInterrupt on Ctrl-C; finished runs are kept.
    """
    jobs = plans.plan(study, settings.quick)
    by_name = {job.name: job for job in jobs}
    known = known or {}
    chosen = _closure(by_name, _chosen(jobs, wanted, settings.only), known)
    jobs = [job for job in jobs if job.name in chosen]
    groups = machine.slots(machine.cores(), settings.jobs, settings.threads)
    if settings.device is not None:
        jobs = [_on(job, settings.device) for job in jobs]
        by_name = {job.name: job for job in jobs}
    about = {**machine.describe(), "slots": len(groups), "cores_a_run": len(groups[0]), "lock": plans.locked(root)}
    ready = results.here(jobs, study, root, settings.quick, known)
    state = _State(known=known, weights=results.weights(list(by_name.values()), known), cards=machine.cards())
    began = time.monotonic()
    _say(f"{study.slug}: {len(jobs)} runs, {len(ready)} finished already; {len(groups)} at a time on "
         f"{len(groups[0])} cores each; {machine.in_words(about)}")  # fmt: skip
    for job in jobs:
        if job.name in ready:  # its config too: others name it, and build/ may be gone or of another machine
            more = results.max_steps(job, root, settings.quick, known)
            plans.write(job, plans.folder(study, root, settings.quick), root, by_name, more)
            _finished(root, job, state, settings, about)
    cut = False
    try:
        with _terminated_as_interrupted():
            while len(state.done) + len(state.failed) < len(jobs):
                if settings.budget is not None and time.monotonic() - began > settings.budget:
                    cut = True
                    break
                _start_ready(study, root, settings, jobs, by_name, state, groups)
                if not state.running and not _can_start(jobs, state):
                    break
                for child in _ended(state):
                    _note(root, child, state, settings, about, len(jobs), began)
                time.sleep(0.05)
    except KeyboardInterrupt:
        _stop(state)
        _say(f"interrupted: {len(state.done)} of {len(jobs)} runs finished; the same command goes on from there")
        raise
    if cut:
        _stop(state)
        for child in _ended(state):
            _note(root, child, state, settings, about, len(jobs), began)
    _say(f"{len(state.done)} of {len(jobs)} runs finished in {time.monotonic() - began:.0f} s")
    if cut and len(state.done) < len(jobs):
        raise RunFailed(f"time is up: {len(jobs) - len(state.done)} runs are left; the same command goes on from there")
    return state.failed


def _chosen(jobs: Sequence[Job], wanted: Sequence[str] | None, only: Sequence[str]) -> list[str]:
    """Names of the jobs asked for. UserError for a run that is none of the study's."""
    known = {job.run for job in jobs}
    for name in only:
        if name not in known:
            raise UserError(f"--only {name}: no run of this study, valid: {', '.join(sorted(known))}")
    return [job.name for job in jobs if (wanted is None or job.name in wanted) and (not only or job.run in only)]


def _closure(by_name: Mapping[str, Job], names: Sequence[str], known: Mapping[str, Kept]) -> set[str]:
    """Jobs and all that they need."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += _needed(by_name[name], known)
    return found


def _needed(job: Job, known: Mapping[str, Kept]) -> list[str]:
    """What must be finished here before a job: its parents' weights, and times that no result tells."""
    return [name for name in job.needs if name in job.parents.values() or name not in known]


def _on(job: Job, device: str) -> Job:
    """The job on another device, which is recorded and decides nothing."""
    return Job(**{**vars(job), "overrides": (*job.overrides, f"run.device={device}")})


def _can_start(jobs: Sequence[Job], state: _State) -> bool:
    return any(_waiting(job, state) and set(_needed(job, state.known)) <= state.done for job in jobs)


def _waiting(job: Job, state: _State) -> bool:
    return job.name not in state.done and job.name not in state.failed and job.name not in state.running


def _start_ready(
    study: Study,
    root: Path,
    settings: Settings,
    jobs: Sequence[Job],
    by_name: Mapping[str, Job],
    state: _State,
    groups: Sequence[Sequence[int]],
) -> None:
    """Fill the free slots with jobs whose parents are done; a job whose parent failed fails too."""
    for job in jobs:
        if not _waiting(job, state):
            continue
        if broken := [name for name in _needed(job, state.known) if name in state.failed]:
            state.failed[job.name] = f"{broken[0]}, which it needs, failed"
            continue
        taken = {child.slot for child in state.running.values()}
        free = [number for number in range(len(groups)) if number not in taken]
        if not free:
            return
        if set(_needed(job, state.known)) <= state.done:
            try:
                state.running[job.name] = _start(study, root, settings, job, by_name, state, free[0], groups[free[0]])
            except UserError as error:
                state.failed[job.name] = str(error)


def _start(
    study: Study,
    root: Path,
    settings: Settings,
    job: Job,
    by_name: Mapping[str, Job],
    state: _State,
    slot: int,
    group: Sequence[int],
) -> _Child:
    where = plans.folder(study, root, settings.quick)
    path = plans.write(job, where, root, by_name, results.max_steps(job, root, settings.quick, state.known))
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", **dict.fromkeys(THREADS, str(len(group)))}
    if len(state.cards) > 1:  # each run sees one card, or all would take the first
        environment["CUDA_VISIBLE_DEVICES"] = state.cards[slot % len(state.cards)]
    log = where / "logs" / f"{job.stem}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    relative = path.relative_to(root) if path.is_relative_to(root) else path
    command = [sys.executable, "-m", "rl", "train", str(relative), *_flags(root, job, path)]
    with log.open("wb") as out:
        # a session of its own: Ctrl-C reaches it once, from here
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    machine.bind(process.pid, group)
    return _Child(job, process, slot, log, time.monotonic())


def _flags(root: Path, job: Job, config: Path) -> list[str]:
    """--resume where an unfinished run of this very config has a checkpoint, --restart where anything else is there."""
    unfinished, final = (root / "models" / part / job.name for part in ("checkpoints", "final"))
    if checkpoints.last_checkpoint(unfinished) is not None and (unfinished / "run.json").is_file():
        from rl.config import load, resolved

        same = not plans.changed(resolved(load(config)), record.read(unfinished).config, list(job.parents))
        return ["--resume" if same else "--restart"]
    return ["--restart"] if unfinished.exists() or final.exists() else []


def _ended(state: _State) -> list[_Child]:
    """Children that have ended, taken off the running ones."""
    ended = [child for child in state.running.values() if child.process.poll() is not None]
    for child in ended:
        del state.running[child.job.name]
    return ended


def _note(
    root: Path, child: _Child, state: _State, settings: Settings, about: dict[str, Any], total: int, began: float
) -> None:
    """Say how a child ended, and keep what it made."""
    name, code, took = child.job.name, child.process.returncode, time.monotonic() - child.began
    if code == 0:
        _finished(root, child.job, state, settings, about)
        how = f"finished in {took:.0f} s"
    elif code == 130:
        point = checkpoints.last_checkpoint(root / "models" / "checkpoints" / name)
        how = f"stopped after {took:.0f} s, " + ("its checkpoint kept" if point else "before its first checkpoint")
    else:
        lines = [line for line in child.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        state.failed[name] = f"exit {code}: {lines[-1].strip()[:300] if lines else 'no output'}"
        how = f"FAILED after {took:.0f} s, {state.failed[name]} ({child.log})"
    waiting = total - len(state.done) - len(state.failed) - len(state.running)
    _say(f"[{time.monotonic() - began:4.0f} s] {name} {how}; {len(state.running)} running, {waiting} waiting")


def _finished(root: Path, job: Job, state: _State, settings: Settings, about: dict[str, Any]) -> None:
    """Keep what a run made, and let others build on it.

    A run made anew only for its weights must give those that the results at hand went on from: of another machine or
    other code it may not, and what is made from it could not stand beside them.
    """
    made, known = _weights(root / "models" / "final" / job.name), state.weights.get(job.name)
    if made and known and made != known:
        state.failed[job.name] = (
            f"its weights as made here ({made[:12]}) are not those that the study's results went on from "
            f"({known[:12]}); make all runs here: --again"
        )
        return
    state.done.add(job.name)
    _copy(root, job, settings, {**about, "weights": made})


def _weights(final: Path) -> str | None:
    """The sha256 of a whole model's weights, as runs that go on from it record it; None for an adapter."""
    if (final / "adapter_config.json").is_file() or not list(final.glob("*.safetensors")):
        return None
    return weights_sha256(weight_files(final, str(final)))


def _copy(root: Path, job: Job, settings: Settings, about: dict[str, Any]) -> None:
    """The run's folder without its weights to `out`, at once: what comes after may be cut off."""
    final = root / "models" / "final" / job.name
    files.write_json(root / "build" / "papers" / "machines" / f"{job.name}.json", about)
    if settings.out is None:
        return
    for name in COPIED:
        if (final / name).is_file():
            files.write_bytes(settings.out / job.name / name, (final / name).read_bytes())
    files.write_json(settings.out / job.name / "machine.json", about)


def _stop(state: _State) -> None:
    """Ask the children to save and end; kill those that do not."""
    for child in state.running.values():
        _signal(child, signal.SIGINT)
    end = time.monotonic() + SAVING_S
    while any(child.process.poll() is None for child in state.running.values()) and time.monotonic() < end:
        time.sleep(0.05)
    for child in state.running.values():
        if child.process.poll() is None:
            _signal(child, signal.SIGKILL)
            child.process.wait()


def _signal(child: _Child, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.process.pid, number)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """A time limit's SIGTERM ends the runner as Ctrl-C does: children save.

    A shell without a terminal lets what it starts with `&` ignore SIGINT, and children would inherit that and be deaf
    when they are asked to save: here they are not.
    """

    def raise_(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    old = {number: signal.signal(number, raise_) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    print(text, flush=True)
