"""What a config names as "module:thing", read from its source with `ast`: checking a config runs no user code."""

import ast
import difflib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
Node = Function | ast.ClassDef


def find(dotted: str, kind: str) -> Node | str | None:
    """The definition of "module:name", or what is wrong with it, or None where it cannot be seen.

    Only the source of the module is read (its packages are imported, as Python does to find it); a name that it takes
    from another module is looked up there, and what is made at run time is left to the run. `kind`, "function" or
    "class", is what the message asks for; the definition may be either.
    """
    module, colon, name = dotted.partition(":")
    if not (colon and module and name.isidentifier()):
        return f"found {dotted!r}, valid: 'module:{'Class' if kind == 'class' else 'function'}'"
    path = _source(module)
    if path is None or isinstance(path, str):
        return path
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except (OSError, SyntaxError, ValueError) as error:
        at = f" line {error.lineno}" if isinstance(error, SyntaxError) else ""
        return f"'{dotted}': {path.name}{at} cannot be read: {str(error).splitlines()[0]}"
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return find(f"{node.module}:{alias.name}", kind)
        if isinstance(node, Node) and node.name == name:
            return node
    if _may_be_made(tree, name):
        return None
    wanted = Function if kind == "function" else ast.ClassDef
    known = [node.name for node in tree.body if isinstance(node, wanted) and not node.name.startswith("_")]
    shown = (other for other in _exported(tree) if other not in (name, *known))
    known += [other for other in shown if other[:1].isupper() == (kind == "class")]  # by habit: looked up nowhere
    return f"'{module}' has no {kind} '{name}'{near(name, known)}; it has: {', '.join(known) or 'none'}"


def near(name: str, known: Iterable[str]) -> str:
    """ ", did you mean 'x'?" or nothing."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean '{match[0]}'?" if match else ""


def _source(module: str) -> Path | str | None:
    """The module's file, or what is wrong, or None for one that has no Python source."""
    try:
        spec = importlib.util.find_spec(module)
    except Exception as error:  # a package on the way may fail in any way when it is imported
        return f"'{module}' cannot be found from '{Path.cwd()}': {type(error).__name__}: {error}"
    if spec is None:
        return f"there is no module '{module}' (looked for from '{Path.cwd()}')"
    return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None


def _exported(tree: ast.Module) -> list[str]:
    """The names in the module's `__all__`, which may come from other modules."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and [n.id for n in node.targets if isinstance(n, ast.Name)] == ["__all__"]:
            return [n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return []


def _may_be_made(tree: ast.Module, name: str) -> bool:
    """Whether the name is assigned, or comes from an import that is not followed."""
    for node in tree.body:
        if isinstance(node, ast.If | ast.Try):
            return True
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.With):
            named = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            if name in named:
                return True
        if isinstance(node, ast.ImportFrom) and any(alias.name in ("*", name) for alias in node.names):
            return True
    return False
