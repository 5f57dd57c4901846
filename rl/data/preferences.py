"""Preference rows: what DPO, ORPO, CPO and KTO train on, ready in a file or sampled by the run itself (`rl.pairs`).

dpo, orpo, cpo, reward: `prompt`, `chosen`, `rejected` (reward takes a number `margin` too). kto: `prompt`,
`completion`, `label` (true for a good completion). No such row needs an `answer`: only held-out questions are graded.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rl.data.prompts import says
from rl.errors import UserError

Row = dict[str, Any]

_PAIR = ("chosen", "rejected")
COLUMNS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("dpo", "orpo", "cpo", "reward"), _PAIR),
    "kto": ("completion", "label"),
}
# what a run adds to rows it has sampled itself: the very tokens, which texts do not always give back
_PAIR_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
IDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("dpo", "orpo", "cpo", "reward"), _PAIR_IDS),
    **dict.fromkeys(("kto", "bon"), ("prompt_ids", "completion_ids")),
}
# the columns that tell a preference row from a question, which may have a (gold) completion too
_MARKS = {algorithm: ("label",) if algorithm == "kto" else needed for algorithm, needed in COLUMNS.items()}
_ANSWERS = ("completion", "chosen", "rejected")  # columns that hold something the assistant says


def columns(record: Mapping[str, Any], algorithm: str | None) -> tuple[str, ...]:
    """The columns `record` must have: those of a question, or of `algorithm`'s preference rows where it has any."""
    if algorithm not in COLUMNS:
        return "prompt", "answer"
    marked = any(column in record for column in _MARKS[algorithm])
    return ("prompt", *COLUMNS[algorithm]) if marked or "answer" not in record else ("prompt", "answer")


def ready(rows: Sequence[Row], algorithm: str, where: str) -> bool:
    """Whether `rows` are preference rows of `algorithm`; False when a run has to sample completions to its questions.

    Raises UserError when some are and some are not, naming the first that is not.
    """
    if algorithm not in COLUMNS:
        return False
    without = [row for row in rows if any(column not in row for column in COLUMNS[algorithm])]
    if algorithm == "kto":  # gold completions of a generated data set carry no label
        without = [row for row in rows if "label" not in row]
    if without and len(without) < len(rows):
        named = " and ".join(f"'{column}'" for column in COLUMNS[algorithm])
        raise UserError(
            f"{where}: row '{without[0]['id']}' lacks {named} that others have; {algorithm} takes preference rows "
            "(in every row) or questions with an answer, to which it samples completions itself"
        )
    return not without


def portable(row: Mapping[str, Any]) -> Row:
    """`row` without token ids, which mean something else to another tokenizer."""
    return {k: v for k, v in row.items() if not any(k in ids for ids in IDS.values())}


def check(row: Row, needed: Sequence[str], where: str) -> None:
    """Raise UserError unless the preference columns among `needed` have the form that the prompt asks for."""
    chat = isinstance(row["prompt"], list)
    for column in (c for c in needed if c in _ANSWERS):
        found = row[column]
        if not isinstance(found, list if chat else str):
            valid = "a text or assistant messages, as the prompt is chat" if chat else "a text, as the prompt is one"
            raise UserError(f"{where}: '{column}' must be {valid}, found {found!r:.60}")
    if "label" in needed and not isinstance(row["label"], bool):
        raise UserError(f"{where}: 'label' must be true or false, found {row['label']!r:.60}")
    if "chosen" in needed and row["chosen"] == row["rejected"]:
        raise UserError(f"{where}: 'chosen' and 'rejected' are the same, {row['chosen']!r:.60}: no preference")


def unpaired(row: Row) -> list[Row]:
    """The two labelled completions of a pair, as kto takes them."""
    same = {k: v for k, v in row.items() if k not in ("chosen", "rejected", "id")}
    return [
        {"id": f"{row['id']}/{name}", **same, "completion": row[column], "label": label}
        for name, column, label in (("right", "chosen", True), ("wrong", "rejected", False))
    ]


def spoken(row: Row) -> Row:
    """`row` with its completions as assistant messages where its prompt is chat."""
    if not isinstance(row["prompt"], list):
        return row
    return row | {c: says(row[c]) for c in _ANSWERS if isinstance(row.get(c), str)}
