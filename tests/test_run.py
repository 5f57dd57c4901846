"""Run folders, records, checkpoints: what survives a kill, and what is refused."""

import errno
import importlib.metadata
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from rl import checkpoints, files, record, run
from rl.errors import RunFailed, UserError

ROOT = Path(__file__).parents[1]
CONFIG = {
    "run": {"name": "demo", "seed": 0, "device": "auto"},
    "model": {"base": "tiny"},
    "trainer": {"algorithm": "grpo", "learning_rate": 1e-4, "max_steps": 8},
    "rollout": {"stop": []},
}
CONTRACT = (
    *("name", "status", "config", "config_sha256", "lock_sha256", "git", "packages", "python", "platform", "device"),
    *("seed", "base", "data", "parents", "started", "finished", "wall_s", "steps", "tokens", "peak_memory_bytes"),
    *("rollout", "result"),
)


def fresh(root: Path, **changes) -> record.Record:
    config = json.loads(json.dumps(CONFIG))
    config["trainer"] |= changes.pop("trainer", {})
    given = {
        "name": "demo",
        "config": config,
        "seed": 0,
        "device": "cpu",
        "base": {"id": "tiny", "sha256": "b" * 64},
        "data": {"source": "arithmetic", "fingerprint": "d" * 64, "rows": {"train": 64, "heldout": 32}},
    }
    return record.new(root, **(given | changes))


def checkpoint(opened: run.OpenRun, step: int, keep: int = 2) -> Path:
    """Log steps up to `step` and save a whole checkpoint there, as a trainer would."""
    for number in range(opened.record.steps + 1, step + 1):
        run.log(opened, number, {"reward": number / 10})
    path = opened.folder / f"checkpoint-{step}"
    files.write_bytes(path / "model.safetensors", b"weights %d" % step)
    opened.record.tokens = {"prompt": 10 * step, "completion": 5 * step}
    run.mark_complete(opened, path, step, keep)
    return path


def crash(opened: run.OpenRun) -> None:
    """What the kernel does on kill -9: nothing is written any more, the lock is gone."""
    opened.lock.close()


def complete(root: Path, **changes) -> run.OpenRun:
    opened = run.start(root, fresh(root, **changes))
    checkpoint(opened, 2)
    files.write_bytes(run.staging(opened) / "model.safetensors", b"final")
    run.finish(opened)
    return opened


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


def test_run_name_carries_an_overridden_seed():
    assert run.run_name("grpo", 0, overridden=False) == "grpo"
    assert run.run_name("grpo", 0, overridden=True) == "grpo-seed0"
    assert run.folders(Path("r"), "grpo-seed2") == (
        Path("r/models/checkpoints/grpo-seed2"),
        Path("r/models/final/grpo-seed2"),
    )


def test_finish_moves_the_result_whole_and_asking_again_says_finished(tmp_path):
    opened = complete(tmp_path)
    assert sorted(path.name for path in opened.final.iterdir()) == sorted(
        ["README.md", "curves.png", "metrics.jsonl", "model.safetensors", "run.json"]
    )
    assert not opened.folder.exists()
    assert sorted(path.name for path in opened.final.parent.iterdir()) == ["demo"]
    written = record.read(opened.final)
    assert (written.status, written.steps, written.tokens) == ("finished", 2, {"prompt": 20, "completion": 10})
    assert written.finished > written.started
    for flags in ({}, {"resume": True}):
        again = run.start(tmp_path, fresh(tmp_path), **flags)
        assert (again.state, again.record, again.lock) == ("finished", written, None)
        assert not opened.folder.exists()  # nothing was written to find that out


def test_finished_with_other_inputs_is_refused_and_names_the_key(tmp_path):
    opened = complete(tmp_path)
    with pytest.raises(UserError, match=r"trainer\.max_steps: 8 → 9;.*--restart") as error:
        run.start(tmp_path, fresh(tmp_path, trainer={"max_steps": 9}))
    assert "\n" not in str(error.value)
    assert not opened.folder.exists()


def test_restart_replaces_a_finished_result_only_when_the_new_one_is_whole(tmp_path):
    old = complete(tmp_path)
    opened = run.start(tmp_path, fresh(tmp_path, trainer={"max_steps": 9}), restart=True)
    checkpoint(opened, 3)
    files.write_bytes(run.staging(opened) / "model.safetensors", b"newer")
    assert (old.final / "model.safetensors").read_bytes() == b"final"
    run.finish(opened)
    assert (old.final / "model.safetensors").read_bytes() == b"newer"
    assert record.read(old.final).config["trainer"]["max_steps"] == 9
    assert sorted(path.name for path in old.final.parent.iterdir()) == ["demo"]


