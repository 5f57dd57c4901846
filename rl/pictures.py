"""`python -m rl.pictures`: the pictures of docs/setup.md, made of what the commands print here and now.

Each command runs as a user runs it; its output, colours and all, becomes an SVG. Nothing in a picture is typed by hand.
"""

import os
import subprocess
import sys
from pathlib import Path

from rl import files

FOLDER = Path("docs", "pictures")
WIDTH = 120
# name of the picture -> what nox is asked for, and the command behind it
PICTURES: dict[str, tuple[str, list[str]]] = {
    "doctor": ("nox -s doctor", ["doctor"]),
    "plan": (
        "nox -s plan -- configs/mac/qwen3-1.7b-36gb.toml --chip m4-max --memory 36GB",
        ["plan", "configs/mac/qwen3-1.7b-36gb.toml", "--chip", "m4-max", "--memory", "36GB"],
    ),
    "plan-small": (
        "nox -s plan -- configs/mac/qwen3-1.7b-64gb.toml --chip m1-max --memory 32GB",
        ["plan", "configs/mac/qwen3-1.7b-64gb.toml", "--chip", "m1-max", "--memory", "32GB"],
    ),
    "error": (
        "nox -s train -- configs/grpo.toml --set trainer.num_generation=8",
        ["train", "configs/grpo.toml", "--set", "trainer.num_generation=8"],
    ),
}


def main() -> None:
    """Make every picture anew."""
    for name, (title, command) in PICTURES.items():
        files.write_text(FOLDER / f"{name}.svg", picture(title, output(command)))
        print(FOLDER / f"{name}.svg")


def output(command: list[str]) -> str:
    """What `python -m rl` prints on a terminal of WIDTH columns, control characters of colours included."""
    environment = os.environ | {"COLUMNS": str(WIDTH), "FORCE_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-m", "rl", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    return done.stdout


def picture(title: str, text: str) -> str:
    """An SVG of a terminal that shows `text` under the command `title`."""
    import io

    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(Text.from_ansi(f"$ {title}\n{text.rstrip()}"), soft_wrap=False)
    return "\n".join(line.rstrip() for line in console.export_svg(title="duet", unique_id="duet").splitlines()) + "\n"


if __name__ == "__main__":
    main()
