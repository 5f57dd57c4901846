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


def tiny_run(
    algorithm: str,
    *,
    most: int,
    train_size: int,
    size: int,
    completion: int = 3,
    model: str = "",
    data: str = "",
    rollout: str = "",
    rewards: str = "",
    trainer: str = "",
    metric: str = "strict",
) -> str:
    """A whole run of a random model of 2 layers on sums of numbers up to `most`, with {name} to fill in.

    `model`, `data`, `rollout` and `trainer` are further lines of their tables, `rewards` whole tables.
    """
    lines = (
        *("[run]", 'name = "{name}"', 'device = "cpu"'),
        *("[model]", 'base = "tiny"', model),
        *("[model.tiny]", "hidden = 32", "layers = 2", "intermediate = 64"),
        *("[data]", 'source = "arithmetic"', 'form = "char"', f"max_a = {most}", f"max_b = {most}"),
        *(f"train_size = {train_size}", data),
        *("[rollout]", f"max_completion_length = {completion}", rollout, rewards),
        *("[trainer]", f'algorithm = "{algorithm}"', trainer),
        *("[eval]", f"size = {size}", f'metric = "{metric}"'),
    )
    return "\n".join(line for line in lines if line) + "\n"
