"""The completions log: which rollouts are kept, that a resume agrees with an unbroken run, and that files are whole."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from online_helper import make_job
from run_helper import checkpoint, crash, fresh
from test_resume import GRPO

from rl import completions, files, models, run, train
from rl.algorithms import base, dapo, grpo, online_dpo, ppo, reinforce_pp, rloo
from rl.errors import UserError


def row(text: str = "1", **more: Any) -> dict[str, Any]:
    plain = {"group": 0, "id": "q", "prompt": "1+0=", "completion": text, "answer": "1", "reward": 1.0}
    return plain | {"rewards/exact": 1.0, "advantage": 0.5, "length": 1, "ended": True, "pair": None} | more


@pytest.mark.parametrize(("every", "period"), [(10, 1), (10, 4), (1, 1), (3, 8)])
def test_which_rollouts_are_kept(every: int, period: int) -> None:
    """Against the definition: the first, and the first at or after each multiple of `every`."""
    rollouts = range(0, 100, period)
    wanted = {min((s for s in rollouts if s >= multiple), default=None) for multiple in range(0, 100, every)} - {None}
    assert {step for step in rollouts if completions.due(every, step, period)} == wanted


def test_none_is_kept_when_off() -> None:
    assert not any(completions.due(0, step) for step in range(30))


def test_parts_become_one_file_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand steps must not be held or rewritten: a part is written once, and merged in bounded row groups."""
    monkeypatch.setattr(completions, "ROWS_A_GROUP", 4)
    for step in (11, 1, 21):
        completions.write(tmp_path, step, 0, [row(f"{step}-{i}") for i in range(3)])
    completions.write(tmp_path, 11, 1, [row("again")])
    before = completions.read(tmp_path)
    assert completions.merge(tmp_path, tmp_path / completions.FILE)
    assert pq.ParquetFile(tmp_path / completions.FILE).num_row_groups == 2 + 1 - 1
    table = completions.read(tmp_path)
    assert table.equals(before)
    assert table["step"].to_pylist() == [1] * 3 + [11] * 4 + [21] * 3
    assert table["completion"].to_pylist()[6] == "again"


def test_resume_cuts_back_and_clears_half_files(tmp_path: Path) -> None:
    opened = run.start(tmp_path, fresh(tmp_path))
    for step in (1, 3):
        completions.write(opened.folder, step, 0, [row(str(step))])
    checkpoint(opened, 2)
    half = opened.folder / completions.PARTS / ".000000003-0.parquet.1.tmp"
    half.write_bytes(b"PAR1")
    crash(opened)
    again = run.start(tmp_path, fresh(tmp_path), resume=True)
    assert completions.read(again.folder)["step"].to_pylist() == [1]
    assert not half.exists()
    files.write_bytes(run.staging(again) / "model.safetensors", b"final")
    final = run.finish(again)
    assert completions.read(final)["step"].to_pylist() == [1]
    assert not (final / completions.PARTS).exists()


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    (tmp_path / completions.FILE).write_bytes(b"PAR1 half of it")
    with pytest.raises(UserError, match=r"completions\.parquet: not whole Parquet"):
        completions.read(tmp_path)
    with pytest.raises(UserError, match="holds no completions"):
        completions.read(tmp_path / "elsewhere")


@pytest.mark.parametrize("algorithm", [grpo, rloo, dapo, reinforce_pp, ppo, online_dpo], ids=lambda m: m.__name__[14:])
def test_every_trainer_that_samples_keeps_its_rollouts(algorithm: Any, tiny_base: models.Base, tmp_path: Path) -> None:
    """Rewards, lengths and advantages are recomputed from the texts; each trainer has its own way to them."""
    name = algorithm.__name__.rpartition(".")[2]
    own = {"ppo": {"num_generations": None}, "online_dpo": {"num_generations": None}}.get(name, {})
    rollout = {"correction": "sequence_truncate"} if name == "rloo" else None
    job = make_job(tiny_base, tmp_path, name, rollout=rollout, **own)
    for key in [key for key, value in job.config.trainer.args.items() if value is None]:
        for drop in (key, "steps_per_generation"):
            job.config.trainer.args.pop(drop, None)
    object.__setattr__(job.config.run, "completions_every", 1)
    kept: list[dict[str, Any]] = []

    def hear(step: int, sampling_round: int, rows: list[dict[str, Any]]) -> None:
        kept.extend({"step": step, "round": sampling_round, **row} for row in rows)

    job.hooks = base.Hooks(completions=hear)
    algorithm.train(job)
    steps = {row["step"] for row in kept}
    assert 1 in steps
    assert steps <= {1, 2}
    if name != "ppo":  # one of its rollouts serves several steps
        assert steps == {1, 2}
    asked = {row["id"]: row for row in job.train}
    for kept_row in kept:
        assert kept_row["reward"] == kept_row["rewards/own"] == kept_row["completion"].count("7")
        assert kept_row["prompt"] == asked[kept_row["id"]]["prompt"]
        assert 1 <= kept_row["length"] <= 3
        assert kept_row["ended"] or kept_row["length"] == 3
        assert len(kept_row["completion"]) <= kept_row["length"]
    group = 8 if name == "online_dpo" else 1 if name == "ppo" else 4
    for first in range(0, len(kept), group):
        part = kept[first : first + group]
        assert len({(r["step"], r["round"], r["group"], r["id"]) for r in part}) == 1
        if name == "grpo":
            mean = sum(r["reward"] for r in part) / 4
            assert all((r["advantage"] > 0) == (r["reward"] > mean + 1e-6) for r in part)
        if name == "online_dpo":
            sides = {r["pair"]: r["reward"] for r in part}
            best, worst = max(r["reward"] for r in part), min(r["reward"] for r in part)
            assert (sides.get("chosen", best), sides.get("rejected", worst)) == (best, worst)
            assert ("chosen" in sides) == (best > worst)
    if name not in ("online_dpo", "grpo"):
        assert any(row["advantage"] for row in kept)


def test_a_resumed_run_keeps_the_same_completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unbroken run's table, row for row, from one that was killed after a rollout its checkpoint does not know."""
    monkeypatch.chdir(tmp_path)
    settings = "max_steps = 6\nsave_steps = 2"
    for name in ("whole", "killed"):
        text = GRPO.format(name=name, trainer=settings).replace("[model]", "completions_every = 2\n[model]", 1)
        Path(f"{name}.toml").write_text(text)
    train.main(Path("whole.toml"))
    real = completions.write

    def killed(folder: Path, step: int, sampling_round: int, rows: Any) -> None:
        real(folder, step, sampling_round, rows)
        if step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(completions, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        train.main(Path("killed.toml"))
    monkeypatch.setattr(completions, "write", real)
    left = Path("models/checkpoints/killed")
    assert completions.read(left)["step"].unique().to_pylist() == [1, 3, 5]
    train.main(Path("killed.toml"), resume=True)
    whole, resumed = (completions.read(Path("models/final") / name) for name in ("whole", "killed"))
    assert whole["step"].unique().to_pylist() == [1, 3, 5]
    assert resumed.equals(whole)
