"""Result files for tests of tables, plots and publishing, as `evals.measure` writes them, with marks chosen by hand."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def put_result(
    root: Path,
    run: str,
    marks: Sequence[float],
    role: str = "run",
    task: str = "heldout",
    *,
    metric: str = "strict",
    sources: Sequence[str] = (),
    first: int = 0,
    filters: Sequence[str] = ("none",),
    version: float = 1.0,
    changes: dict[str, Any] | None = None,
    **made: Any,
) -> Path:
    """A result below evals/results/ of `root` with these marks, one a question; its path.

    sources: each question's, in the document's field `cluster`; first: number of the first question; changes: to the
    result object; made: to the provenance block.
    """
    samples = "".join(
        json.dumps(
            {
                "doc_id": i,
                "doc": {"question": f"q{first + i}", **({"cluster": sources[i]} if sources else {})},
                "doc_hash": f"h{first + i}",
                "prompt_hash": f"p{first + i}",
                "filter": chosen,
                metric: mark,
            }
        )
        + "\n"
        for chosen in filters
        for i, mark in enumerate(marks)
    )
    folder = root / "evals" / "results" / run / ("base" if role == "base" else "")
    folder.mkdir(parents=True, exist_ok=True)
    scores = {f"{metric},{chosen}": sum(marks) / len(marks) for chosen in filters}
    result = {
        "results": {task: {"alias": task, **scores, f"{metric}_stderr,{filters[0]}": 0.01}},
        "configs": {task: {"metric_list": [{"metric": metric, "aggregation": "mean"}], "metadata": {"version": 1.0}}},
        "versions": {task: version},
        "n-shot": {task: 0},
        "n-samples": {task: {"original": len(marks), "effective": len(marks)}},
        "higher_is_better": {task: {metric: True}},
        "lm_eval_version": "0.4.13",
        **(changes or {}),
        "duet": {"run": run, "role": role, "samples_sha256": hashlib.sha256(samples.encode()).hexdigest(), **made},
    }
    (folder / f"{task}.samples.jsonl").write_text(samples)
    (folder / f"{task}.json").write_text(json.dumps(result))
    return folder / f"{task}.json"
