"""Completions in the terminal. They are a model's output: shown escaped, never read as markup."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rl.completions import REWARD, reward_names
from rl.display import head, tail, visible

Row = dict[str, Any]
SHOWN = 600  # characters of a completion, unless whole


def show(console: Console, rows: Sequence[Row], total: int, columns: Sequence[str], *, whole: bool = False) -> None:
    """Print each row as a paragraph: what it earned, the prompt's end, the completion; `whole` cuts neither."""
    if not rows:
        console.print(f"none of {total:,} completions passes")
        return
    names = reward_names(columns)
    for row in rows:
        parts = [f"step {row['step']}", f"reward {_number(row['reward'])}"]
        if len(names) > 1:
            parts += [f"{visible(name)} {_number(row[REWARD + name])}" for name in names]
        if row["advantage"] is not None:
            parts.append(f"advantage {row['advantage']:+.3f}")
        if row["pair"]:
            parts.append(row["pair"])
        parts.append(f"{row['length']} tokens{'' if row['ended'] else ', cut'}")
        console.print(Text("  ".join(parts), style="bold"))
        prompt, said = row["prompt"], row["completion"]
        answer = f"  → {visible(row['answer'])}" if row["answer"] is not None else ""
        console.print(Text((visible(prompt) if whole else tail(prompt, 100)) + answer, style="dim"))
        console.print(Text(visible(said) if whole else head(said, SHOWN)))
        console.print()
    console.print(f"{len(rows):,} of {total:,} completions")


def summary(console: Console, rows: Sequence[Row]) -> None:
    """One line a logged step: how many, mean reward and length, share that ended."""
    table = Table(box=None, pad_edge=False)
    for name in ("step", "n", "reward", "length", "ended"):
        table.add_column(name, justify="right")
    for step in dict.fromkeys(row["step"] for row in rows):
        part = [row for row in rows if row["step"] == step]
        rewards = [row["reward"] for row in part if row["reward"] is not None]
        table.add_row(
            str(step),
            str(len(part)),
            _number(sum(rewards) / len(rewards) if rewards else None),
            f"{sum(row['length'] for row in part) / len(part):.1f}",
            f"{sum(row['ended'] for row in part) / len(part):.2f}",
        )
    console.print(table)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
