"""The rewards a config can name, and the wrapper that keeps one bad sample from costing a batch."""

import importlib
import inspect
import math
import re
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.errors import RunFailed, UserError
from rl.names import near
from rl.rewards import json_schema
from rl.rewards.answers import EXTRACTS, Score, Scorer, grade, text_of
from rl.rewards.equivalence import equivalent
from rl.rewards.learned import LearnedReward

if TYPE_CHECKING:
    from rl.config import Reward

BatchReward = Callable[..., Iterable[float | None]]
SampleReward = Callable[[Any, dict[str, Any]], float]  # (completion, row) -> reward
VERIFYING = ("exact", "reasoning-gym", "math-verify", "environment")  # the rewards that say what a right answer is


@dataclass
class Stats:
    """What one reward has done so far. `seconds` is wall time; `errors` counts samples lost to an error or a NaN."""

    calls: int = 0
    seconds: float = 0.0
    samples: int = 0
    errors: int = 0
    first_error: str | None = None


@dataclass
class RewardFunction:
    """A reward as TRL calls it: `f(prompts, completions, **columns) -> list[float | None]`, one value per completion.

    A sample whose reward raises or is not finite gets None, which TRL leaves out of its group; it is counted in
    `stats`. Raises RunFailed when every sample of a batch fails so, or when the number of rewards is wrong.
    """

    name: str
    weight: float
    function: BatchReward
    stats: Stats = field(default_factory=Stats)

    def __post_init__(self) -> None:
        self.__name__ = self.name  # what TRL logs it as

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        started = time.perf_counter()
        try:
            rewards, failures = self._score(prompts, completions, columns)
        finally:
            self.stats.calls += 1
            self.stats.samples += len(completions)
            self.stats.seconds += time.perf_counter() - started
        self.stats.errors += len(failures)
        if failures:
            row, said = next(iter(failures.items()))
            first = f"{_sample(row, prompts, columns)}: {said}"
            self.stats.first_error = self.stats.first_error or first
            if len(failures) == len(completions):
                raise RunFailed(f"reward '{self.name}' failed on every one of {len(completions)} samples; {first}")
        return rewards

    def _score(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any]
    ) -> tuple[list[float | None], dict[int, str]]:
        """Rewards and, per failed sample, what went wrong."""
        failures: dict[int, str] = {}
        try:
            raw = self._called(prompts, completions, columns)
        except RunFailed:
            raise
        except Exception:  # find the samples it fails on and keep the rest
            raw = []
            for i in range(len(completions)):
                one = {k: [v[i]] if _is_column(v, len(completions)) else v for k, v in columns.items()}
                try:
                    raw += self._called([prompts[i]], [completions[i]], one)
                except RunFailed:
                    raise
                except Exception as error:
                    raw.append(None)
                    failures[i] = _told(error)
        rewards: list[float | None] = []
        for i, value in enumerate(raw):
            reward, problem = _number(value)
            rewards.append(reward)
            if problem:
                failures[i] = problem
        return rewards, failures

    def _called(self, prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any]) -> list[Any]:
        raw = self.function(prompts=prompts, completions=completions, **columns)
        if not hasattr(raw, "__len__") or isinstance(raw, str | dict):
            raise RunFailed(f"reward '{self.name}' returned {type(raw).__name__}, not a list of numbers")
        if len(raw) != len(completions):
            raise RunFailed(f"reward '{self.name}' returned {len(raw)} rewards for {len(completions)} completions")
        return list(raw)


def build(rewards: "tuple[Reward, ...]") -> list[RewardFunction]:
    """One callable per `[[reward]]`, in order; a name used twice gets a number, so that each has its own metric.

    Raises UserError (one line): unknown name or option, bad value, a user function that cannot be imported.
    """
    built: list[RewardFunction] = []
    for position, reward in enumerate(rewards):
        same = sum(other.name == reward.name for other in rewards[:position])
        name = reward.name if not same else f"{reward.name}_{same + 1}"
        where = f"[[reward]] {position} ({reward.name})"
        if ":" in reward.name:
            function = _own(reward.name, reward.options, where)
        elif reward.name in _NAMED:
            _check(reward.options, _NAMED[reward.name].options, where)
            function = _NAMED[reward.name].make(reward.options, where)
        else:
            raise UserError(
                f"[[reward]] {position}: unknown name '{reward.name}'{near(reward.name, NAMES)}; valid: "
                f"{', '.join(NAMES)}, or 'module:function' for your own"
            )
        built.append(RewardFunction(name, reward.weight, function))
    return built


