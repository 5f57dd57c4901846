"""The little language of claims, tables and figures: numbers of runs, arithmetic on them, one comparison.

    accuracy(grpo-shared-q4) - accuracy(grpo-full) > -0.02 at 95 %

A run is named as paper.toml names it. Parsed by `ast`; whatever is not listed here is refused, so that a study from
elsewhere can do nothing but compute. Every function of a run is its mean over the run's seeds:

- `accuracy(run)`, `start(run)`: share of held-out questions right after and before training;
- `score(run, "gym_gcd")`: the mean mark of an [[evaluation]]'s lm-eval task;
- `field(run, "rollout.ess")`: a number of run.json; `tokens_per_s`, `dlogp`, `ess`, `sync_s`, `sync_bytes`, `wall_s`,
  `steps`, `completion_tokens`, `memory` are such fields; `step_s(run)`: seconds a step, first logged step to last;
- `mean(run, "kl")`, `early`, `late`, `peak`: a logged value over all steps, their first and last tenth, and the highest
  mean of a tenth of them in a row, which noise alone lifts: it is no test that there was a peak;
- `part(run, "kl", 0.2, 0.4)`: the same from one share of the steps to another, chosen beforehand;
- `iqm(x)`: interquartile mean over seeds of x, an expression of one run; `improvement(x, y)`: the chance that a seed's
  x is above a seed's y, ties counting half;
- `abs`, `sqrt`, and + - * /.
"""

import ast
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any

from evals import stats
from papers.jobs import timing
from papers.results import Kept
from rl.config.reading import nearest
from rl.errors import UserError

FIELDS = {
    "tokens_per_s": "rollout.tokens_per_s",
    "dlogp": "rollout.mean_abs_dlogp",
    "ess": "rollout.ess",
    "sync_s": "rollout.sync_s",
    "sync_bytes": "rollout.sync_bytes",
    "wall_s": "wall_s",
    "steps": "steps",
    "completion_tokens": "tokens.completion",
    "memory": "peak_memory_bytes",
}
CLOCKED = ("tokens_per_s", "sync_s", "wall_s", "step_s")  # depend on machine and code, not on the inputs alone
MARKED = ("accuracy", "start", "score")  # of questions
LOGGED = ("mean", "early", "late", "peak", "part")
OVER_SEEDS = {"iqm": 1, "improvement": 2}
PLAIN: dict[str, Callable[[float], float]] = {"abs": abs, "sqrt": math.sqrt}
ARITHMETIC: dict[type, Callable[[float, float], float]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}
COMPARISONS: dict[type, str] = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
CONFIDENCE = re.compile(r"\s+at\s+(\d+(?:\.\d+)?)\s*%\s*$")


class Missing(Exception):
    """A run logged or recorded nothing of that name: the claim cannot be tested on it."""


@dataclass(frozen=True)
class Test:
    """`left sign right` at `confidence`; `margin` is set where left is abs(x) and right a number: equivalence of x."""

    __test__ = False  # pytest would collect it by its name

    left: ast.expr
    sign: str
    right: ast.expr
    confidence: float
    text: str

    @property
    def equivalence(self) -> ast.expr | None:
        """x, where the test says that |x| is below a number."""
        call = self.left
        if isinstance(call, ast.Call) and _called(call) == "abs" and self.sign in ("<", "<=") and not names(self.right):
            return call.args[0]
        return None


@dataclass(frozen=True)
class View:
    """The seeds of each run that are looked at, and the question that is left out, if one is."""

    runs: Mapping[str, Sequence[Kept]]
    without: int | None = None

    def of(self, run: str) -> Sequence[Kept]:
        found = self.runs.get(run, ())
        if not found:
            raise Missing(f"{run}: no result")
        return found


# --- reading


def parse_test(text: str, runs: Sequence[str]) -> Test:
    """A claim's test. UserError for what the language does not have; `runs` are the names it may use."""
    found = CONFIDENCE.search(text)
    confidence = float(found[1]) / 100 if found else 0.95
    if not 0.5 <= confidence < 1:
        raise UserError(f"test {text!r}: at {confidence:.4g}, valid: a confidence from 50 % to below 100 %")
    tree = _tree(text[: found.start()] if found else text, runs, text)
    if not isinstance(tree, ast.Compare) or len(tree.ops) != 1 or type(tree.ops[0]) not in COMPARISONS:
        raise UserError(f"test {text!r}: one comparison is needed, by <, <=, > or >=")
    right = tree.comparators[0]
    for side in (tree.left, right):
        _check(side, runs, text)
    if not names(tree.left) | names(right):
        raise UserError(f"test {text!r}: names no run")
    return Test(tree.left, COMPARISONS[type(tree.ops[0])], right, confidence, text)


