"""Rows from files or the hub: columns `prompt` (text or chat messages) and `answer`; others are kept for rewards.

For dpo, kto and reward the training rows may be preferences instead of questions (`rl.data.preferences`); for reward,
which is measured on pairs, the held-out rows too.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rl.data import preferences
from rl.errors import UserError

if TYPE_CHECKING:
    from rl.config import Config, Data

Row = dict[str, Any]


def jsonl_rows(config: "Config") -> tuple[list[Row], list[Row]]:
    """(train, held-out) rows of `data.path` and `data.heldout_path` (relative to the config's folder).

    Without `heldout_path` the held-out rows are split off by a hash of each row's prompt, so they stay the same when
    rows are added elsewhere in the file. File order is kept. Train rows whose prompt is also held out are left out.
    """
    data, folder = config.data, config.path.parent
    if data.path is None:
        raise UserError(f"{config.path}: [data] path is missing: source 'jsonl' needs the file of the rows")
    train = _read(folder / data.path, data, config.trainer.algorithm)
    heldout = None if data.heldout_path is None else _read(folder / data.heldout_path, data, _measured(config))
    if heldout is None and not _measured(config) and preferences.ready(train, config.trainer.algorithm, str(data.path)):
        raise UserError(
            f"{config.path}: [data] heldout_path is missing: {data.path} holds preferences, and the run is measured on "
            "questions: a jsonl file with columns prompt and answer"
        )
    return _split(train, heldout, config, str(data.path), str(data.heldout_path))


def hub_rows(config: "Config") -> tuple[list[Row], list[Row]]:
    """(train, held-out) rows of `data.name`, "org/name" or "org/name:subset", splits `split` and `heldout_split`.

    A column `question` serves as `prompt`, and of an answer with "####" only what follows counts (GSM8K's form).
    Equal split names: split off by hash as for jsonl.
    """
    data = config.data
    if data.name is None:
        raise UserError(f"{config.path}: [data] name is missing: source 'hub' needs the data set's id, 'org/name'")
    train = _fetch(data.split, config, config.trainer.algorithm)
    same = data.heldout_split == data.split
    if same and not _measured(config) and preferences.ready(train, config.trainer.algorithm, str(data.name)):
        raise UserError(
            f"{config.path}: [data] heldout_split = '{data.split}' holds preferences, and the run is measured on "
            "questions with an answer: name a split of those, or take source = 'jsonl' with a heldout_path"
        )
    heldout = None if same else _fetch(data.heldout_split, config, _measured(config))
    return _split(train, heldout, config, f"{data.name}/{data.split}", f"{data.name}/{data.heldout_split}")


def of_run(folder: Path, config: "Config", heldout: list[Row]) -> list[Row]:
    """At most `data.train_size` of the preferences that the finished run in `folder` has sampled, none on a held-out
    prompt. As texts: its token ids may mean something else here. For kto pairs come as two labelled completions.

    Raises UserError when the run has sampled none, or not of the kind that the algorithm takes.
    """
    from rl import pairs

    where, algorithm = f"{config.path}: [data] from = '{config.data.from_}'", config.trainer.algorithm
    path = folder / pairs.FILE
    if not path.is_file():
        raise UserError(f"{where}: that run has sampled no pairs ({path} is not there): its rows came from a file")
    rows = [preferences.portable(json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]
    if algorithm == "kto" and "label" not in rows[0]:
        rows = [half for row in rows for half in preferences.unpaired(row)]
    preferences.ready(rows, algorithm, where)
    asked = {_asked(row) for row in heldout}
    rows = [row for row in rows if _asked(row) not in asked]
    if not rows:
        raise UserError(f"{where}: every prompt of its pairs is held out here: take another [data] seed")
    return _choose(rows, config.data.train_size, config.data.seed, "id")


def _measured(config: "Config") -> str | None:
    """The algorithm whose preference rows may be held out, None where only questions may."""
    return "reward" if config.trainer.algorithm == "reward" else None


def _read(path: Path, data: "Data", algorithm: str | None = None) -> list[Row]:
    """The rows of a file; with an `algorithm` they may be its preference rows."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # not splitlines: texts may hold U+2028
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); [data] paths are relative to the config"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    rows: list[Row] = []
    lines_of: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path} line {number}: not JSON ({error.msg}, column {error.colno}); one object a line"
            ) from error
        row = _row(record, data, f"{path} line {number}", algorithm)
        if "id" in record and row["id"] in lines_of:
            raise UserError(
                f"{path} line {number}: id '{row['id']}' is also on line {lines_of[row['id']]}; make it unique"
            )
        lines_of[row["id"]] = number
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: no rows; one JSON object a line, with 'prompt' and 'answer'")
    return _unique(rows)


