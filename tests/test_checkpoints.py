"""Checkpoints count only when whole, and a full disk says what is safe."""

import errno
from types import SimpleNamespace

import pytest
from run_helper import checkpoint, fresh

from rl import checkpoints, files, record, run
from rl.errors import RunFailed


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


def test_one_guard_inside_another_keeps_the_name_of_the_file(tmp_path):
    with (
        pytest.raises(RunFailed, match=r"^metrics\.jsonl: the disk is full"),
        checkpoints.disk_guard(tmp_path),
        checkpoints.disk_guard(tmp_path),
    ):
        full_disk()