def grader(rewards: "tuple[Reward, ...]") -> Callable[[Any, Mapping[str, Any]], Score]:
    """`(completion, row) -> Score` as the first verifying reward sees it; plain comparison where there is none."""
    reward = next((r for r in rewards if r.name in VERIFYING), None)
    if reward is None:
        return grade
    if reward.name == "environment":
        return _environment_score
    if reward.name == "math-verify":
        return partial(grade, reward_options=reward.options, scorer=equivalent, any_form=True)
    scorer = _gym_scorer("[[reward]] reasoning-gym") if reward.name == "reasoning-gym" else None
    return partial(grade, reward_options=reward.options, scorer=scorer)


def _environment_score(_completion: Any, row: Mapping[str, Any]) -> Score:
    """An episode is solved at a reward of 1 or more (strict); above 0 it is half solved (lenient)."""
    earned, problem = _number(row.get("environment_reward"))
    value = earned if earned is not None and problem is None else 0.0
    return Score(strict=value >= 1.0, lenient=value > 0.0, wellformed=earned is not None)


# --- the named rewards: options -> batch function


def _exact(options: Mapping[str, Any], _: str) -> BatchReward:
    return _each(lambda completion, row: float(grade(completion, row, options).strict))


def _gym(options: Mapping[str, Any], where: str) -> BatchReward:
    scorer = _gym_scorer(where)
    return _each(lambda completion, row: float(grade(completion, row, options, scorer).strict))


def _math(options: Mapping[str, Any], _: str) -> BatchReward:
    return _each(lambda completion, row: float(grade(completion, row, options, equivalent, any_form=True).strict))


def _json(options: Mapping[str, Any], where: str) -> BatchReward:
    """1 for a completion that is one JSON document (whitespace around it aside) and keeps to the schema, else 0."""
    schema = options["schema"]
    try:
        json_schema.check(schema)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error

    def score(completion: Any, _row: Mapping[str, Any]) -> float:
        try:
            value = json_schema.parse(text_of(completion))
        except ValueError:
            return 0.0
        return float(json_schema.valid(value, schema))

    return _each(score)


def _model(options: Mapping[str, Any], where: str) -> BatchReward:
    return LearnedReward(where, **{name: value for name, value in options.items() if name != "model"})


def _environment(options: Mapping[str, Any], _: str) -> BatchReward:
    """The environment's own reward; None for an episode that a hanging call has cost."""

    def reward(environments: Sequence[Any], **_: Any) -> list[float | None]:
        return [environment._reward() for environment in environments]

    return reward


def _format(options: Mapping[str, Any], _: str) -> BatchReward:
    return _each(lambda completion, row: float(grade(completion, row, options).wellformed))


def _regex(options: Mapping[str, Any], where: str) -> BatchReward:
    try:
        pattern = re.compile(options["pattern"])
    except re.error as error:
        raise UserError(f"{where}: pattern = {options['pattern']!r} is no regular expression: {error}") from error
    return _each(lambda completion, row: float(pattern.fullmatch(text_of(completion)) is not None))


