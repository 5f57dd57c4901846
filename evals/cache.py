"""What need not be done twice: file digests, whole results, and the finished requests of a task that was killed.

All of it lies in evals/results/: digests by size and time in .digests.json, finished requests in .partial/KEY.jsonl
until the result is whole. A result's `key` is a digest of all it depends on, so a result of the same weights on the
same task with the same settings is found whatever its model is called.
"""

import inspect
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from evals import runs
from rl.files import sha256_file, sha256_json, write_text

KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja")


class Bar(Protocol):
    """What shows progress: `update` with the number of requests done."""

    def update(self, step: int) -> None: ...


Progress = Callable[[int], AbstractContextManager[Bar]]  # number of requests -> bar


# --- digests


def model_sha256(root: Path, subject: runs.Subject, tokenizer: Path) -> str:
    """Digest of all files that make up a subject: weights, config.json, adapter with its settings, tokenizer's folder.

    Where the adapter says its base lies is left out: the base's own files are in the digest.
    """
    patterns = {subject.model: ["*.safetensors", "config.json"]}
    if subject.adapter:
        patterns[subject.adapter] = ["*.safetensors"]
    known = _read_digests(root)
    before, parts = dict(known), []
    for folder, names in [*patterns.items(), (tokenizer, list(TOKENIZER))]:
        files = sorted({path for name in names for path in folder.glob(name) if path.is_file()})
        parts.append([f"{path.name} {_digest(path, known)}" for path in files])
    if subject.adapter:
        settings = runs.read_json(subject.adapter / "adapter_config.json", "train the run again")
        parts.append([sha256_json({k: v for k, v in settings.items() if k != "base_model_name_or_path"})])
    if known != before:
        write_text(_digests_path(root), json.dumps(known))
    return sha256_json(parts)


def _digest(path: Path, known: dict[str, list[Any]]) -> str:
    """A file's sha256, from `known` while size, time of change and inode are the same."""
    real = path.resolve()  # the hub's cache holds links
    stat = real.stat()
    stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    found = known.get(str(real))
    if found is None or found[:4] != stamp:
        found = known[str(real)] = [*stamp, sha256_file(real)]
    return str(found[4])


def _digests_path(root: Path) -> Path:
    return root / "evals" / "results" / ".digests.json"


def _read_digests(root: Path) -> dict[str, list[Any]]:
    with suppress(OSError, ValueError, AttributeError):
        return {path: entry for path, entry in json.loads(_digests_path(root).read_text()).items() if len(entry) == 5}
    return {}


# --- whole results


def same(root: Path, key: str) -> Path | None:
    """A result with this key under any name, its samples as they were written; None where there is none."""
    folder = root / "evals" / "results"
    for path in sorted([*folder.glob("*/*.json"), *folder.glob("*/base/*.json")]):
        # the key stands in the block that measure.py writes first: most files need no parsing
        with suppress(OSError, ValueError, KeyError, TypeError):
            text = path.read_text(encoding="utf-8")
            if key in text and json.loads(text)["duet"]["key"] == key and samples_match(path, json.loads(text)["duet"]):
                return path
    return None


def samples_match(path: Path, made: dict[str, Any]) -> bool:
    """Whether the samples beside a result are the ones it was made with."""
    samples = path.with_name(f"{path.stem}.samples.jsonl")
    return samples.is_file() and sha256_file(samples) == made.get("samples_sha256")


# --- finished requests


