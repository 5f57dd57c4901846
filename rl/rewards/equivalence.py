"""Are two answers the same mathematics? math-verify (huggingface/math-verify) parses both with sympy and compares."""

import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

LONGEST = 300  # characters of an answer: a longer one is no final answer, and sympy may take minutes over it
SECONDS = 3  # for one parse or comparison; math-verify can keep it in the main thread only


def equivalent(value: str, row: Mapping[str, Any]) -> bool:
    """Whether `value` (LaTeX or plain, without the dollar signs) equals `row["answer"]`: 1/2, 0.5, \\frac{1}{2}."""
    from math_verify import verify

    if len(value) > LONGEST or not value.strip():
        return False
    gold, said = _parsed(str(row["answer"])), _parsed(value)
    return bool(gold) and bool(said) and bool(verify(list(gold), list(said), timeout_seconds=_limit()))


@lru_cache(maxsize=4096)
def _parsed(text: str) -> tuple[Any, ...]:
    from math_verify import parse

    return tuple(parse(f"${text.strip().strip('$')}$", parsing_timeout=_limit()))


def _limit() -> int | None:
    return SECONDS if threading.current_thread() is threading.main_thread() else None
