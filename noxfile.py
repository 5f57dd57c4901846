"""The front door: `nox -l` lists what can be done, `nox -s NAME -- ARGUMENTS` does it.

All sessions share the project's `.venv`, which `uv sync --locked` first makes equal to uv.lock (a tenth of a second
when nothing changed). A virtual environment for each would be several copies of torch.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "tests"]


def uv_binary(session: nox.Session) -> str:
    """The uv that came with `nox[uv]`, which need not be on PATH; else one that is."""
    if importlib.util.find_spec("uv") is not None:
        import uv

        return uv.find_uv_bin()
    found = shutil.which("uv")
    if found is None:
        session.error('uv is missing; install nox with it: python3 -m pip install "nox[uv]==2026.10.20"')
    return found


def backend() -> list[str]:
    """Which of MLX's backends is installed on Linux: the CPU's, or with DUET_CUDA=1 in the environment CUDA's."""
    return ["--no-group", "cpu", "--group", "cuda"] if os.environ.get("DUET_CUDA") == "1" else []


def python(session: nox.Session, *args: str, offline: bool = False, threads: int | None = None) -> None:
    """Run `.venv`'s Python, after making `.venv` equal to the lock.

    Both timeouts are None because Nox otherwise kills a child half a second after Ctrl-C, before it has saved.
    """
    # the interpreter that runs Nox, so that a machine with Python 3.13 and pip needs no download of another
    interpreter = ["--python", sys.executable] if sys.version_info[:2] == (3, 13) else []
    sync = [uv_binary(session), "sync", "--locked", *interpreter, *backend()]
    # silent where nothing is to do; a first install shows its gigabytes
    if subprocess.run([*sync, "--check", "--quiet"], stderr=subprocess.DEVNULL).returncode != 0:
        session.run(*sync, external=True)
    env = {"TOKENIZERS_PARALLELISM": "false"} | ({"HF_HUB_OFFLINE": "1"} if offline else {})
    env |= {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    venv = Path(os.environ.get("UV_PROJECT_ENVIRONMENT", ".venv"))
    session.run(
        str(venv / "bin" / "python"), *args, external=True, env=env, interrupt_timeout=None, terminate_timeout=None
    )


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff."""
    python(session, "-m", "ruff", "check")
    python(session, "-m", "ruff", "format", "--check")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests, offline: nox -s tests -- tests/test_lock.py"""
    # tiny models gain nothing from threads that wait for each other, two processes halve the time
    python(
        session,
        "-m",
        "pytest",
        "-n",
        "2",
        "--dist",
        "loadfile",
        "--no-loadscope-reorder",
        *session.posargs,
        offline=True,
        threads=1,
    )


@nox.session
def train(session: nox.Session) -> None:
    """Train what a config describes: nox -s train -- configs/grpo.toml"""
    python(session, "-m", "rl", "train", *session.posargs)


@nox.session
def check(session: nox.Session) -> None:
    """Say what is wrong with a config, or print every setting it resolves to: nox -s check -- configs/grpo.toml"""
    python(session, "-m", "rl", "check", *session.posargs)


@nox.session(name="eval")
def evaluate(session: nox.Session) -> None:
    """Measure runs and other models with lm-eval and write tables: nox -s eval -- RUN --tasks gym_gcd,arc_easy"""
    python(session, "-m", "evals", *session.posargs)


@nox.session
def mps_smoke(session: nox.Session) -> None:
    """Hold this machine's device against references: arithmetic, training steps, trainer beside sampler, memory."""
    python(session, "-m", "rl", "smoke", *session.posargs)


@nox.session
def doctor(session: nox.Session) -> None:
    """Show versions, devices, memory and disk, and what to do about each."""
    python(session, "-m", "rl", "doctor", *session.posargs)


@nox.session
def plan(session: nox.Session) -> None:
    """Predict memory and time of a config: nox -s plan -- configs/grpo.toml --chip m4-max --memory 64GB"""
    python(session, "-m", "rl", "plan", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Time rollouts, sync and a GRPO step against what they replace: nox -s bench -- --shape smollm2"""
    python(session, "-m", "rl", "bench", *session.posargs)


@nox.session
def export(session: nox.Session) -> None:
    """Write a run as other tools open it, and check it: nox -s export -- tiny-grpo --to mlx"""
    python(session, "-m", "rl", "export", *session.posargs)


@nox.session
def chat(session: nox.Session) -> None:
    """Talk to a finished run, and to what it came from (/base, /both): nox -s chat -- RUN"""
    python(session, "-m", "rl", "chat", *session.posargs)


@nox.session
def samples(session: nox.Session) -> None:
    """Write a run's held-out answers before and after training as a page: nox -s samples -- RUN"""
    python(session, "-m", "rl", "samples", *session.posargs)


@nox.session
def completions(session: nox.Session) -> None:
    """Read what a run said while it trained: nox -s completions -- RUN --reward '>0.5', or --watch"""
    python(session, "-m", "rl", "completions", *session.posargs)


@nox.session
def paper(session: nox.Session) -> None:
    """Make a study's runs, judge its claims, set its report: nox -s paper -- papers/over-optimisation --check"""
    python(session, "-m", "papers", *session.posargs)


@nox.session
def clean(session: nox.Session) -> None:
    """Remove caches and generated tables, never a run: nox -s clean -- --dry-run"""
    python(session, "-m", "rl", "clean", *session.posargs)
