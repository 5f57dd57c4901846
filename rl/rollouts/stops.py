"""Texts that end a completion, also where they are spread over several tokens. Free of mlx and torch."""

from collections.abc import Callable, Sequence

# a character outside a byte-level vocabulary takes up to four tokens; some more for tokens that decode to nothing
TOKENS_PER_CHARACTER, MARGIN = 4, 8


def stopped_at(tokens: Sequence[int], new: int, stops: Sequence[str], decode: Callable[[list[int]], str]) -> int | None:
    """The least number of tokens whose text holds one of `stops`, or None when the whole has none.

    Only ends within the last `new` tokens are looked at: call it again before more than `new` have been added. Of what
    came before, so many tokens are read as the longest stop can be spread over.
    """
    if not stops or not tokens:
        return None
    back = new + TOKENS_PER_CHARACTER * max(map(len, stops)) + MARGIN
    start = max(0, len(tokens) - back)
    tail = list(tokens[start:])

    def holds(count: int) -> bool:
        text = decode(tail[:count])
        return any(stop in text for stop in stops)

    if not holds(len(tail)):
        return None
    # not bisected: a character whose bytes are not all there decodes to another one, so a text can lose its stop again
    first = max(1, len(tail) - new + 1)
    return next((start + n for n in range(first, len(tail) + 1) if holds(n)), None)