def test_unfinished_run_needs_a_word_and_both_ways_out_are_named(tmp_path):
    opened = run.start(tmp_path, fresh(tmp_path))
    checkpoint(opened, 4)
    run.close(opened, "interrupted")
    with pytest.raises(UserError, match=r"interrupted.*step 4; --resume .*--restart"):
        run.start(tmp_path, fresh(tmp_path))
    with pytest.raises(UserError, match="give one"):
        run.start(tmp_path, fresh(tmp_path), resume=True, restart=True)
    again = run.start(tmp_path, fresh(tmp_path), restart=True)
    assert (again.state, again.checkpoint, again.record.steps) == ("fresh", None, 0)
    assert sorted(path.name for path in again.folder.iterdir()) == [".lock", "run.json"]


def test_resume_with_other_inputs_is_refused_and_loses_nothing(tmp_path):
    opened = run.start(tmp_path, fresh(tmp_path))
    path = checkpoint(opened, 4)
    run.log(opened, 5, {"reward": 0.5})
    crash(opened)
    before = (opened.folder / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"trainer\.learning_rate: 0\.0001 → 0\.001;"):
        run.start(tmp_path, fresh(tmp_path, trainer={"learning_rate": 1e-3}), resume=True)
    assert (opened.folder / "metrics.jsonl").read_bytes() == before
    assert (path / "complete.json").exists()
    assert run.start(tmp_path, fresh(tmp_path), resume=True).checkpoint.step == 4


