"""The config that the tests of rl/plan share."""

from pathlib import Path

TINY = """
[run]
name = "x"
device = "cpu"
[model]
base = "tiny"
tiny = {{ hidden = 512, layers = 8, heads = 8, intermediate = 2048 }}
[data]
source = "arithmetic"
form = "char"
train_size = 200
[rollout]
max_completion_length = 64
[[reward]]
name = "exact"
[trainer]
algorithm = "grpo"
max_steps = 4
per_device_train_batch_size = {rows}
steps_per_generation = 1
num_generations = 4
save_steps = 100
[eval]
size = 8
"""


def config_file(folder: Path, rows: int = 64, more: str = "") -> Path:
    path = folder / "x.toml"
    path.write_text(TINY.format(rows=rows) + more)
    return path
