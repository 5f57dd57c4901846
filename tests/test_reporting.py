"""`[trainer] report_to`: known names, one line for a package that is not there, and metrics that arrive."""

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from online_helper import make_job
from test_cli import GOOD, python

from rl import config, models, record, reporting
from rl.algorithms import base, grpo
from rl.errors import UserError


def test_the_names_are_those_of_transformers() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(reporting.TRACKERS) == set(INTEGRATION_TO_CALLBACK)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ('"tensorbord"', "did you mean 'tensorboard'?"),
        ('["wandb", "all"]', "found 'all'"),
        ('"wandb"', None),
        ('["trackio", "tensorboard"]', None),
        ('"all"', None),
        ('"none"', None),
    ],
)
def test_an_unknown_tracker_is_refused(tmp_path: Path, value: str, said: str | None) -> None:
    path = tmp_path / "x.toml"
    path.write_text(GOOD + f"report_to = {value}\n")
    if said is None:
        config.load(path)
        return
    with pytest.raises(UserError) as error:
        config.load(path)
    assert "[trainer] report_to" in str(error.value)
    assert said in str(error.value)


def test_a_missing_package_is_one_line_before_anything_is_loaded(tmp_path: Path) -> None:
    """Nothing is written either: a run that fails after its base was made would leave that behind."""
    (tmp_path / "x.toml").write_text(GOOD + 'report_to = "wandb"\n')
    hide = (
        "import importlib.util as u, sys; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'wandb' else real(name, *a)\n"
        "from rl.__main__ import main\n"
        "code = main(['train', 'x.toml'])\n"
        "loaded = [name for name in ('mlx', 'trl', 'torch') if name in sys.modules]\n"
        "print(code, loaded)"
    )
    done, _ = python(tmp_path, "-c", hide)
    assert done.stdout.split() == ["2", "[]"]
    assert done.stderr.count("\n") == 1
    assert "[trainer] report_to: 'wandb' is not installed here: run `uv pip install wandb`" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.toml"]


def test_report_to_is_no_input_of_a_run() -> None:
    """A run that also tells a tracker is the same run, and need not be trained again."""
    plain = record.Record(
        name="x", config={"run": {"name": "x"}, "trainer": {"lr": 1}}, device="cpu", seed=0, base={}, data={}
    )
    told = record.Record(
        name="x",
        config={"run": {"name": "y", "completions_every": 3}, "trainer": {"lr": 1, "report_to": "wandb"}},
        device="cpu",
        seed=0,
        base={},
        data={},
    )
    assert record.differences(plain, told) == []


class Heard:
    """Stands where trackio is imported: notes what transformers' callback tells it."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.started: dict[str, Any] = {}
        self.finished = 0
        self.config: dict[str, Any] = {}
        self.context_vars = types.SimpleNamespace(
            **dict.fromkeys(("current_space_id", "current_run"), types.SimpleNamespace(get=lambda: None))
        )

    def init(self, **given: Any) -> None:
        self.started = given

    def log(self, row: dict[str, Any], **_: Any) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.finished += 1


def test_a_tracker_hears_what_the_run_logs(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own callback, with a package of our own in the tracker's place; the rollout's speed is ours."""
    from transformers.integrations import integration_utils

    class Config(dict):
        def update(self, other: dict[str, Any], **_: Any) -> None:
            super().update(other)

    heard = Heard()
    heard.config = Config()
    module = types.ModuleType("trackio")
    for name in ("init", "log", "finish", "config", "context_vars"):
        setattr(module, name, getattr(heard, name))
    module.__spec__ = importlib.util.spec_from_loader("trackio", None)
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.setattr("trl.extras.profiling.trackio", module, raising=False)  # imported there where it is installed
    monkeypatch.setattr(integration_utils, "is_trackio_available", lambda: True)
    job = make_job(tiny_base, tmp_path, "grpo", report_to=["trackio"], run_name="mine")
    rows: list[dict[str, float]] = []
    job.hooks = base.Hooks(metrics=lambda step, values: rows.append(values))
    grpo.train(job)
    assert heard.started["name"] == "mine"
    assert heard.finished == 1
    steps = [row for row in heard.rows if "train/reward" in row]
    assert [row["train/reward"] for row in steps] == [row["reward"] for row in rows]
    assert [row["train/rollout/tokens_per_s"] for row in steps] == [row["rollout/tokens_per_s"] for row in rows]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed: group track")
def test_tensorboard_writes_into_the_run(tiny_base: models.Base, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = make_job(tiny_base, tmp_path, "grpo", report_to="tensorboard")
    rows: list[dict[str, float]] = []
    job.hooks = base.Hooks(metrics=lambda step, values: rows.append(values))
    grpo.train(job)
    events = EventAccumulator(str(job.folder / reporting.EVENTS)).Reload()
    assert [e.value for e in events.Scalars("train/reward")] == pytest.approx([row["reward"] for row in rows])
    assert [e.step for e in events.Scalars("train/reward")] == [1, 2]
