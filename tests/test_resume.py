"""A run stopped and resumed ends in exactly the weights of one that was not; kills lose nothing that counted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from config_helper import tiny_run
from run_helper import train_until_ctrl_c
from safetensors.numpy import load_file

from rl import train
from tests.tools_helper import ASCII

GRPO = tiny_run(
    "grpo",
    most=5,
    train_size=6,
    size=4,
    rewards='[[reward]]\nname = "length"\ntarget = 1\nper_token = 0.5',
    trainer="per_device_train_batch_size = 8\nnum_generations = 4\nlearning_rate = 5e-3\n{trainer}",
)
SFT = tiny_run(
    "sft",
    most=5,
    train_size=12,
    size=4,
    trainer="per_device_train_batch_size = 4\nlearning_rate = 5e-3\n{trainer}",
)
# the prompts hold what the environment says at reset, from a seed keyed by (run, step, prompt)
PLAYED = GRPO.replace(
    'source = "arithmetic"\nform = "char"\nmax_a = 5\nmax_b = 5', 'source = "environment"\nform = "chat"'
)
PLAYED = PLAYED.replace(
    "intermediate = 64", f"intermediate = 64\nalphabet = {json.dumps(ASCII)}".replace("{", "{{").replace("}", "}}")
).replace("max_completion_length = 3", 'max_completion_length = 3\nenvironment = "tests.tools_helper:Counter"')
# two prompts a step and six of them: an epoch is three rollouts, so these cross its boundary
CASES = {
    "grpo": (GRPO, "max_steps = 8\nsave_steps = 2\nsteps_per_generation = 1", 4),
    "grpo, two iterations over two steps": (
        GRPO,
        "max_steps = 16\nsave_steps = 4\nsteps_per_generation = 2\nnum_iterations = 2\ngradient_accumulation_steps = 1",
        8,
    ),
    "rloo": (
        GRPO.replace('"grpo"', '"rloo"'),
        "max_steps = 8\nsave_steps = 2\nsteps_per_generation = 1",
        4,
    ),
    "dapo": (
        GRPO.replace('"grpo"', '"dapo"'),
        "max_steps = 8\nsave_steps = 2\nsteps_per_generation = 1",
        4,
    ),
    "grpo, an environment": (PLAYED, "max_steps = 8\nsave_steps = 2\nsteps_per_generation = 1", 4),
    "sft": (SFT, "max_steps = 8\nsave_steps = 2", 5),
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, template: str, trainer: str) -> Path:
    path = Path(f"{name}.toml")
    path.write_text(template.format(name=name, trainer=trainer))
    return path


def final_weights(name: str) -> dict[str, np.ndarray]:
    return load_file(f"models/final/{name}/model.safetensors")


def steps_of(folder: str) -> list[int]:
    return [json.loads(line)["step"] for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", CASES)
def test_interrupted_and_resumed_is_bit_for_bit_uninterrupted(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across an epoch boundary and with `num_iterations` 2. TRL alone is 1e-2 off: its sampler is never reseeded and
    its buffer is not saved (DESIGN of the resume: checkpoints at generation boundaries, streams keyed by step)."""
    template, trainer, stop_at = CASES[case]
    assert train.main(write("whole", template, trainer)) == 0
    path = write("broken", template, trainer)
    train_until_ctrl_c(monkeypatch, path, stop_at - 1)
    record = json.loads(Path("models/checkpoints/broken/run.json").read_text())
    assert (record["status"], record["steps"]) == ("interrupted", stop_at)
    assert train.main(path, resume=True) == 0
    whole, broken = final_weights("whole"), final_weights("broken")
    assert whole.keys() == broken.keys()
    for name, weight in whole.items():
        np.testing.assert_array_equal(broken[name], weight, err_msg=name)
    assert steps_of("models/final/broken") == steps_of("models/final/whole")
    runs = [json.loads(Path(f"models/final/{n}/run.json").read_text()) for n in ("whole", "broken")]
    assert runs[0]["tokens"] == runs[1]["tokens"]
    assert runs[0]["result"] == runs[1]["result"]


