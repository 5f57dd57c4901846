"""`train --accelerate FILE`: what is refused before anything starts, what processes agree on, and real launches.

No GPU here: several processes are CPU ones, joined by gloo.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rl import __main__ as cli
from rl import config as configs
from rl import launch, processes
from rl.errors import UserError
from tests.config_helper import GRPO, write

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
ONE = "distributed_type: 'NO'\n"
MANY = "distributed_type: MULTI_GPU\nnum_processes: 2\n"
SFT = """
[run]
name = "one"
device = "cpu"
[model]
base = "tiny"
tiny = { hidden = 32, layers = 2, heads = 4, intermediate = 64 }
[data]
source = "arithmetic"
form = "char"
train_size = 64
[rollout]
max_completion_length = 4
[trainer]
algorithm = "sft"
max_steps = 3
per_device_train_batch_size = 8
learning_rate = 1e-2
save_steps = 2
[eval]
size = 4
"""


def file(folder: Path, text: str) -> Path:
    path = folder / "a.yaml"
    path.write_text(text)
    return path


# --- the file


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_our_files_are_sound_and_accelerate_takes_them(path: Path) -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    told, theirs = launch.read(path), ClusterConfig.from_yaml_file(str(path))
    assert (told.kind, told.processes) == (theirs.distributed_type.value, theirs.num_processes)
    assert (told.precision, told.cpu) == (theirs.mixed_precision, theirs.use_cpu)
    named = re.search(r"^# nox -s train -- (\S+) --accelerate (\S+)$", path.read_text(), re.MULTILINE)
    assert named
    assert named.group(2) == f"configs/accelerate/{path.name}"
    if named.group(1) != "YOUR_SFT.toml":
        config = configs.load(ROOT / named.group(1))
        launch.check(told, configs.load(ROOT / named.group(1), launch.settings(told, config)), config.path)
    half = re.search(r"(fp16|bf16)", path.stem)
    assert told.precision == (half.group(1) if half else "bf16" if path.stem.startswith("cuda") else "no")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a", "found list, valid: accelerate's keys"),
        ("a: [", "not a YAML file: while parsing"),
        ("mixed_precision: bf16\n", "missing key 'distributed_type', valid: NO, MULTI_CPU, MULTI_GPU, FSDP"),
        (ONE + "mixed_precission: bf16\n", "unknown key 'mixed_precission', did you mean 'mixed_precision'?"),
        ("distributed_type: NO\n", "distributed_type: found False, valid: NO, MULTI_CPU, MULTI_GPU, FSDP, in quotes"),
        (ONE + "mixed_precision: fp8\n", "mixed_precision: found 'fp8', valid: no, fp16, bf16"),
        (ONE + "num_processes: 2\n", "num_processes: found 2, valid: 1 for distributed_type NO"),
        ("distributed_type: MULTI_GPU\n", "num_processes: found None, valid: a whole number ≥ 1"),
        (MANY + "num_machines: 2\n", "num_machines: found 2, valid: 1"),
        (MANY + "use_cpu: true\n", "use_cpu: found True, which does not go with distributed_type MULTI_GPU"),
        (ONE + "use_cpu: true\nmixed_precision: fp16\n", "mixed_precision: found 'fp16', which accelerate leaves out"),
        ("distributed_type: DEEPSPEED\n", "distributed_type: found 'DEEPSPEED', valid: NO, MULTI_CPU"),
        (ONE + "deepspeed_config: {zero_stage: 3}\n", "deepspeed_config: not used here"),
        ("distributed_type: FSDP\nnum_processes: 2\n", "fsdp_config: fsdp_version: found no 2, valid: 2"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_wrap: 1}\n", "fsdp_config: unknown key 'fsdp_wrap', "),
    ],
)
def test_a_bad_file_is_one_line_and_exit_2(
    tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    path, config = file(tmp_path, text), write(tmp_path, GRPO)
    assert cli.main(["train", str(config), "--accelerate", str(path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {path}: {said}")
    assert told.count("\n") == 1


def test_a_missing_file_names_one_beside_it(tmp_path: Path) -> None:
    file(tmp_path, ONE)
    with pytest.raises(UserError, match=r"b.yaml: no such file; did you mean 'a.yaml'\?"):
        launch.read(tmp_path / "b.yaml")


def test_checking_the_files_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from rl import config, launch\n"
        f"found = launch.read(Path({str(FILES[0])!r})); run = config.load(Path({str(write(tmp_path, GRPO))!r}))\n"
        "launch.settings(found, run); launch.check(found, run, run.path)\n"
        "print([n for n in ('torch', 'accelerate', 'transformers', 'trl', 'mlx') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


# --- the run


def test_precision_and_device_become_settings_of_the_run(tmp_path: Path) -> None:
    config = configs.load(write(tmp_path, GRPO))
    of = launch.Launch(tmp_path / "a.yaml", "MULTI_GPU", 2, "bf16", False)
    assert launch.settings(of, config) == ["trainer.bf16=true", "run.device=cuda"]
    assert launch.settings(launch.Launch(of.path, "NO", 1, "no", False), config) == []
    half = configs.load(config.path, ["trainer.bf16=true", "run.device=cuda"])
    assert launch.settings(of, half) == []
    with pytest.raises(UserError, match=r"found 'fp16', and .*x.toml: \[trainer\] bf16 = true: say one"):
        launch.settings(launch.Launch(of.path, "MULTI_GPU", 2, "fp16", False), half)
    with pytest.raises(UserError, match=r"trains on cpu, and .*x.toml: \[run\] device = 'cuda': say one"):
        launch.settings(launch.Launch(of.path, "NO", 1, "no", True), half)


@pytest.mark.parametrize(
    ("name", "kind", "more", "said"),
    [
        ("ppo", "MULTI_GPU", [], "algorithm 'ppo': not in several processes"),
        ("dapo", "MULTI_CPU", [], "algorithm 'dapo': not in several processes"),
        ("reward", "MULTI_CPU", [], "algorithm 'reward': not in several processes"),
        ("grpo", "FSDP", [], "algorithm 'grpo': not with FSDP"),
        ("grpo", "MULTI_GPU", ["rollout.engine=torch"], "engine 'torch' draws the same on every process"),
        ("grpo_reward", "MULTI_GPU", [], "reward.toml: [trainer] algorithm 'reward': not in several processes"),
        ("grpo", "MULTI_GPU", [], None),
        ("dpo", "MULTI_CPU", [], None),
        ("sft", "FSDP", [], None),
    ],
)
def test_what_cannot_work_in_several_processes_is_refused(
    name: str, kind: launch.Kind, more: list[str], said: str | None
) -> None:
    config = configs.load(ROOT / "configs" / "tiny" / f"{name}.toml", more)
    of = launch.Launch(Path("a.yaml"), kind, 2, "no", False)
    if said is None:
        launch.check(of, config, config.path)
        return
    with pytest.raises(UserError, match=re.escape(said)):
        launch.check(of, config, config.path)
    launch.check(launch.Launch(Path("a.yaml"), "NO", 1, "no", False), config, config.path)


def test_tools_are_refused_in_several_processes() -> None:
    config = configs.load(ROOT / "configs" / "tiny" / "grpo.toml")
    config = replace(config, rollout=replace(config.rollout, tools=("rl.tools:calculator",)))
    with pytest.raises(UserError, match=r"\[rollout\] tools and environment: not in several processes"):
        launch.check(launch.Launch(Path("a.yaml"), "MULTI_GPU", 2, "no", False), config, config.path)


STAND_IN = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from rl import processes
processes.begin()
try:
    {body}
except KeyboardInterrupt:
    time.sleep(0.3)
    open("saved", "w").close()
    sys.exit(processes.end(130, "interrupted"))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where a small program takes the place of launcher and run; `body.py` is what it does."""
    monkeypatch.chdir(tmp_path)
    body = tmp_path / "body.py"
    monkeypatch.setattr(launch, "command", lambda *_: [sys.executable, str(body)])
    return body


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("processes.end(0, None)", 0, ""),
        ("processes.end(2, 'error: x.toml: no')", 2, "error: x.toml: no\n"),
        ("processes.end(1, 'failed: step 3')", 1, "failed: step 3\n"),
        (
            "raise ValueError('broken')",
            1,
            "ValueError: broken\nfailed: the run's processes ended without a result (1); "
            "--resume goes on from its last checkpoint\n",
        ),
        (
            "os.kill(os.getpid(), 9)",
            1,
            "failed: the run's processes ended without a result (-9); --resume goes on from its last checkpoint\n",
        ),
    ],
)
def test_the_exit_code_and_the_line_come_through(
    stand_in: Path, capsys: pytest.CaptureFixture[str], body: str, code: int, said: str
) -> None:
    """Trap: accelerate's launcher makes every exit code but 0 a 1, under a traceback of its own."""
    stand_in.write_text(STAND_IN.format(root=str(ROOT), body=body))
    assert launch._run(launch.Launch(Path("a.yaml"), "NO", 1, "no", False), ["train"]) == code
    assert capsys.readouterr().err.endswith(said)


