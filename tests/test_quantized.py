"""The quantized base on disk: made once, by one process or two, and never used when its files have changed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rl import models
from rl.errors import UserError
from rl.rollouts import quantized


def build(base: models.Base, out: Path, source: str | None = None) -> str:
    return quantized.build(base.path, None, 4, 32, out, source=source or base.sha256)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were written, in order."""
    written: list[Path] = []
    real = quantized._write

    def write(folder: Path, *args: Any) -> None:
        written.append(folder)
        real(folder, *args)

    monkeypatch.setattr(quantized, "_write", write)
    return written


def test_it_is_made_once_and_its_record_holds_the_hashes_of_both_files(
    tiny_base: models.Base, tmp_path: Path, writes: list[Path]
) -> None:
    out = tmp_path / "q"
    digest = build(tiny_base, out)
    assert build(tiny_base, out) == digest
    assert len(writes) == 1
    record = json.loads((out / "base.json").read_text())
    assert record == {
        "source": tiny_base.sha256,
        "bits": 4,
        "group_size": 32,
        "sha256": models.files.sha256_file(out / "mlx" / "model.safetensors"),
        "dequantized_sha256": models.files.sha256_file(out / "model.safetensors"),
    }
    assert record["sha256"] == digest
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


@pytest.mark.parametrize("file", ["mlx/model.safetensors", "model.safetensors", "base.json"])
@pytest.mark.parametrize("damage", ["cut", "one bit", "gone"])
def test_a_damaged_file_is_made_again_with_the_same_bytes(
    tiny_base: models.Base, tmp_path: Path, file: str, damage: str
) -> None:
    """Trap: the record's hash alone says nothing; torch would train on values that the sampler does not have."""
    out = tmp_path / "q"
    digest = build(tiny_base, out)
    path, whole = out / file, (out / file).read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[:-8] if damage == "cut" else whole[:-1] + bytes([whole[-1] ^ 1]))
    assert build(tiny_base, out) == digest
    assert path.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_other_weights_of_the_same_name_replace_it(tiny_base: models.Base, tmp_path: Path, writes: list[Path]) -> None:
    build(tiny_base, tmp_path / "q")
    build(tiny_base, tmp_path / "q", source="other")
    assert json.loads((tmp_path / "q" / "base.json").read_text())["source"] == "other"
    assert len(writes) == 2


@pytest.mark.parametrize("before", ["nothing", "damaged"])
def test_of_two_processes_at_once_the_second_keeps_what_the_first_made(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """Trap: with one temporary name for all, the second process empties the folder the first is writing."""
    out = tmp_path / "q"
    if before == "damaged":
        build(tiny_base, out)
        (out / "model.safetensors").write_bytes(b"")
    real, folders, others = quantized._write, [], []

    def write(folder: Path, *args: Any) -> None:
        folders.append(folder)
        real(folder, *args)
        if len(folders) == 1:  # while this process writes, another one starts and finishes
            with monkeypatch.context() as other:
                other.setattr(os, "getpid", lambda: 4_000_000)
                others.append(build(tiny_base, out))
            others.append((out / "base.json").stat().st_ino)

    monkeypatch.setattr(quantized, "_write", write)
    assert build(tiny_base, out) == others[0]
    assert len(folders) == len(set(folders)) == 2
    assert (out / "base.json").stat().st_ino == others[1]  # the first one's file still, not a copy put over it
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_what_a_killed_process_of_the_same_number_left_is_no_obstacle(tiny_base: models.Base, tmp_path: Path) -> None:
    left = tmp_path / f".q.{os.getpid()}.tmp" / "mlx"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    build(tiny_base, tmp_path / "q")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("file", ["model.safetensors", "mlx/model.safetensors", "mlx/config.json"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """Leans on mlx 0.32.4: a write that fails is a RuntimeError "[write] Unable to write ..."."""
    real_write, real_json = quantized._write, quantized.write_json

    def write(folder: Path, *args: Any) -> None:
        if file.endswith(".safetensors"):
            (folder / file).symlink_to("/dev/full")
        real_write(folder, *args)

    def write_json(path: Path, value: Any) -> None:
        if path.as_posix().endswith(file):
            with open("/dev/full", "wb", buffering=0) as full:
                full.write(b"x")
        real_json(path, value)

    monkeypatch.setattr(quantized, "_write", write)
    monkeypatch.setattr(quantized, "write_json", write_json)
    with pytest.raises(UserError, match="q: the disk is full while writing the quantized base: free some space"):
        build(tiny_base, tmp_path / "q")
    assert list(tmp_path.iterdir()) == []
