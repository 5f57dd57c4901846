"""What a run has in hand once its rows and its base are there, and how it trains: shared by every kind of run."""

import importlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl import completions, processes
from rl import run as runs
from rl.checkpoints import disk_guard
from rl.config import Config
from rl.display import Display
from rl.errors import RunFailed
from rl.rewards import RewardFunction, Score

if TYPE_CHECKING:
    import torch

    from rl.algorithms.base import Job, Outcome
    from rl.data import Dataset
    from rl.start import Start
    from rl.tools.toolbox import Toolbox

ROOT = Path()  # commands run in the repository's root; relative paths keep result folders movable


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """`rewards` and `grade` are those of the config; `folders` are those of what the run builds on, by role."""

    config: Config
    opened: runs.OpenRun
    dataset: "Dataset"
    device: "torch.device"
    begin: "Start"
    tokenizer: Any
    display: Display
    rewards: Sequence[RewardFunction]
    grade: Callable[[Any, Mapping[str, Any]], Score]
    folders: Mapping[str, Path]
    toolbox: "Toolbox | None" = None

    @property
    def origin(self) -> dict[str, Any]:
        """Whose completions sampled pairs are: the run or the base that this one starts from."""
        parent = next((p["name"] for p in self.opened.record.parents if p["role"] == "model.from"), None)
        return {"run": parent, **self.opened.record.base}


def job(run: Prepared, **more: Any) -> "Job":
    """What an algorithm is given: the run's own part, and `more`."""
    from rl.algorithms import base as algorithms
    from rl.algorithms import seam

    return algorithms.Job(
        config=run.config,
        folder=run.opened.folder,
        device=run.device,
        tokenizer=run.tokenizer,
        train=run.dataset.train,
        stop_ids=seam.stop_ids(run.tokenizer, run.config.rollout.stop),
        resume=run.opened.checkpoint.path if run.opened.checkpoint else None,
        tokens=run.opened.record.tokens,
        **more,
    )


def fit(run: Prepared, job: "Job") -> None:
    """Train to the end; raises RunFailed where the run had to stop, KeyboardInterrupt where it was interrupted."""
    opened, display = run.opened, run.display
    outcome = _train(run.config, opened, job, display)
    _note_rewards(run.rewards, display)
    _note_tools(run.toolbox, display)
    if outcome.failure:
        kept = runs.last_checkpoint(opened.folder)
        last = f"last good checkpoint: {kept.path} (--resume goes on from it)" if kept else "no checkpoint was made yet"
        raise RunFailed(f"{outcome.failure}; {last}")
    if outcome.interrupted:
        display.note(f"stopped after step {outcome.steps}, saved in {opened.folder}; --resume goes on from there")
        raise KeyboardInterrupt


def _train(config: Config, opened: runs.OpenRun, job: "Job", display: Display) -> "Outcome":
    """Train with a live bar; every logged step and every whole checkpoint goes into the run's folder."""
    from rl.algorithms.base import Hooks

    algorithm = importlib.import_module(f"rl.algorithms.{config.trainer.algorithm}")
    done = opened.checkpoint.step if opened.checkpoint else 0
    with display.train_progress(1, start=done, title=config.trainer.algorithm) as bar:

        def metrics(step: int, values: dict[str, Any]) -> None:
            runs.log(opened, step, values)
            bar.update(step, values)

        def saved(step: int, folder: Path, good: bool) -> None:
            if good:
                runs.mark_complete(opened, folder, step)
            else:
                shutil.rmtree(folder)  # nothing to go back to

        def total(steps: int) -> None:
            bar.total = steps

        def kept(step: int, sampling_round: int, rows: list[dict[str, Any]]) -> None:
            with disk_guard(opened.folder):
                completions.write(opened.folder, step, sampling_round, rows)

        if processes.is_main():
            job.hooks = Hooks(metrics=metrics, saved=saved, total=total, warn=display.warn, completions=kept)
        return algorithm.train(job)


def _note_rewards(functions: Sequence[RewardFunction], display: Display) -> None:
    for function in functions:
        if function.stats.errors:
            display.warn(
                f"reward '{function.name}' failed on {function.stats.errors} of {function.stats.samples} samples, "
                f"which were left out; the first: {function.stats.first_error}"
            )


def _note_tools(toolbox: "Toolbox | None", display: Display) -> None:
    if toolbox is not None and toolbox.runner.stats.errors:
        stats = toolbox.runner.stats
        display.warn(
            f"{stats.errors} of {stats.calls} tool calls failed, {stats.timeouts} of them by time, and cost their "
            f"samples only; the first: {stats.first_error}"
        )
