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


def test_rollouts_on_the_cpu_beside_a_cuda_card_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: MLX's Linux wheel is the CPU's, and a run on a GPU machine would train on the card and sample beside it."""
    monkeypatch.setattr(doctor, "available", lambda: ("cuda", "cpu"))
    if (check := doctor.mlx_device()).found.startswith("cpu"):
        assert (check.state, check.advice.split()[0]) == ("warn", "DUET_CUDA=1")
    monkeypatch.setattr(doctor, "available", lambda: ("cpu",))
    assert doctor.mlx_device().state == "ok"


# --- a Mac, as `sysctl` and `sw_vers` answer there; written down from Apple's documentation of both, no Mac was asked

SYSCTL = {
    "machdep.cpu.brand_string": "Apple M4 Max\n",
    "sysctl.proc_translated": "0\n",
    "iogpu.wired_limit_mb": "0\n",
}


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An M4 Max of 64 GiB on macOS 26.1; what `sysctl -n` prints may be changed."""
    told = dict(SYSCTL)

    def run(command: list[str], **_: object) -> object:
        assert tuple(command[:2]) == ("sysctl", "-n")
        if command[2] not in told:
            raise doctor.subprocess.CalledProcessError(1, command)
        return doctor.subprocess.CompletedProcess(command, 0, told[command[2]], "")

    monkeypatch.setattr(doctor.subprocess, "run", run)
    monkeypatch.setattr(doctor.sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("26.1", ("", "", ""), "arm64"))
    monkeypatch.setattr(doctor, "total_memory_bytes", lambda: 64 * doctor.GIB)
    return told


def on_the_mac() -> dict[str, doctor.Check]:
    return {check.name: check for check in (*doctor.machine(ROOT), *doctor.wired_limit())}


def test_a_mac_in_order(mac: dict[str, str]) -> None:
    checks = on_the_mac()
    assert checks["chip"].found.startswith("Apple M4 Max, ")
    assert checks["system"] == doctor.Check("system", "macOS 26.1, arm64")
    assert checks["memory"] == doctor.Check("memory", "64.0 GiB")
    assert checks["wired limit"] == doctor.Check("wired limit", "macOS's own, about 74% of memory: 47.4 GiB")


@pytest.mark.parametrize(
    ("limit", "state", "found", "advice"),
    [
        ("57344\n", "ok", "56.0 GiB, set by hand", ""),
        ("63488\n", "warn", "62.0 GiB, set by hand", "leaves macOS 2.0 GiB, and it wants 4: sudo sysctl"),
        ("16384\n", "warn", "16.0 GiB, set by hand", "below macOS's own, which the planner reckons with: sudo"),
        (None, "warn", "not told", "is this Apple silicon?"),
    ],
)
def test_the_wired_limit(mac: dict[str, str], limit: str | None, state: str, found: str, advice: str) -> None:
    mac.pop("iogpu.wired_limit_mb")
    if limit is not None:
        mac["iogpu.wired_limit_mb"] = limit
    check = on_the_mac()["wired limit"]
    assert (check.state, check.found) == (state, found)
    assert advice in check.advice


def test_an_old_macos_and_an_intel_python_stop_training(mac: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: under Rosetta everything installs and runs, without MPS and without Metal."""
    monkeypatch.setattr(platform, "mac_ver", lambda: ("13.6.1", ("", "", ""), "arm64"))
    system = on_the_mac()["system"]
    assert (system.state, system.advice) == ("bad", "update to macOS 14: torch's wheels need it")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("26.1", ("", "", ""), "x86_64"))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    mac["sysctl.proc_translated"] = "1\n"
    system = on_the_mac()["system"]
    assert system.state == "bad"
    assert "install one built for arm64" in system.advice


def test_a_mac_without_sysctl_is_described_all_the_same(mac: dict[str, str]) -> None:
    mac.clear()
    assert on_the_mac()["chip"].found.startswith("arm64, ")


def test_devices_that_a_mac_does_not_see_are_warned_of(mac: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    import rl.rollouts.device

    monkeypatch.setattr(doctor, "available", lambda: ("cpu",))
    monkeypatch.setattr(doctor, "describe", lambda device: "cpu: arm64")
    assert (doctor.torch_device().state, doctor.torch_device().advice[:16]) == ("warn", "torch sees no MP")
    monkeypatch.setattr(rl.rollouts.device, "describe", lambda: {"backend": "cpu", "device": "cpu", "version": "0"})
    assert (doctor.mlx_device().state, doctor.mlx_device().advice[:16]) == ("warn", "MLX sees no Meta")
    monkeypatch.setattr(doctor, "available", lambda: ("mps", "cpu"))
    monkeypatch.setattr(doctor, "describe", lambda device: f"{device}: Apple arm64, macOS 26.1, 64.0 GiB shared")
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    assert doctor.torch_device().found.endswith("64.0 GiB shared, MPS fallback on")
    metal = {"backend": "metal", "device": "applegpu_g16s", "version": "0.32.4"}
    monkeypatch.setattr(rl.rollouts.device, "describe", lambda: metal)
    assert doctor.mlx_device() == doctor.Check("mlx device", "metal: applegpu_g16s")
