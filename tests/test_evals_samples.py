"""TASK@N: several samples a question, through lm-eval to pass@k and majority@k."""

import itertools
import json
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from evals_checkout import answering, put_run

from evals import catalog, harness, measure, runs
from evals.tasks import heldout
from rl.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
DOC = {"row": json.dumps({"prompt": "7+5=", "answer": "12"}), "rewards": '[{"name": "exact", "options": {}}]'}


def _vote(votes: tuple[str, ...]) -> float:
    """1 where "12" has the most votes, its share of a tie; what is no number has no vote."""
    counts = Counter(vote for vote in votes if vote.strip().isdigit())
    first = [vote for vote, count in counts.items() if count == max(counts.values())]
    return float("12" in first) / max(1, len(first))


@pytest.mark.parametrize(
    "samples",
    [
        ["12", "13", "13", "no", "12"],
        ["no", "no", "no", "12", "13"],
        ["13", "13", "14", "12", "12"],
        ["1", "2", "3", "4", "5"],
        ["12"] * 5,
    ],
)
def test_marks_over_samples_are_means_over_all_subsets(samples: list[str]) -> None:
    """Trap: the three `no` would win the vote. Enumerated here."""
    found = heldout.process_samples(DOC, [samples])
    assert {name for name in found if "@" in name} == {f"{what}@{k}" for what in ("pass", "maj") for k in (2, 4, 5)}
    for k in (2, 4, 5):
        subsets = list(itertools.combinations(samples, k))
        assert found[f"pass@{k}"] == pytest.approx(fmean("12" in subset for subset in subsets))
        assert found[f"maj@{k}"] == pytest.approx(fmean(map(_vote, subsets)))
    assert found["strict"] == samples.count("12") / 5
    assert found["wellformed"] == sum(sample.isdigit() for sample in samples) / 5


def test_one_answer_in_two_spellings_is_one_vote() -> None:
    """math-verify takes ½ and 0.5 for right: two votes against the two for 3."""
    row = {"prompt": "1/2=", "answer": "0.5"}
    doc = {"row": json.dumps(row), "rewards": '[{"name": "math-verify", "options": {"extract": "plain"}}]'}
    found = heldout.process_samples(doc, [["1/2", "0.5", "0.50", "3", "3"]])
    assert (found["strict"], found["maj@5"]) == (0.6, 1.0)


def test_lm_eval_asks_each_question_so_often_and_gives_the_means() -> None:
    """A model that is right once in four, at another wrong number each other time; no filter of the distribution."""
    (task,) = catalog.find(ROOT, "sums@4")
    asked: list[str] = []

    def rule(prompt: str) -> str:
        asked.append(prompt)
        a, b = prompt.rpartition("\n")[2].removesuffix("=").split("+")
        turn = asked.count(prompt)
        return f" {int(a) + int(b) + turn - 1}"

    result = harness.evaluate(answering(rule), harness.asked(task), 5, 0)
    assert len(asked) == 20
    assert set(Counter(asked).values()) == {4}
    values = result["results"]["sums@4"]
    expected = {"strict": 1 / 4, "pass@2": 1 / 2, "pass@4": 1, "maj@2": 1 / 4, "maj@4": 1 / 4, "wellformed": 1}
    assert {name: values[f"{name},none"] for name in expected} == pytest.approx(expected)
    assert set(expected) | {"lenient"} == set(catalog.metrics(task))
    sample = result["samples"]["sums@4"][0]
    drawn = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_gen_toks": 16}
    assert drawn.items() <= sample["arguments"][0][1].items()
    assert len(sample["resps"][0]) == 4


def test_samples_are_part_of_what_a_task_is() -> None:
    found = catalog.find(ROOT, "sums,sums@4,sums@8,gym_l*@2,heldout@3")
    assert [task.name for task in found[:3]] == ["sums", "sums@4", "sums@8"]
    assert [task.name for task in found[3:]] == [
        *(f"gym_{n}@2" for n in ("lcm", "leg_counting", "letter_counting")),
        "heldout@3",
    ]
    assert len({task.sha256 for task in found[:3]}) == 3
    assert [task.of_runs for task in found] == [False] * 6 + [True]
    assert [catalog.ks(n) for n in (2, 3, 8, 10)] == [[2], [2, 3], [2, 4, 8], [2, 4, 8, 10]]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sums@1", "sums@1: valid are 2 to 1024 samples, or sums for the greedy answer"),
        ("sums@2000", "valid are 2 to 1024"),
        ("arc_easy@4", "arc_easy@4: samples are drawn for the tasks in evals/tasks/ alone"),
        ("sum@4", "unknown task 'sum', did you mean 'sums'"),
    ],
)
def test_samples_that_cannot_be_are_one_line(name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "index", lambda _: catalog.Index({"arc_easy": "arc/arc_easy.yaml"}))
    with pytest.raises(UserError) as error:
        catalog.find(ROOT, name)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_is_not_asked_for_samples_of_what_it_may_have_seen(tmp_path: Path) -> None:
    """Trap: the task goes by another name."""
    data: dict[str, Any] = {"source": "arithmetic", "seed": 0, "max_a": 99, "max_b": 99, "shots": 0}
    folder = put_run(tmp_path, "other", "random")
    record = json.loads((folder / "run.json").read_text())
    record["config"]["data"] = data
    (folder / "run.json").write_text(json.dumps(record))
    target = runs.Target("other", [], runs.load(tmp_path, "other"))
    with pytest.raises(UserError, match="it may have seen these"):
        measure.check_unseen(tmp_path, target, catalog.find(ROOT, "sums@4")[0])
