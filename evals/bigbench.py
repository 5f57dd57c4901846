"""BIG-bench tasks, only where a user has fetched them: data/raw/bigbench/NAME/task.json, ignored by git.

The data is for evaluation only (its own canary asks that it stays out of training sets), so nothing of it is in this
repository and no trainer reads it. Srivastava et al. 2022, "Beyond the Imitation Game", arXiv 2206.04615; format of a
task.json: docs/doc.md of the BIG-bench repository.
"""

import json
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from rl.errors import UserError
from rl.files import write_bytes

FOLDER = Path("data") / "raw" / "bigbench"
SOURCE = "https://raw.githubusercontent.com/google/BIG-bench/main/bigbench/benchmark_tasks"
SECONDS = 10.0
_NAME = re.compile(r"[a-z0-9_]+(?:/[a-z0-9_]+)?")  # a task, or a task and one of its subtasks


def main(argv: list[str], root: Path, source: str = SOURCE) -> None:
    """`python -m evals fetch bigbench:NAME ...`: put task files where the tasks look for them.

    Raises:
        UserError: a name of another form, or a file that cannot be had; then how to bring it by hand.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m evals fetch bigbench:NAME ...\n\nNAME is a folder of BIG-bench's benchmark_tasks that")
        print(f"holds a task.json, or NAME/SUBTASK; the file goes to {FOLDER}/NAME/. For evaluation only.")
        return
    for name in argv:
        path = fetch(root, name, source)
        content = read(path)
        made = [task for task, (_, file) in tasks(root).items() if file == path]
        print(f"{path.relative_to(root)}: {len(content['examples'])} examples; --tasks {','.join(made)}")


def fetch(root: Path, name: str, source: str = SOURCE) -> Path:
    """Fetch one task's file (kept if it is there); its path. `name` is "bigbench:NAME" or "bigbench:NAME/SUBTASK"."""
    task = name.removeprefix("bigbench:")
    if task == name or not _NAME.fullmatch(task):
        raise UserError(f"fetch: {name!r} is not of the form bigbench:NAME or bigbench:NAME/SUBTASK")
    path = root / FOLDER / task / "task.json"
    if path.is_file():
        return path
    address = f"{source}/{task}/task.json"
    by_hand = f"where the network reaches it, get {address} and put it at {FOLDER / task / 'task.json'}"
    try:
        with urllib.request.urlopen(address, timeout=SECONDS) as answer:
            content = answer.read()
    except urllib.error.HTTPError as error:
        raise UserError(f"fetch: {address}: {error.code} {error.reason}; check the name, or {by_hand}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"fetch: no answer ({reason}); {by_hand}") from None
    _checked(content, address)
    write_bytes(path, content)
    return path


def tasks(root: Path) -> dict[str, tuple[str, Path]]:
    """Task name -> ("choice" or "exact", file), for each way in which a file that is here can be scored."""
    folder = root / FOLDER
    found = {}
    for path in sorted([*folder.glob("*/task.json"), *folder.glob("*/*/task.json")]):
        name = "-".join(path.parent.relative_to(folder).parts)
        examples = read(path)["examples"]
        if all(example.get("target_scores") for example in examples):
            found[f"bigbench_{name}_choice"] = ("choice", path)
        if all(example.get("target") not in (None, "", []) for example in examples):
            found[f"bigbench_{name}_exact"] = ("exact", path)
    return found


def read(path: Path) -> dict[str, Any]:
    """A task.json. Raises UserError when it is truncated or not one."""
    return _checked(path.read_bytes(), str(path))


def hint(name: str) -> str | None:
    """How to get the data of a task that is named like ours and is not here."""
    found = re.fullmatch(r"bigbench_([a-z0-9_]+(?:-[a-z0-9_]+)?)_(?:choice|exact)", name)
    if not found:
        return None
    task = found.group(1).replace("-", "/")
    return (
        f"its data is fetched only when asked for: `.venv/bin/python -m evals fetch bigbench:{task}`, "
        f"or put the file at {FOLDER / task / 'task.json'}"
    )


def _checked(content: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(content)
        examples = found["examples"]
        if not examples or not all(isinstance(example["input"], str) for example in examples):
            raise ValueError("no examples with an input")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: not a BIG-bench JSON task ({error!r}); remove it and fetch it again") from None
    return found