def test_ctrl_c_goes_to_the_run_which_saves(stand_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trap: the launcher dies of Ctrl-C, and torch's kills its processes, before they have saved."""
    stand_in.write_text(STAND_IN.format(root=str(ROOT), body='open("training", "w").close(); time.sleep(60)'))

    def press() -> None:
        while not Path("training").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    assert launch._run(launch.Launch(Path("a.yaml"), "NO", 1, "no", False), ["train"]) == 130
    assert Path("saved").exists()
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- the processes


def test_one_process_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: a WORLD_SIZE that some scheduler has left in the environment."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv(processes.CONTROL, raising=False)
    assert (processes.count(), processes.rank(), processes.is_main(), processes.inputs()) == (1, 0, True, {})
    assert processes.share(lambda: "made") == "made"
    assert [processes.anywhere(flag) for flag in (True, False)] == [True, False]
    assert processes.total(3) == 3


def test_each_process_sees_one_card_and_the_main_one_leaves_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap: MLX samples on the first card it sees, and torch's launcher stops all when one process has gone."""
    given = {"CONTROL": "", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "4,6"}
    for name, value in (given | {processes.CONTROL: str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    processes.begin()
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["LOCAL_RANK"]) == ("6", "0")
    assert (tmp_path / "1.pid").read_text() == str(os.getpid())
    assert processes.inputs() == {"processes": {"count": 2, "sharded": False}}
    done: list[int] = []
    waiting = threading.Thread(target=lambda: done.append(processes.end(0, None)))
    waiting.start()
    time.sleep(0.2)
    assert done == []
    (tmp_path / "0.code").write_text("0")
    waiting.join(5)
    assert done == [0]


def launched(folder: Path, name: str, *more: str) -> str:
    """What a real launch of x.toml through configs/accelerate/<name>.yaml printed; it must end well."""
    file = ROOT / "configs" / "accelerate" / f"{name}.yaml"
    asked = ["-m", "rl", "train", "x.toml", *more, "--accelerate", str(file)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, *asked], cwd=folder, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_two_processes_train_as_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of 4 rows are one of 8: the same rows a step, summed in another order. One folder, one record.

    Through accelerate in one process the run is the very run without it, which is finished here already.
    """
    from rl.display import Display
    from rl.train import quiet, train_run

    (tmp_path / "x.toml").write_text(SFT)
    monkeypatch.chdir(tmp_path)
    quiet()
    train_run(Path("x.toml"), [], Display(stages=5))
    assert "one is finished with these very inputs" in launched(tmp_path, "cpu")
    said = launched(tmp_path, "cpu-ddp", "--set", "run.name=two", "--set", "trainer.per_device_train_batch_size=4")
    assert said.count("4/5 sft: training") == 1
    one, two = (
        [json.loads(line) for line in (tmp_path / "models/final" / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [row["step"] for row in two] == [1, 2, 3]
    for mine, other in zip(two, one, strict=True):
        for key in ("loss", "grad_norm", "mean_token_accuracy", "num_tokens", "learning_rate"):
            assert mine[key] == pytest.approx(other[key], rel=1e-5), key
    record = json.loads((tmp_path / "models/final/two/run.json").read_text())
    assert record["status"] == "finished"
    assert record["config"]["processes"] == {"count": 2, "sharded": False}
    assert record["command"].startswith("nox -s train -- x.toml --set run.name=two")
    assert "--accelerate" in record["command"]
    assert sorted(path.name for path in (tmp_path / "models/checkpoints").iterdir()) == []