def start_process(path: Path, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "rl", "train", str(path), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(folder: Path, process: subprocess.Popen, seconds: float = 90) -> None:
    """Until the folder holds a whole checkpoint."""
    end = time.monotonic() + seconds
    while not list(folder.glob("checkpoint-*/complete.json")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_kill_9_then_resume_ends_in_the_same_weights_and_ctrl_c_exits_130() -> None:
    """Real processes: SIGKILL wherever it hits after the first checkpoint, then SIGINT, then to the end."""
    trainer = "max_steps = 60\nsave_steps = 5\nsteps_per_generation = 1"
    assert train.main(write("whole", GRPO, trainer)) == 0
    path = write("killed", GRPO, trainer)
    folder = Path("models/checkpoints/killed")
    process = start_process(path)
    wait_for(folder, process)
    process.kill()
    process.wait()
    assert json.loads((folder / "run.json").read_text())["status"] == "running"

    refused = start_process(path)
    assert "--resume continues it, --restart throws it away" in refused.communicate()[0]
    assert refused.returncode == 2

    process = start_process(path, "--resume")
    time.sleep(0.1)
    at = max(int(p.parent.name.split("-")[1]) for p in folder.glob("checkpoint-*/complete.json"))
    while process.poll() is None and not (folder / f"checkpoint-{at + 5}" / "complete.json").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output = process.communicate()[0]
    assert process.returncode == 130, output
    assert "saved" in output or "interrupted" in output
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"

    assert train.main(path, resume=True) == 0
    for name, weight in final_weights("whole").items():
        np.testing.assert_array_equal(final_weights("killed")[name], weight, err_msg=name)
    assert not folder.exists()


def test_the_same_again_is_a_word_and_other_inputs_are_refused(capsys: pytest.CaptureFixture) -> None:
    trainer = "max_steps = 2\nsave_steps = 2\nsteps_per_generation = 1"
    path = write("twice", GRPO, trainer)
    assert train.main(path) == 0
    capsys.readouterr()
    assert train.main(path) == 0
    assert "finished with these very inputs" in capsys.readouterr().out
    from rl.errors import UserError

    with pytest.raises(UserError, match=r"learning_rate: 0.005 → 0.001"):
        train.main(path, ["trainer.learning_rate=1e-3"])
    assert train.main(path, ["trainer.learning_rate=1e-3"], restart=True) == 0


def test_a_config_builds_on_another_and_seeds_make_one_table(capsys: pytest.CaptureFixture) -> None:
    """`[model] from` trains its parent first, once, and every seed starts from that same parent."""
    write("first", SFT, "max_steps = 4\nsave_steps = 4")
    text = GRPO.format(name="second", trainer="max_steps = 2\nsave_steps = 2\nsteps_per_generation = 1")
    tiny = text[text.index('base = "tiny"') : text.index("[data]")]
    Path("second.toml").write_text(text.replace(tiny, 'from = "first.toml"\n'))
    assert train.main(Path("second.toml"), seeds=(0, 1)) == 0
    runs = [json.loads(Path(f"models/final/second-seed{s}/run.json").read_text()) for s in (0, 1)]
    first = json.loads(Path("models/final/first/run.json").read_text())
    for run in runs:
        assert [p["name"] for p in run["parents"]] == ["first"]
        assert run["parents"][0]["inputs_sha256"] == first["inputs_sha256"]
        assert run["result"]["before"] == first["result"]["after"]  # the parent's end is the start
    table = json.loads(Path("models/final/second-seeds.json").read_text())["tables"][0]
    assert [row["seed"] for row in table["rows"]] == [0, 1]
    assert table["mean"]["after"]["value"] == pytest.approx(np.mean([r["result"]["after"]["value"] for r in runs]))
    assert capsys.readouterr().out.count("first: data and base model") == 1 + 1  # trained once, then found finished


def test_a_parent_made_from_other_inputs_is_made_again(capsys: pytest.CaptureFixture) -> None:
    """The contract's "made first if missing or made from different inputs"; its child then has other inputs too."""
    from rl.errors import UserError

    first = write("first", SFT, "max_steps = 2\nsave_steps = 2")
    text = GRPO.format(name="second", trainer="max_steps = 1\nsave_steps = 1\nsteps_per_generation = 1")
    tiny = text[text.index('base = "tiny"') : text.index("[data]")]
    Path("second.toml").write_text(text.replace(tiny, 'from = "first.toml"\n'))
    assert train.main(Path("second.toml")) == 0
    before = final_weights("first")
    first.write_text(first.read_text().replace("learning_rate = 5e-3", "learning_rate = 1e-3"))
    with pytest.raises(UserError, match=r"second: finished with other inputs"):
        train.main(Path("second.toml"))
    assert "first was made from other inputs (trainer.learning_rate: 0.005 → 0.001): it is made again" in (
        capsys.readouterr().out
    )
    assert any(not np.array_equal(before[n], w) for n, w in final_weights("first").items())
    assert train.main(Path("second.toml"), restart=True) == 0
    child = json.loads(Path("models/final/second/run.json").read_text())
    parent = json.loads(Path("models/final/first/run.json").read_text())
    assert child["parents"][0]["inputs_sha256"] == parent["inputs_sha256"]


LORA = "[model.lora]\nrank = 4\nalpha = 8.0\n"


def test_a_config_goes_on_in_the_adapter_of_another() -> None:
    """The parent's adapter is trained further on the parent's base; a different adapter is refused."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from rl.errors import UserError

    text = SFT.format(name="first", trainer="max_steps = 4\nsave_steps = 4")
    Path("first.toml").write_text(text.replace("[data]", LORA + "[data]"))
    text = GRPO.format(name="second", trainer="max_steps = 2\nsave_steps = 2\nsteps_per_generation = 1")
    tiny = text[text.index('base = "tiny"') : text.index("[data]")]
    Path("second.toml").write_text(text.replace(tiny, 'from = "first.toml"\n' + LORA))
    assert train.main(Path("second.toml")) == 0
    first, second = Path("models/final/first"), Path("models/final/second")
    runs = [json.loads((f / "run.json").read_text()) for f in (first, second)]
    assert runs[1]["result"]["before"] == runs[0]["result"]["after"]
    configs = [json.loads((f / "adapter_config.json").read_text()) for f in (first, second)]
    assert configs[0]["base_model_name_or_path"] == configs[1]["base_model_name_or_path"]
    before, after = (load_file(f / "adapter_model.safetensors") for f in (first, second))
    assert before.keys() == after.keys()
    assert 0 < max(np.abs(after[n] - before[n]).max() for n in before) < 0.1  # two steps of 5e-3 from where it was
    base_model = AutoModelForCausalLM.from_pretrained(configs[1]["base_model_name_or_path"])
    PeftModel.from_pretrained(base_model, second)  # the folder is one that peft loads
    with pytest.raises(UserError, match="that run is an adapter of rank 4, alpha 8"):
        train.main(Path("second.toml"), ["model.lora.rank=2"], restart=True)
