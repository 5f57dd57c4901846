"""What _bigbench_choice and _bigbench_exact name: examples of a BIG-bench task.json, and their scores.

Zero-shot, with the prefixes of the file itself. Departures from BIG-bench's own JSON tasks: no few-shot examples, the
choices stand in the prompt in the file's order, and of the metrics only `multiple_choice_grade` and
`exact_str_match` (compared without spaces at the ends).
"""

import re
from pathlib import Path
from typing import Any

from datasets import Dataset

from evals.bigbench import read


def choices(file: str, **_: Any) -> dict[str, Dataset]:
    """{"test": rows of prompt, choices, scores}; each score is what BIG-bench pays for that choice."""
    task = read(Path(file))
    rows = []
    for number, example in enumerate(task["examples"]):
        scores = example["target_scores"]
        rows.append(
            {
                "id": f"{number}",
                "prompt": _prompt(task, example, list(scores)),
                "choices": list(scores),
                "scores": [float(value) for value in scores.values()],
            }
        )
    return {"test": Dataset.from_list(rows)}


def best(doc: dict[str, Any]) -> int:
    """The index of the choice with the highest score, the first of several."""
    return doc["scores"].index(max(doc["scores"]))


def grade(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """BIG-bench's multiple_choice_grade: the score of the choice that the model finds most likely."""
    logps = [logp for logp, _ in results]
    return {"multiple_choice_grade": doc["scores"][logps.index(max(logps))]}


def targets(file: str, **_: Any) -> dict[str, Dataset]:
    """{"test": rows of prompt, targets, regex}; any one of the targets is right."""
    task = read(Path(file))
    rows = []
    for number, example in enumerate(task["examples"]):
        target = example["target"]
        right = [str(one) for one in target] if isinstance(target, list) else [str(target)]
        prompt = _prompt(task, example, list(example.get("target_scores") or {}))
        rows.append({"id": f"{number}", "prompt": prompt, "targets": right, "regex": task.get("output_regex") or ""})
    return {"test": Dataset.from_list(rows)}


def exact(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """BIG-bench's exact_str_match against any target; the file's `output_regex`, where it has one, cuts the answer."""
    said = results[0]
    if doc["regex"]:
        found = re.search(doc["regex"], said)
        said = (found.group(1) if found.re.groups else found.group()) if found else ""
    return {"exact_str_match": float(said.strip() in [target.strip() for target in doc["targets"]])}


def _prompt(task: dict[str, Any], example: dict[str, Any], offered: list[str]) -> str:
    """The text before the answer, by the file's prefixes (BIG-bench's defaults where it names none)."""
    listed = ""
    if offered and task.get("append_choices_to_input", True):
        listed = "".join(task.get("choice_prefix", "\n  choice: ") + choice for choice in offered)
    before = task.get("task_prefix", "") + task.get("example_input_prefix", "\nQ: ")
    return (before + example["input"] + listed + task.get("example_output_prefix", "\nA: ")).lstrip("\n")
