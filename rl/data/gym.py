"""Rows from reasoning-gym's seeded generators (105 task families with verifiers; Apache-2.0)."""

import dataclasses
import difflib
import functools
import hashlib
import json
import random
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rl.data.prompts import ANSWER_LINE_SYSTEM, chat, says
from rl.errors import UserError
from rl.rewards.answers import default_extract, render

if TYPE_CHECKING:
    from rl.config import Config, Task

# seen in 0.1.25: the same seed gives other questions in another process, or no question at all
UNUSABLE: dict[str, str] = {
    "codeio": "its questions depend on the global random state",
    "composite": "its parts are the other tasks, name those",
    "intermediate_integration": "its questions depend on Python's hash seed",
    "isomorphic_strings": "its questions depend on Python's hash seed",
    "knight_swap": "its questions depend on Python's hash seed",
    "list_functions": "its questions depend on the global random state",
    "polynomial_multiplication": "its questions depend on Python's hash seed",
    "ransom_note": "its questions depend on Python's hash seed",
    "time_intervals": "its questions depend on today's date",
    "word_ladder": "its questions depend on Python's hash seed",
    "zebra_puzzles": "it needs the compiled package pycosat",
}
# questions that mean the same with their parts in another order, so that they must lie on the same side
REORDERABLE = ("basic_arithmetic", "chain_sum", "decimal_chain_sum", "gcd", "lcm", "leg_counting", "products")
_PATIENCE = 1000  # repeats in a row after which a generator has nothing new
_SIDES = {"train": 0, "heldout": 1 << 30, "shots": 1 << 31}  # each side draws its seeds from its own range


def load(where: str) -> Any:
    """The module reasoning_gym. Raises UserError, starting with `where`, when it is not installed."""
    if "pycosat" not in sys.modules:  # no wheel for 3.13, and only zebra_puzzles calls it
        sys.modules["pycosat"] = types.ModuleType("pycosat")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of a package it imports, on its first import
            import reasoning_gym
    except ImportError as error:
        raise UserError(
            f"{where}: reasoning-gym cannot be imported here ({error}): install it, or write the rows as jsonl on a "
            "machine that has it, set [data] source = 'jsonl' and path, and use the reward 'exact'"
        ) from error
    return reasoning_gym


def score(row: Mapping[str, Any], value: str) -> float:
    """The task's own score of `value`, 0 to 1; only 1.0 means right (its default scorer pays for substrings).

    Raises ValueError for a row that reasoning-gym did not make.
    """
    if row.get("metadata") is None:
        raise ValueError("reasoning-gym scores only its own rows (column 'metadata'); use the reward 'exact'")
    entry = {"question": "", "answer": row["answer"], "metadata": json.loads(row["metadata"])}
    scorer = _scorer(row["task"])
    try:
        return float(scorer(value, entry))
    except Exception:  # some parse the answer and raise on one that makes no sense
        return 0.0


