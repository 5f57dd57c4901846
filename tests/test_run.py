"""Run folders: what survives a kill, what is resumed, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from run_helper import checkpoint, complete, crash, fresh

from rl import files, record, run
from rl.errors import RunFailed, UserError

ROOT = Path(__file__).parents[1]


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
    from run_helper import fresh
    from rl import run
    opened = run.start(Path(sys.argv[1]), fresh(Path(sys.argv[1])))
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_with_the_first_ones_pid_until_it_is_killed(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
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


def test_bad_input_found_late_leaves_nothing_but_what_can_be_resumed(tmp_path):
    """Exit code 2 says that nothing was written; a checkpoint is kept whatever came after it."""
    opened = run.start(tmp_path, fresh(tmp_path))
    files.write_bytes(opened.folder / "before.json", b"{}")
    with pytest.raises(UserError), run.recording(opened):
        raise UserError("[model.lora] targets: foo is no linear module")
    assert (opened.folder.exists(), opened.lock) == (False, None)
    opened = run.start(tmp_path, fresh(tmp_path))
    checkpoint(opened, 2)
    with pytest.raises(UserError), run.recording(opened):
        raise UserError("[model.lora] targets: foo")
    assert record.read(opened.folder).error == "UserError: [model.lora] targets: foo"
    assert run.last_checkpoint(opened.folder).step == 2


def test_many_differences_are_counted(tmp_path):
    complete(tmp_path)
    more = {f"key{i}": i for i in range(9)}
    with pytest.raises(UserError, match=r"key3: null → 3; trainer\.key4: null → 4; and 4 more; choose another"):
        run.start(tmp_path, fresh(tmp_path, trainer=more))


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


def test_resuming_under_another_commit_is_written_down(tmp_path, monkeypatch):
    monkeypatch.setenv("DUET_COMMIT", "one")
    opened = run.start(tmp_path, fresh(tmp_path))
    checkpoint(opened, 2)
    crash(opened)
    monkeypatch.setenv("DUET_COMMIT", "two")
    again = run.start(tmp_path, fresh(tmp_path), resume=True)
    assert again.record.git == {"commit": "two", "dirty": None, "resumed_from": "one"}
