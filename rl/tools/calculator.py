"""A calculator: arithmetic read by `ast`, never evaluated as Python."""

import ast
import operator
from collections.abc import Callable
from typing import Any

Number = int | float

LONGEST = 200  # characters of an expression
MOST_BITS = 4096  # of an exact result: 9**9**9 would not end

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculator(expression: str) -> str:
    """
    Work out an arithmetic expression.

    Args:
        expression: Numbers with + - * / // % ** and brackets, e.g. 12 * (3 + 4).

    Returns:
        The value.
    """
    if len(expression) > LONGEST:
        raise ValueError(f"expression of {len(expression)} characters, at most {LONGEST} are read")
    try:
        tree = ast.parse(expression.strip().replace("×", "*").replace("÷", "/"), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(f"'{expression}' is not an arithmetic expression") from None
    return _text(_value(tree.body, expression))


def _value(node: ast.expr, whole: str) -> Number:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand, whole))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left, whole), _value(node.right, whole)
        if isinstance(node.op, ast.Pow):
            _check_power(left, right)
        if isinstance(node.op, ast.Div) and type(left) is type(right) is int and right and left % right == 0:
            return left // right  # exact, where a float would round
        try:
            return _BINARY[type(node.op)](left, right)
        except ZeroDivisionError:
            raise ValueError("division by zero") from None
        except OverflowError:
            raise ValueError("the result is too large") from None
    raise ValueError(f"'{whole}' holds more than numbers, + - * / // % ** and brackets")


def _check_power(base: Number, exponent: Number) -> None:
    if base < 0 and exponent != int(exponent):
        raise ValueError("a root of a negative number")
    if base == 0 and exponent < 0:
        raise ValueError("division by zero")
    if isinstance(base, int) and base.bit_length() * abs(exponent) > MOST_BITS:
        raise ValueError("the result is too large")


def _text(value: Number) -> str:
    """As a person writes it: 0.3 for 0.1 + 0.2, 4 for 4.0."""
    if isinstance(value, int):
        return str(value)
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError("the result is too large")
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else f"{value:.12g}"
