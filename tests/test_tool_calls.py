"""Calls of tools: limits, wrong arguments, and what of a function is kept."""

import inspect
import threading

import pytest

from rl.environments import GuessNumber
from rl.errors import RunFailed
from rl.tools import calculator
from rl.tools.calls import MOST_HUNG, Runner, guarded, seat_class


def test_too_many_hanging_calls_stop_the_run() -> None:
    release = threading.Event()
    runner = Runner(0.001)

    def hang(x: int) -> int:
        release.wait(20)
        return x

    tool = guarded(hang, runner)
    try:
        for _ in range(MOST_HUNG):
            runner.check()
            with pytest.raises(TimeoutError, match="no result within"):
                tool(x=1)
        with pytest.raises(RunFailed, match=f"{MOST_HUNG} tool calls hang; the first error: hang: no result"):
            runner.check()
        with pytest.raises(RuntimeError, match="not called"):
            tool(x=1)
    finally:
        release.set()


def test_a_tool_keeps_its_name_and_signature_and_says_text() -> None:
    tool = guarded(calculator, Runner(5.0))
    assert tool.__name__ == "calculator"
    assert inspect.signature(tool) == inspect.signature(calculator)
    assert tool(expression="6*7") == "42"
    with pytest.raises(RuntimeError, match="TypeError"):
        tool(wrong=1)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        ("abc", "number must be a whole number, found 'abc'"),
        (2.5, "found 2.5"),
        (True, "found True"),
        (None, "found None"),
    ],
)
def test_an_argument_of_a_wrong_type_is_told_in_words(number: object, said: str) -> None:
    """Trap: a model that writes number=abc would read Python's complaint about comparing str with int."""
    runner = Runner(5.0)
    seat = seat_class(GuessNumber, GuessNumber, runner)()
    seat.reset(answer="25", low=20)
    with pytest.raises(RuntimeError, match=said):
        seat.guess(number=number)
    assert seat.guess(number=25) == "right"
    assert seat._reward() == 1.0
