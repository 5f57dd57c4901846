"""Does a completion give the answer: in exactly the asked-for form (strict), or anywhere at the end (lenient)?

Nothing here gives credit for a substring: an answer is compared whole, as text or as a number.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, get_args

Extract = Literal["plain", "answer_line", "last_number", "boxed"]
Scorer = Callable[[str, Mapping[str, Any]], bool]  # (value, row) -> right or wrong
EXTRACTS: tuple[str, ...] = get_args(Extract)

# a sign counts only where no operand stands before it: "10-4" ends in 4, "= -4" in -4
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(rf"(?:(?<![\w)\]])[-+−])?(?<![\w.])(?:{_DIGITS})(?:[eE][-+]?[0-9]{{1,3}}(?![0-9]))?")
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)")
_DECIMAL = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?")
_LINE = re.compile(r"Answer: (\S.*)")
_MARKER = re.compile(r"answer\s*:", re.IGNORECASE)
_AROUND = " \t\r\n\"'`*_$.,;:!?"  # what may stand around a text answer without changing it; never a sign or a bracket


@dataclass(frozen=True)
class Score:
    """Strict: right and in the asked-for form. Lenient: the last answer given is right. Wellformed: form alone.

    Strict implies lenient and wellformed; lenient minus strict is what format costs.
    """

    strict: bool
    lenient: bool
    wellformed: bool


def text_of(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion, plain or as chat messages (TRL hands over either).

    Of an episode with tools only what the policy says after the last result: a result is no answer of its own.
    """
    if isinstance(completion, str):
        return completion
    results = [i for i, message in enumerate(completion) if message.get("role") == "tool"]
    return "".join(message["content"] or "" for message in completion[results[-1] + 1 if results else 0 :])


def default_extract(prompt: str | list[dict[str, Any]]) -> Extract:
    """The form that the prompt itself asks for: a system message that names "Answer:" asks for the answer line."""
    if isinstance(prompt, list) and any(m["role"] == "system" and "Answer:" in m["content"] for m in prompt):
        return "answer_line"
    return "plain"


def render(answer: str, how: Extract) -> str:
    """The shortest completion that gives `answer` in the form `how`."""
    forms = {"plain": f" {answer}\n", "answer_line": f"Answer: {answer}", "boxed": rf"\boxed{{{answer}}}"}
    return forms.get(how, answer)


def parse_number(text: str) -> Decimal | None:
    """The number that `text` is, with signs, thousands commas, decimals and exponents; None when it is none."""
    match = _NUMBER.fullmatch(text.strip())
    return _decimal(match.group()) if match else None


def last_number(text: str) -> Decimal | None:
    """The last number in `text`, None when there is none."""
    found = _last_number_text(text)
    return None if found is None else _decimal(found)


def extract(text: str, how: Extract, *, stop: str = "\n", multiline: bool = False) -> str | None:
    """The value `text` gives in the form `how`, None where it does not keep to the form.

    `plain`: everything up to `stop`, less one leading space. `answer_line`: the last line is "Answer: <value>".
    `boxed`: the last \\boxed{...}, braces balanced. `last_number`: the last number, as written.
    `multiline` (an answer of several lines): plain text has no stop, and the answer line may run on.
    """
    if how == "plain":
        head = text.rstrip("\n") if multiline else text.split(stop, 1)[0]
        return head.removeprefix(" ") or None
    if how == "answer_line":
        tail = text.rstrip()
        start = tail.rfind("\nAnswer: ") + 1 if multiline else tail.rfind("\n") + 1
        match = re.compile(_LINE.pattern, re.DOTALL).fullmatch(tail[start:])
        return match.group(1) if match else None
    if how == "boxed":
        return _boxed(text)
    return _last_number_text(text)


def grade(
    completion: str | list[dict[str, Any]],
    row: Mapping[str, Any],
    reward_options: Mapping[str, Any] | None = None,
    scorer: Scorer | None = None,
    any_form: bool = False,
) -> Score:
    """Score one completion of `row` (needs `answer`; `prompt` decides the form where no option does).

    Options: `extract` (one of EXTRACTS), `stop` (plain form only, default newline). `scorer` replaces comparison with
    `row["answer"]` by a task's own verdict on the extracted value. With `any_form` the value may be written in another
    way than the answer (1.0 for 1) and still be strictly right. Text after the stop never counts.
    """
    options = reward_options or {}
    how: Extract = options.get("extract") or default_extract(row.get("prompt", ""))
    stop: str = options.get("stop") or "\n"
    text, answer = text_of(completion), str(row["answer"]).strip()
    multiline = "\n" in answer
    value = extract(text, how, stop=stop, multiline=multiline)
    wellformed = value is not None and (any_form or _in_form(value, answer))
    strict = wellformed and (scorer(value, row) if scorer else value == answer)
    if how == "plain" and not multiline:
        text = text.lstrip().split(stop, 1)[0]  # a leading blank line is a matter of format
    said = _said(text, how)
    lenient = strict or _same_at_end(said, answer) or (scorer is not None and scorer(said.strip(_AROUND), row))
    return Score(strict, lenient, wellformed)


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("−", "-"))


def _last_number_text(text: str) -> str | None:
    found = None
    for match in _NUMBER.finditer(text):
        found = match.group()
    return found


def _in_form(value: str, answer: str) -> bool:
    """Could `value` be strictly right for an answer of this kind? "007" could not, nor could 1.0 for an integer."""
    for kind in (_INTEGER, _DECIMAL):
        if kind.fullmatch(answer):
            return kind.fullmatch(value) is not None
    return bool(value.strip())


def _boxed(text: str) -> str | None:
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len(r"\boxed")
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin + 1 : position] or None
    return None


def _said(text: str, how: Extract) -> str:
    """The part of a completion that holds its final answer: the last box or "Answer:" line, else all of it."""
    if how == "boxed" and (inside := _boxed(text)) is not None:
        return inside
    markers = list(_MARKER.finditer(text))
    return text[markers[-1].end() :].strip().split("\n", 1)[0] if markers else text


def _same_at_end(text: str, answer: str) -> bool:
    """Is the last number in `text` the answer, or, for an answer in words, does `text` end in exactly these words?"""
    number = parse_number(answer)
    if number is not None:
        return last_number(text) == number
    target = (answer.strip(_AROUND) or answer).casefold()
    text = (text.strip(_AROUND) or text.strip()).casefold()
    before = text[: len(text) - len(target)][-1:]
    # "bonus" does not end in the answer "nus", nor "-5/3" in "5/3"
    return text.endswith(target) and not (before.isalnum() or before in tuple("_-+/.^"))
