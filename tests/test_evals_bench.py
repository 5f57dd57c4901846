"""`python -m evals bench`: turns, ratios, the goal, and one small run on the tiny model."""

import importlib.util
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from evals import bench, published
from evals.bench import Contest, Report, Sizes, Work
from rl.errors import RunFailed, UserError

SIZES = Sizes(prompts=2, prompt_tokens=4, new=4, batch_size=2, repeats=3)
WORK = Work("some", "generate_until", [("a", {}), ("b", {})], bar=True)


class Scripted:
    """A model that gives the same answers each time and writes down that it was asked."""

    def __init__(self, name: str, answers: list[Any], turns: list[str]):
        self.name, self.answers, self.turns = name, answers, turns

    def tok_encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [0] * len(text)

    def generate_until(self, requests: list[Any], disable_tqdm: bool) -> list[Any]:
        assert [request.args for request in requests] == WORK.requests
        self.turns.append(self.name)
        return self.answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool) -> list[Any]:
        return self.answers[: len(requests)]


def test_the_two_take_turns_after_a_warm_up_each() -> None:
    """Trap: all of one, then all of the other, times what the machine does meanwhile."""
    turns: list[str] = []
    lms = {"hf": Scripted("hf", ["xyz", "q"], turns), "mlx": Scripted("mlx", ["xyz", "qr"], turns)}
    found = bench.contest(WORK, lms, SIZES.repeats)
    assert turns == ["hf", "mlx"] * (1 + SIZES.repeats)
    assert {who: len(seconds) for who, seconds in found.seconds.items()} == {"hf": 3, "mlx": 3}
    assert (found.tokens, found.agreement) == ({"hf": 4, "mlx": 5}, "1 of 2 equal")


def test_what_was_begun_ends_with_one_turn_each_when_time_is_up() -> None:
    """Trap: a bench that a time limit kills in the middle has nothing to show."""
    turns: list[str] = []
    lms = {"hf": Scripted("hf", ["xyz", "q"], turns), "mlx": Scripted("mlx", ["xyz", "qr"], turns)}
    found = bench.contest(WORK, lms, SIZES.repeats, deadline=time.monotonic() - 1)
    assert turns == ["hf", "mlx"] * 2
    assert {who: len(seconds) for who, seconds in found.seconds.items()} == {"hf": 1, "mlx": 1}
    lines = bench.markdown([Report("m", [found], ["3 texts"])], {}, "cpu").splitlines()
    assert "- no time was left for m: 3 texts" in lines


@pytest.mark.parametrize(("hf", "said"), [([6.0, 9.0, 3.1], "3.10 ×, met"), ([6.0, 2.9, 2.0], "2.90 ×, missed")])
def test_the_ratio_is_hfs_seconds_over_ours_turn_by_turn(hf: list[float], said: str) -> None:
    """By hand: 6/2, 9/1, 3.1/1 and 6/2, 2.9/1, 2/1; their medians."""
    one = Contest(
        "some", "generate_until", 2, True, "2 of 2 equal", {"hf": 9, "mlx": 9}, {"hf": hf, "mlx": [2.0, 1.0, 1.0]}
    )
    other = Contest("choices", "loglikelihood", 2, False, "≤ 0 apart", {}, {"hf": [1.0], "mlx": [1.0]})
    table = bench.markdown([Report("m", [one, other])], {"machine": "here"}, "cuda")
    assert f"- bar, m: generation at least 3 × hf: {said}" in table
    assert table.count("- bar") == 1
    assert "- machine: here" in table
    # the goal is a GPU's
    assert "- bar" not in bench.markdown([Report("m", [one])], {}, "cpu")


def test_the_early_stop_cuts_answers_to_about_a_quarter() -> None:
    """'b' comes first at 3 and 2 of 10; 'a' at 0, 'c' at 6 and never."""
    assert bench._stop(["aaabbbcccc", "aabbbbbbbb"], 10) == "b"


@pytest.mark.parametrize("mine", [[0.0] * 8, [math.nan] * 8])
def test_nothing_is_timed_where_scores_differ(mine: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "prompt_texts", lambda tokenizer, count, length: ["text"] * count)
    lms = {"hf": Scripted("hf", [-16.0] * 8, []), "mlx": Scripted("mlx", mine, [])}
    with pytest.raises(RunFailed, match="a token apart"):
        bench._check_agreement(lms, None, "float32")
    lms["mlx"] = Scripted("mlx", [-16.016] * 8, [])  # 0.001 a token: float32 and another order of sums
    bench._check_agreement(lms, None, "float32")


def test_without_lm_eval_it_is_one_line_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else real(name, *rest)
    )
    with pytest.raises(UserError, match=r"^bench: lm_eval not installed here[^\n]*$"):
        bench.main(["--model", "tiny"], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_small_run_writes_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All four kinds of requests through both models, in float32 on the CPU: equal answers."""
    sizes = ["--prompts", "4", "--prompt-tokens", "6", "--new", "4", "--batch-size", "2", "--repeats", "1"]
    bench.main(["--model", "tiny", *sizes, "--out", str(tmp_path / "made" / "table.md")], tmp_path)
    made = json.loads((tmp_path / "made" / "table.json").read_text())
    table = (tmp_path / "made" / "table.md").read_text()
    contests = made["reports"][0]["contests"]
    kinds = ["generate_until", "generate_until", "loglikelihood", "loglikelihood_rolling"]
    assert [one["kind"] for one in contests] == kinds
    assert [one["agreement"] for one in contests[:2]] == ["4 of 4 equal"] * 2
    assert contests[0]["tokens"]["hf"] == contests[0]["tokens"]["mlx"] > 0
    assert all(len(one["seconds"][who]) == 1 for one in contests for who in ("hf", "mlx"))
    shown = capsys.readouterr()
    assert table in shown.out
    assert "Running" not in shown.err  # lm-eval's own bar, within what is timed
    assert bench.table(tmp_path / "made" / "table.json") == table
    assert {"machine", "packages", "command", "commit"} <= made["about"].keys()
    assert [path.name for path in (tmp_path / "build").iterdir()] == []


def test_a_published_table_follows_from_its_json(tmp_path: Path) -> None:
    """`published` makes it, `check` finds a number changed by hand, and a broken JSON is one line."""
    folder = tmp_path / "evals" / "published"
    folder.mkdir(parents=True)
    one = Contest("some", "generate_until", 2, True, "2 of 2 equal", {"hf": 9, "mlx": 9}, {"hf": [8.0], "mlx": [2.0]})
    source = folder / "bench-evals-h.json"
    value = {"about": {"machine": "here"}, "device": "cuda", "reports": [asdict(Report("m", [one], ["choices"]))]}
    source.write_text(json.dumps(value))
    published.main(["published"], tmp_path)
    table = folder / "bench-evals-h.md"
    assert "generation at least 3 × hf: 4.00 ×, met" in table.read_text()
    assert "[h](bench-evals-h.md)" in (folder / "README.md").read_text()
    published.main(["check"], tmp_path)
    table.write_text(table.read_text().replace("4.00", "5.00"))
    with pytest.raises(UserError, match=r"published/bench-evals-h\.md: not what the published runs and results give"):
        published.main(["check"], tmp_path)
    source.write_text('{"about": {}}')
    with pytest.raises(UserError, match=r"^[^\n]*bench-evals-h\.json: not what this bench writes[^\n]*$"):
        published.main(["check"], tmp_path)
