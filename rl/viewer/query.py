"""Which completions to show: conditions on columns, a text, an order, a limit."""

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rl.completions import REWARD
from rl.config.reading import nearest
from rl.errors import UserError

Row = dict[str, Any]
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
}
CONDITION = re.compile(r"\s*(>=|<=|!=|==|>|<|=)?\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")
RANGE = re.compile(r"\s*(-?[\d.]+)\s*\.\.\s*(-?[\d.]+)\s*")
SORTS = ("step", "reward", "advantage", "length")


@dataclass(frozen=True)
class Query:
    """Conditions on columns, [(column, text of it, test)]; rows pass all of them. `sort` with "-" in front descends."""

    tests: Sequence[tuple[str, Callable[[float], bool]]] = ()
    text: str | None = None
    sort: str | None = None
    limit: int | None = None

    def of(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that pass, in order, at most `limit`. A row without a number passes no condition on it."""
        wanted = self.text.casefold() if self.text else None
        found = [
            row
            for row in rows
            if all(row.get(column) is not None and test(row[column]) for column, test in self.tests)
            and (wanted is None or wanted in row["prompt"].casefold() or wanted in row["completion"].casefold())
        ]
        if self.sort:
            column, down = self.sort.removeprefix("-"), self.sort.startswith("-")
            have = [row for row in found if row.get(column) is not None]
            have.sort(key=lambda row: row[column], reverse=down)
            found = have + [row for row in found if row.get(column) is None]
        return found[: self.limit] if self.limit is not None else found


def condition(option: str, text: str) -> Callable[[float], bool]:
    """'>0.5', '<= 3', '7' and '10..20' (both ends in) as a test; raises UserError for anything else."""
    if match := RANGE.fullmatch(text):
        try:
            low, high = float(match[1]), float(match[2])
        except ValueError:
            low = high = None
        if low is not None and low > high:
            raise UserError(f"{option}: found {text!r}, valid: from the lower to the higher, {match[2]}..{match[1]}")
        if low is not None:
            return lambda value: low <= value <= high
    if match := CONDITION.fullmatch(text):
        compare, bound = OPERATORS[(match[1] or "=").replace("==", "=")], float(match[2])
        return lambda value: compare(value, bound)
    raise UserError(f"{option}: found {text!r}, valid: a number, '>0.5', '<=3', '!=0' or '10..20'")


def build(
    columns: Sequence[str],
    *,
    reward: Sequence[str] = (),
    length: Sequence[str] = (),
    step: Sequence[str] = (),
    text: str | None = None,
    sort: str | None = None,
    limit: int | None = None,
) -> Query:
    """A query from the options of the command line; `--reward 'exact>0'` asks one function's reward.

    Raises UserError for a condition that is none, and a reward or an order that the log does not have.
    """
    tests = []
    for option, column, conditions in (("--length", "length", length), ("--step", "step", step)):
        tests += [(column, condition(option, said)) for said in conditions]
    for said in reward:
        name = re.match(r"\s*([^\s<>=!.\d+-][^\s<>=!]*)", said)
        column = f"{REWARD}{name[1]}" if name else "reward"
        if name and column not in columns:
            known = [c.removeprefix(REWARD) for c in columns if c.startswith(REWARD)]
            raise UserError(f"--reward: found {said!r}, no reward '{name[1]}', {nearest(name[1], known)}")
        tests.append((column, condition("--reward", said[name.end() :] if name else said)))
    if sort is not None and sort.removeprefix("-") not in SORTS:
        raise UserError(f"--sort: found {sort!r}, valid: {', '.join(SORTS)}, with '-' in front from the highest")
    return Query(tests, text, sort, limit)
