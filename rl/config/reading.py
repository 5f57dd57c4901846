"""TOML -> frozen dataclasses: types, ranges, unknown keys and `--set`, each error one line. Knows no table by name."""

from __future__ import annotations

import difflib
import functools
import math
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union

from rl.errors import UserError

Where = tuple[str | int, ...]  # keys from the top of the file down, e.g. ("reward", 0, "weight")
LONGEST_LIST = 18  # a longer list of valid names helps nobody on one line
SHORT_LIST = 8  # up to here the list is given beside the nearest name


def about(
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    rest: bool = False,
) -> dict[str, Any]:
    """A field's metadata: its meaning, its range, and whether it collects all keys no other field has (`rest`)."""
    limits = {"≥": least, ">": above, "≤": most, "<": below}
    return {"help": help, "limits": {sign: v for sign, v in limits.items() if v is not None}, "rest": rest}


def key(help: str, default: Any = MISSING, **limits: float) -> Any:
    """A dataclass field with `about` as its metadata; required where it has no default."""
    return field(default=default, metadata=about(help, **limits))


@dataclass(frozen=True)
class Source:
    """Where values came from: the file as the user named it, and the places set by `--set`."""

    file: str
    overridden: frozenset[Where] = frozenset()
    home: Callable[[str], str | None] = lambda name: None  # the table(s) a key belongs in

    def error(self, where: Where, message: str) -> UserError:
        """The one-line error about the key at `where`: file or --set, [table], key, message."""
        named = any(at[: len(where)] == where or where[: len(at)] == at for at in self.overridden)
        name = f"{_table(where[:-1])} {where[-1]}" if len(where) > 1 else _table(where)
        return UserError(f"{self._file(named)}: {name}: {message}")

    def table_error(self, where: Where, message: str, name: str | None = None) -> UserError:
        """The one-line error about the table at `where`, or about its key `name`."""
        named = name is not None and any(at[: len(where) + 1] == (*where, name) for at in self.overridden)
        table = f"{_table(where)} " if where else ""
        return UserError(f"{self._file(named)}: {table}{message}")

    def _file(self, named: bool) -> str:
        return "--set" if named else f"{self.file} with --set" if self.overridden else self.file

    def unknown(self, where: Where, name: str, valid: Iterable[str], instead: str | None = None) -> UserError:
        """The error for a key no table has, with the nearest valid one, or all where none is near."""
        kind = "key" if where else "table"
        return self.table_error(where, f"unknown {kind} {_show(name)}, {instead or nearest(name, valid)}", name)


def nearest(name: str, valid: Iterable[str]) -> str:
    """ "did you mean 'x'?", or the list of valid names where none is near and the list is short."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    if len(names) > LONGEST_LIST:
        return f"no name among the {len(names)} valid ones is near"
    return "valid: " + ", ".join(names)


def read_toml(path: Path) -> dict[str, Any]:
    """The file's tables. Raises UserError for a missing, unreadable or malformed file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        beside = [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        hint = f"; {nearest(path.name, beside)}" if beside else ""
        raise UserError(f"{path}: no such file{hint}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {_one_line(str(error))}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def with_overrides(
    tables: dict[str, Any], overrides: Sequence[str], cls: type
) -> tuple[dict[str, Any], frozenset[Where]]:
    """Put "table.key=value" strings over `tables`; returns the new tables and the places set.

    A value is TOML, or a bare string where it is not. `cls` is the dataclass of the whole file: its table names
    are checked here, keys later by `read`. Raises UserError.
    """
    places: set[Where] = set()
    for override in overrides:
        dotted, equals, text = override.partition("=")
        parts = dotted.strip().split(".")
        if not equals or len(parts) < 2 or not all(parts):
            raise UserError(f"--set: {_show(override)} is not table.key=value, e.g. run.seed=1 or reward.0.weight=0.5")
        if parts[0] not in _tables(cls):
            raise Source("--set").unknown((), parts[0], _tables(cls))
        where = place(dotted.strip())
        tables = _put(tables, where, _value(text.strip()), override)
        places.add(where)
    return tables, frozenset(places)


def place(dotted: str) -> Where:
    """ "reward.0.weight" -> ("reward", 0, "weight")."""
    return tuple(int(part) if part.isdecimal() else part for part in dotted.split("."))