def _fetch(split: str, config: "Config", algorithm: str | None = None) -> list[Row]:
    import datasets

    data = config.data
    name, _, subset = str(data.name).partition(":")
    where = f"{config.path}: [data] name = '{data.name}', split '{split}'"
    try:
        records = datasets.load_dataset(name, subset or None, split=split)
    except Exception as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"{where}: cannot be loaded ({type(error).__name__}: {said:.200}): without a network, run 'hf download "
            f"--repo-type dataset {name}' on a machine that has one, copy its cache and point HF_HOME to it, or "
            "give the rows as a file (source = 'jsonl')"
        ) from error
    rows = []
    for number, record in enumerate(records):
        record = dict(record)
        if "prompt" not in record and "question" in record:
            record["prompt"] = record.pop("question")
        if isinstance(record.get("answer"), str) and "####" in record["answer"]:
            record["answer"] = record["answer"].rsplit("####", 1)[1]
        rows.append(_row(record, data, f"{where}, row {number}", algorithm))
    if not rows:
        raise UserError(f"{where}: no rows")
    return _unique(rows)


def _row(record: Any, data: "Data", where: str, algorithm: str | None = None) -> Row:
    if not isinstance(record, dict):
        raise UserError(f"{where}: found {type(record).__name__}, must be an object with 'prompt' and 'answer'")
    needed = preferences.columns(record, algorithm)
    if missing := [f"'{column}'" for column in needed if column not in record]:
        instead = (
            "" if "answer" in needed else f"; {algorithm} takes {', '.join(needed)} in each row, or prompt, answer"
        )
        raise UserError(f"{where}: no column {', '.join(missing)}, found: {', '.join(record) or 'none'}{instead}")
    prompt = record["prompt"]
    if not (isinstance(prompt, str) and prompt) and not _is_chat(prompt):
        raise UserError(f"{where}: 'prompt' must be a text or a list of {{role, content}}, found {prompt!r:.60}")
    own = preferences.portable(record) | ({"answer": _answer(record["answer"], where)} if "answer" in needed else {})
    if data.form == "chat":
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if data.system and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": data.system}, *prompt]
    digest = hashlib.sha256(json.dumps([own[column] for column in needed], sort_keys=True).encode()).hexdigest()
    row = preferences.spoken(own | {"id": str(record.get("id", digest[:16])), "prompt": prompt})
    preferences.check(row, needed, where)
    return {"task": data.source} | row


def _answer(answer: Any, where: str) -> str:
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise UserError(f"{where}: 'answer' must be a text or a number, found {answer!r:.60}")
    return str(answer).strip()


def _unique(rows: list[Row]) -> list[Row]:
    """Number the repeats of an id (equal rows without ids of their own)."""
    times: Counter[str] = Counter()
    for row in rows:
        times[row["id"]] += 1
        if times[row["id"]] > 1:
            row["id"] += f"-{times[row['id']]}"
    return rows


def _is_chat(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
        )
    )


def _split(
    train: list[Row], heldout: list[Row] | None, config: "Config", name: str, heldout_name: str
) -> tuple[list[Row], list[Row]]:
    data, size = config.data, config.eval.size
    found, source = (train, name) if heldout is None else (heldout, heldout_name)
    if len(found) < size:
        raise UserError(
            f"{config.path}: [eval] size = {size}, but {source} has {len(found)} rows: lower it or add rows"
        )
    # by prompt where one file has both: by row, a prompt given often would nearly always be held out, so lost to train
    heldout = _choose(found, size, data.seed, "prompt" if found is train else "id")
    asked = {_asked(row) for row in heldout}
    train = [row for row in train if _asked(row) not in asked]
    if not train:
        raise UserError(
            f"{config.path}: [eval] size = {size} leaves none of the rows of {name} to train on (rows whose prompt is "
            "held out do not count): lower it or add rows"
        )
    return _choose(train, data.train_size, data.seed, "id"), heldout


def _asked(row: Row) -> str:
    return json.dumps(row["prompt"], sort_keys=True)


def _choose(rows: list[Row], count: int, seed: int, by: Literal["id", "prompt"]) -> list[Row]:
    """`count` rows in their own order, chosen by hash of seed and `by`; all of them when there are no more."""
    names = [_asked(row) if by == "prompt" else row["id"] for row in rows]
    order = sorted(range(len(rows)), key=lambda i: hashlib.sha256(f"{seed}/{names[i]}".encode()).digest())
    return [rows[i] for i in sorted(order[:count])]
