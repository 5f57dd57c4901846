"""The end of a run that trained: its result, rows and weights go to models/final as one folder, and are shown."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl import curriculum, files, pairs, record, run
from rl.config import Config
from rl.display import Display, Sample

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Results:
    """What was measured: `run.json`'s result and rollout, the held-out rows, and beside each what came of it.

    `samples` are the lines of samples.jsonl; `shown` are the same for the terminal; `what` was measured, in words.
    """

    result: dict[str, Any]
    rollout: dict[str, Any]
    heldout: Sequence[Row]
    samples: Sequence[Row]
    shown: Sequence[Sample]
    what: str = "questions, greedy"


def finish(opened: run.OpenRun, results: Results, save: Callable[[Path], None], device: Any, display: Display) -> None:
    """Write weights and tokenizer (`save`), rows and record; move them to models/final whole; show the result."""
    from rl.device import memory_bytes

    opened.record.result = results.result
    opened.record.rollout = results.rollout
    opened.record.peak_memory_bytes = memory_bytes(device)
    stage = run.staging(opened)
    save(stage)
    write_jsonl(stage / "heldout.jsonl", results.heldout)
    if (opened.folder / pairs.FILE).exists():  # what a run has sampled to train on is part of its result
        files.write_bytes(stage / pairs.FILE, (opened.folder / pairs.FILE).read_bytes())
    if (opened.folder / curriculum.FILE).exists():
        files.write_bytes(stage / curriculum.FILE, (opened.folder / curriculum.FILE).read_bytes())
    write_jsonl(stage / "samples.jsonl", results.samples)
    final = run.finish(opened)
    display.result(
        results.result,
        results.shown,
        {
            "model": final,
            "record": final / "run.json",
            "every step": final / "metrics.jsonl",
            "curves": final / "curves.png",
            "completions": final / "samples.jsonl",
        },
        results.what,
    )


def rollout_record(config: Config, folder: Path, sampler: Mapping[str, Any]) -> dict[str, Any]:
    """`run.json`'s `rollout`: means over the logged steps; null where the run did not sample.

    `sampler` says how the MLX sampler held its weights and how they came there, as `held` tells.
    """
    rows = record.read_metrics(folder / "metrics.jsonl")

    def mean(key: str) -> float | None:
        values = [row[key] for row in rows if isinstance(row.get(key), int | float)]
        return sum(values) / len(values) if values else None

    return {
        "engine": config.rollout.engine,
        "precision": config.rollout.precision,
        "dtype": sampler.get("dtype"),
        "packed": sampler.get("packed"),
        "base_shared_bytes": sampler.get("base_shared_bytes"),
        "tokens_per_s": mean("rollout/tokens_per_s"),
        "sync_s": mean("time/sync"),
        "sync_bytes": mean("sync/bytes"),
        "sync_way": sampler.get("sync_way"),
        "mean_abs_dlogp": mean("sampling/sampling_logp_difference/mean"),
        "ess": mean("sampling/ess"),
        "kept_weight": mean("sampling/kept_weight"),
        "clipped": mean("sampling/clipped"),
        "ratio": {name: mean(f"sampling/ratio_{name}") for name in ("p05", "p50", "p95")},
    }


def held(sampler: Any) -> dict[str, Any]:
    """How a sampler holds its weights; nothing for torch's."""
    syncs = getattr(sampler, "syncs", None)
    return {
        "dtype": getattr(sampler, "dtype", None),
        "packed": getattr(sampler, "packed", None),
        "base_shared_bytes": getattr(sampler, "base_shared_bytes", None),
        "sync_way": getattr(syncs, "way", None),
    }


def write_jsonl(path: Path, rows: Sequence[Row]) -> None:
    """One JSON object a line, written whole."""
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def last(prompt: str | list[dict[str, str]]) -> str:
    """The text of a prompt, or of the last message of a chat prompt."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