def read[T](
    cls: type[T], table: Mapping[str, Any], source: Source, where: Where = (), also: Mapping[str, Any] | None = None
) -> T:
    """Build the dataclass `cls` from a table, every key checked. `also` gives fields that are not keys of the file."""
    hints, given, values = _hints(cls), dict(table), dict(also or {})
    known = _keys(cls)
    rest = next((f.name for f in fields(cls) if f.metadata.get("rest")), None)
    for name, f in known.items():
        if f.name in values:
            continue
        if name in given:
            values[f.name] = _read_value(hints[f.name], given.pop(name), f, source, (*where, name))
        elif f.default is MISSING and f.default_factory is MISSING:
            if is_dataclass(hints[f.name]):
                raise source.table_error(where, f"missing table {_table((*where, name))}")
            raise source.table_error(where, f"missing key '{name}', valid: {type_name(hints[f.name])}")
    if rest is not None:
        for name, value in given.items():
            check_json(value, source, (*where, name))
        values[rest] = given
    elif given:
        name = next(iter(given))
        table = source.home(name)
        raise source.unknown(where, name, known, f"it belongs in {table}" if table and where else None)
    return cls(**values)


def check_value(wanted: Any, value: Any, source: Source, where: Where) -> None:
    """Raise UserError unless `value` is of the type `wanted`, without coercion (bool is no int; an int is a float)."""
    if conforms(value, wanted):
        return
    choices = _choices(wanted)
    if choices and isinstance(value, str):
        listed = f", valid: {type_name(wanted)}" if len(choices) <= SHORT_LIST else ""
        close = difflib.get_close_matches(value, choices, n=1) or [name for name in choices if name == value.lower()]
        hint = f", did you mean '{close[0]}'?" if close else "" if listed else f", {nearest(value, choices)}"
        raise source.error(where, f"found {_show(value)}{listed}{hint}")
    hint = ""
    if isinstance(value, float) and not math.isfinite(value):
        hint = ", finite"
    elif isinstance(value, str) and conforms(_value(value.lower()), wanted):
        hint = f" (write {value.lower()} without quotes)"
    elif str in (wanted, *typing.get_args(wanted)) and not isinstance(value, (list, dict)):
        hint = " (quote it)"
    raise source.error(where, f"found {_show(value)} ({_kind(value)}), valid: {type_name(wanted)}{hint}")


