"""Calls of tools, each in a thread of its own with a time limit: one that raises or hangs costs its sample only."""

import functools
import inspect
import threading
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rl.errors import RunFailed

# calls that never returned and are still running; more of them would take the processor from the run
MOST_HUNG = 64


@dataclass
class CallStats:
    """What the calls of a run came to; `timeouts` are among `errors`."""

    calls: int = 0
    errors: int = 0
    timeouts: int = 0
    first_error: str | None = None


class Runner:
    """Runs tools for one run. `clean` makes a text of results and errors that the tokenizer can encode."""

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s
        self.stats = CallStats()
        self.clean: Callable[[str], str] = str
        self._hung: list[threading.Thread] = []
        self._taken = (0, 0, 0)

    def call(self, name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """What `function` returns. Raises TimeoutError after `timeout_s` (the thread is left behind), and RuntimeError
        "<type>: <text>" for whatever it raises, SystemExit included."""
        self._hung = [thread for thread in self._hung if thread.is_alive()]
        self.stats.calls += 1
        if len(self._hung) >= MOST_HUNG:
            raise self._failed(name, RuntimeError("not called, too many calls hang"))
        outcome: list[tuple[bool, Any]] = []

        def work() -> None:
            try:
                outcome.append((True, function(*args, **kwargs)))
            except BaseException as error:  # sys.exit() in a tool must not end the run
                outcome.append((False, error))

        thread = threading.Thread(target=work, name=f"tool-{name}", daemon=True)
        thread.start()
        thread.join(self.timeout_s)
        if not outcome:
            self._hung.append(thread)
            self.stats.timeouts += 1
            raise self._failed(name, TimeoutError(f"no result within {self.timeout_s:g} s"))
        fine, value = outcome[0]
        if fine:
            return value
        said = " ".join(str(value).split())
        text = said if isinstance(value, ValueError) else f"{type(value).__name__}: {said}"
        raise self._failed(name, RuntimeError(self.clean(text))) from None

    def check(self) -> None:
        """Raise RunFailed when so many calls hang that no further one is made."""
        if sum(thread.is_alive() for thread in self._hung) >= MOST_HUNG:
            raise RunFailed(f"{MOST_HUNG} tool calls hang; the first error: {self.stats.first_error}")

    def take(self) -> dict[str, float]:
        """Counts since the last `take`, as metrics."""
        now = (self.stats.calls, self.stats.errors, self.stats.timeouts)
        new = [a - b for a, b in zip(now, self._taken, strict=True)]
        self._taken = now
        return dict(zip(("tools/calls", "tools/errors", "tools/timeouts"), map(float, new), strict=True))

    def _failed(self, name: str, error: Exception) -> Exception:
        self.stats.errors += 1
        self.stats.first_error = self.stats.first_error or f"{name}: {error}"
        return error


_SAID = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def check_types(function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Raise ValueError, for the model to read, where an argument is not of the simple type its parameter has.

    What is missing or unknown is Python's to tell.
    """
    try:
        hints = typing.get_type_hints(function)
    except Exception:
        return  # a type that is only there for type checkers
    for name, value in arguments.items():
        wanted = hints.get(name)
        fits = type(value) in ((int, float) if wanted is float else (wanted,))
        if wanted in _SAID and not fits:
            raise ValueError(f"{name} must be {_SAID[wanted]}, found {value!r:.60}")


def guarded(function: Callable[..., Any], runner: Runner) -> Callable[..., str]:
    """The tool with the same name, signature and docstring; its result is a text."""
    name, checked = function.__name__, _checked(function)

    @functools.wraps(function)
    def call(**arguments: Any) -> str:
        return runner.clean(str(runner.call(name, checked, **arguments)))

    return call


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        check_types(function, arguments)
        return function(**arguments)

    return call


def tool_methods(cls: type) -> list[str]:
    """The methods of an environment that the policy may call, by name."""
    own = ("reset", "get_reward", "rows")
    return [n for n, _ in inspect.getmembers(cls, inspect.isfunction) if n not in own and not n.startswith("_")]


class Seat:
    """One place at which episodes are played, one after the other: what TRL takes for the environment.

    Holds the user's environment and makes a new one when a call to it has hung, since that call may still change it.
    """

    _make: Callable[[], Any]
    _runner: Runner

    def __init__(self) -> None:
        self._inner: Any = None
        self._lost: str | None = None

    def reset(self, **row: Any) -> str | None:
        """Begin an episode with the columns of `row` that the environment's `reset` takes."""
        try:
            if self._inner is None:
                self._inner = self._runner.call("__init__", type(self)._make)
            self._lost = None
            parameters = inspect.signature(self._inner.reset).parameters
            everything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
            given = {k: v for k, v in row.items() if everything or k in parameters}
            said = self._call("reset", given)
        except Exception as error:
            self._inner, self._lost = None, f"the environment did not start ({error})"
            return None
        return None if said is None else self._runner.clean(str(said))

    def _call(self, name: str, arguments: dict[str, Any]) -> Any:
        if self._lost is not None or self._inner is None:
            raise RuntimeError(self._lost or "the environment was not started")
        try:
            method = getattr(self._inner, name)
            called = method if name in ("reset", "get_reward") else _checked(method)  # those are not the model's
            return self._runner.call(name, called, **arguments)
        except TimeoutError as error:
            self._inner, self._lost = None, f"the environment is gone ({error})"
            raise

    def _reward(self) -> float | None:
        """The environment's own reward; None where the episode was lost. Raises what `get_reward` raises."""
        return None if self._lost is not None else self._call("get_reward", {})


def seat_class(cls: type, make: Callable[[], Any], runner: Runner) -> type[Seat]:
    """A class of seats for the environment `cls`, with its tools as methods; TRL finds them on the class."""

    def method(name: str) -> Callable[..., str]:
        @functools.wraps(getattr(cls, name))
        def call(self: Seat, **arguments: Any) -> str:
            return self._runner.clean(str(self._call(name, arguments)))

        return call

    members: dict[str, Any] = {name: method(name) for name in tool_methods(cls)}
    return type(cls.__name__, (Seat,), members | {"_make": staticmethod(make), "_runner": runner})
