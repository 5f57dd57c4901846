"""BIG-bench files that a user fetched: scores by hand, and fetching from a folder instead of the network."""

import json
from pathlib import Path
from typing import Any

import pytest
from evals_checkout import answering

from evals import bigbench, catalog, harness
from rl.errors import UserError

CHOICE = {"input": "2 is", "target_scores": {"even": 1.0, "odd": 0.0, "a colour": 0.5}}


def put_bigbench(root: Path, name: str, task: dict[str, Any]) -> Path:
    path = root / bigbench.FOLDER / name / "task.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"name": name, "description": "", "keywords": [], **task}))
    return path


def test_bigbench_choices_are_scored_as_bigbench_does(tmp_path: Path) -> None:
    """The model prefers the longest choice: half a point for the first question, none for the second."""
    second = {"input": "3 is", "target_scores": {"even": 0.0, "odd": 1.0}}
    put_bigbench(tmp_path, "parity", {"examples": [CHOICE, second], "task_prefix": "Say.\n"})
    (task,) = [task for name, task in catalog.ours(tmp_path).items() if task.kind == "bigbench"]
    assert (task.name, catalog.size(task)) == ("bigbench_parity_choice", 2)
    result = harness.evaluate(answering(str), harness.asked(task), None, 0)
    plain, samples = harness.plain(result, task)
    assert plain["results"][task.name]["multiple_choice_grade,none"] == pytest.approx((0.5 + 0.0) / 2)
    first = json.loads(samples.splitlines()[0])
    assert first["arguments"][2] == [
        "Say.\n\nQ: 2 is\n  choice: even\n  choice: odd\n  choice: a colour\nA: ",
        "a colour",
    ]


def test_bigbench_targets_are_matched_whole(tmp_path: Path) -> None:
    examples = [{"input": f"{a} + 1", "target": [str(a + 1), f"{a + 1}.0"]} for a in range(4)]
    put_bigbench(tmp_path, "plus", {"examples": examples})
    (task,) = catalog.find(tmp_path, "bigbench_plus_*")
    said = {"0": " 1", "1": "2.0", "2": "13", "3": "the 4"}
    result = harness.evaluate(answering(lambda prompt: said[prompt[3]]), harness.asked(task), None, 0)
    assert result["results"]["bigbench_plus_exact"]["exact_str_match,none"] == 0.5


def test_bigbench_is_fetched_once_and_only_whole(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = put_bigbench(tmp_path / "there", "parity", {"examples": [CHOICE]})
    root, address = tmp_path / "here", (tmp_path / "there" / bigbench.FOLDER).as_uri()
    bigbench.main(["bigbench:parity"], root, address)
    assert "1 examples; --tasks bigbench_parity_choice" in capsys.readouterr().out
    source.write_text('{"examples": [')
    bigbench.main(["bigbench:parity"], root, address)  # kept
    (root / bigbench.FOLDER / "parity" / "task.json").unlink()
    for name, words in (
        ("bigbench:parity", "not a BIG-bench JSON task"),
        ("bigbench:absent", "get file://"),
        ("parity", "not of the form bigbench:NAME"),
        ("bigbench:../parity", "not of the form"),
    ):
        with pytest.raises(UserError, match=words):
            bigbench.main([name], root, address)
    assert not catalog.find(root, "sums")[0].data
    assert not list(root.rglob("*.json"))
