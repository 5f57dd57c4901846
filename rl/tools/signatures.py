"""Is a function fit to be a tool? Read from its source with `ast`, so that checking a config imports no user code.

A tool is a plain function (or an environment's method) whose parameters are all named, typed and described under
`Args:` of a docstring in Google's form: from these the model is told how to call it.
"""

import ast
import re

from rl import names
from rl.names import Function

SHAPE = "valid: def f(x: int) -> str with a docstring that describes each parameter under 'Args:'"
# methods of an environment that are no tools
OWN = ("reset", "get_reward", "rows")
_ENTRY = re.compile(r"^\s*(\w+)\s*(?:\([^)]*\))?\s*:\s*\S")


def problem(dotted: str, kind: str) -> str | None:
    """What is wrong with "module:name" as a `kind` ("function" or "class"), None where nothing is or cannot be seen."""
    node = names.find(dotted, kind)
    if node is None or isinstance(node, str):
        return node
    if isinstance(node, ast.ClassDef):
        return class_problem(node, dotted) if kind == "class" else f"'{dotted}' is a class, {SHAPE}"
    if kind == "class":
        return f"'{dotted}' is a function, valid: a class with reset() and methods that are tools"
    return function_problem(node, dotted)


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
