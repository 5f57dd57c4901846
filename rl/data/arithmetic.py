"""Every problem a op b up to a size, split so that 3 + 5 and 5 + 3 lie on the same side."""

import itertools
import operator
import random
from typing import TYPE_CHECKING, Any

from rl.data.prompts import chat, says
from rl.errors import UserError
from rl.rewards.answers import default_extract, render

if TYPE_CHECKING:
    from rl.config import Config, Data

Pair = tuple[int, int]
SHOTS: tuple[Pair, ...] = ((1, 2), (5, 4), (8, 3), (2, 6), (7, 1), (3, 9), (6, 0), (9, 8))
# where the shots call the calculator: problems worth a call. After one of these SmolLM2 calls in one of seven samples,
# after 1 * 2 in one of thirty
CALLED: tuple[Pair, ...] = ((12, 34), (57, 24), (81, 46), (63, 18), (29, 75), (94, 52), (38, 67), (45, 91))
CALCULATOR = "rl.tools:calculator"  # with this tool the shots show how it is called
MOST = 4_000_000  # all problems are listed, in memory
_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def rows(config: "Config") -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(train, held-out) rows, in an order shuffled by `data.seed`; the held-out ones do not depend on `train_size`.

    The shots and their commuted forms are on neither side. At most one problem is dropped, the commuted partner of
    the last held-out one.
    """
    data, size, where = config.data, config.eval.size, f"{config.path}: [data]"
    if data.form == "char" and data.shots:
        raise UserError(f"{where} shots = {data.shots}: form 'char' has no shots, set 0")
    if data.shots > len(SHOTS):
        raise UserError(f"{where} shots = {data.shots}: arithmetic has at most {len(SHOTS)}")
    if (data.max_a + 1) * (data.max_b + 1) > MOST:
        raise UserError(f"{where} max_a = {data.max_a}, max_b = {data.max_b}: more than {MOST} problems, lower them")

    calls = data.form == "chat" and CALCULATOR in config.rollout.tools
    shots = (CALLED if calls else SHOTS)[: data.shots]
    shown = {_unordered(pair) for pair in shots}
    groups: dict[Pair, list[Pair]] = {}
    for pair in itertools.product(range(data.max_a + 1), range(data.max_b + 1)):
        if _unordered(pair) not in shown:
            groups.setdefault(_unordered(pair), []).append(pair)
    rng = random.Random(data.seed)
    order = list(groups.values())
    rng.shuffle(order)

    heldout: list[Pair] = []
    taken = 0
    while len(heldout) < size and taken < len(order):
        heldout += order[taken]
        taken += 1
    train = [pair for group in order[taken:] for pair in group]
    if not train:
        pool = sum(map(len, order))
        raise UserError(
            f"{config.path}: [eval] size = {size}, but there are {pool} problems (a 0-{data.max_a}, b 0-{data.max_b}, "
            f"less {data.shots} shots) and some must be left to train on: lower it, or raise [data] max_a or max_b"
        )
    heldout = heldout[:size]
    rng.shuffle(heldout)
    rng.shuffle(train)
    return [_row(p, data, shots, calls) for p in train[: data.train_size]], [
        _row(p, data, shots, calls) for p in heldout
    ]


def _unordered(pair: Pair) -> Pair:
    return min(pair), max(pair)


def _called(expression: str, question: str, value: str) -> list[dict[str, Any]]:
    """A worked example that asks the calculator, as chat messages."""
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": expression}}}
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "calculator", "content": value},
        *says(value),
    ]


def _row(pair: Pair, data: "Data", shots: tuple[Pair, ...], calls: bool = False) -> dict[str, Any]:
    op = data.operation

    def asked(a: int, b: int) -> str:
        return {"plain": f"{a} {op} {b} =", "char": f"{a}{op}{b}=", "chat": f"What is {a} {op} {b}?"}[data.form]

    def value(a: int, b: int) -> str:
        return str(_OPERATIONS[op](a, b))

    prompt: Any
    completion: Any
    if data.form == "chat":
        prompt = chat(asked(*pair), (), data.system)
        how = default_extract(prompt)

        def reply(a: int, b: int) -> str:
            return render(value(a, b), how).strip()

        if calls:
            examples = [m for shot in shots for m in _called(f"{shot[0]} {op} {shot[1]}", asked(*shot), value(*shot))]
            prompt = [*prompt[:-1], *examples, prompt[-1]]
        else:
            prompt = chat(asked(*pair), [(asked(*shot), reply(*shot)) for shot in shots], data.system)
        completion = says(reply(*pair))
    else:
        prompt = "".join(f"{asked(*shot)} {value(*shot)}\n" for shot in shots) + asked(*pair)
        completion = value(*pair) if data.form == "char" else render(value(*pair), "plain")
    name = f"{pair[0]}{op}{pair[1]}"
    return {"id": name, "prompt": prompt, "answer": value(*pair), "task": "arithmetic", "completion": completion}
