"""`python -m rl` in processes of its own: exit codes, one line on stderr, speed, and nothing imported or written."""

import argparse
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from rl import __main__ as cli
from rl import arguments
from rl.config import load
from rl.errors import RunFailed, UserError

REPOSITORY = Path(__file__).parent.parent
GOOD = """
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
[trainer]
algorithm = "grpo"
max_steps = 10
per_device_train_batch_size = 16
num_generations = 8
"""


def python(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run python in `folder`; the second value is the seconds it took."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "utf-8"}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    return done, time.perf_counter() - started


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "x.toml"
    path.write_text(GOOD)
    return path


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        ("num_generation = 8", "x.toml: [trainer] unknown key 'num_generation', did you mean 'num_generations'?"),
        ('learning_rate = "1e-4"', "x.toml: [trainer] learning_rate: found '1e-4' (str), valid: float (write 1e-4 "),
        ("gradient_accumulation_steps = 0", "x.toml: [trainer] gradient_accumulation_steps: found 0, valid: ≥ 1"),
        ("per_device_train_batch_size = 12", "x.toml: [trainer] num_generations: per_device_train_batch_size 12 × "),
        (None, "no.toml: no such file; did you mean 'x.toml'?"),
    ],
)
def test_a_bad_config_exits_2_with_one_line_at_once_and_writes_nothing(
    config: Path, edit: str | None, line: str
) -> None:
    lines = [old for old in GOOD.splitlines() if edit is None or old.split(" = ")[0] != edit.split(" = ")[0]]
    config.write_text("\n".join([*lines, edit or "", ""]))
    done, seconds = python(config.parent, "-m", "rl", "train", "no.toml" if edit is None else "x.toml")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {line}")
    assert done.stdout == ""
    assert seconds < 1.5
    assert [p.name for p in config.parent.iterdir()] == ["x.toml"]


def test_load_in_a_cold_process_imports_no_heavy_package_and_takes_under_a_second(config: Path) -> None:
    code = (
        "import sys, time; started = time.perf_counter()\n"
        "from pathlib import Path; from rl.config import load\n"
        "load(Path('x.toml')); seconds = time.perf_counter() - started\n"
        "heavy = [n for n in ('torch', 'transformers', 'trl', 'mlx', 'peft', 'datasets') if n in sys.modules]\n"
        "print(seconds < 1.0, heavy)"
    )
    done, _ = python(config.parent, "-c", code)
    assert (done.stdout, done.stderr) == ("True []\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["check", "--help"]])
def test_help_is_instant_and_names_the_options(tmp_path: Path, arguments: list[str]) -> None:
    done, seconds = python(tmp_path, "-m", "rl", *arguments)
    assert done.returncode == 0
    assert seconds < 1.0
    wanted = {
        "--help": ["train", "check", "doctor", "smoke", "clean"],
        "train": ["--set", "--resume", "--restart", "--seeds"],
    }
    for name in wanted.get(arguments[0], ["--keys", "--set"]):
        assert name in done.stdout


def test_check_prints_a_config_that_loads_to_the_same(config: Path) -> None:
    done, _ = python(config.parent, "-m", "rl", "check", "x.toml", "--set", "run.seed=3")
    assert done.returncode == 0
    original = load(config, ["run.seed=3"])
    config.write_text(done.stdout)
    assert load(config) == original


def test_check_keys_prints_the_reference_and_check_without_a_config_says_what_to_give(tmp_path: Path) -> None:
    done, _ = python(tmp_path, "-m", "rl", "check", "--keys")
    assert done.stdout.startswith("## [run]\n")
    assert "| `temperature` | float > 0 | `1.0` |" in done.stdout
    done, _ = python(tmp_path, "-m", "rl", "check")
    assert done.returncode == 2
    assert done.stderr.startswith("error: check: no config given")


@pytest.mark.parametrize(
    "arguments",
    [[], ["trian"], ["train"], ["train", "x.toml", "--seeds", "0,a"], ["train", "x.toml", "--seeds", "1,1"]],
)
def test_bad_arguments_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_seeds_and_a_seed_by_set_are_refused_together(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(config), "--seeds", "0,1", "--set", "run.seed=3"]) == 2
    assert capsys.readouterr().err == "error: --seeds and --set run.seed=... are both given: give one\n"


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **functions: object) -> None:
    """Put a module in the place of rl.<name>, so that the command line is tested without training."""
    module = types.ModuleType(f"rl.{name}")
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, f"rl.{name}", module)
    monkeypatch.setattr(f"rl.{name}", module, raising=False)


def test_train_hands_on_what_it_was_given(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    def main(path: Path, overrides: list[str], *, resume: bool, restart: bool, seeds: tuple[int, ...] | None) -> int:
        calls.append((path, overrides, resume, restart, seeds))
        return 0

    stand_in(monkeypatch, "train", main=main)
    assert cli.main(["train", str(config)]) == 0
    options = ["--set", "run.seed=1", "--set", "eval.size=9", "--resume", "--restart"]
    assert cli.main(["train", str(config), *options]) == 0
    assert cli.main(["train", str(config), "--seeds", "0, 1,2"]) == 0
    assert calls == [
        (config, [], False, False, None),
        (config, ["run.seed=1", "eval.size=9"], True, True, None),
        (config, [], False, False, (0, 1, 2)),
    ]


@pytest.mark.parametrize(
    ("options", "everything", "dry_run"),
    [([], False, False), (["--all"], True, False), (["--dry-run"], False, True), (["--all", "--dry-run"], True, True)],
)
def test_clean_hands_on_its_flags(
    options: list[str], everything: bool, dry_run: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap: `clean --dry-run` whose flag is lost removes what it was asked to show."""
    calls: list[dict[str, bool]] = []
    stand_in(monkeypatch, "clean", main=lambda **options: calls.append(options))
    assert cli.main(["clean", *options]) == 0
    assert calls == [{"everything": everything, "dry_run": dry_run}]


def test_clean_says_what_stays(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["clean", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "runs, finished or not, stay unless --all" in told
    assert "--dry-run say what would go, remove nothing" in told


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (RunFailed("step 3: no finite gradient"), 1, "failed: step 3: no finite gradient\n"),
        (UserError("x.jsonl: no rows"), 2, "error: x.jsonl: no rows\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], raised: BaseException, code: int, line: str
) -> None:
    def main(**options: bool) -> None:
        raise raised

    for name, module in (("doctor", "doctor"), ("smoke", "smoke.command"), ("clean", "clean")):
        stand_in(monkeypatch, module, main=main)
        assert cli.main([name]) == code
        assert capsys.readouterr().err == line


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5", ""])
def test_a_count_is_refused_in_the_same_words_by_every_command(text: str) -> None:
    """Trap: argparse says "invalid _positive value" of a ValueError."""
    assert arguments.count("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match=f"found '{text}', valid: a whole number ≥ 1"):
        arguments.count(text)


def test_train_says_at_once_that_a_base_is_not_there(config: Path) -> None:
    """Trap: torch and trl, imported first, take ten seconds before the same line."""
    code = (
        "import sys\nfrom rl.__main__ import main\n"
        "assert main(['train', 'x.toml', '--set', 'model.base=./absent']) == 2\n"
        "print([name for name in ('torch', 'trl', 'mlx') if name in sys.modules])\n"
    )
    config.write_text(GOOD.replace('form = "char"', ""))
    done, _ = python(config.parent, "-c", code)
    assert (done.returncode, done.stdout) == (0, "[]\n")
    assert done.stderr.startswith("error: x.toml: [model] base = './absent': no folder of that name; valid are")
