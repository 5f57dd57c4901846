"""A small valid config for the tests of rl.config, and its errors as text."""

from pathlib import Path

import pytest

from rl.config import load
from rl.errors import UserError

GRPO = """
[run]
name = "g"
[model]
base = "tiny"
[data]
source = "arithmetic"
form = "char"
train_size = 100
[[reward]]
name = "exact"
extract = "plain"
[trainer]
algorithm = "grpo"
max_steps = 10
per_device_train_batch_size = 16
num_generations = 8
"""


def write(folder: Path, text: str = GRPO, name: str = "x.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def error_of(folder: Path, text: str = GRPO, *overrides: str) -> str:
    """The error's line, with the folder taken out."""
    with pytest.raises(UserError) as caught:
        load(write(folder, text), overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{folder}/", "")
