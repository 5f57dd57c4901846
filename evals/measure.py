"""One model on one task through lm-eval; results go to evals/results/<name>/[base/]<task>.json, samples beside them."""

import hashlib
import json
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evals import backends, cache, harness, runs
from evals.catalog import Task
from rl.errors import UserError
from rl.files import sha256_json, write_text
from rl.record import git_state

if TYPE_CHECKING:
    from evals.backends import Loaded

# code that makes our questions and marks the answers: a result made with other code is made again
CODE = ("data/gym.py", "data/arithmetic.py", "rewards/answers.py", "rewards/functions.py")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to measure; `limit` questions at most, `batch_size` sequences at once, `seed` of all that lm-eval draws."""

    backend: str = "auto"
    device: str = "auto"
    dtype: str = "float32"
    batch_size: int = 32
    limit: int | None = None
    seed: int = 0
    again: bool = False


@dataclass(frozen=True)
class Job:
    """One measurement: a subject of a target on a task, the backend chosen for it, and the digest of its inputs."""

    target: runs.Target
    subject: runs.Subject
    task: Task
    backend: backends.Backend
    path: Path
    inputs: dict[str, Any]
    key: str

    @property
    def title(self) -> str:
        """For people: "grpo (base) on gym_gcd"."""
        return f"{self.target.name}{' (base)' if self.subject.role == 'base' else ''} on {self.task.name}"


Made = Literal["up to date", "same as", "resumed", "wrote"]


def result_path(root: Path, name: str, role: str, task: str) -> Path:
    """Where a result lies; beside it <task>.samples.jsonl, and for a run's own questions <task>.rows.jsonl."""
    folder = root / "evals" / "results" / name
    return (folder / "base" if role == "base" else folder) / f"{task}.json"


def job(root: Path, target: runs.Target, subject: runs.Subject, task: Task, settings: Settings) -> Job:
    """A measurement with all its inputs hashed; nothing heavy is imported and nothing measured.

    Raises UserError for a task the target cannot answer honestly, missing data, a backend that cannot serve, and a
    result file in the way that is not whole.
    """
    backend = backends.choose(settings.backend, settings.device, subject)
    check_unseen(root, target, task)
    kept: dict[str, Any] = {"limit": settings.limit, "seed": settings.seed}
    if task.of_runs:
        if target.run is None:
            raise UserError(f"{target.name}: task heldout asks the questions that a run kept, and this is no run; "
                            "name other tasks, such as --tasks sums,gym_gcd")  # fmt: skip
        rows = runs.heldout(target.run)[: settings.limit]
        kept |= {
            "rows_sha256": sha256_json(rows),
            "grading": runs.grading(target.run),
            "generation": runs.generation(target.run),
        }
    names = [
        "lm-eval",
        "transformers",
        "reasoning-gym",
        *(("mlx", "mlx-lm") if backend == "mlx" else ("torch", "peft")),
    ]
    inputs = {
        "backend": backend,
        "dtype": settings.dtype,
        "model_sha256": cache.model_sha256(root, subject, runs.tokenizer_folder(target, subject)),
        "task_sha256": task.sha256,
        "settings": kept,
        "packages": {name: _version(name) for name in names},
        "code_sha256": _code_sha256() if task.kind == "ours" else None,
    }
    path = result_path(root, target.name, subject.role, task.name)
    if path.is_file() and not settings.again:
        runs.read_json(path, f"it is not overwritten: remove it, or run with --again (results of {target.name})")
    return Job(target, subject, task, backend, path, inputs, sha256_json(inputs))