def parse(text: str, runs: Sequence[str]) -> ast.expr:
    """An expression with no comparison; `runs` are the names it may use. UserError as `parse_test`."""
    tree = _tree(text, runs, text)
    _check(tree, runs, text)
    return tree


def _tree(text: str, runs: Sequence[str], whole: str) -> ast.expr:
    # a name such as grpo-full would read as a difference: names are quoted where they are arguments
    known = "|".join(re.escape(name) for name in sorted(runs, key=len, reverse=True))
    quoted = re.sub(rf"(?<=[(,])(\s*)({known})(?=\s*[,)])", r'\1"\2"', text) if runs else text
    try:
        return ast.parse(quoted.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise UserError(f"test {whole!r}: not an expression ({error})") from None


def _check(node: ast.AST, runs: Sequence[str], text: str) -> None:
    """Raise UserError for every node that is not in the language."""

    def wrong(why: str) -> UserError:
        return UserError(f"test {text!r}: {why}")

    if isinstance(node, ast.Constant) and type(node.value) in (int, float) and math.isfinite(node.value):
        return
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return _check(node.operand, runs, text)
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        _check(node.left, runs, text)
        return _check(node.right, runs, text)
    if not isinstance(node, ast.Call):
        raise wrong(f"{ast.unparse(node)!r} is not in the language of papers/expression.py")
    name = _called(node)
    functions = [*MARKED, *FIELDS, "step_s", "field", *LOGGED, *OVER_SEEDS, *PLAIN]
    if name not in functions or node.keywords:
        raise wrong(f"no function {name or ast.unparse(node.func)!r}, {nearest(name, functions)}")
    nested = 1 if name in PLAIN else OVER_SEEDS.get(name, 0)
    wanted = nested or (4 if name == "part" else 2 if name in ("field", "score", *LOGGED) else 1)
    if len(node.args) != wanted:
        raise wrong(f"{name} takes {wanted} argument{'s' if wanted > 1 else ''}, found {len(node.args)}")
    if nested:
        for part in node.args:
            _check(part, runs, text)
            if name in OVER_SEEDS and len(names(part)) != 1:
                raise wrong(f"{name} takes expressions of one run each, found {ast.unparse(part)!r}")
        return None
    strings = [part.value if isinstance(part, ast.Constant) else None for part in node.args]
    if name == "part":
        low, high = (value if type(value) in (int, float) else -1 for value in strings[2:])
        if not 0 <= low < high <= 1:
            raise wrong(f"part takes two shares of the steps, 0 ≤ first < last ≤ 1, found {ast.unparse(node)!r}")
        strings = strings[:2]
    if not all(isinstance(value, str) for value in strings):
        raise wrong(f"{name} takes a run{' and a name in quotes' if wanted == 2 else ''}, found {ast.unparse(node)!r}")
    if strings[0] not in runs:
        raise wrong(f"no run {strings[0]!r}, {nearest(str(strings[0]), runs)}")
    return None


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else ""


def names(node: ast.AST) -> set[str]:
    """The runs an expression is about."""
    calls = [call for call in ast.walk(node) if isinstance(call, ast.Call) and call.args]
    firsts = [call.args[0] for call in calls if _called(call) not in (*PLAIN, *OVER_SEEDS)]
    return {str(first.value) for first in firsts if isinstance(first, ast.Constant)}


def questions(node: ast.AST, view: "View") -> list[list[str]]:
    """The different lists of questions that it is about; none where it is about no marks. Raises Missing."""
    calls = [call for call in ast.walk(node) if isinstance(call, ast.Call) and _called(call) in MARKED]
    found = []
    for call in calls:
        run, *rest = [str(part.value) for part in call.args if isinstance(part, ast.Constant)]
        found += [tuple(_asked(_called(call), kept, tuple(rest))) for kept in view.of(run)]
    return [list(ids) for ids in dict.fromkeys(found)]


def clocked(node: ast.AST) -> bool:
    """Whether it is about times, which compare on one machine and one commit only."""
    return any(isinstance(call, ast.Call) and _called(call) in CLOCKED for call in ast.walk(node))


def over_seeds(node: ast.AST) -> bool:
    """Whether it is a statistic that only a bootstrap over seeds gives an error to."""
    return any(isinstance(call, ast.Call) and _called(call) in OVER_SEEDS for call in ast.walk(node))


# --- computing


def value(node: ast.expr, view: View) -> float:
    """The number that a checked expression has on the runs in view; NaN where it divides by 0.

    Raises Missing where a run is not there or has logged nothing of that name.
    """
    if isinstance(node, ast.Constant):
        return float(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.UnaryOp):
        return -value(node.operand, view)
    if isinstance(node, ast.BinOp):
        left, right = value(node.left, view), value(node.right, view)
        return math.nan if isinstance(node.op, ast.Div) and right == 0 else ARITHMETIC[type(node.op)](left, right)
    assert isinstance(node, ast.Call)
    name = _called(node)
    if name in PLAIN:
        inner = value(node.args[0], view)
        return math.nan if name == "sqrt" and inner < 0 else PLAIN[name](inner)
    if name in OVER_SEEDS:
        tables = [[[one] for one in by_seed(part, view)] for part in node.args]
        return stats.iqm(tables[0]) if name == "iqm" else stats.improvement(tables[1], tables[0])
    run, *rest = [str(part.value) for part in node.args if isinstance(part, ast.Constant)]
    return fmean(_of_seed(name, kept, rest, view.without) for kept in view.of(run))


def by_seed(node: ast.expr, view: View) -> list[float]:
    """An expression of one run for each of its seeds in view."""
    run = next(iter(names(node)))
    return [value(node, View({run: [kept]}, view.without)) for kept in view.of(run)]


def _of_seed(name: str, kept: Kept, rest: Sequence[str], without: int | None) -> float:
    """A function of a run for one seed."""
    if name in MARKED:
        marks = _marks(name, kept, tuple(rest))
        right = _right(name, kept, tuple(rest))
        return right / len(marks) if without is None else (right - marks[without]) / (len(marks) - 1)
    return _of_run(name, kept, tuple(rest))


def _asked(name: str, kept: Kept, rest: tuple[str, ...]) -> Sequence[str]:
    """The questions of a function of marks, in the order of the marks."""
    return kept.ids if name != "score" else sorted(_task(kept, rest[0]))


@cache
def _marks(name: str, kept: Kept, rest: tuple[str, ...]) -> Sequence[float]:
    if name == "score":
        return [mark for _, mark in sorted(_task(kept, rest[0]).items())]
    return kept.after if name == "accuracy" else kept.before


@cache
def _right(name: str, kept: Kept, rest: tuple[str, ...]) -> float:
    return math.fsum(_marks(name, kept, rest))


def _task(kept: Kept, task: str) -> dict[str, float]:
    if not kept.scores.get(task):
        raise Missing(f"{kept.record.name}: task {task!r} was not measured")
    return kept.scores[task]


@cache
def _of_run(name: str, kept: Kept, rest: tuple[str, ...]) -> float:
    """A function of a run that knows no questions, for one seed; a bootstrap asks for it thousands of times."""
    if name == "step_s":
        return timing(kept.record, kept.logged).step_s
    if name in LOGGED:
        return _logged(name, kept, *rest)
    found: Any = vars(kept.record)
    for part in FIELDS.get(name, rest[0] if rest else "").split("."):
        found = found.get(part) if isinstance(found, dict) else None
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise Missing(f"{kept.record.name}: run.json has no number {FIELDS.get(name, rest[0] if rest else '')!r}")
    return float(found)


def _logged(name: str, kept: Kept, key: str, low: str = "0", high: str = "1") -> float:
    values = [one for one in kept.metrics.get(key, ()) if one is not None]
    if not values:
        raise Missing(f"{kept.record.name}: logged no {key!r}")
    if name == "part":
        first = min(int(float(low) * len(values)), len(values) - 1)
        return fmean(values[first : max(first + 1, int(float(high) * len(values)))])
    tenth = max(1, len(values) // 10)
    if name == "peak":
        return max(fmean(values[at : at + tenth]) for at in range(len(values) - tenth + 1))
    return fmean({"mean": values, "early": values[:tenth], "late": values[-tenth:]}[name])