def conforms(value: Any, wanted: Any) -> bool:
    """Whether a TOML value is of a type built of int, float, bool, str, list, tuple, dict, Literal, None and unions."""
    origin = typing.get_origin(wanted)
    if wanted is Any:
        return True
    if wanted is float:  # TOML has nan and inf; no setting means one
        return type(value) in (int, float) and math.isfinite(value)
    if wanted in (int, bool, str, dict, list):
        return type(value) is wanted
    if wanted is type(None):
        return value is None
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(wanted))
    if origin in (Union, types.UnionType):
        return any(conforms(value, part) for part in typing.get_args(wanted))
    if origin in (list, tuple):
        return isinstance(value, list) and all(conforms(item, typing.get_args(wanted)[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(conforms(item, typing.get_args(wanted)[1]) for item in value.values())
    raise TypeError(f"no rule for {wanted}")


def type_name(wanted: Any) -> str:
    """A type as a person writes it: "float", "one of mps, cpu", "list of str"; None, which TOML lacks, is left out."""
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Literal:
        return ", ".join(str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in args)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(part) for part in args if part is not type(None))
    if origin in (list, tuple):
        return f"list of {type_name(args[0])}"
    if wanted is dict or origin is dict or is_dataclass(wanted):
        return "table"
    return "true or false" if wanted is bool else wanted.__name__


def check_json(value: Any, source: Source, where: Where) -> None:
    """Raise UserError where a free-form value holds what run.json cannot: dates, nan, inf."""
    if isinstance(value, dict):
        for name, item in value.items():
            check_json(item, source, (*where, name))
    elif isinstance(value, list):
        for item in value:
            check_json(item, source, where)
    elif not isinstance(value, (str, int, float)) or (isinstance(value, float) and not math.isfinite(value)):
        raise source.error(where, f"found {value} ({_kind(value)}), valid: a string, finite number, boolean or table")


def plain(instance: Any) -> dict[str, Any]:
    """A dataclass as TOML-shaped, JSON-able tables: TOML's key names, None left out, catch-all dicts spread."""
    table: dict[str, Any] = {}
    for name, f in _keys(type(instance)).items():
        value = getattr(instance, f.name)
        if value is not None:
            table[name] = _plain_value(value)
    for f in fields(instance):
        if f.metadata.get("rest"):
            table |= _plain_value(getattr(instance, f.name))
    return table


def keys_of(cls: type) -> dict[str, tuple[Field[Any], Any]]:
    """TOML key -> (field, type), without catch-all fields."""
    return {name: (f, _hints(cls)[f.name]) for name, f in _keys(cls).items()}


def table_of(wanted: Any) -> type | None:
    """The dataclass in a type like `Lora | None` or `tuple[Reward, ...]`, or None."""
    return next((part for part in (wanted, *typing.get_args(_listed(wanted))) if is_dataclass(part)), None)


def _listed(wanted: Any) -> Any:
    """The tuple in a type like `tuple[Part, ...] | None`, else the type itself."""
    return next((part for part in typing.get_args(wanted) if typing.get_origin(part) is tuple), wanted)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@functools.cache
def _keys(cls: type) -> dict[str, Field[Any]]:
    """TOML key -> field; a Path is no TOML value, so such a field is no key."""
    named = {f.metadata.get("toml", f.name.rstrip("_")): f for f in fields(cls) if not f.metadata.get("rest")}
    return {name: f for name, f in named.items() if _hints(cls)[f.name] is not Path}


def _tables(cls: type) -> list[str]:
    return list(_keys(cls))


def _read_value(wanted: Any, value: Any, f: Field[Any], source: Source, where: Where) -> Any:
    inner = table_of(wanted)
    if inner is not None and typing.get_origin(_listed(wanted)) is tuple:
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise source.error(where, f"found {_show(value)}, valid: tables written as [{_table(where)}]")
        return tuple(read(inner, item, source, (*where, i)) for i, item in enumerate(value))
    if inner is not None:
        if not isinstance(value, dict):
            raise source.error(where, f"found {_show(value)} ({_kind(value)}), valid: a table")
        return read(inner, value, source, where)
    check_value(wanted, value, source, where)
    if wanted is dict or typing.get_origin(wanted) is dict:
        check_json(value, source, where)
    if type(value) is int and _takes_float(wanted):
        value = float(value)
    for sign, limit in f.metadata.get("limits", {}).items():
        if not _COMPARE[sign](value, limit):
            bounds = " and ".join(f"{s} {v}" for s, v in f.metadata["limits"].items())
            raise source.error(where, f"found {_show(value)}, valid: {type_name(wanted)} {bounds}")
    return tuple(value) if isinstance(value, list) else value


_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "≥": lambda value, limit: value >= limit,
    "≤": lambda value, limit: value <= limit,
    ">": lambda value, limit: value > limit,
    "<": lambda value, limit: value < limit,
}


def _takes_float(wanted: Any) -> bool:
    return wanted is float or float in typing.get_args(wanted)


def _put(tables: Any, where: Where, value: Any, override: str, done: Where = ()) -> Any:
    """A copy of `tables` with `value` at `where`; tables on the way are made, list items must exist."""
    if not where:
        return value
    head, rest = where[0], where[1:]
    if isinstance(tables, list) or (isinstance(head, int) and not tables):
        if not isinstance(head, int) or head >= len(tables):
            name = ".".join(map(str, done))
            indices = ", ".join(f"{name}.{i}" for i in range(len(tables))) or "none, it is empty"
            raise UserError(f"--set: {_show(override)}: no item '{head}' in {name}, valid: {indices}")
        return [*tables[:head], _put(tables[head], rest, value, override, (*done, head)), *tables[head + 1 :]]
    if not isinstance(tables, dict):
        raise UserError(f"--set: {_show(override)}: {'.'.join(map(str, done))} is a value, not a table")
    return tables | {str(head): _put(tables.get(str(head), {}), rest, value, override, (*done, str(head)))}


def _value(text: str) -> Any:
    """`text` as a TOML value, or as it stands where it is none."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if list(parsed) == ["value"] else text


def _choices(wanted: Any) -> list[str]:
    parts = typing.get_args(wanted) if typing.get_origin(wanted) in (Union, types.UnionType) else (wanted,)
    return [str(c) for part in parts if typing.get_origin(part) is Literal for c in typing.get_args(part)]


def _plain_value(value: Any) -> Any:
    if is_dataclass(value):
        return plain(value)
    if isinstance(value, (list, tuple)):
        return [_plain_value(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain_value(item) for name, item in value.items()}
    return value


def _table(where: Where) -> str:
    """("model", "lora") -> "[model.lora]"; ("reward", 0) -> "[[reward]] 0", numbered as --set numbers it."""
    if where and isinstance(where[-1], int):
        return f"[[{'.'.join(map(str, where[:-1]))}]] {where[-1]}"
    return f"[{'.'.join(map(str, where))}]"


def _show(value: Any) -> str:
    """A value on one line, cut where it is long, written as TOML writes booleans."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _kind(value: Any) -> str:
    return {dict: "table", list: "list", bool: "boolean"}.get(type(value), type(value).__name__)


def _one_line(text: str) -> str:
    return " ".join(text.split())
