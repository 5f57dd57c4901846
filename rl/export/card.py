"""The card of an export: the run's own (command, scores with intervals, limits), how it was exported, data, config."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl import files, report
from rl.config.text import to_toml
from rl.record import Record

if TYPE_CHECKING:
    from rl.export.command import Checked

LIBRARY = {"mlx": "mlx", "gguf": "gguf", "safetensors": "transformers", "hub": "transformers"}
KEPT = ("run.json", "metrics.jsonl", "curves.png")  # of the run's folder, copied beside the weights


def write(stage: Path, folder: Path, run: Record, target: str, form: str, checked: "Checked", root: Path) -> None:
    """Write `README.md` into the export `stage` of the run in `folder`, with what the card refers to beside it."""
    for name in KEPT:
        if (folder / name).is_file():
            files.write_bytes(stage / name, (folder / name).read_bytes())
    sections = [
        *("## This export", "", _export(run, form, checked), ""),
        *_evals(root / "evals" / "results" / run.name),
        *("## Data", "", *_data(run), ""),
        *("## Config", "", "Every setting, defaults filled in.", "", "```toml", to_toml(run.config).strip(), "```", ""),
    ]
    files.write_text(stage / "README.md", report.model_card(run, LIBRARY[target], sections))


def _export(run: Record, form: str, checked: "Checked") -> str:
    model = run.config.get("model", {})
    merged = " The adapter is merged." if model.get("lora") else ""
    if bits := (model.get("quantization") or {}).get("bits"):
        merged = f" The adapter is merged into the dequantized values of the {bits}-bit base it was trained on."
    return (
        f"Whole model, weights in {form}.{merged} Opened by {checked.tool} and compared with the policy as it was "
        f"trained: mean |Δlogp| {checked.mean:.1e}, largest {checked.largest:.1e}, on {checked.tokens} tokens of "
        "held-out completions."
    )


def _data(run: Record) -> list[str]:
    rows, own = run.data.get("rows") or {}, run.config.get("data", {})
    count = f"{rows.get('train', '?')} training and {rows.get('heldout', '?')} held-out rows"
    told = [f"Source {run.data.get('source')}: {count}, fingerprint `{run.data.get('fingerprint')}`."]
    sources = [own.get("source"), *(part.get("source") for part in own.get("mix") or ())]
    if {"arithmetic", "reasoning-gym"} & set(sources):
        told.append("Generated rows are made anew from the config below, the same on every machine.")
    return told


def _evals(folder: Path) -> list[str]:
    """A table of what lm-eval measured of the run, where it was measured."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for task, scores in sorted(found.get("results", {}).items()):
            for key, value in scores.items():
                name, _, filtered = key.partition(",")
                error = scores.get(f"{name}_stderr,{filtered}")
                if filtered and not name.endswith("_stderr") and isinstance(value, int | float):
                    half = f" ± {report.Z95 * error:.3f}" if isinstance(error, int | float) else ""
                    lines.append(f"| {task} | {name} ({filtered}) | {value:.3f}{half} |")
    if not lines:
        return []
    head = ["| task | metric (filter) | score, 95 % |", "|---|---|---|"]
    return ["## lm-eval", "", *head, *lines, ""]
