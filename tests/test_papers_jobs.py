"""Studies and the runs they ask for: what is read, planned, written out, found again and timed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from papers import jobs, results, study
from rl import config, files, record
from rl.errors import UserError
from tests import run_helper

ROOT = Path(__file__).resolve().parent.parent
PAPER = """
title = "T"
question = "Q?"
seeds = [0, 1]
[quick]
runs = ["slow"]
seeds = [7]
set = ["trainer.max_steps=2"]
[[run]]
name = "start"
config = "configs/tiny/sft.toml"
seeds = [0]
[[run]]
name = "fast"
config = "configs/tiny/grpo.toml"
builds_on = { "model.from" = "start" }
[[run]]
name = "slow"
like = "fast"
as_long_as = "fast"
[[run]]
name = "alone"
config = "configs/tiny/sft.toml"
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    files.write_text(tmp_path / "papers" / "some" / "paper.toml", PAPER)
    return tmp_path


def loaded(root: Path, text: str = PAPER) -> study.Study:
    files.write_text(root / "papers" / "some" / "paper.toml", text)
    return study.load(study.find(root, "papers/some"), root)


def test_seeds_come_in_turn_and_parents_before_children(root: Path) -> None:
    """Trap: run by run instead of seed by seed, a study cut short has five seeds of one run and none of another."""
    plan = jobs.plan(loaded(root))
    assert [job.stem for job in plan] == [
        *("start-seed0", "fast-seed0", "slow-seed0", "alone-seed0"),
        *("fast-seed1", "slow-seed1", "alone-seed1"),
    ]
    by_stem = {job.stem: job for job in plan}
    assert by_stem["fast-seed1"].needs == ("some.start-seed0",)
    assert by_stem["slow-seed1"].needs == ("some.start-seed0", "some.fast-seed1")


def test_quick_makes_only_what_is_named_and_what_that_needs(root: Path) -> None:
    plan = jobs.plan(loaded(root), quick=True)
    assert [job.name for job in plan] == [f"some-quick.{stem}" for stem in ("start-seed0", "fast-seed7", "slow-seed7")]
    assert "trainer.max_steps=2" in plan[1].overrides


def test_a_job_is_written_as_a_config_that_finds_its_parent(root: Path) -> None:
    plan = jobs.plan(loaded(root))
    by_name = {job.name: job for job in plan}
    where = root / "build" / "papers" / "some"
    for job in plan:
        path = jobs.write(job, where, root, by_name, 40 if job.timed else None)
        made = config.load(path)
        assert (made.run.name, made.run.seed) == (job.name, job.seed)
    assert config.builds_on(config.load(where / "fast-seed1.toml")) == {"model.from": where / "start-seed0.toml"}
    assert config.load(where / "slow-seed0.toml").trainer.args["max_steps"] == 40


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "start"', 'name = "Start"', "[[run]] 0 name: found 'Start', valid: lower case"),
        ('name = "alone"', 'name = "fast"', "[[run]] 3 name: found 'fast' twice"),
        ('like = "fast"', 'like = "alone"', "[[run]] 2 like: found 'alone', valid: a run that stands before"),
        ('like = "fast"', 'config = "configs/tiny/grpo.toml"', "[[run]] 2 as_long_as: needs `like`"),
        ('runs = ["slow"]', 'runs = ["slwo"]', "[quick] runs: found 'slwo', did you mean 'slow'?"),
        ("seeds = [0]", 'sedes = "x"', "[[run]] 0 unknown key 'sedes', did you mean 'seeds'?"),
    ],
)
def test_a_wrong_study_is_one_line(root: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        loaded(root, PAPER.replace(old, new, 1))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_parent_without_the_seed_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match="'fast' has seed 2, which 'start' that it needs has not"):
        jobs.plan(
            loaded(root, PAPER.replace("seeds = [0, 1]", "seeds = [0, 2]").replace("seeds = [0]", "seeds = [0, 1]"))
        )


def test_a_timed_run_takes_as_long_as_the_other() -> None:
    """100 steps of 0.2 s and 10 s of all else take 30 s: 45 s are 175 steps, rounded down to 170."""
    speed, time = jobs.Timing(100, 30.0, 0.2), jobs.Timing(400, 45.0, 0.1)
    assert jobs.steps(speed, time) == 170
    assert jobs.steps(speed, speed) == 100
    assert jobs.steps(speed, jobs.Timing(1, 1.0, 0.1)) == 10  # never none


def test_a_run_is_found_again_until_config_lock_or_parent_change(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The heart of reuse: a stale result that passes for a fresh one is a wrong number in a report."""
    plan = [job for job in jobs.plan(loaded(root)) if job.run in ("start", "fast")]
    by_name = {job.name: job for job in plan}
    one, where = loaded(root), jobs.folder(loaded(root), root)
    made: dict[str, record.Record] = {}
    for job in plan:
        parents = [
            {"role": role, "name": name, "inputs_sha256": made[name].inputs_sha256}
            for role, name in job.parents.items()
        ]
        found = run_helper.fresh(root, name=job.name, config=jobs.resolved(job, where, root, by_name), parents=parents)
        made[job.name] = replace(found, status="finished")
        record.save(made[job.name], root / "models" / "final" / job.name)
    assert set(results.here(plan, one, root)) == set(by_name)
    monkeypatch.setattr(record, "versions", lambda names: dict.fromkeys(names, "9"))
    assert not results.here(plan, one, root)
    monkeypatch.undo()
    changed = loaded(
        root, PAPER.replace('[[run]]\nname = "fast"', '[[run]]\nset = ["trainer.max_steps=9"]\nname = "fast"')
    )
    plan = [job for job in jobs.plan(changed) if job.run in ("start", "fast")]
    assert set(results.here(plan, changed, root)) == {"some.start-seed0"}
    path = root / "models" / "final" / "some.start-seed0" / "run.json"
    files.write_json(path, json.loads(path.read_text()) | {"inputs_sha256": "0" * 64})
    assert set(results.here([job for job in jobs.plan(one) if job.run in ("start", "fast")], one, root)) == {
        "some.start-seed0"
    }


@pytest.mark.parametrize("slug", study.slugs(ROOT))
def test_committed_studies_resolve_to_configs(slug: str, tmp_path: Path) -> None:
    found = study.load(study.find(ROOT, slug), ROOT)
    for quick in (False, True):
        plan = jobs.plan(found, quick)
        first: dict[str, jobs.Job] = {}
        for job in plan:
            first.setdefault(job.run, job)
        by_name = {job.name: job for job in plan}
        for job in first.values():
            jobs.write(job, tmp_path / str(quick), ROOT, by_name, 20 if job.timed else None)


def test_a_setting_that_came_later_does_not_make_results_stale(root: Path) -> None:
    """Trap: every new key of the configs, at its default, would ask for all studies to be made again."""
    plan = jobs.plan(loaded(root))
    by_name, where = {job.name: job for job in plan}, root / "build"
    wanted = jobs.resolved(plan[1], where, root, by_name)
    old = json.loads(json.dumps(wanted))
    del old["rollout"]["max_batch_tokens"]
    assert jobs.changed(wanted, old, ["model.from"]) == []
    old["rollout"]["temperature"] = 0.5
    old["rollout"]["forgotten"] = 1  # a setting that is no more
    assert "rollout.temperature: 0.5 → 1.0" in jobs.changed(wanted, old, ["model.from"])
