"""`nox -s doctor`: what it finds wrong, and what it advises."""

import platform
from collections import namedtuple
from pathlib import Path

import pytest

from rl import doctor
from rl.errors import RunFailed

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = """
[project]
dependencies = ["rich==1.0", "no-such-package==2.0", "other-system==3.0 ; sys_platform == 'never'"]
[dependency-groups]
dev = ["pytest==9.2.0"]
"""
LOCK = """
[[package]]
name = "rich"
version = "1.0"
[[package]]
name = "no-such-package"
version = "2.0"
[[package]]
name = "pytest"
version = "{pytest}"
"""


def test_versions_are_compared_with_the_lock(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    (tmp_path / "uv.lock").write_text(LOCK.format(pytest=pytest.__version__))
    checks = {check.name: check for check in doctor.packages(tmp_path / "pyproject.toml", tmp_path / "uv.lock")}
    assert checks.keys() == {"rich", "no-such-package", "pytest", "lock"}  # the other system's package is not asked for
    assert {name: check.state for name, check in checks.items()} == {
        "rich": "warn",
        "no-such-package": "bad",
        "pytest": "ok",
        "lock": "warn",
    }
    assert checks["no-such-package"].found == "absent"
    assert checks["lock"].found.startswith("1 packages as locked, 1 not: rich ")
    assert "uv sync --locked" in checks["rich"].advice


def test_this_machine_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    checks = {check.name: check for check in doctor.examine(ROOT)}
    assert checks["python"].found == platform.python_version()
    assert checks["torch device"].found.split(":")[0] in ("mps", "cuda", "cpu")
    assert checks["mlx device"].found.split(":")[0] in ("metal", "cuda", "cpu")
    assert checks["chip"].found.split(", ")[-1].endswith(" cores")


def test_little_room_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(10, 9, 2 * doctor.GIB)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(doctor, "total_memory_bytes", lambda: 2 * doctor.GIB)
    checks = {check.name: check for check in doctor.machine(ROOT)}
    assert (checks["disk"].state, checks["disk"].found) == ("warn", "2.0 GiB free")
    assert (checks["memory"].state, checks["memory"].found) == ("warn", "2.0 GiB")
    assert "nox -s clean" in checks["disk"].advice


def test_what_stops_training_fails_the_session(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A broken torch must be a line in the table, not a traceback before it."""

    def broken() -> tuple[str, ...]:
        raise ImportError("libtorch.so: not found")

    monkeypatch.setattr(doctor, "available", broken)
    monkeypatch.setattr(doctor, "packages", lambda *_: [])
    with pytest.raises(RunFailed, match="1 to put right before training: torch device"):
        doctor.main()
    assert "libtorch.so" in capsys.readouterr().out
