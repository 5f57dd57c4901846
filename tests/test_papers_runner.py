"""The runner, with a stand-in for `python -m rl train`: order, cores, budget, failures, and going on."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from papers import jobs, machine, results, runner, study
from rl import files
from rl.errors import RunFailed, UserError
from tests import papers_helper

PAPER = """
title = "T"
question = "Q?"
seeds = [0, 1]
[[run]]
name = "start"
config = "configs/tiny/sft.toml"
seeds = [0]
[[run]]
name = "grpo"
config = "configs/tiny/grpo.toml"
builds_on = { "model.from" = "start" }
"""
# notes what it was given; fails or lingers where a file says so
TRAIN = """
import json, os, pathlib, sys, time, tomllib
config = tomllib.loads(pathlib.Path(sys.argv[2]).read_text())
name = config["run"]["name"]
said = {"args": sys.argv[3:], "cores": sorted(os.sched_getaffinity(0)), "threads": os.environ["OMP_NUM_THREADS"]}
said |= {"card": os.environ.get("CUDA_VISIBLE_DEVICES")}
said |= {"began": time.monotonic(), "config": config}
pathlib.Path("said").mkdir(exist_ok=True)
try:
    if os.path.exists("fail-" + name):
        sys.exit("bad luck")
    while os.path.exists("linger-" + name):
        time.sleep(0.02)
except KeyboardInterrupt:
    pathlib.Path("said", name + ".saved").write_text("")
    sys.exit(130)
final = pathlib.Path("models/final", name)
final.mkdir(parents=True, exist_ok=True)
for file in ("run.json", "metrics.jsonl", "samples.jsonl"):
    final.joinpath(file).write_text("{}")
said["ended"] = time.monotonic()
pathlib.Path("said", name + ".json").write_text(json.dumps(said))
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    papers_helper.house(tmp_path)
    files.write_text(tmp_path / "papers" / "some" / "paper.toml", PAPER)
    files.write_text(tmp_path / "rl" / "__main__.py", TRAIN)
    return tmp_path


def load(root: Path) -> study.Study:
    return study.load(study.find(root, "some"), root)


def said(root: Path, name: str) -> dict:
    return json.loads((root / "said" / f"{name}.json").read_text())


def test_children_start_when_their_parent_is_done_each_on_its_cores(root: Path) -> None:
    out = root / "out"
    assert runner.make(load(root), root, runner.Settings(jobs=2, threads=1, out=out)) == {}
    start, *rest = (said(root, f"some.{stem}") for stem in ("start-seed0", "grpo-seed0", "grpo-seed1"))
    assert all(one["began"] >= start["ended"] for one in rest)
    assert start["threads"] == "1"
    cores = machine.cores()
    if len(cores) > 1:
        assert {tuple(one["cores"]) for one in rest} <= {(core,) for core in cores[:2]}
    assert rest[0]["config"]["model"]["from"] == "start-seed0.toml"
    assert (out / "some.grpo-seed1" / "run.json").is_file()
    about = json.loads((out / "some.grpo-seed1" / "machine.json").read_text())
    assert about["cores_a_run"] == 1
    assert about["lock"] == jobs.locked(root)


