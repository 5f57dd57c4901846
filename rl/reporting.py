"""`[trainer] report_to`: experiment trackers as TRL's users know them, beside the run's own metrics.jsonl.

The trackers are packages of their own: nothing here imports one, and a config that names one which is not installed is
refused before anything is loaded.
"""

import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.config.reading import Source, nearest
from rl.errors import UserError

if TYPE_CHECKING:
    from rl.config import Config

# transformers' name of a tracker -> (modules of which one is needed, what to install)
TRACKERS = {
    "azure_ml": (("azureml",), "azureml-core"),
    "clearml": (("clearml",), "clearml"),
    "codecarbon": (("codecarbon",), "codecarbon"),
    "comet_ml": (("comet_ml",), "comet-ml"),
    "dagshub": (("dagshub",), "dagshub mlflow"),
    "dvclive": (("dvclive",), "dvclive"),
    "flyte": (("flytekit",), "flytekit"),
    "kubeflow": (("kubeflow",), "kubeflow"),
    "mlflow": (("mlflow",), "mlflow"),
    "neptune": (("neptune",), "neptune"),
    "swanlab": (("swanlab",), "swanlab"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"),
}
WORDS = ("all", "none")  # alone: every tracker that is installed, or no tracker
EVENTS = "tensorboard"  # folder of TensorBoard's event files in a run


def named(args: dict[str, Any]) -> list[str]:
    """The trackers that a config's trainer arguments name."""
    given = args.get("report_to") or []
    names = [given] if isinstance(given, str) else list(given)
    return [] if names == ["none"] else names


def check(config: "Config", source: Source) -> None:
    """Raise UserError for a tracker that transformers does not know."""
    names = named(config.trainer.args)
    for name in names:
        if name not in TRACKERS and not (name in WORDS and len(names) == 1):
            raise source.error(("trainer", "report_to"), f"found {name!r}, {nearest(name, [*TRACKERS, *WORDS])}")


def require(config: "Config") -> None:
    """Raise UserError for a tracker whose package is not installed."""
    for name in named(config.trainer.args):
        modules, package = TRACKERS.get(name, ((), ""))
        if modules and not any(importlib.util.find_spec(module) for module in modules):
            raise UserError(
                f"{config.path}: [trainer] report_to: '{name}' is not installed here: run "
                f"`uv pip install {package}`, or leave report_to out (every run writes metrics.jsonl and curves.png)"
            )


def prepare(trainer: Any, folder: Path, resumed_at: int | None) -> None:
    """Put the trackers behind the run's own callbacks, so that they hear what those add; TensorBoard's event files go
    into the run's `folder`. What an earlier part of the run has told of steps after `resumed_at` is hidden there."""
    from transformers.integrations import get_reporting_integration_callbacks

    kinds = tuple(get_reporting_integration_callbacks(trainer.args.report_to))
    handler = trainer.callback_handler
    own = [callback for callback in handler.callbacks if type(callback) not in kinds]
    trackers = [callback for callback in handler.callbacks if type(callback) in kinds]
    handler.callbacks[:] = own + trackers
    for callback in trackers:
        if type(callback).__name__ == "TensorBoardCallback":
            callback.logging_dir = callback.logging_dir or str(folder / EVENTS)
            if resumed_at is not None:
                callback._SummaryWriter = partial(callback._SummaryWriter, purge_step=resumed_at + 1)


def close(trainer: Any) -> None:
    """End the run at a tracker that would go on until the process ends: the next of `--seeds` is another run."""
    wandb = sys.modules.get("wandb")
    if "wandb" in trainer.args.report_to and getattr(wandb, "run", None) is not None:
        wandb.finish()
