"""The tools and the environment that a config names, imported, checked and guarded, for training and measuring."""

import hashlib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.errors import UserError
from rl.names import near
from rl.tools.calls import Runner, Seat, guarded, seat_class, tool_methods
from rl.tools.signatures import SHAPE, problem

if TYPE_CHECKING:
    from rl.config import Config

# lengths of later turns are rounded up to these, so that a sampler that compiles meets few sizes
TURN = 16


@dataclass
class Toolbox:
    """`functions` are the standalone tools, `seat` the class of the environment's seats (None without one)."""

    runner: Runner
    max_turns: int
    max_turn: int | None = None  # tokens of one turn
    functions: list[Callable[..., str]] = field(default_factory=list)
    seat: type[Seat] | None = None

    def callables(self) -> list[Callable[..., Any]]:
        """Every tool, in the order in which TRL describes them to the model."""
        if self.seat is None:
            return list(self.functions)
        probe = self.seat()
        return [*self.functions, *(getattr(probe, name) for name in tool_methods(self.seat))]

    def room(self, left: int, most: int) -> int:
        """Tokens to sample in a turn when `left` of `most` are left of the episode."""
        room = turn_length(left, most)
        return room if self.max_turn is None else min(room, self.max_turn)

    def names(self) -> list[str]:
        """Names of all tools."""
        return [tool.__name__ for tool in self.callables()]

    def table(self, seat: Seat | None) -> dict[str, Callable[..., Any]]:
        """Name -> tool of one episode."""
        methods = [] if seat is None else [getattr(seat, name) for name in tool_methods(type(seat))]
        return {tool.__name__: tool for tool in (*self.functions, *methods)}


def turn_length(left: int, most: int) -> int:
    """`left` rounded up to a multiple of TURN, at most `most`."""
    return min(most, -(-left // TURN) * TURN)


def wanted(config: "Config") -> bool:
    """Whether the config's episodes have tools."""
    return bool(config.rollout.tools) or config.rollout.environment is not None


def build(config: "Config") -> Toolbox | None:
    """The box of `config`, None where it names no tool. Raises UserError (one line) for what is no tool."""
    if not wanted(config):
        return None
    rollout, where = config.rollout, f"{config.path}: [rollout]"
    runner = Runner(rollout.tool_timeout_s)
    functions = [guarded(_function(dotted, f"{where} tools"), runner) for dotted in rollout.tools]
    seat = None
    if rollout.environment is not None:
        cls = environment_class(config)
        make = environment_maker(config)
        seat = seat_class(cls, make, runner)
    box = Toolbox(runner, rollout.max_turns, rollout.max_turn_length, functions, seat)
    names = box.names()
    if double := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{where} tools: two are called '{double}'; the model could not tell them apart")
    _check_schemas(box, where)
    return box


def environment_class(config: "Config") -> type:
    """The class that [rollout] environment names. Raises UserError where there is none, or it is no environment."""
    dotted, where = str(config.rollout.environment), f"{config.path}: [rollout] environment"
    if said := problem(dotted, "class"):
        raise UserError(f"{where}: {said}")
    cls = _imported(dotted, where)
    if not inspect.isclass(cls) or not callable(getattr(cls, "reset", None)) or not tool_methods(cls):
        raise UserError(f"{where}: '{dotted}' is no class with reset() and a method to call as a tool")
    return cls


def environment_maker(config: "Config") -> Callable[[], Any]:
    """A function that makes the config's environment with its options, tried once. Raises UserError where it fails."""
    cls, options = environment_class(config), dict(config.rollout.environment_options)
    where = f"{config.path}: [rollout] environment_options"
    parameters = inspect.signature(cls).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in options:
        if name not in parameters and not takes_all:
            valid = ", ".join(parameters) or "none"
            raise UserError(
                f"{where}: '{cls.__name__}' takes no option '{name}'{near(name, parameters)}; valid: {valid}"
            )
    try:
        cls(**options)
    except Exception as error:
        said = " ".join(str(error).split())
        raise UserError(f"{where}: '{cls.__name__}' cannot be made: {type(error).__name__}: {said}") from error
    return lambda: cls(**options)


def episode_seed(seed: int, *keys: int | str) -> int:
    """A seed of 63 bits for one episode, a pure function of the run's seed and what names the episode."""
    said = ":".join(map(str, (seed, *keys)))
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:8], "big") >> 1


def _function(dotted: str, where: str) -> Callable[..., Any]:
    if said := problem(dotted, "function"):
        raise UserError(f"{where}: {said}")
    function = _imported(dotted, where)
    if not inspect.isfunction(function) or inspect.iscoroutinefunction(function):
        raise UserError(f"{where}: '{dotted}' is a {type(function).__name__}, {SHAPE}")
    return function


def _imported(dotted: str, where: str) -> Any:
    module_name, _, name = dotted.partition(":")
    try:
        return getattr(importlib.import_module(module_name), name)
    except Exception as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"{where}: cannot import '{dotted}' from '{Path.cwd()}': {type(error).__name__}: {said}"
        ) from error


def _check_schemas(box: Toolbox, where: str) -> None:
    """transformers makes the description for the model from signature and docstring: it has the last word."""
    from transformers.utils import get_json_schema

    for tool in box.callables():
        try:
            get_json_schema(tool)
        except Exception as error:
            said = " ".join(str(error).split())
            raise UserError(f"{where} tools: '{tool.__name__}' is no tool: {said:.200}; {SHAPE}") from error