@dataclass
class Journal:
    """Finished requests of one task, appended to a file as the model reports them; lm-eval's cache hook.

    A line is {"kind", "request": digest of the arguments, "answer"}. Sampled generations are not kept: several samples
    of one question have the same arguments and must differ.
    """

    path: Path
    answers: dict[str, Any] = field(default_factory=dict)
    reported: Callable[[], None] | None = None
    file: IO[str] | None = None

    def __post_init__(self) -> None:
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError, KeyError, TypeError):  # a killed process may have left half a line
                    found = json.loads(line)
                    self.answers[found["request"]] = found["answer"]

    def get(self, kind: str, arguments: Sequence[Any]) -> Any:
        """The answer to a request, None where it is not finished."""
        if _sampled(arguments):
            return None
        answer = self.answers.get(_name(kind, arguments))
        return (float(answer[0]), bool(answer[1])) if kind == "loglikelihood" and answer is not None else answer

    def add_partial(self, kind: str, arguments: Sequence[Any], answer: Any) -> None:
        """Called by lm-eval's models for each finished request."""
        if self.reported:
            self.reported()
        name = _name(kind, arguments)
        if _sampled(arguments) or name in self.answers:
            return
        if kind == "loglikelihood":
            answer = [float(answer[0]), bool(answer[1])]
        elif kind == "loglikelihood_rolling":
            answer = float(answer)
        self.answers[name] = answer
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torn = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
            self.file = self.path.open("a", encoding="utf-8")
            self.file.write("\n" if torn else "")
        self.file.write(json.dumps({"kind": kind, "request": name, "answer": answer}, ensure_ascii=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file; what it holds stays."""
        if self.file:
            self.file.close()
            self.file = None


@dataclass
class Work:
    """What a model did for one task: seconds in it, tokens it wrote (generation) or read (scoring), by its tokenizer.

    Requests that the journal answered are in neither.
    """

    seconds: float = 0.0
    tokens: int = 0


@contextmanager
def resumable(
    lm: Any, journal: Journal, progress: Progress, check: Callable[[Any], None] | None = None, *, batch: int = 1
) -> Iterator[Work]:
    """Within it, `lm` answers from the journal what is there and adds what it finishes; `check` sees requests first.

    `progress` is given the number of requests of a kind and yields a bar, which moves by whole batches of `batch`: the
    requests of one are reported together, and the first alone would promise a long wait.
    """
    work = Work()
    hook = getattr(lm, "cache_hook", None)
    own = {kind: getattr(lm, kind) for kind in KINDS}

    def asking(kind: str) -> Callable[..., list[Any]]:
        # lm-eval's own bar would run beside ours
        quiet = {"disable_tqdm": True} if "disable_tqdm" in inspect.signature(own[kind]).parameters else {}

        def ask(requests: list[Any]) -> list[Any]:
            for request in requests if check else []:
                check(request)
            found = [journal.get(kind, request.args) for request in requests]
            left = [request for request, answer in zip(requests, found, strict=True) if answer is None]
            with progress(len(requests)) as bar:
                done = [len(requests) - len(left)]

                def reported() -> None:
                    done[0] = min(done[0] + 1, len(requests))
                    if (done[0] - len(requests) + len(left)) % batch == 0:
                        bar.update(done[0])

                bar.update(done[0])
                journal.reported = reported
                started = time.monotonic()
                fresh = own[kind](left, **quiet) if left else []
                work.seconds += time.monotonic() - started
                journal.reported = None
                bar.update(len(requests))
            work.tokens += sum(_tokens(lm, kind, *pair) for pair in zip(left, fresh, strict=True))
            answers = iter(fresh)
            return [next(answers) if answer is None else answer for answer in found]

        return ask

    try:
        lm.set_cache_hook(journal)
        for kind in KINDS:
            setattr(lm, kind, asking(kind))
        yield work
    finally:
        for kind in KINDS:
            delattr(lm, kind)  # the class's own method shows again
        lm.set_cache_hook(hook)
        journal.reported = None
        journal.close()


def _tokens(lm: Any, kind: str, request: Any, answer: Any) -> int:
    text = answer if kind == "generate_until" else "".join(request.args)
    return len(lm.tok_encode(text, add_special_tokens=False)) if text else 0


def _name(kind: str, arguments: Sequence[Any]) -> str:
    return sha256_json([kind, *arguments])


def _sampled(arguments: Sequence[Any]) -> bool:
    return any(isinstance(part, dict) and part.get("do_sample") for part in arguments)
