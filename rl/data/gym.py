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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

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
# this share of all questions, chosen by hash, is kept from train at every train_size: a run that goes on from another
# one's model with fewer rows is not measured on what that model was trained on
_HELDOUT_SHARE = 0.2


@dataclass(frozen=True)
class _Item:
    """A question: what names it in any wording or order, where the hash places it (0 to 1), and its columns."""

    group: str
    place: float
    columns: dict[str, Any]


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
    questions than its share (or of which another task has some) gives what it has to train; held-out, that is an error.

    A task's questions come from one stream and go to their side by a hash of `data.seed` and the question. Filled one
    after the other, the side drawn first would get the likely questions and the other what is left of a small pool.
    """
    data, where = config.data, f"{config.path}: [[data.task]]"
    if not data.tasks:
        raise UserError(f"{where} is missing: source 'reasoning-gym' needs at least one (name, weight, options)")
    if data.form == "char":
        raise UserError(f"{config.path}: [data] form = 'char': reasoning-gym asks in words, use 'chat' or 'plain'")
    load(where)
    weights = [task.weight for task in data.tasks]
    measured, trained = shares(config.eval.size, weights), shares(data.train_size, weights)
    streams = []
    for number, task in enumerate(data.tasks):
        most = data.shots + max(measured[number] / _HELDOUT_SHARE, trained[number] / (1 - _HELDOUT_SHARE))
        streams.append(_items(task, number, round(most), data.seed, where))
    taken: set[str] = set()  # groups that have their side
    shots = [_shots(streams[i], data.shots, task.name, taken, where) for i, task in enumerate(data.tasks)]

    pools: list[list[list[_Item]]] = []
    heldout: list[dict[str, Any]] = []
    train: list[dict[str, Any]] = []
    for number, task in enumerate(data.tasks):
        pool = _pool(streams[number], measured[number], trained[number], taken)
        pools.append(pool[::-1])  # train takes from the other end
        heldout += [_row(item, task.name, config, shots[number]) for item in _take(pool, measured[number], taken)]
        if len(heldout) < sum(measured[: number + 1]):
            _too_few(where, task.name, sum(map(len, pool)), measured[number], "heldout")
    for number, task in enumerate(data.tasks):
        pool = [items for items in pools[number] if items[0].place >= _HELDOUT_SHARE]
        items = _take(pool, trained[number], taken)
        if trained[number] and not items:
            _too_few(where, task.name, 0, trained[number], "train")
        train += [_row(item, task.name, config, shots[number]) for item in items]
    for side in (train, heldout):
        random.Random(data.seed).shuffle(side)
    return train, heldout


def _shots(stream: Iterator[_Item], count: int, task: str, taken: set[str], where: str) -> list[tuple[str, str]]:
    """(question, answer) of the stream's first `count` groups, whatever `train_size`; adds them to `taken`."""
    shots: list[tuple[str, str]] = []
    while len(shots) < count:
        item = next(stream, None)
        if item is None:
            _too_few(where, task, len(shots), count, "shots")
        elif item.group not in taken:
            taken.add(item.group)
            shots.append((item.columns["question"], item.columns["answer"]))
    return shots


def _pool(stream: Iterator[_Item], measured: int, trained: int, taken: set[str]) -> list[list[_Item]]:
    """Groups of equivalent questions in the order of their places, drawn until both sides can be filled (or the end).

    Both sides are drawn to the same point of the stream, so that likely questions are as frequent on one as the other.
    """
    groups: dict[str, list[_Item]] = {}
    for item in stream:
        if item.group in taken:
            continue
        groups.setdefault(item.group, []).append(item)
        measured -= item.place < _HELDOUT_SHARE
        trained -= item.place >= _HELDOUT_SHARE
        if measured <= 0 and trained <= 0:
            break
    return sorted(groups.values(), key=lambda items: items[0].place)


def _take(pool: list[list[_Item]], count: int, taken: set[str]) -> list[_Item]:
    """Up to `count` items of the pool's first groups that are free; adds those groups to `taken`."""
    found: list[_Item] = []
    for items in pool:
        if len(found) >= count:
            break
        if items[0].group not in taken:
            taken.add(items[0].group)
            found += items
    return found[:count]


def _too_few(where: str, task: str, found: int, count: int, side: str) -> NoReturn:
    raise UserError(
        f"{where} '{task}': {found} different questions left for {count} {side} rows: "
        "widen its options, or lower [eval] size, [data] shots or its weight"
    )


def _items(task: "Task", number: int, most: int, seed: int, where: str) -> Iterator[_Item]:
    """The task's different questions, until it has nothing new; meant for about `most` of them."""
    seen: set[str] = set()
    repeats = 0
    for index, item in enumerate(_stream(task, number, most, seed, where)):
        question = item["question"].strip()
        text, group = keys(task.name, question)
        repeats += 1
        if repeats > _PATIENCE:
            break
        if text in seen:
            continue
        seen.add(text)
        repeats = 0
        answer = str(item["answer"]).strip()
        columns = {
            "id": f"{task.name}-{number}-{index}",
            "question": question,
            "answer": answer,
            "task": task.name,
            "metadata": json.dumps(item["metadata"], sort_keys=True, default=str),
        }
        if item["answer"] is None or score(columns, answer) != 1.0:
            raise UserError(f"{where} '{task.name}': its own answer to a question scores below 1; choose another task")
        place = int.from_bytes(hashlib.sha256(f"{seed}/{group}".encode()).digest()[:8]) / 2**64
        yield _Item(group, place, columns)


def _stream(task: "Task", number: int, most: int, seed: int, where: str) -> Iterator[dict[str, Any]]:
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
    first = int.from_bytes(digest[:4]) % (1 << 31)
    try:
        yield from create_dataset(task.name, seed=first, size=20 * most + 5 * _PATIENCE, **task.options)
    except Exception as error:  # the generators assert, and fail in their own ways on options they did not foresee
        raise UserError(f"{where} '{task.name}' {task.options}: {' '.join(str(error).split())}") from error


def keys(task: str, question: str) -> tuple[str, str]:
    """(the text in any case, what equivalent questions share: for REORDERABLE tasks the parts in any order)."""
    question = question.casefold()
    if task not in REORDERABLE:
        return question, question
    words = (word.strip(".,:;?") for word in question.split())
    if task != "leg_counting":  # the same numbers in another wording are the same question
        words = (word for word in words if word in ("+", "-", "*", "/") or any(c.isdigit() for c in word))
    return question, f"{task}: {' '.join(sorted(words))}"


def _row(item: _Item, task: str, config: "Config", shots: list[tuple[str, str]]) -> dict[str, Any]:
    data, question, answer = config.data, item.columns["question"], item.columns["answer"]
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
        "id": item.columns["id"],
        "prompt": prompt,
        "answer": answer,
        "task": task,
        "completion": completion,
        "metadata": item.columns["metadata"],
    }


def shares(total: int, weights: list[float]) -> list[int]:
    """`total` split in proportion to `weights`, whole numbers by largest remainder."""
    exact = [total * weight / sum(weights) for weight in weights]
    whole = [int(share) for share in exact]
    largest = sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])
    for i in largest[: total - sum(whole)]:
        whole[i] += 1
    return whole


@functools.cache
def _scorer(task: str) -> Any:
    return load(f"task '{task}'").get_score_answer_fn(task)
