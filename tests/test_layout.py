"""Rules of the house that no single module can check: who imports what, file sizes, what tracked text may name."""

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = ("rl", "evals", "papers", "tests")
UNREAD = {"uv.lock"}  # the lock names the registry it was made from


@cache
def tracked() -> tuple[str, ...]:
    """Files of the repository, also those not committed yet. A copy without git has no ignored files to leave out."""
    asked = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(asked, capture_output=True, text=True)
    if done.returncode == 0:
        names = [name for name in done.stdout.split("\0") if name]
    else:
        tops = (*CODE, "configs", ".ci", ".github")
        names = [path.relative_to(ROOT).as_posix() for top in tops for path in (ROOT / top).rglob("*")]
        names += [path.name for path in ROOT.iterdir()]
    return tuple(sorted(name for name in names if (ROOT / name).is_file() and "__pycache__" not in name))


def text(name: str) -> str | None:
    """A tracked file's text, None for pictures and the like."""
    try:
        return (ROOT / name).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def python_files(*tops: str) -> list[str]:
    return [name for name in tracked() if name.endswith(".py") and name.split("/")[0] in tops]


def imports(name: str) -> Iterator[str]:
    """Modules a file imports anywhere, also inside functions and by name through importlib."""
    for node in ast.walk(ast.parse(text(name) or "", filename=name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__", "importorskip"):
                yield str(node.args[0].value)


def importers(top: str, *where: str) -> set[str]:
    """Files below `where` that import the top-level package `top`."""
    return {name for name in python_files(*where) if any(module.split(".")[0] == top for module in imports(name))}


def test_only_the_rollouts_import_mlx() -> None:
    """Trainer code that touched MLX could not run without it, and `[rollout] engine = "torch"` promises that."""
    allowed = {name for name in python_files("rl") if name.startswith("rl/rollouts/")} | {"evals/mlx_model.py"}
    for package in ("mlx", "mlx_lm"):
        assert importers(package, "rl", "evals") <= allowed
    assert importers("mlx", "rl")  # the check would pass on an empty list of files


def test_only_the_algorithms_import_trl() -> None:
    assert {name.split("/")[1] for name in importers("trl", "rl")} <= {"algorithms"}
    assert not importers("trl", "evals")
    assert importers("trl", "rl")


def test_rollouts_know_nothing_of_the_trainer() -> None:
    rollouts = [name for name in python_files("rl") if name.startswith("rl/rollouts/")]
    assert not [name for name in rollouts if any(module.startswith("rl.algorithms") for module in imports(name))]


def test_rl_never_imports_evals() -> None:
    """evals reads run folders; the other direction would make a run depend on how it is measured."""
    assert not importers("evals", "rl")


def test_no_file_is_over_400_lines() -> None:
    long = {name: n for name in python_files(*CODE) if (n := len((text(name) or "").splitlines())) > 400}
    assert not long


def test_code_parses_on_python_3_12() -> None:
    """The GPU machines of the measurements run 3.12."""
    for name in python_files(*CODE):
        ast.parse(text(name) or "", filename=name, feature_version=(3, 12))


# written in halves, so that this file passes its own test
HOSTS = ("py" + "pi.org", "python" + "hosted.org", "ana" + "conda.org", "down" + "load.pytorch.org", "npm" + "js.org")
MACHINE = re.compile(r"(?<![\w.~<{}/-])/(?:ro" + r"ot|wo" + r"rk|ho" + r"me|Us" + r"ers|o" + r"pt|m" + r"nt)/\w")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('x = "/ro' + 'ot/a"', True),
        ("see /Us" + "ers/me/duet", True),
        ("../shared/work/x", False),
        ("/dev/null", False),
    ],
)
def test_machine_paths_are_recognised(line: str, found: bool) -> None:
    assert bool(MACHINE.search(line)) == found


def test_no_tracked_text_names_a_registry_or_a_machine() -> None:
    """A path of one machine in a config or a published result breaks on every other."""
    wrong = []
    for name in tracked():
        content = text(name)
        if content is None or name in UNREAD:
            continue
        for number, line in enumerate(content.splitlines(), 1):
            if any(host in line for host in HOSTS) or MACHINE.search(line):
                wrong.append(f"{name}:{number}: {line.strip()[:80]}")
    assert not wrong


def test_changelog_is_kept_in_its_form() -> None:
    content = text("CHANGELOG.md") or ""
    assert "## [Unreleased]" in content
    sections = set(re.findall(r"^### (.+)$", content, re.MULTILINE))
    assert sections <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}  # keepachangelog.com


def test_licence_is_apache_2() -> None:
    content = text("LICENSE") or ""
    assert "Apache License" in content
    assert "Version 2.0, January 2004" in content
    assert "END OF TERMS AND CONDITIONS" in content


# --- Nox


def test_every_nox_session_says_what_it_does() -> None:
    """`nox -l` is the help: a session without a docstring is a bare name there."""
    tree = ast.parse(text("noxfile.py") or "")
    sessions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list]
    assert {node.name for node in sessions} == {
        *("lint", "tests", "train", "check", "evaluate", "mps_smoke", "doctor", "clean", "bench", "plan"),
        *("export", "completions", "paper", "chat", "samples"),
    }
    assert all((ast.get_docstring(node) or "").count("\n") == 0 and ast.get_docstring(node) for node in sessions)


def test_nox_lets_a_run_save_on_ctrl_c(tmp_path: Path) -> None:
    """Trap: Nox kills a child half a second after Ctrl-C unless both of its timeouts are None."""
    import os
    import signal
    import sys
    import time

    (tmp_path / "noxfile.py").write_text(text("noxfile.py") or "", encoding="utf-8")
    (tmp_path / "rl").mkdir()
    (tmp_path / "rl" / "__main__.py").write_text(
        "import sys, time\n"
        "try:\n"
        "    open('training', 'w').close()\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    time.sleep(1.5)\n"
        "    open('saved', 'w').close()\n"
        "    sys.exit(130)\n"
    )
    # an environment that is there, and a uv that finds nothing to do
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "uv.py").write_text("def find_uv_bin():\n    return 'true'\n")
    command = [sys.executable, "-m", "nox", "-s", "train"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    child = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        for _ in range(200):
            if (tmp_path / "training").exists():
                break
            time.sleep(0.1)
        assert (tmp_path / "training").exists()
        os.killpg(child.pid, signal.SIGINT)  # as a terminal does: Nox and the run both get it
        output, _ = child.communicate(timeout=20)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
    assert (tmp_path / "saved").exists(), output.decode()
    assert child.returncode != 0
