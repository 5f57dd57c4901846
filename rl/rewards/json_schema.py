"""Does a JSON value keep to a schema? The part of JSON Schema (draft 2020-12) that a model's answers are asked to keep.

A schema with a keyword that is not in KEYWORDS is refused: left out in silence, it would let through what it forbids.
`title` and `description` say nothing about a value.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "number": lambda v: _is_number(v),
    "integer": lambda v: _is_number(v) and v == int(v),  # 1.0 is an integer in JSON Schema
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
}
_LIST_OF_SCHEMAS = ("anyOf", "allOf", "oneOf")
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
KEYWORDS = (
    *("type", "enum", "const", "properties", "required", "additionalProperties", "items", "uniqueItems", "pattern"),
    *("not", "title", "description", *_LIST_OF_SCHEMAS, *_COUNTS, *_NUMBERS),
)


def check(schema: Any, at: str = "schema") -> None:
    """Raise ValueError, one line, where `schema` is not one that `valid` knows; `at` names the place."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise ValueError(f"{at}: found {schema!r:.40}, must be a table")
    if unknown := sorted(schema.keys() - set(KEYWORDS)):
        raise ValueError(f"{at}: unknown keyword '{unknown[0]}'; valid: {', '.join(KEYWORDS)}")
    for name, value in schema.items():
        _check_keyword(name, value, f"{at}.{name}")


def valid(value: Any, schema: Any) -> bool:
    """Whether a parsed JSON value keeps to a schema that `check` has passed."""
    if isinstance(schema, bool):
        return schema
    return all(_RULES[name](value, wanted, schema) for name, wanted in schema.items() if name in _RULES)


def parse(text: str) -> Any:
    """`text` as one JSON document. Raises ValueError for anything else, also NaN, Infinity and a name given twice."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a name is given twice")
        return dict(pairs)

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def equal(a: Any, b: Any) -> bool:
    """JSON's equality: 1 is 1.0, and true is no 1."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    return a == b


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_keyword(name: str, value: Any, at: str) -> None:
    problem = None
    if name == "type":
        names = value if isinstance(value, list) else [value]
        if not names or any(not isinstance(n, str) or n not in TYPES for n in names):
            problem = f"one of {', '.join(TYPES)}, or a list of them"
    elif name == "enum" and not isinstance(value, list):
        problem = "a list"
    elif name == "required" and not (isinstance(value, list) and all(isinstance(n, str) for n in value)):
        problem = "a list of names"
    elif name == "uniqueItems" and not isinstance(value, bool):
        problem = "true or false"
    elif name in _COUNTS and not (type(value) is int and value >= 0):
        problem = "a whole number, 0 or more"
    elif name in _NUMBERS and not (_is_number(value) and (name != "multipleOf" or value > 0)):
        problem = "a number above 0" if name == "multipleOf" else "a number"
    elif name == "pattern":
        try:
            re.compile(value)
        except (re.error, TypeError):
            problem = "a regular expression"
    elif name == "properties":
        if not isinstance(value, dict):
            problem = "a table of schemas"
        else:
            for key, inner in value.items():
                check(inner, f"{at}.{key}")
    elif name in _LIST_OF_SCHEMAS:
        if not (isinstance(value, list) and value):
            problem = "a list of schemas"
        else:
            for i, inner in enumerate(value):
                check(inner, f"{at}.{i}")
    elif name in ("items", "additionalProperties", "not"):
        check(value, at)
    if problem:
        raise ValueError(f"{at}: found {value!r:.40}, must be {problem}")


def _multiple(value: Any, unit: float) -> bool:
    quotient = value / unit
    return math.isclose(quotient, round(quotient), rel_tol=1e-9, abs_tol=1e-9)


def _typed(value: Any, names: Any) -> bool:
    return any(TYPES[name](value) for name in (names if isinstance(names, list) else [names]))


def _additional(value: Any, wanted: Any, schema: Mapping[str, Any]) -> bool:
    if not isinstance(value, dict):
        return True
    return all(valid(inner, wanted) for name, inner in value.items() if name not in schema.get("properties", {}))


def _of(kind: str, holds: Callable[[Any, Any], bool]) -> Callable[[Any, Any, Any], bool]:
    """A rule that speaks of values of one type and lets every other pass, as JSON Schema's do."""
    return lambda value, wanted, _: not TYPES[kind](value) or holds(value, wanted)


_RULES: dict[str, Callable[[Any, Any, Any], bool]] = {
    "type": lambda v, names, _: _typed(v, names),
    "enum": lambda v, options, _: any(equal(v, option) for option in options),
    "const": lambda v, only, _: equal(v, only),
    "properties": _of("object", lambda v, inner: all(valid(v[n], s) for n, s in inner.items() if n in v)),
    "required": _of("object", lambda v, names: all(name in v for name in names)),
    "additionalProperties": _additional,
    "items": _of("array", lambda v, inner: all(valid(item, inner) for item in v)),
    "minItems": _of("array", lambda v, n: len(v) >= n),
    "maxItems": _of("array", lambda v, n: len(v) <= n),
    "uniqueItems": _of("array", lambda v, on: not on or not any(equal(a, b) for i, a in enumerate(v) for b in v[:i])),
    "minLength": _of("string", lambda v, n: len(v) >= n),
    "maxLength": _of("string", lambda v, n: len(v) <= n),
    "pattern": _of("string", lambda v, pattern: re.search(pattern, v) is not None),
    "minimum": _of("number", lambda v, limit: v >= limit),
    "maximum": _of("number", lambda v, limit: v <= limit),
    "exclusiveMinimum": _of("number", lambda v, limit: v > limit),
    "exclusiveMaximum": _of("number", lambda v, limit: v < limit),
    "multipleOf": _of("number", _multiple),
    "anyOf": lambda v, schemas, _: any(valid(v, s) for s in schemas),
    "allOf": lambda v, schemas, _: all(valid(v, s) for s in schemas),
    "oneOf": lambda v, schemas, _: sum(valid(v, s) for s in schemas) == 1,
    "not": lambda v, schema, _: not valid(v, schema),
}
