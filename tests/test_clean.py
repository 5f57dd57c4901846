"""`nox -s clean` removes what can be made again, and nothing else."""

import fcntl
from pathlib import Path

import pytest

from rl import clean

CACHES = {"rl/__pycache__", ".ruff_cache", "build", "evals/tables"}
RUNS = {"models/base/tiny", "models/checkpoints/b", "models/final/a", "evals/results/a"}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for folder in (*CACHES, *RUNS, "data/raw/set", ".venv/lib/__pycache__", "rl"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "file").write_bytes(b"x" * 1000)
    (tmp_path / "models/checkpoints/b/.lock").touch()
    (tmp_path / "models/final/.gitkeep").touch()
    (tmp_path / "evals/results/a/.heldout.json.7.tmp").write_bytes(b"half")
    return tmp_path


def left(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*")}


def test_caches_go_and_runs_stay(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "models/final/a/run.json").touch()
    clean.main(root=checkout)
    assert not CACHES & left(checkout)
    assert left(checkout) >= RUNS | {"rl/file", "data/raw/set/file", ".venv/lib/__pycache__/file"}
    assert "evals/results/a/.heldout.json.7.tmp" not in left(checkout)
    out = capsys.readouterr().out
    assert "freed 0.0 MB" in out
    assert "kept the runs in models/final; --all removes them too" in out


def test_everything_leaves_downloads_and_what_git_keeps(checkout: Path) -> None:
    assert clean.clean(checkout, everything=True, dry_run=False, say=print) == 8000 + 4
    assert not RUNS & left(checkout)
    assert left(checkout) >= {"data/raw/set/file", ".venv/lib/__pycache__/file", "models/final/.gitkeep", "rl/file"}


def test_dry_run_removes_nothing_and_tells_the_same_sum(checkout: Path) -> None:
    before, told = left(checkout), []
    would = clean.clean(checkout, everything=True, dry_run=True, say=told.append)
    assert left(checkout) == before
    assert clean.clean(checkout, everything=True, dry_run=False, say=print) == would
    assert {line.split()[2] for line in told} == CACHES | RUNS


def test_a_run_in_progress_stays(checkout: Path) -> None:
    """Trap: removing the folder under a running trainer loses its checkpoints and its lock."""
    told: list[str] = []
    with (checkout / "models/checkpoints/b/.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        clean.clean(checkout, everything=True, dry_run=False, say=told.append)
        assert (checkout / "models/checkpoints/b/file").exists()
    assert "in use, stays: models/checkpoints/b" in told


def test_a_link_goes_and_its_target_stays(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Trap: a base linked to a shared folder of models must not be emptied."""
    shared = tmp_path_factory.mktemp("shared")
    (shared / "model.safetensors").write_bytes(b"weights")
    (checkout / "models/base/linked").symlink_to(shared)
    clean.clean(checkout, everything=True, dry_run=False, say=print)
    assert not (checkout / "models/base/linked").is_symlink()
    assert (shared / "model.safetensors").read_bytes() == b"weights"
