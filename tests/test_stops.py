"""Stop texts over tokens of any split against the plain search in every prefix."""

from hypothesis import given
from hypothesis import strategies as st

from rl.rollouts.stops import stopped_at


def decode_bytes(ids: list[int]) -> str:
    """A byte-level tokenizer: part of a character is U+FFFD until its last byte is there."""
    return bytes(ids).decode("utf-8", errors="replace")


@given(
    text=st.text(alphabet="ab\nü🙂", max_size=40),
    stops=st.lists(st.text(alphabet="ab\nü🙂", min_size=1, max_size=3), min_size=1, max_size=3),
    every=st.integers(1, 9),
)
def test_found_at_the_least_prefix_that_holds_one(text: str, stops: list[str], every: int) -> None:
    tokens = list(text.encode())
    plain = next((n for n in range(1, len(tokens) + 1) if any(s in decode_bytes(tokens[:n]) for s in stops)), None)
    found = None
    for seen in range(0, len(tokens) + every, every):
        now = tokens[: min(seen, len(tokens))]
        found = stopped_at(now, len(now) - max(0, seen - every), stops, decode_bytes)
        if found is not None:
            break
    assert found == plain


def test_pieces_that_hold_more_than_the_stop_count_whole() -> None:
    pieces = ["The ", "answer", ".\n", "\nNext", ":"]
    assert stopped_at([0, 1, 2, 3, 4], 5, ["\n\n"], lambda ids: "".join(pieces[i] for i in ids)) == 4
    assert stopped_at([0, 1, 2], 3, ["\n\n"], lambda ids: "".join(pieces[i] for i in ids)) is None
    assert stopped_at([], 0, ["x"], lambda ids: "") is None
