"""uv.lock installs without a compiler on both supported platforms, and the pins agree with each other."""

import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags, mac_platforms
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
PYTHON = (3, 13)
GLIBC = 35  # Ubuntu 22.04, Debian 12 and later: mlx asks for it, all others are content with 2.28

# pure Python, so pip's own setuptools builds them in a second without a compiler; none has ever had a wheel
SOURCE_ONLY = {"cellpylib", "rouge-score", "sqlitedict", "word2number", "zss"}

MAC = {"sys_platform": "darwin", "platform_machine": "arm64", "platform_system": "Darwin", "os_name": "posix"}
LINUX = {"sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux", "os_name": "posix"}
CUDA = {**LINUX, "group": "cuda"}  # in place of cpu


@cache
def lock() -> dict[str, Any]:
    return tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))


@cache
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def tags(system: str, glibc: int = GLIBC) -> set[Tag]:
    """Wheel tags that install on CPython 3.13 there: macOS 14 on arm64, or glibc 2.<glibc> on x86-64."""
    if system == "darwin":
        platforms = list(mac_platforms((14, 0), "arm64"))
    else:
        platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(glibc, 4, -1)]
        platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
    return {*cpython_tags(PYTHON, platforms=platforms), *compatible_tags(PYTHON, "cp313", platforms)}


def needed(environment: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Locked packages that are installed there: a walk from the project along markers and extras."""
    mine, others = environment.get("group", "cpu"), {"cpu", "cuda"}
    there = {**environment, "python_version": "3.13", "python_full_version": "3.13.0"}
    there["extra"] = f"group-4-duet-{mine}"  # how uv's markers tell groups apart that exclude each other
    there |= {"implementation_name": "cpython", "platform_python_implementation": "CPython"}
    packages = {package["name"]: package for package in lock()["package"]}
    assert len(packages) == len(lock()["package"])  # one version of each: a fork would need telling apart
    groups = packages["duet"]["dev-dependencies"]
    todo = list(_wanted(packages["duet"], there))
    todo += [edge for name, edges in groups.items() if name == mine or name not in others for edge in edges]
    todo = [edge for edge in todo if "marker" not in edge or Marker(edge["marker"]).evaluate(there)]
    found: dict[str, dict[str, Any]] = {}
    seen: set[tuple[str, str]] = set()
    while todo:
        edge = todo.pop()
        package = packages[edge["name"]]
        found[edge["name"]] = package
        for extra in ("", *edge.get("extra", [])):
            if (edge["name"], extra) not in seen:
                seen.add((edge["name"], extra))
                todo += _wanted(package, there, extra)
    return found


def _wanted(package: dict[str, Any], there: dict[str, str], extra: str = "") -> Iterator[dict[str, Any]]:
    edges = package.get("optional-dependencies", {}).get(extra, []) if extra else package.get("dependencies", [])
    return (edge for edge in edges if "marker" not in edge or Marker(edge["marker"]).evaluate(there))


def without_wheel(environment: dict[str, str], usable: set[Tag]) -> set[str]:
    """Names of the packages needed there of which no wheel is usable."""
    found = set()
    for name, package in needed(environment).items():
        names = [wheel["url"].rsplit("/", 1)[-1].replace("%2B", "+") for wheel in package.get("wheels", [])]
        if not any(parse_wheel_filename(wheel)[3] & usable for wheel in names):
            found.add(name)
    return found


@pytest.mark.parametrize("environment", [MAC, LINUX, CUDA], ids=["macos14-arm64", "linux-x86_64", "linux-cuda"])
def test_every_package_has_a_usable_wheel(environment: dict[str, str]) -> None:
    """Trap: a lock made on Linux resolves for macOS too, and only fails there, wanting a compiler."""
    assert without_wheel(environment, tags(environment["sys_platform"])) == SOURCE_ONLY


def test_only_mlx_needs_a_newer_linux() -> None:
    """What the README says of Linux rests on this: without MLX, glibc 2.28 would do."""
    assert without_wheel(LINUX, tags("linux", glibc=28)) == SOURCE_ONLY | {"mlx", "mlx-cpu"}


def test_source_only_packages_are_hashed_sdists() -> None:
    packages = {package["name"]: package for package in lock()["package"]}
    for name in SOURCE_ONLY:
        assert packages[name]["sdist"]["hash"].startswith("sha256:")


def test_the_walk_tells_the_platforms_apart() -> None:
    """The wheel test would pass on an empty walk: these are the packages that must, or must not, be there."""
    mac, linux, cuda = needed(MAC), needed(LINUX), needed(CUDA)
    assert {"mlx-metal", "mlx", "torch", "uv", "lm-eval"} <= mac.keys()
    assert {"mlx-cpu", "mlx", "torch", "uv", "triton", "nvidia-cudnn-cu13"} <= linux.keys()
    assert not {"mlx-cpu", "triton", "nvidia-cudnn-cu13"} & mac.keys()
    assert "mlx-metal" not in linux
    assert linux.keys() - cuda.keys() == {"mlx-cpu"}  # both would write one library
    assert cuda.keys() - linux.keys() == {"mlx-cuda-13"}
    assert (mac.keys() | linux.keys() | cuda.keys()) == {package["name"] for package in lock()["package"]} - {"duet"}


def test_lock_is_for_these_platforms_and_this_python() -> None:
    assert lock()["requires-python"] == project()["project"]["requires-python"] == "==3.13.*"
    assert (ROOT / ".python-version").read_text().strip() == "3.13"
    supported = [Marker(marker) for marker in lock()["supported-markers"]]
    assert [sum(marker.evaluate(there) for marker in supported) for there in (MAC, LINUX)] == [1, 1]


def direct() -> list[Requirement]:
    groups = project()["dependency-groups"].values()
    return [Requirement(line) for line in (*project()["project"]["dependencies"], *(x for g in groups for x in g))]


def test_direct_dependencies_are_pinned_to_what_is_locked() -> None:
    versions = {package["name"]: package["version"] for package in lock()["package"]}
    for requirement in direct():
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", requirement
        assert specifier.version == versions[requirement.name]


def test_what_the_project_is_built_on_is_there_and_bitsandbytes_is_not() -> None:
    """bitsandbytes does not run on MPS: quantization is MLX's."""
    assert {requirement.name for requirement in direct()} >= {
        *("nox", "torch", "transformers", "peft", "trl", "accelerate", "mlx", "mlx-lm", "datasets", "lm-eval"),
        *("evaluate", "pytest", "ruff"),
    }
    names = {package["name"] for package in lock()["package"]}
    assert not names & {"bitsandbytes", "pycosat"}


def test_nox_is_the_same_version_wherever_it_is_named() -> None:
    """Trap: the README's command installs another nox than CI tests."""
    (pinned,) = [str(r.specifier).removeprefix("==") for r in direct() if r.name == "nox"]
    for name in ("README.md", ".ci/run", "noxfile.py"):
        found = re.findall(r"nox\[uv\]==([0-9.]*[0-9])", (ROOT / name).read_text(encoding="utf-8"))
        assert found, name
        assert set(found) == {pinned}, name
