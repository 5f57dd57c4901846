"""Finished runs as `evals` sees them: folders below models/final/, never trainer objects. Imports nothing heavy."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.config_read import nearest
from rl.errors import UserError
from rl.files import sha256_file, sha256_json


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and its run.json."""

    name: str
    folder: Path
    record: dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """One model to measure: a Hugging Face folder, with a PEFT folder on top where the run trained an adapter."""

    role: str  # "run" is what the run made, "base" is what it started from
    model: Path
    adapter: Path | None = None


def finished(root: Path) -> list[str]:
    """Names of the runs in models/final/, sorted; what is still being moved there has a hidden name."""
    final = root / "models" / "final"
    return sorted(path.parent.name for path in final.glob("*/run.json") if not path.parent.name.startswith("."))


def load(root: Path, name: str) -> Run:
    """The run called `name`, or with that folder. Raises UserError when there is none or its record is broken."""
    folder = root / "models" / "final" / Path(name).name
    path = folder / "run.json"
    if not path.is_file():
        known = finished(root)
        if not known:
            raise UserError(f"{name}: models/final holds no finished run; make one: nox -s train -- configs/grpo.toml")
        raise UserError(f"{name}: no such run in models/final; {nearest(Path(name).name, known)}")
    record = read_json(path, "train it again")
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise UserError(f"{path.relative_to(root)}: not a run record (no `config` table); train it again")
    return Run(folder.name, folder, record)


def heldout(run: Run) -> list[dict[str, Any]]:
    """Rows {"id", "prompt", "answer", "task", …} the run kept for measuring. Raises UserError naming file and line."""
    path = run.folder / "heldout.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: missing, so there is nothing to ask {run.name}; train it again")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}: line {number} is not JSON ({error}); train {run.name} again") from None
        missing = {"id", "prompt", "answer"} - (row.keys() if isinstance(row, dict) else set())
        if missing:
            raise UserError(f"{path}: line {number} lacks {', '.join(sorted(missing))}; train {run.name} again")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: no rows, so there is nothing to ask {run.name}; train it again")
    return rows


def subjects(root: Path, run: Run) -> list[Subject]:
    """What to measure for a run: what it started from (where that still exists), then what it made.

    Raises UserError for a folder without whole weights.
    """
    start = _start(root, run)
    adapter = run.folder / "adapter_config.json"
    if adapter.is_file():
        name = str(read_json(adapter, "train the run again").get("base_model_name_or_path", ""))
        base = _existing(name, root, run.folder)
        if base is None:
            raise UserError(f"{adapter}: base_model_name_or_path {name!r} is not a folder here; train the run again")
        _check_weights(run.folder, "adapter_model")
        _check_weights(base, "model")
        made = Subject("run", base, run.folder)
        start = start or Subject("base", base)
    else:
        _check_weights(run.folder, "model")
        made = Subject("run", run.folder)
    return [start, made] if start else [made]


def weights_sha256(subject: Subject) -> str:
    """One digest of all weight files that make up a subject, with their names."""
    folders = [subject.model] + ([subject.adapter] if subject.adapter else [])
    files = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    return sha256_json([[path.name, sha256_file(path)] for path in files])


def read_json(path: Path, remedy: str) -> Any:
    """A JSON file's value; UserError with `remedy` when it is truncated or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not whole JSON ({error}); {remedy}") from None


def _start(root: Path, run: Run) -> Subject | None:
    """The model a run started from where run.json tells: the run that [model] from names, or a base folder."""
    if run.record["config"].get("model", {}).get("from"):
        for parent in run.record.get("parents") or []:
            name = str(parent.get("name", "")) if parent.get("role") == "model.from" else ""
            if name and (root / "models" / "final" / name / "run.json").is_file():
                made = subjects(root, load(root, name))[-1]
                return Subject("base", made.model, made.adapter)
        return None
    base = run.record.get("base") or {}
    folder = _existing(str(base.get("id") or ""), root, run.folder) or _by_sha256(base.get("sha256"), root)
    if folder is None:
        return None
    _check_weights(folder, "model")
    return Subject("base", folder)


def _by_sha256(digest: str | None, root: Path) -> Path | None:
    """The folder below models/base whose base.json says it holds these weights; an id need not be a folder's name."""
    for path in sorted((root / "models" / "base").glob("*/base.json")):
        if digest and read_json(path, "remove the folder: the next run makes it again").get("weights_sha256") == digest:
            return path.parent.resolve()
    return None


def _existing(name: str, root: Path, folder: Path) -> Path | None:
    """The model folder a record means by `name`: as it stands, or relative to the checkout, models/base or the run."""
    if not name:
        return None
    base = root / "models" / "base"
    # the last: a run that was made in another checkout
    for path in (Path(name), root / name, base / name, folder / name, base / Path(name).name):
        if (path / "config.json").is_file():
            return path.resolve()
    return None


def _check_weights(folder: Path, stem: str) -> None:
    """Raise UserError unless `folder` holds `stem`*.safetensors files of the length their headers announce."""
    files = sorted(folder.glob(f"{stem}*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no {stem}*.safetensors, so there is no model to measure; train it again")
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            header = file.read(length) if 8 + length <= size else b""
        try:
            ends = [entry["data_offsets"][1] for key, entry in json.loads(header).items() if key != "__metadata__"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: truncated or not safetensors ({size} bytes); get the file again") from None
        expected = 8 + length + max(ends, default=0)
        if size != expected:
            raise UserError(f"{path}: truncated, {size} bytes of {expected}; get the file again")
