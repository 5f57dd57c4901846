"""The files of `nox -s bench`: a table and, beside it, everything it was made from; sections of other runs stay."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl import files, record
from rl.bench import table as tables
from rl.bench.table import Report

if TYPE_CHECKING:
    import torch


def device_name(device: "torch.device") -> str:
    """Of a file: "cpu", "cuda-h100", "mps-m4-max"."""
    if device.type == "cuda":
        import torch

        card = torch.cuda.get_device_name(device).lower().removeprefix("nvidia ")
        model = re.search(r"\b[a-z]+\d+\b", card)
        return "cuda-" + (model[0] if model else re.sub(r"[^a-z0-9]+", "-", card).strip("-"))
    if device.type == "mps":
        from rl.smoke.page import chip_name

        return f"mps-{chip_name()}"
    return device.type


def write(path: Path, report: Report, parts: Sequence[str], about: dict[str, str]) -> None:
    """Put a report into `path`.json and make `path`.md from it, both whole.

    What other commands measured on this device stays: a report replaces only the one of its shape, parts and size.
    """
    kept = path.with_suffix(".json")
    sections: list[dict[str, Any]] = json.loads(kept.read_text())["sections"] if kept.is_file() else []
    key = {"shape": report.shape, "parts": sorted(parts), "full": report.full}
    new = {
        **key,
        "about": about,
        "report": asdict(report),
        "bars": [{**asdict(bar), "met": bar.met} for bar in tables.bars(report)],
        "text": tables.section(report, [f"{name}: {text}" for name, text in about.items()]),
    }
    sections = [one for one in sections if {name: one[name] for name in key} != key] + [record.finite(new)]
    sections.sort(key=lambda one: (tables.SHAPES.index(one["shape"]), -len(one["parts"]), one["parts"]))
    files.write_json(kept, {"sections": sections})
    files.write_text(path.with_suffix(".md"), tables.markdown(report.device, [one["text"] for one in sections]))