def kept(root: Path, todo: Job, settings: Settings) -> Made | None:
    """Whether a result made from just these inputs is there ("up to date"), or under another name and is copied."""
    if settings.again:
        return None
    try:
        made = json.loads(todo.path.read_text(encoding="utf-8"))["duet"]
        if made["key"] == todo.key and cache.samples_match(todo.path, made):
            return "up to date"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    other = cache.same(root, todo.key)
    if other is None:
        return None
    result = runs.read_json(other, "measure again")
    result["duet"] |= {"run": todo.target.name, "role": todo.subject.role}
    beside = [f"{todo.task.name}.samples.jsonl", f"{todo.task.name}.rows.jsonl"]
    for source, name in ((other.with_name(name), name) for name in beside):
        if source.is_file():
            write_text(todo.path.with_name(name), source.read_text(encoding="utf-8"))
    write_text(todo.path, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return "same as"


def load(todo: Job, settings: Settings) -> "Loaded":
    """The job's model, ready for lm-eval."""
    tokenizer = backends.tokenizer_of(runs.tokenizer_folder(todo.target, todo.subject))
    return backends.load(
        todo.subject,
        tokenizer,
        todo.backend,
        device=settings.device,
        dtype=settings.dtype,
        batch_size=settings.batch_size,
    )


def measure(root: Path, todo: Job, loaded: "Loaded", settings: Settings, progress: cache.Progress) -> Made:
    """Run the task and write result and samples; "resumed" when a killed run had left finished requests.

    Raises UserError for rows that do not fit the context, a tokenizer that cannot serve and data that cannot be had;
    nothing is written then, and finished requests stay for the next time.
    """
    partial = root / "evals" / "results" / ".partial" / f"{todo.key}.jsonl"
    if settings.again:
        partial.unlink(missing_ok=True)
    journal = cache.Journal(partial)
    resumed = bool(journal.answers)
    run = todo.target.run if todo.task.of_runs else None
    lm, where = loaded.lm, f"{run.folder / 'heldout.jsonl'}: row" if run else f"{todo.task.name}: question"
    check = harness.fits(lm, where) if todo.task.kind == "ours" else None
    with tempfile.TemporaryDirectory() as folder:
        if run:
            asked = harness.own_rows(Path(folder), run, todo.task, loaded.tokenizer, settings.limit)
        else:
            asked = harness.asked(todo.task)
        # a chat template writes BOS itself where the model wants one
        with (
            backends.bos(lm, False if asked.chat else None),
            cache.resumable(lm, journal, progress, check, batch=settings.batch_size) as work,
        ):
            result = harness.evaluate(lm, asked, settings.limit, settings.seed)
    result, samples = harness.plain(result, todo.task)
    samples = _portable(samples, root)
    made = {
        "run": todo.target.name,
        "role": todo.subject.role,
        "device": loaded.device,
        **todo.inputs,
        "key": todo.key,
        "weights_sha256": runs.weights_sha256(todo.subject),
        "samples_sha256": hashlib.sha256(samples.encode()).hexdigest(),
        "batch_size": settings.batch_size,
        "commit": (git_state(root) or {}).get("commit"),
        "lm_eval": version("lm-eval"),
        "tokens_per_s": round(work.tokens / work.seconds, 3) if work.seconds and work.tokens else None,
        "peak_memory_bytes": backends.peak_memory_bytes(loaded),
        "seconds": round(work.seconds, 3),
        "resumed": resumed,
    }
    # the result last: where it is, its samples are whole
    if asked.rows:
        write_text(todo.path.with_name(f"{todo.task.name}.rows.jsonl"), asked.rows)
    write_text(todo.path.with_name(f"{todo.task.name}.samples.jsonl"), samples)
    text = json.dumps({"duet": made, **result}, indent=2, ensure_ascii=False)
    write_text(todo.path, _portable(text, root) + "\n")
    partial.unlink(missing_ok=True)
    with suppress(OSError):  # another measurement's requests may be there
        partial.parent.rmdir()
    return "resumed" if resumed else "wrote"


def check_unseen(root: Path, target: runs.Target, task: Task) -> None:
    """Raise UserError where the run may have been trained on the task's own questions (see evals/tasks/offline.py)."""
    asked = task.config.get("dataset_kwargs") or {} if task.kind == "ours" else {}
    for data in runs.trained_on(root, target.run) if target.run else []:
        families = [entry.get("name") for entry in data.get("task") or [] if isinstance(entry, dict)]
        gym = data.get("source") == "reasoning-gym" and asked.get("family") in families and data.get("seed", 0) != 0
        sums = data.get("source") == "arithmetic" and task.path.stem == "sums" and data.get("operation", "+") == "+"
        same = all(data.get(key) == asked.get(key) for key in ("max_a", "max_b", "shots")) and data.get("seed", 0) == 0
        if gym or (sums and not same):
            raise UserError(
                f"{target.name} on {task.name}: it was trained on questions of this kind split another way "
                "([data] seed, max_a, max_b or shots), so it may have seen these; --tasks heldout asks what it did not"
            )


def _code_sha256() -> str:
    folder = Path(__file__).resolve().parent.parent / "rl"
    return sha256_json([(folder / name).read_text(encoding="utf-8") for name in CODE])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _portable(text: str, root: Path) -> str:
    """Text without the checkout's place on this machine: results get published."""
    return text.replace(f"{root.resolve()}/", "")
