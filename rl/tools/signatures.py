"""Is a function fit to be a tool? Read from its source with `ast`, so that checking a config imports no user code.

A tool is a plain function (or an environment's method) whose parameters are all named, typed and described under
`Args:` of a docstring in Google's form: from these the model is told how to call it.
"""

import ast
import difflib
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef

SHAPE = "valid: def f(x: int) -> str with a docstring that describes each parameter under 'Args:'"
# methods of an environment that are no tools
OWN = ("reset", "get_reward", "rows")
_ENTRY = re.compile(r"^\s*(\w+)\s*(?:\([^)]*\))?\s*:\s*\S")


def problem(dotted: str, kind: str) -> str | None:
    """What is wrong with "module:name" as a `kind` ("function" or "class"), None where nothing is or cannot be seen.

    Only the source of the module is read (its packages are imported, as Python does to find it); a name that it takes
    from another module is looked up there, and what is made at run time is left to the run.
    """
    module, colon, name = dotted.partition(":")
    if not (colon and module and name.isidentifier()):
        return f"found {dotted!r}, valid: 'module:{'Class' if kind == 'class' else 'function'}'"
    path = _source(module)
    if isinstance(path, str):
        return path
    if path is None:
        return None
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except (OSError, SyntaxError, ValueError) as error:
        at = f" line {error.lineno}" if isinstance(error, SyntaxError) else ""
        return f"'{dotted}': {path.name}{at} cannot be read: {str(error).splitlines()[0]}"
    return _look(tree, module, name, dotted, kind)


def _look(tree: ast.Module, module: str, name: str, dotted: str, kind: str) -> str | None:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return problem(f"{node.module}:{alias.name}", kind)
        if isinstance(node, Function) and node.name == name:
            if kind == "class":
                return f"'{dotted}' is a function, valid: a class with reset() and methods that are tools"
            return function_problem(node, dotted)
        if isinstance(node, ast.ClassDef) and node.name == name:
            if kind == "function":
                return f"'{dotted}' is a class, {SHAPE}"
            return class_problem(node, dotted)
    if _may_be_made(tree, name):
        return None
    wanted = Function if kind == "function" else ast.ClassDef
    known = [node.name for node in tree.body if isinstance(node, wanted) and not node.name.startswith("_")]
    return f"'{module}' has no {kind} '{name}'{near(name, known)}; it has: {', '.join(known) or 'none'}"


def function_problem(node: Function, dotted: str, method: bool = False) -> str | None:
    """What keeps a function from being a tool."""
    at = f"'{dotted}' (line {node.lineno})"
    if isinstance(node, ast.AsyncFunctionDef):
        return f"{at} is async, {SHAPE}"
    given = node.args
    if given.vararg or given.kwarg or given.posonlyargs:
        return f"{at} takes *args, **kwargs or positional-only parameters, {SHAPE}"
    parameters = [*given.args[1 if method else 0 :], *given.kwonlyargs]
    for parameter in parameters:
        if parameter.annotation is None:
            return f"{at}: parameter '{parameter.arg}' has no type, {SHAPE}"
    text = ast.get_docstring(node)
    if not text:
        return f"{at} has no docstring, {SHAPE}"
    described = _described(text)
    for parameter in parameters:
        if parameter.arg not in described:
            return f"{at}: parameter '{parameter.arg}' is not described under 'Args:' of the docstring, {SHAPE}"
    return None


def class_problem(node: ast.ClassDef, dotted: str) -> str | None:
    """What keeps a class from being an environment; methods of its bases are left to the run."""
    methods = {n.name: n for n in node.body if isinstance(n, Function)}
    inherits = any(not (isinstance(base, ast.Name) and base.id == "object") for base in node.bases)
    if "reset" not in methods and not inherits:
        return f"'{dotted}' has no method reset(), which begins an episode"
    tools = [n for name, n in methods.items() if name not in OWN and not name.startswith("_")]
    if not tools and not inherits:
        return f"'{dotted}' has no method to call as a tool (beside {', '.join(OWN)} and _private ones)"
    return next((said for n in tools if (said := function_problem(n, f"{dotted}.{n.name}", method=True))), None)


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


def _described(docstring: str) -> set[str]:
    """Parameters with a description in the section `Args:`."""
    found: set[str] = set()
    inside = False
    for line in docstring.splitlines():
        if line.strip() in ("Args:", "Arguments:", "Parameters:"):
            inside = True
        elif inside and line.strip() and not line[:1].isspace():
            break
        elif inside and (match := _ENTRY.match(line)):
            found.add(match.group(1))
    return found