def rows(config: "Config") -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(train, held-out) rows of the weighted `[[data.task]]`s; no held-out question occurs in train, reordered or not.

    `form` "chat": messages, the system message asking for "Answer: <value>" unless `data.system` says otherwise;
    "plain": "Question: ...\\nAnswer:". `shots` examples of the same task stand in front. A task with fewer different
    questions than its share gives what it has to train; held-out, that is an error.
    """
    data, where = config.data, f"{config.path}: [[data.task]]"
    if not data.tasks:
        raise UserError(f"{where} is missing: source 'reasoning-gym' needs at least one (name, weight, options)")
    if data.form == "char":
        raise UserError(f"{config.path}: [data] form = 'char': reasoning-gym asks in words, use 'chat' or 'plain'")
    load(where)
    seen: set[str] = set()
    shots: list[list[tuple[str, str]]] = []
    made: dict[str, list[dict[str, Any]]] = {"shots": [], "heldout": [], "train": []}
    for side, total in (("shots", data.shots * len(data.tasks)), ("heldout", config.eval.size), ("train", None)):
        wanted = _shares(data.train_size if total is None else total, [t.weight for t in data.tasks])
        banned = frozenset(seen)  # what earlier sides have, in any order
        for number, task in enumerate(data.tasks):
            count = data.shots if side == "shots" else wanted[number]
            items = _items(task, number, side, count, data.seed, seen, banned, where)
            if side == "shots":
                shots.append([(item["question"], item["answer"]) for item in items])
            if len(items) < count and (side != "train" or not items):
                raise UserError(
                    f"{where} '{task.name}': {len(items)} different questions left for {count} {side} rows: "
                    "widen its options, or lower [eval] size, [data] shots or its weight"
                )
            if side != "shots":
                made[side] += [_row(item, task.name, config, shots[number]) for item in items]
        random.Random(data.seed).shuffle(made[side])
    return made["train"], made["heldout"]


def _items(
    task: "Task", number: int, side: str, count: int, seed: int, seen: set[str], banned: frozenset[str], where: str
) -> list[dict[str, Any]]:
    """Up to `count` new questions of one task; adds their keys to `seen`."""
    found: list[dict[str, Any]] = []
    repeats = 0
    for index, item in enumerate(_stream(task, number, side, count, seed, where)):
        if len(found) == count or repeats == _PATIENCE:
            break
        question = item["question"].strip()
        keys = _keys(task.name, question)
        repeats += 1
        if keys[0] in seen or any(key in banned for key in keys):
            continue
        repeats = 0
        answer = str(item["answer"]).strip()
        row = {
            "id": f"{task.name}-{number}-{side}-{index}",
            "question": question,
            "answer": answer,
            "task": task.name,
            "metadata": json.dumps(item["metadata"], sort_keys=True, default=str),
        }
        if item["answer"] is None or score(row, answer) != 1.0:
            raise UserError(f"{where} '{task.name}': its own answer to a question scores below 1; choose another task")
        seen.update(keys)
        found.append(row)
    return found


def _stream(task: "Task", number: int, side: str, count: int, seed: int, where: str) -> Iterator[dict[str, Any]]:
    """The task's questions one after another; generators seed question i with (seed + i)."""
    from reasoning_gym.factory import DATASETS, create_dataset

    if task.name not in DATASETS:
        near = difflib.get_close_matches(task.name, DATASETS, n=1)
        hint = f", did you mean '{near[0]}'?" if near else f"; valid: {', '.join(sorted(DATASETS))}"
        raise UserError(f"{where} unknown name '{task.name}'{hint}")
    if task.name in UNUSABLE:
        raise UserError(f"{where} '{task.name}' cannot be used: {UNUSABLE[task.name]}; choose another task")
    known = [f.name for f in dataclasses.fields(DATASETS[task.name][1]) if f.name not in ("seed", "size")]
    for option in task.options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f", did you mean '{near[0]}'?" if near else ""
            raise UserError(f"{where} '{task.name}': unknown option '{option}'{hint}; valid: {', '.join(known)}")
    # one table's seeds lie far from another's and from those of a neighbouring data.seed
    digest = hashlib.sha256(f"{seed}/{number}/{task.name}".encode()).digest()
    first = _SIDES[side] + int.from_bytes(digest[:4]) % (1 << 29)
    try:
        yield from create_dataset(task.name, seed=first, size=20 * count + 5 * _PATIENCE, **task.options)
    except Exception as error:  # the generators assert, and fail in their own ways on options they did not foresee
        raise UserError(f"{where} '{task.name}' {task.options}: {' '.join(str(error).split())}") from error


def _keys(task: str, question: str) -> tuple[str, ...]:
    """What makes two questions the same: the text in any case, and for REORDERABLE tasks the parts in any order."""
    question = question.casefold()
    if task not in REORDERABLE:
        return (question,)
    words = (word.strip(".,:;?") for word in question.split())
    if task != "leg_counting":  # the same numbers in another wording are the same question
        words = (word for word in words if word in ("+", "-", "*", "/") or any(c.isdigit() for c in word))
    return question, f"{task}: {' '.join(sorted(words))}"


def _row(item: dict[str, Any], task: str, config: "Config", shots: list[tuple[str, str]]) -> dict[str, Any]:
    data, question, answer = config.data, item["question"], item["answer"]
    prompt: Any
    completion: Any
    if data.form == "chat":
        system = ANSWER_LINE_SYSTEM if data.system is None else data.system
        how = default_extract(chat(question, (), system))
        prompt = chat(question, [(asked, render(reply, how).strip()) for asked, reply in shots], system)
        completion = says(render(answer, how).strip())
    else:
        worked = "".join(f"Question: {asked}\nAnswer: {reply}\n\n" for asked, reply in shots)
        prompt = f"{worked}Question: {question}\nAnswer:"
        completion = render(answer, "plain")
    return {
        "id": item["id"],
        "prompt": prompt,
        "answer": answer,
        "task": task,
        "completion": completion,
        "metadata": item["metadata"],
    }


def _shares(total: int, weights: list[float]) -> list[int]:
    """`total` split in proportion to `weights`, whole numbers by largest remainder."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    largest = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for i in largest[: total - sum(shares)]:
        shares[i] += 1
    return shares


@functools.cache
def _scorer(task: str) -> Any:
    return load(f"task '{task}'").get_score_answer_fn(task)
