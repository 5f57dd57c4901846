"""Runs in several processes, broken and resumed: they end where unbroken ones do, with whole weights and in shards.

Real processes joined by gloo (tests/ranks_helper.py). FSDP is torch's own on the CPU, in the settings that accelerate
makes of configs/accelerate/cuda-fsdp.yaml; what a GPU adds to it is not seen here.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.ranks_helper import ROOT, Run, ranks

LORA = "[model.lora]\nrank = 4\nalpha = 8.0"
GRPO = "num_generations = 2\nsteps_per_generation = 1"
REWARD = '[[reward]]\nname = "length"\ntarget = 1\nper_token = 0.5'
TEMPLATE = """
[run]
name = "x"
device = "cpu"
[model]
base = "tiny"
tiny = {{ hidden = 32, layers = 2, heads = 4, intermediate = 64 }}
{lora}
[data]
source = "arithmetic"
form = "char"
train_size = 12
[rollout]
max_completion_length = 3
{reward}
[trainer]
algorithm = "{algorithm}"
max_steps = 4
per_device_train_batch_size = 4
learning_rate = 1e-2
save_steps = 2
{trainer}
[eval]
size = 4
"""
HALF = ("--set", "trainer.bf16=true")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with ranks(tmp_path_factory.mktemp("ranks") / "log") as started:
        yield started


@pytest.fixture(scope="module")
def fsdp() -> dict[str, str]:
    """What accelerate's launcher puts into the environment for our file."""
    from accelerate.commands import launch

    path = ROOT / "configs" / "accelerate" / "cuda-fsdp.yaml"
    asked = launch.launch_command_parser().parse_args(["--config_file", str(path), "--quiet", "-m", "rl"])
    asked, _, _ = launch._validate_launch_command(asked)
    told = launch.prepare_multi_gpu_env(asked)
    return {name: value for name, value in told.items() if name.startswith(("FSDP_", "ACCELERATE_"))}


@pytest.fixture(scope="module")
def sft(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where SFT of all weights has run unbroken, in two processes that each hold them."""
    folder = write(tmp_path_factory.mktemp("sft"), "sft")
    assert run(folder, "whole") == [0, 0]
    return folder


def write(folder: Path, algorithm: str, *, lora: str = "") -> Path:
    online = algorithm != "sft"
    text = TEMPLATE.format(algorithm=algorithm, lora=lora, reward=REWARD * online, trainer=GRPO if online else "")
    (folder / "x.toml").write_text(text)
    return folder


def weights(folder: Path, name: str) -> dict[str, np.ndarray]:
    (file,) = (folder / "models" / "final" / name).glob("*.safetensors")
    return load_file(file)


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "models/final" / name / "metrics.jsonl").read_text().splitlines()]


def check_same(folder: Path) -> None:
    """The broken run's weights, steps, counts and score are the unbroken one's, to the last bit."""
    whole, broken = weights(folder, "whole"), weights(folder, "broken")
    assert whole.keys() == broken.keys()
    for name, weight in whole.items():
        np.testing.assert_array_equal(broken[name], weight, err_msg=name)
    assert [(r["step"], r["loss"]) for r in rows(folder, "broken")] == [
        (r["step"], r["loss"]) for r in rows(folder, "whole")
    ]
    told = [json.loads((folder / "models/final" / name / "run.json").read_text()) for name in ("whole", "broken")]
    assert told[0]["tokens"] == told[1]["tokens"]
    assert told[0]["result"] == told[1]["result"]
    assert not (folder / "models" / "checkpoints" / "broken").exists()


def status(folder: Path) -> tuple[str, list[int]]:
    """The broken run's status and the steps of its whole checkpoints."""
    path = folder / "models" / "checkpoints" / "broken"
    whole = sorted(int(marker.parent.name.split("-")[1]) for marker in path.glob("checkpoint-*/complete.json"))
    return json.loads((path / "run.json").read_text())["status"], whole


def test_one_of_two_processes_is_killed_and_the_run_resumed(run: Run, sft: Path) -> None:
    """kill -9 of the one that writes nothing: the other cannot go on, and what counted is there."""
    assert run(sft, "broken", breaks=[1, 3, "SIGKILL"])[1] is None
    found, steps = status(sft)
    assert found in ("running", "failed")  # the other one hears of it before it is stopped, or not
    assert steps == [2]
    assert run(sft, "broken", "--resume") == [0, 0]
    check_same(sft)


def test_ctrl_c_at_one_process_stops_both_at_a_checkpoint_and_sampling_goes_on(run: Run, tmp_path: Path) -> None:
    """Trap: random streams of each process's own, and a rollout for each of them, restored on both."""
    folder = write(tmp_path, "grpo", lora=LORA)
    assert run(folder, "whole") == [0, 0]
    assert run(folder, "broken", breaks=[1, 2, "SIGINT"]) == [130, 130]
    assert status(folder) == ("interrupted", [2, 3])
    assert run(folder, "broken", "--resume") == [0, 0]
    check_same(folder)


def test_shards_of_a_killed_run_come_together_as_whole_weights(run: Run, sft: Path, fsdp: dict[str, str]) -> None:
    """FSDP, killed and resumed, is the run with whole weights on each, its sums in another order (float32)."""
    whole = {"ACCELERATE_MIXED_PRECISION": "no"}
    assert run(sft, "shards", breaks=[0, 3, "SIGKILL"], fsdp=fsdp | whole)[0] is None
    checkpoint = sft / "models" / "checkpoints" / "shards" / "checkpoint-2"
    assert (checkpoint / "complete.json").exists()
    assert (checkpoint / "pytorch_model_fsdp.bin").exists()  # of FSDP's trainer alone
    assert run(sft, "shards", "--resume", fsdp=fsdp | whole) == [0, 0]
    units = json.loads((sft / "units-1.json").read_text())
    assert units.count("LlamaDecoderLayer") == 2  # each layer is gathered alone: the file's wrap policy has found them
    assert units[-1] == "LlamaForCausalLM"
    mine, theirs = weights(sft, "shards"), weights(sft, "whole")
    assert {name: weight.shape for name, weight in mine.items()} == {n: weight.shape for n, weight in theirs.items()}
    for name, weight in theirs.items():
        np.testing.assert_allclose(mine[name], weight, atol=1e-5, err_msg=name)
    record = json.loads((sft / "models/final/shards/run.json").read_text())
    assert record["config"]["processes"] == {"count": 2, "sharded": True}


def test_an_adapter_in_shards_is_resumed_to_the_last_bit(run: Run, tmp_path: Path, fsdp: dict[str, str]) -> None:
    """In the file's own bfloat16, which the adapter is not stored in."""
    folder = write(tmp_path, "sft", lora=LORA)
    assert fsdp["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert run(folder, "whole", *HALF, fsdp=fsdp) == [0, 0]
    assert run(folder, "broken", *HALF, breaks=[1, 2, "SIGINT"], fsdp=fsdp) == [130, 130]
    assert status(folder) == ("interrupted", [2, 3])
    assert run(folder, "broken", "--resume", *HALF, fsdp=fsdp) == [0, 0]
    check_same(folder)
    assert json.loads((folder / "units-0.json").read_text()).count("LlamaDecoderLayer") == 2  # also below an adapter
    trained = weights(folder, "whole")
    assert {weight.dtype for weight in trained.values()} == {np.dtype("float32")}
    assert all(np.abs(weight).max() > 0 for name, weight in trained.items() if "lora_B" in name)