def _length(options: Mapping[str, Any], _: str) -> BatchReward:
    target, per_token = options["target"], options.get("per_token", 0.01)

    def length(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [-per_token * max(0, len(ids) - target) for ids in completion_ids]

    return length


def _overlong(options: Mapping[str, Any], where: str) -> BatchReward:
    """Soft overlong punishment (DAPO, Yu et al. 2025, arXiv 2503.14476, eq. 13), in tokens with EOS."""
    limit, cache = options["limit"], options["cache"]
    if cache > limit:
        raise UserError(f"{where}: cache = {cache}, must be at most limit = {limit}")

    def overlong(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [-min(1.0, max(0.0, (len(ids) - (limit - cache)) / cache)) for ids in completion_ids]

    return overlong


def _each(score: SampleReward) -> BatchReward:
    """A batch reward from one of (completion, row)."""

    def batch(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        rows = {k: v for k, v in columns.items() if _is_column(v, len(completions))}
        return [
            score(completions[i], {"prompt": prompts[i]} | {k: v[i] for k, v in rows.items()})
            for i in range(len(completions))
        ]

    return batch


def _gym_scorer(where: str) -> Scorer:
    """Right means a score of exactly 1.0: reasoning-gym's default scorer pays for substrings."""
    from rl.data import gym  # here, since rl.data renders its answers with rl.rewards

    gym.load(where)
    return lambda value, row: gym.score(row, value) == 1.0


@dataclass(frozen=True)
class Option:
    """One key of a named reward: is a value valid, what is, and must it be given."""

    valid: Callable[[Any], bool]
    what: str
    required: bool = False


@dataclass(frozen=True)
class Named:
    """A reward of this module: (options, where for errors) -> batch function, and its options."""

    make: Callable[[Mapping[str, Any], str], BatchReward]
    options: Mapping[str, Option]


_ANSWER = {
    "extract": Option(lambda v: isinstance(v, str) and v in EXTRACTS, f"one of {', '.join(EXTRACTS)}"),
    "stop": Option(lambda v: isinstance(v, str) and v != "", "a text that is not empty"),
}
_PATTERN = {"pattern": Option(lambda v: isinstance(v, str), "a regular expression (text)", required=True)}
_TOKENS = {
    "target": Option(lambda v: type(v) is int and v >= 0, "a number of tokens, 0 or more", required=True),
    "per_token": Option(lambda v: type(v) in (int, float) and 0 <= v < math.inf, "a number, 0 or more"),
}
_LIMIT = {
    "limit": Option(lambda v: type(v) is int and v >= 1, "a number of tokens, 1 or more", required=True),
    "cache": Option(lambda v: type(v) is int and v >= 1, "a number of tokens, 1 or more", required=True),
}
_SCHEMA = {"schema": Option(lambda v: isinstance(v, dict), "a table, the JSON schema", required=True)}
_LEARNED = {
    "model": Option(
        lambda v: isinstance(v, str) and v != "",
        "a config of algorithm 'reward' relative to this one, a model folder or a hub id (text)",
        required=True,
    ),
    "batch_size": Option(lambda v: type(v) is int and v >= 1, "a number of completions, 1 or more"),
    "normalise": Option(lambda v: v in ("standard", "none"), "'standard' or 'none'"),
    "clip": Option(lambda v: type(v) in (int, float) and 0 < v < math.inf, "a number above 0"),
}
_NAMED = {
    "exact": Named(_exact, _ANSWER),
    "reasoning-gym": Named(_gym, _ANSWER),
    "math-verify": Named(_math, _ANSWER),
    "json": Named(_json, _SCHEMA),
    "model": Named(_model, _LEARNED),
    "environment": Named(_environment, {}),
    "format": Named(_format, _ANSWER),
    "regex": Named(_regex, _PATTERN),
    "length": Named(_length, _TOKENS),
    "overlong": Named(_overlong, _LIMIT),
}
NAMES: tuple[str, ...] = tuple(_NAMED)


def _check(options: Mapping[str, Any], known: Mapping[str, Option], where: str) -> None:
    for name, value in options.items():
        if name not in known:
            raise UserError(f"{where}: unknown key '{name}'{near(name, known)}; valid: {', '.join(known)}")
        if not known[name].valid(value):
            raise UserError(f"{where}: {name} = {value!r}, must be {known[name].what}")
    for name, option in known.items():
        if option.required and name not in options:
            raise UserError(f"{where}: needs '{name}', {option.what}")


def _own(path: str, options: Mapping[str, Any], where: str) -> BatchReward:
    """A user's function, given its options and only the columns it takes."""
    module_name, _, function_name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(f"{where}: cannot import '{module_name}' from '{Path.cwd()}': {_told(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        own = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module_name]
        raise UserError(
            f"{where}: '{module_name}' has no function '{function_name}'{near(function_name, own)}; "
            f"it has: {', '.join(own) or 'none'}"
        )
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        raise UserError(f"{where}: '{function_name}' is async; a reward returns its list directly")
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in options:
        if name in ("prompts", "completions") or not (takes_all or name in parameters):
            raise UserError(f"{where}: '{function_name}' takes no option '{name}'{near(name, parameters)}")

    def call(**columns: Any) -> Iterable[float | None]:
        given = columns | dict(options)
        return function(**(given if takes_all else {k: v for k, v in given.items() if k in parameters}))

    return call


def _number(value: Any) -> tuple[float | None, str | None]:
    """(reward or None, what is wrong with it); None from the function itself means unscorable and is not wrong."""
    if value is None:
        return None, None
    try:
        reward = None if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        reward = None
    if reward is None:
        return None, f"returned {value!r:.60}, not a number"
    return (reward, None) if math.isfinite(reward) else (None, f"returned {reward}")


def _sample(index: int, prompts: Sequence[Any], columns: Mapping[str, Any]) -> str:
    prompt = prompts[index] if isinstance(prompts[index], str) else prompts[index][-1]["content"]
    ids = columns.get("id")
    name = f"row '{ids[index]}'" if _is_column(ids, len(prompts)) else f"sample {index}"
    return f"{name} (prompt {'…' if len(prompt) > 60 else ''}{prompt[-60:]!r})"


def _told(error: Exception) -> str:
    """An exception in one line, with the file and line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f" ({Path(frames[-1].filename).name} line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{at}"


def _is_column(value: Any, rows: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == rows
