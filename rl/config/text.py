"""Settings as text: the reference table of every key, and a resolved config as TOML."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from rl.config.reading import keys_of, table_of, type_name


def reference(cls: type, table: str = "") -> str:
    """Markdown tables of every key of a dataclass of tables: type, default, range and meaning."""
    parts = []
    keys = keys_of(cls)
    own = {name: entry for name, entry in keys.items() if table_of(entry[1]) is None}
    if table:
        title, _, meaning = (cls.__doc__ or "").partition(": ")
        rows = [_row(name, f, wanted) for name, (f, wanted) in own.items()]
        rows += [f"| ... | any | | {f.metadata['help']} |" for f in fields(cls) if f.metadata.get("rest")]
        head = f"## {title}\n\n{_sentence(meaning)}\n\n| key | type | default | meaning |\n| --- | --- | --- | --- |\n"
        parts.append(head + "\n".join(rows) + "\n")
    for name, (_, wanted) in keys.items():
        inner = table_of(wanted)
        if inner is not None:
            parts.append(reference(inner, f"{table}.{name}" if table else name))
    return "\n".join(parts)


def to_toml(tables: Mapping[str, Any], prefix: str = "") -> str:
    """TOML text of nested tables (strings, finite numbers, booleans, lists, dicts with string keys)."""
    plain = {name: v for name, v in tables.items() if not _is_table(v)}
    text = "".join(f"{_key(name)} = {_inline(value)}\n" for name, value in plain.items())
    for name, value in tables.items():
        if not _is_table(value):
            continue
        dotted = f"{prefix}{_key(name)}"
        for item in [value] if isinstance(value, Mapping) else value:
            header = f"[{dotted}]" if isinstance(value, Mapping) else f"[[{dotted}]]"
            text += ("\n" if text or prefix else "") + f"{header}\n" + to_toml(item, f"{dotted}.")
    return text


def _row(name: str, f: Field[Any], wanted: Any) -> str:
    if f.default is MISSING and f.default_factory is MISSING:
        default = "required"
    elif f.default is MISSING:
        default = f"`{_inline(f.default_factory())}`"  # type: ignore[misc]
    else:
        default = "unset" if f.default is None else f"`{_inline(f.default)}`"
    limits = " and ".join(f"{sign} {limit}" for sign, limit in f.metadata.get("limits", {}).items())
    kind = f"{type_name(wanted)} {limits}".strip()
    return f"| `{name}` | {kind} | {default} | {f.metadata['help']} |"


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text[:1].upper() + text[1:]


def _is_table(value: Any) -> bool:
    """A dict, or a list of nothing but dicts; an empty dict is a table too."""
    return isinstance(value, Mapping) or (
        isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) for v in value)
    )


def _inline(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which JSON leaves bare
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_inline, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(name)} = {_inline(item)}" for name, item in value.items()) + "}"
    return repr(value)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _inline(name)