def test_runs_at_once_take_the_cards_in_turn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: two runs on the first card, none on the second."""
    monkeypatch.setattr(machine, "cores", lambda: [0, 0])
    for given, wanted in (("2,5", {"2", "5"}), ("3", {"3"})):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        shutil.rmtree(root / "models", ignore_errors=True)
        assert runner.make(load(root), root, runner.Settings(jobs=2, threads=1)) == {}
        assert {said(root, f"some.{stem}")["card"] for stem in ("grpo-seed0", "grpo-seed1")} == wanted


def test_what_a_failed_run_would_have_made_is_not_tried(root: Path) -> None:
    (root / "fail-some.start-seed0").touch()
    failed = runner.make(load(root), root, runner.Settings(jobs=2, threads=1))
    assert failed["some.start-seed0"] == "exit 1: bad luck"
    assert failed["some.grpo-seed1"] == "some.start-seed0, which it needs, failed"
    assert not (root / "said" / "some.grpo-seed0.json").exists()


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_at_the_end_of_its_time_children_save(root: Path, before: signal.Handlers) -> None:
    """Traps: a child that is killed instead of asked loses all since its last checkpoint; and one of a runner that was
    started with `&` inherits that Ctrl-C is ignored, and cannot be asked."""
    old = signal.signal(signal.SIGINT, before)
    (root / "linger-some.grpo-seed0").touch()
    with pytest.raises(RunFailed, match="time is up: 1 runs are left"):
        runner.make(load(root), root, runner.Settings(jobs=2, threads=1, budget=2.0))
    assert signal.signal(signal.SIGINT, old) is before
    assert (root / "said" / "some.grpo-seed0.saved").exists()
    assert said(root, "some.grpo-seed1")


def test_one_run_alone_brings_its_parent_along(root: Path) -> None:
    assert runner.make(load(root), root, runner.Settings(only=("grpo",)), ["some.grpo-seed1"]) == {}
    assert sorted(path.stem for path in (root / "said").iterdir()) == ["some.grpo-seed1", "some.start-seed0"]
    with pytest.raises(UserError, match="--only gpro: no run of this study, valid: grpo, start"):
        runner.make(load(root), root, runner.Settings(only=("gpro",)))


def test_a_result_tells_its_time_without_being_made_again(root: Path) -> None:
    """On a fresh machine that goes on with a study, only what others build on is trained once more."""
    path = root / "papers" / "some" / "paper.toml"
    path.write_text(path.read_text() + '[[run]]\nname = "timed"\nlike = "grpo"\nas_long_as = "grpo"\n')
    one = load(root)
    plan = jobs.plan(one)
    known = {job.name: kept for job, kept in papers_helper.made(root, one, plan, lambda run, seed: 0.5)}
    known = {name: kept for name, kept in known.items() if ".grpo-" in name}
    assert runner.make(one, root, runner.Settings(jobs=2, threads=1), ["some.timed-seed0"], known) == {}
    assert sorted(path.stem for path in (root / "said").iterdir()) == ["some.start-seed0", "some.timed-seed0"]
    assert said(root, "some.timed-seed0")["config"]["trainer"]["max_steps"] == 30


def test_a_start_that_comes_out_otherwise_stops_what_builds_on_it(root: Path) -> None:
    """Trap: seeds of one run from two different starts, in one mean."""
    one = load(root)
    plan = jobs.plan(one)
    known = {job.name: kept for job, kept in papers_helper.made(root, one, plan, lambda run, seed: 0.5)}
    del known["some.grpo-seed1"]
    weights = root / "models" / "final" / "some.start-seed0" / "model.safetensors"
    files.write_text(weights, "as they were")
    known["some.grpo-seed0"].record.base = {"sha256": files.sha256_file(weights)}
    out, wanted = root / "out", ["some.grpo-seed1"]
    assert runner.make(one, root, runner.Settings(threads=1, out=out), wanted, known) == {}
    about = json.loads((out / "some.start-seed0" / "machine.json").read_text())
    assert about["weights"] == files.sha256_file(weights)
    shutil.rmtree(root / "models")
    files.write_text(weights, "other")
    failed = runner.make(one, root, runner.Settings(threads=1), wanted, known)
    assert "not those that the study's results went on from" in failed["some.start-seed0"]
    assert failed["some.grpo-seed1"] == "some.start-seed0, which it needs, failed"


def test_a_parent_that_is_there_is_found_where_build_is_not(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: models/final brought from another machine, and children look for their parent's config in build/."""
    (root / "models" / "final" / "some.start-seed0").mkdir(parents=True)
    monkeypatch.setattr(results, "here", lambda *given: {"some.start-seed0": None})
    assert runner.make(load(root), root, runner.Settings(threads=1), ["some.grpo-seed1"]) == {}
    assert [path.stem for path in (root / "said").iterdir()] == ["some.grpo-seed1"]


def test_cores_are_dealt_out_once() -> None:
    assert machine.slots(range(16), 7, 2) == [[2 * i, 2 * i + 1] for i in range(7)]
    assert machine.slots(range(3), 7, 2) == [[0, 1]]
    assert machine.slots([5], 1, 2) == [[5]]
    assert machine.cores() == sorted(os.sched_getaffinity(0))


def test_runs_need_nothing_that_only_reports_need() -> None:
    """The machines that train may lack matplotlib, typst and lm-eval; and nothing here may import torch."""
    heavy = ["typst", "matplotlib", "lm_eval", "evals", "scipy", "torch", "trl", "transformers", "mlx"]
    code = f"import sys, papers.__main__, papers.runner; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=papers_helper.ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
