"""What `evals` measures: finished runs (folders below models/final/, never trainer objects), model folders, hub ids.

Imports nothing heavy.
"""

import hashlib
import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.config.reading import nearest
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


@dataclass(frozen=True)
class Target:
    """What one MODEL argument means. `name` is its folder below evals/results/; `run` is None for any other model."""

    name: str
    subjects: list[Subject]
    run: Run | None = None


def target(root: Path, text: str) -> Target:
    """The run, model folder, packaged model or hub id that `text` means, its files checked.

    Raises:
        UserError: nothing of that name, a folder without whole weights, a hub model that is not here and not fetched.
    """
    given = next((path for path in (Path(text), root / text) if path.is_dir()), None)
    final = (root / "models" / "final").resolve()
    is_name = bool(text) and Path(text).name == text
    if (is_name and (final / text / "run.json").is_file()) or (given and given.resolve().parent == final):
        run = load(root, text)
        return Target(run.name, subjects(root, run), run)
    from rl import models

    if given is None and text == models.PACKAGED:
        given = _packaged(root)
    if given is None and models.HUB_ID.fullmatch(text):
        folder = models.fetch(text, f"model '{text}'")
        return Target(text.replace("/", "__"), [Subject("run", folder)])
    if given is None:
        run = load(root, text)  # which says what is near
        return Target(run.name, subjects(root, run), run)
    return Target(_safe_name(root, given.resolve()), [_folder(root, given.resolve())])


def tokenizer_folder(target: Target, subject: Subject) -> Path:
    """Where a subject's tokenizer is: in the run's folder, so that a run and its start read the same, else its own."""
    folders = [target.run.folder if target.run else None, subject.adapter]
    return next((folder for folder in folders if folder and (folder / "tokenizer.json").is_file()), subject.model)


def trained_on(root: Path, run: Run) -> list[dict[str, Any]]:
    """The [data] tables of a run and of the runs its model came from, as far as they are here."""
    found = [run.record["config"].get("data") or {}]
    for parent in run.record.get("parents") or []:
        name = str(parent.get("name", "")) if parent.get("role") == "model.from" else ""
        if name and name != run.name and (root / "models" / "final" / name / "run.json").is_file():
            found += trained_on(root, load(root, name))
    return found


def grading(run: Run) -> list[dict[str, Any]]:
    """The run's rewards as {"name", "weight", "options"}: the first verifying one says what a right answer is."""
    rewards = run.record["config"].get("reward") or []
    own = ("name", "weight")
    return [
        {
            **{key: reward[key] for key in own if key in reward},
            "options": {k: reward[k] for k in reward if k not in own},
        }
        for reward in rewards
    ]


def generation(run: Run) -> dict[str, Any]:
    """Length (tokens) and stop strings the run generated with, as lm-eval names them."""
    rollout = run.record["config"].get("rollout", {})
    return {"max_gen_toks": int(rollout.get("max_completion_length", 64)), "until": list(rollout.get("stop") or [])}


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


def _folder(root: Path, folder: Path) -> Subject:
    """A model folder, or a PEFT adapter's folder on the base it names."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        name = str(read_json(adapter, "get the file again").get("base_model_name_or_path", ""))
        base = _existing(name, root, folder)
        if base is None:
            raise UserError(f"{adapter}: base_model_name_or_path {name!r} is not a folder here; bring that model too")
        _check_weights(folder, "adapter_model", "get the file again")
        _check_weights(base, "model", "get the file again")
        return Subject("run", base, folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json, so it is not a model folder; give one as save_pretrained writes it")
    _check_weights(folder, "model", "get the file again")
    return Subject("run", folder)


def _packaged(root: Path) -> Path:
    """The folder of the packaged SmolLM2, converted where that was not done before."""
    from rl import config, models

    folder = root / "models" / "base" / models.PACKAGED_NAME
    if (folder / "base.json").is_file():
        return folder
    return models.resolve_base(
        config.Config(
            path=Path("nox -s eval"),
            run=config.Run(name="eval"),
            model=config.Model(base=models.PACKAGED),
            data=config.Data(source="arithmetic", train_size=1),
            trainer=config.Trainer(algorithm="sft"),
        ),
        root,
    ).path


def _safe_name(root: Path, folder: Path) -> str:
    """A name for the results of a model folder: its own, and a digest of the path unless it is a base of ours."""
    name = re.sub(r"[^\w.+-]+", "-", folder.name).lstrip(".") or "model"
    if folder.parent == (root / "models" / "base").resolve() and name not in finished(root):
        return name
    return f"{name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:6]}"


def _start(root: Path, run: Run) -> Subject | None:
    """The model a run started from where run.json tells: the run that [model] from names, or a base folder.

    Of a run on a quantized base that is the quantized one: what quantization cost is not undone by training.
    """
    base = run.record.get("base") or {}
    held = _by_sha256(base.get("sha256"), root)
    if run.record["config"].get("model", {}).get("from"):
        for parent in run.record.get("parents") or []:
            name = str(parent.get("name", "")) if parent.get("role") == "model.from" else ""
            if name and (root / "models" / "final" / name / "run.json").is_file():
                made = subjects(root, load(root, name))[-1]
                return (
                    Subject("base", held or made.model)
                    if made.adapter is None
                    else Subject("base", made.model, made.adapter)
                )
        return None
    folder = held or _existing(str(base.get("id") or ""), root, run.folder)
    if folder is None:
        return None
    _check_weights(folder, "model")
    return Subject("base", folder)


def _by_sha256(digest: str | None, root: Path) -> Path | None:
    """The folder below models/base whose base.json says it holds these weights, or is packed from them (`sha256`).

    An id need not be a folder's name, and a quantized base has the id of what it was made from.
    """
    for path in sorted((root / "models" / "base").glob("*/base.json")):
        told = read_json(path, "remove the folder: the next run makes it again")
        if digest and digest in (told.get("weights_sha256"), told.get("sha256")):
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


def _check_weights(folder: Path, stem: str, remedy: str = "train it again") -> None:
    """Raise UserError unless `folder` holds `stem`*.safetensors files of the length their headers announce."""
    files = sorted(folder.glob(f"{stem}*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no {stem}*.safetensors, so there is no model to measure; {remedy}")
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