def test_kill_in_mid_save_resumes_from_the_last_whole_checkpoint(tmp_path):
    """transformers writes a checkpoint file by file: the newest folder after a kill may be half of one."""
    opened = run.start(tmp_path, fresh(tmp_path))
    opened.record.result = {"before": {"value": 0.25}}
    whole = checkpoint(opened, 4)
    marked = json.loads((whole / "complete.json").read_text())
    for step in (5, 6):
        run.log(opened, step, {"reward": 9.0})
    files.write_bytes(opened.folder / "checkpoint-6" / "optimizer.pt", b"half")  # killed in here: no marker
    files.write_text(opened.folder / "checkpoint-5" / "complete.json", '{"step": 5, "wal')  # a torn marker is none
    with (opened.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "rew')  # and in the middle of a line
    crash(opened)

    again = run.start(tmp_path, fresh(tmp_path), resume=True)
    assert (again.state, again.checkpoint.path, again.checkpoint.step) == ("resumed", whole, 4)
    assert [path.name for path in again.folder.glob("checkpoint-*")] == ["checkpoint-4"]
    lines = (again.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert marked["rows"] == 4
    assert again.record.tokens == {"prompt": 40, "completion": 20}
    assert again.record.started == opened.record.started
    assert again.record.result == {"before": {"value": 0.25}}
    assert again.record.status == "running"
    run.log(again, 5, {"reward": 0.5})
    assert [row["step"] for row in record.read_metrics(again.folder / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_wall_time_sums_over_resumes_without_the_time_that_was_lost(tmp_path):
    opened = run.start(tmp_path, fresh(tmp_path))
    opened.began -= 100
    checkpoint(opened, 2)
    opened.began -= 1000  # work after the checkpoint, lost in the kill
    crash(opened)
    again = run.start(tmp_path, fresh(tmp_path), resume=True)
    again.began -= 50
    checkpoint(again, 4)
    assert again.record.wall_s == pytest.approx(150, abs=5)
    rows = record.read_metrics(again.folder / "metrics.jsonl")
    assert rows[0]["wall_s"] == pytest.approx(100, abs=5)
    assert rows[-1]["wall_s"] == pytest.approx(150, abs=5)


def test_a_row_logged_after_the_checkpoint_at_the_same_step_is_cut_too(tmp_path):
    """TRL logs its summary at the last step once that checkpoint is saved: cutting by step would leave it twice."""
    opened = run.start(tmp_path, fresh(tmp_path))
    checkpoint(opened, 2)
    run.log(opened, 2, {"train_runtime": 3.0})
    crash(opened)
    again = run.start(tmp_path, fresh(tmp_path), resume=True)
    assert len(record.read_metrics(again.folder / "metrics.jsonl")) == 2


@pytest.mark.parametrize("flags", [{}, {"resume": True}])
def test_a_kill_before_the_first_checkpoint_starts_over_without_a_word(tmp_path, flags):
    opened = run.start(tmp_path, fresh(tmp_path))
    run.log(opened, 1, {"reward": 0.1})
    files.write_bytes(opened.folder / "checkpoint-2" / "model.safetensors", b"half")
    crash(opened)
    again = run.start(tmp_path, fresh(tmp_path, trainer={"learning_rate": 1.0}), **flags)
    assert again.state == "fresh"
    assert sorted(path.name for path in again.folder.iterdir()) == [".lock", "run.json"]


def test_checkpoints_without_a_record_are_not_trusted(tmp_path):
    opened = run.start(tmp_path, fresh(tmp_path))
    checkpoint(opened, 2)
    crash(opened)
    (opened.folder / "run.json").unlink()
    with pytest.raises(UserError, match=r"no run\.json.*--restart"):
        run.start(tmp_path, fresh(tmp_path), resume=True)


def test_damage_in_metrics_is_refused_and_missing_rows_too(tmp_path):
    opened = run.start(tmp_path, fresh(tmp_path))
    checkpoint(opened, 3)
    crash(opened)
    metrics = opened.folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text(lines[0] + "garbage\n" + lines[2])
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 "):
        run.start(tmp_path, fresh(tmp_path), resume=True)
    metrics.write_text(lines[0])
    with pytest.raises(UserError, match="1 rows, the checkpoint was saved with 3"):
        run.start(tmp_path, fresh(tmp_path), resume=True)


def test_only_the_newest_whole_checkpoints_stay_in_numeric_order(tmp_path):
    """checkpoint-10 sorts before checkpoint-8 as text."""
    opened = run.start(tmp_path, fresh(tmp_path))
    for step in (8, 9, 10):
        checkpoint(opened, step, keep=2)
    assert sorted(path.name for path in opened.folder.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-9"]
    assert [item.step for item in checkpoints.complete_checkpoints(opened.folder)] == [9, 10]


def test_a_kill_in_the_middle_of_pruning_leaves_nothing_that_counts(tmp_path, monkeypatch):
    opened = run.start(tmp_path, fresh(tmp_path))
    path = checkpoint(opened, 2)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoints.remove_checkpoint(path)
    assert (path / "model.safetensors").exists()
    assert checkpoints.complete_checkpoints(opened.folder) == []


@pytest.mark.parametrize("moved", [False, True], ids=["before the swap", "in the swap"])
def test_a_kill_in_finish_is_carried_to_its_end(tmp_path, monkeypatch, moved):
    old = complete(tmp_path)
    opened = run.start(tmp_path, fresh(tmp_path, trainer={"max_steps": 9}), restart=True)
    checkpoint(opened, 3)
    files.write_bytes(run.staging(opened) / "model.safetensors", b"newer")

    def killed(stage: Path, final: Path) -> None:
        if moved:
            final.rename(final.with_name(f".{final.name}.old"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "_swap", killed)
        with pytest.raises(KeyboardInterrupt):
            run.finish(opened)
    crash(opened)
    again = run.start(tmp_path, fresh(tmp_path, trainer={"max_steps": 9}))
    assert again.state == "finished"
    assert (old.final / "model.safetensors").read_bytes() == b"newer"
    assert not opened.folder.exists()
    assert sorted(path.name for path in old.final.parent.iterdir()) == ["demo"]


def test_a_staged_result_that_was_not_complete_is_cleared_away(tmp_path):
    opened = run.start(tmp_path, fresh(tmp_path))
    checkpoint(opened, 2)
    stage = run.staging(opened)
    files.write_bytes(stage / "model.safetensors", b"half")
    crash(opened)
    again = run.start(tmp_path, fresh(tmp_path), resume=True)
    assert again.state == "resumed"
    assert not stage.exists()
    assert not again.final.exists()


def test_a_result_holds_safetensors_and_no_pickle(tmp_path):
    opened = run.start(tmp_path, fresh(tmp_path))
    stage = run.staging(opened)
    with pytest.raises(RunFailed, match=r"no \.safetensors"):
        run.finish(opened)
    files.write_bytes(stage / "model.safetensors", b"x")
    files.write_bytes(stage / "training_args.bin", b"x")
    with pytest.raises(RunFailed, match=r"training_args\.bin"):
        run.finish(opened)
    assert not opened.final.exists()


HOLDER = """
    import sys, time
    from pathlib import Path
    from tests.test_run import fresh
    from rl import run
    opened = run.start(Path(sys.argv[1]), fresh(Path(sys.argv[1])))
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_with_the_first_ones_pid_until_it_is_killed(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            for flags in ({}, {"resume": True}, {"restart": True}):
                with pytest.raises(UserError, match=f"process {holder.pid} is training in this folder"):
                    run.start(tmp_path, fresh(tmp_path), **flags)
        finally:
            holder.send_signal(signal.SIGKILL)
    assert run.start(tmp_path, fresh(tmp_path)).state == "fresh"  # the kernel gave the lock back


def test_the_lock_file_of_a_run_that_finished_meanwhile_guards_nothing(tmp_path, monkeypatch):
    """Opened just before the other process removed its folder: locking that ghost would let two runs in."""
    folder = tmp_path / "models" / "checkpoints" / "demo"
    flock, calls = run.fcntl.flock, []

    def slow(file, how):
        flock(file, how)
        calls.append(file.name)
        if len(calls) == 1:
            (folder / ".lock").unlink()

    monkeypatch.setattr(run.fcntl, "flock", slow)
    opened = run.start(tmp_path, fresh(tmp_path))
    assert len(calls) == 2
    assert os.path.samestat(os.fstat(opened.lock.fileno()), (folder / ".lock").stat())


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")


def test_full_disk_says_path_bytes_free_and_what_is_safe(tmp_path, monkeypatch):
    opened = run.start(tmp_path, fresh(tmp_path))
    checkpoint(opened, 4)
    for name, call in (
        ("append_metrics", lambda: run.log(opened, 5, {"reward": 1.0})),
        ("save", lambda: run.save(opened)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(record, name, full_disk)
            with pytest.raises(RunFailed, match=r"^metrics\.jsonl: the disk is full \([\d,]+ bytes free\);") as error:
                call()
        assert "checkpoint-4 is whole: free some space, then --resume" in str(error.value)
        assert "\n" not in str(error.value)


def test_full_disk_while_marking_leaves_the_checkpoint_uncounted(tmp_path, monkeypatch):
    opened = run.start(tmp_path, fresh(tmp_path))
    checkpoint(opened, 2)
    files.write_bytes(opened.folder / "checkpoint-4" / "model.safetensors", b"x")
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", full_disk)
        with pytest.raises(RunFailed, match="checkpoint-2 is whole"), run.recording(opened):
            run.mark_complete(opened, opened.folder / "checkpoint-4", 4)
    again = run.start(tmp_path, fresh(tmp_path), resume=True)  # the lock was given back all the same
    assert again.checkpoint.step == 2


@pytest.mark.parametrize(
    "error",
    [
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors
        RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534"),  # torch.save
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ],
)
def test_full_disk_is_known_by_the_words_of_each_writer(tmp_path, error):
    """safetensors raises no OSError, and torch.save only says that it lost its place (both seen on a full disk)."""
    with pytest.raises(RunFailed, match="the disk is full"), checkpoints.disk_guard(tmp_path):
        raise error


def test_other_errors_pass_the_disk_guard_as_they_are(tmp_path):
    with pytest.raises(PermissionError), checkpoints.disk_guard(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_check_space_compares_with_the_bytes_free(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=40))
    checkpoints.check_space(tmp_path / "not" / "there", 40)
    with pytest.raises(RunFailed, match="41 bytes are needed and 40 are free; no checkpoint"):
        checkpoints.check_space(tmp_path, 41)


def test_how_a_run_ended_is_recorded(tmp_path):
    for error, status in ((KeyboardInterrupt(), "interrupted"), (ValueError("loss\nis NaN"), "failed")):
        opened = run.start(tmp_path, fresh(tmp_path), restart=True)
        with pytest.raises(type(error)), run.recording(opened):
            raise error
        written = record.read(opened.folder)
        assert (written.status, written.error) == (
            status,
            None if status == "interrupted" else "ValueError: loss is NaN",
        )
        assert opened.lock is None


def test_an_error_after_finish_leaves_the_result_finished(tmp_path):
    """A failure to print the summary must neither turn the result into a failure nor bring the folder back."""
    opened = run.start(tmp_path, fresh(tmp_path))
    recording = run.recording(opened)
    recording.__enter__()
    files.write_bytes(run.staging(opened) / "model.safetensors", b"x")
    run.finish(opened)
    error = ValueError("terminal")
    assert not recording.__exit__(ValueError, error, None)  # it goes on up
    assert record.read(opened.final).status == "finished"
    assert not opened.folder.exists()


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


def test_resuming_under_another_commit_is_written_down(tmp_path, monkeypatch):
    monkeypatch.setenv("DUET_COMMIT", "one")
    opened = run.start(tmp_path, fresh(tmp_path))
    checkpoint(opened, 2)
    crash(opened)
    monkeypatch.setenv("DUET_COMMIT", "two")
    again = run.start(tmp_path, fresh(tmp_path), resume=True)
    assert again.record.git == {"commit": "two", "dirty": None, "resumed_from": "one"}


def test_record_survives_the_round_trip(tmp_path):
    one = fresh(tmp_path, parents=({"role": "from", "name": "sft", "inputs_sha256": "9"},))
    record.save(one, tmp_path)
    assert asdict(record.read(tmp_path)) == asdict(one)
