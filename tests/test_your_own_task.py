"""docs/your-own-task.md, run from top to bottom with few steps: its files, its commands, what it says comes out."""

import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from evals import __main__ as evals
from rl import __main__ as rl

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "your-own-task.md").read_text(encoding="utf-8")
FILES = re.findall(r"^`(mytask/[\w.]+)`:\n\n```\w+\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
COMMANDS = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]
# a smaller model and fewer steps than the page's, for the configs whose run another one starts from
SMALLER = (
    ('base = "tiny"', 'base = "tiny"\n[model.tiny]\nhidden = 32\nlayers = 2\nintermediate = 64'),
    ("max_steps = 25\n", "max_steps = 3\nsave_steps = 3\n"),
    ("max_steps = 200", "max_steps = 2\nsave_steps = 2"),
    ("per_device_train_batch_size = 128", "per_device_train_batch_size = 16"),
    ("size = 256", "size = 16"),
)


def run(line: str) -> None:
    """One command of the page, in this process."""
    match shlex.split(line):
        case ["python3", script]:
            runpy.run_path(script)
        case ["nox", "-s", "eval", "--", *arguments]:
            evals.main(arguments, Path.cwd())
        case ["nox", "-s", session, "--", *arguments]:
            assert rl.main([session, *arguments]) == 0
        case _:
            pytest.fail(f"no rule for {line!r}")


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as `python -m rl` has its working directory
    shutil.copytree(ROOT / "evals" / "tasks", "evals/tasks")
    assert [name for name, _ in FILES] == [f"mytask/{n}" for n in ("rows.py", "reward.py", "start.toml", "sort.toml")]
    for name, text in FILES:
        for old, new in SMALLER if name.endswith(".toml") else ():
            text = text.replace(old, new)
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    assert len(COMMANDS) == 4
    try:
        for line in COMMANDS:
            run(line)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "mytask"]:
            del sys.modules[name]
    rows = [json.loads(line) for line in Path("mytask/sort.jsonl").read_text().splitlines()]
    assert len(rows) == 6000
    assert all(row["answer"] == "".join(sorted(row["prompt"].rstrip("="))) for row in rows)
    record = json.loads(Path("models/final/sort/run.json").read_text())
    assert record["data"]["rows"] == {"train": 5000, "heldout": 16}
    assert [parent["name"] for parent in record["parents"]] == ["sort-start"]
    logged = [json.loads(line) for line in Path("models/final/sort/metrics.jsonl").read_text().splitlines()]
    assert any("places" in key for row in logged for key in row)  # the function was asked
    result = json.loads(Path("evals/results/sort/heldout.json").read_text())
    assert "heldout" in result["results"]
    assert Path("models/exports/sort-safetensors/model.safetensors").is_file()


def test_the_reward_of_the_page_gives_what_it_says() -> None:
    space: dict = {}
    exec(dict(FILES)["mytask/reward.py"], space)
    assert space["places"](["1249", "1294", "12", ""], ["1249"] * 4) == [1.0, 0.5, 0.5, 0.0]
    assert len(dict(FILES)["mytask/reward.py"].strip().splitlines()) <= 10


def test_start_and_run_hold_out_the_same_questions() -> None:
    """Trap: with other sizes or another seed the run would be measured on what its start was trained on."""
    import tomllib

    start, own = (tomllib.loads(dict(FILES)[f"mytask/{name}.toml"]) for name in ("start", "sort"))
    assert (start["data"], start["eval"]) == (own["data"], own["eval"])
