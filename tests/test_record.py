"""run.json: its keys, its hashes, and which changes make a different run."""

import importlib.metadata
import json
import math
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from run_helper import CONFIG, complete, fresh

from rl import files, record, run
from rl.errors import UserError

CONTRACT = (
    *("name", "status", "config", "config_sha256", "lock_sha256", "git", "packages", "python", "platform", "device"),
    *("seed", "base", "data", "parents", "started", "finished", "wall_s", "steps", "tokens", "peak_memory_bytes"),
    *("rollout", "result"),
)


def test_run_json_has_every_key_of_the_contract(tmp_path):
    opened = run.start(tmp_path, fresh(tmp_path))
    written = json.loads((opened.folder / "run.json").read_text())
    assert set(CONTRACT) <= set(written)
    assert (written["status"], written["name"], written["seed"]) == ("running", "demo", 0)
    assert written["config"] == CONFIG
    assert written["config_sha256"] == files.sha256_json(CONFIG)
    assert written["packages"]["torch"] == importlib.metadata.version("torch")
    assert written["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record.read(opened.folder) == opened.record


def test_nan_is_written_as_null_not_as_invalid_json(tmp_path):
    opened = run.start(tmp_path, fresh(tmp_path))
    opened.record.rollout = {"ess": math.nan, "sync_s": math.inf, "tokens_per_s": 5.0}
    run.save(opened)
    run.log(opened, 1, {"kl": math.nan, "reward": 0.5})
    rollout = json.loads((opened.folder / "run.json").read_text(), parse_constant=pytest.fail)["rollout"]
    assert rollout == {"ess": None, "sync_s": None, "tokens_per_s": 5.0}
    row = json.loads((opened.folder / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert (row["step"], row["kl"], row["reward"]) == (1, None, 0.5)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"trainer": {"learning_rate": 2e-4}}, "trainer.learning_rate: 0.0001 → 0.0002"),
        ({"trainer": {"beta": 0.1}}, "trainer.beta: null → 0.1"),
        ({"data": {"source": "arithmetic", "fingerprint": "e", "rows": {}}}, "data.fingerprint: "),
        ({"base": {"id": "tiny", "sha256": "c"}}, "base.sha256: "),
        ({"seed": 3}, "seed: 0 → 3"),
        ({"parents": [{"role": "from", "name": "sft", "inputs_sha256": "9"}]}, "parents.0.inputs_sha256: null"),
    ],
)
def test_each_input_changes_the_hash_and_is_named(tmp_path, changes, key):
    old, new = fresh(tmp_path), fresh(tmp_path, **changes)
    assert old.inputs_sha256 != new.inputs_sha256
    assert any(line.startswith(key) for line in record.differences(old, new)), record.differences(old, new)


def test_a_package_that_computes_is_an_input_and_one_that_draws_is_not(tmp_path):
    old = fresh(tmp_path)
    for name, same in (("torch", False), ("mlx-lm", False), ("rich", True), ("matplotlib", True)):
        new = replace(old, packages={**old.packages, name: "0.0"})
        assert (record.inputs_hash(new) == record.inputs_hash(old)) is same
        assert (record.differences(old, new) == []) is same


def test_machine_time_and_name_are_no_inputs(tmp_path):
    old = fresh(tmp_path)
    renamed = {**CONFIG, "run": {**CONFIG["run"], "name": "other"}}
    new = replace(old, device="mps", platform="x", started="later", git={"commit": "1"}, name="other", config=renamed)
    assert record.inputs_hash(new) == record.inputs_hash(old)
    # an independent computation of the hash, key by key
    parts = {
        "config": {**CONFIG, "run": {"seed": 0, "device": "auto"}},
        "parents": [],
        "data": {"fingerprint": "d" * 64},
        "base": {"sha256": "b" * 64},
        "packages": {name: old.packages[name] for name in record.COMPUTING},
        "seed": 0,
    }
    assert old.inputs_sha256 == files.sha256_json(parts)


def test_unreadable_record_is_one_clear_line(tmp_path):
    opened = complete(tmp_path)
    for text in ("", "[]", '{"name": "demo"}'):
        (opened.final / "run.json").write_text(text)
        with pytest.raises(UserError, match=r"demo/run\.json: not a run record") as error:
            run.start(tmp_path, fresh(tmp_path))
        assert "\n" not in str(error.value)


def test_versions_are_compared_with_the_lock_and_local_tags_pass(tmp_path):
    lock = tmp_path / "uv.lock"
    lock.write_text('[[package]]\nname = "torch"\nversion = "2.15.0"\n[[package]]\nname = "mlx"\nversion = "0.32.4"\n')
    assert record.unlocked(lock, {"torch": "2.15.0+cu128", "mlx": "0.32.4"}) == []
    assert record.unlocked(lock, {"torch": "2.11.0", "mlx": None}) == [
        "torch 2.11.0, locked 2.15.0",
        "mlx absent, locked 0.32.4",
    ]
    written = fresh(tmp_path)
    assert written.lock_sha256 == files.sha256_file(lock)
    assert written.packages_match_lock is False  # trl and others are not in this lock
    lock.unlink()
    assert (fresh(tmp_path).lock_sha256, fresh(tmp_path).packages_match_lock) == (None, None)


def test_commit_comes_from_git_or_from_the_variable_but_never_from_an_enclosing_repository(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True, text=True).stdout

    monkeypatch.delenv("DUET_COMMIT", raising=False)
    assert record.git_state(tmp_path) is None
    monkeypatch.setenv("DUET_COMMIT", "abc")
    assert record.git_state(tmp_path) == {"commit": "abc", "dirty": None}
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one")
    commit = git("rev-parse", "HEAD").strip()
    assert record.git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "file").write_text("2")
    assert record.git_state(tmp_path) == {"commit": commit, "dirty": True}
    inner = tmp_path / "vendored"
    inner.mkdir()
    assert record.git_state(inner) == {"commit": "abc", "dirty": None}


def test_record_survives_the_round_trip(tmp_path):
    one = fresh(tmp_path, parents=({"role": "from", "name": "sft", "inputs_sha256": "9"},))
    record.save(one, tmp_path)
    assert asdict(record.read(tmp_path)) == asdict(one)
