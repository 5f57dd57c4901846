"""Statistics against scipy and closed forms, and tables against result files with marks chosen by hand."""

import csv
import gzip
import json
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from evals_helper import put_result
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as reference

from evals import __main__ as cli
from evals import stats, table, tables_text
from rl.errors import UserError

# --- statistics


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_equals_scipy(share: tuple[int, int]) -> None:
    successes, n = share
    expected = reference.binomtest(successes, n).proportion_ci(method="wilson")
    assert stats.wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_is_not_empty_at_the_ends() -> None:
    """Trap: the normal interval of 0/20 and 20/20 has width 0, which claims certainty."""
    assert stats.wilson(0, 20)[0] == 0
    assert stats.wilson(0, 20)[1] == pytest.approx(0.161125, abs=1e-6)
    assert stats.wilson(20, 20) == pytest.approx((1 - 0.161125, 1), abs=1e-6)


def test_binomial_stderr_by_hand() -> None:
    assert stats.binomial_stderr(20, 80) == pytest.approx(math.sqrt(0.25 * 0.75 / 80))
    assert stats.binomial_stderr(0, 5) == 0
    with pytest.raises(ValueError, match="6 of 5"):
        stats.binomial_stderr(6, 5)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_paired_difference_equals_scipy(pairs: list[tuple[bool, bool]]) -> None:
    before, after = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    found = stats.paired_difference(before, after)
    difference = [b - a for a, b in zip(before, after, strict=True)]
    assert found.value == pytest.approx(sum(after) / len(after) - sum(before) / len(before))
    assert found.stderr == pytest.approx(reference.sem(difference))
    low, high = reference.norm.interval(0.95, loc=found.value, scale=max(found.stderr, 1e-300))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_pairing_narrows_the_interval() -> None:
    """Trap: adding the two errors as if the questions differed overstates the error of a gain."""
    before = [1.0] * 40 + [0.0] * 40
    after = [1.0] * 44 + [0.0] * 36
    paired = stats.paired_difference(before, after).stderr
    apart = math.hypot(stats.mean(before).stderr, stats.mean(after).stderr)
    assert paired == pytest.approx(math.sqrt(80 / 79 * 0.05 * 0.95 / 80))
    assert paired < apart / 3


def test_mean_of_one_has_no_error() -> None:
    assert math.isnan(stats.mean([1.0]).stderr)
    with pytest.raises(ValueError, match="3 questions before, 2 after"):
        stats.paired_difference([1, 0, 1], [1, 0])


# --- tables


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _cells(text: str, first: str) -> list[str]:
    """Cells of the only Markdown row whose first cells are `first`."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in row.strip("|").split(" | ")]


def _three_seeds(root: Path) -> dict[str, dict[int, list[int]]]:
    """`demo-seed0` to 2 on two tasks with bases; the marks of the runs by task and seed."""
    chance = random.Random(0)
    marks = {task: {seed: [int(chance.random() < 0.7) for _ in range(40)] for seed in range(3)} for task in ("a", "b")}
    for task, by_seed in marks.items():
        for seed, found in by_seed.items():
            put_result(root, f"demo-seed{seed}", [0, 1] * 20, "base", task, task_sha256="e" * 64)
            put_result(root, f"demo-seed{seed}", found, "run", task, task_sha256="e" * 64)
    return marks


def test_table_compares_question_by_question(tmp_path: Path) -> None:
    put_result(tmp_path, "a", [1, 0, 0, 0], "base")
    put_result(tmp_path, "a", [1, 1, 1, 0], tokens_per_s=1234.6, peak_memory_bytes=3 * 2**29)
    (gain,) = table.compare(table.read(tmp_path))[0]
    assert (gain.before, gain.after, gain.value, gain.n, gain.gained, gain.lost) == (0.25, 0.75, 0.5, 4, 2, 0)
    assert gain.stderr == pytest.approx(math.sqrt(1 / 3 / 4))  # differences 0, 1, 1, 0
    assert gain.p == 0.5  # two questions, both one way: 2 / 2²
    table.build(tmp_path)
    text = (tmp_path / "evals/tables/results.md").read_text()
    low, high = stats.tango([1, 0, 0, 0], [1, 1, 1, 0])
    assert -1 <= low < high <= 1
    # s / sqrt(n) of three equal marks and one other is 1/4
    base = ["a (base)", "heldout", "1.0", "none", "0", "strict", "↑", "0.2500", "±", "0.2500", "4", *"––––"]
    assert _cells(text, "a (base)") == base
    assert _cells(text, "a")[7:] == [
        *("0.7500", "±", "0.2500", "4", f"+0.5000 [{low:+.4f}, {high:+.4f}]", "0.5000", "1,235", "1.50 GiB")
    ]


def test_holm_counts_every_p_value_of_the_table(tmp_path: Path) -> None:
    """Trap: three tests at 5 % each find something in one table out of seven."""
    for name, gained in (("a", 8), ("b", 6), ("c", 0)):
        put_result(tmp_path, name, [0] * 20, "base")
        put_result(tmp_path, name, [1] * gained + [0] * (20 - gained))
    gains = {gain.run: gain for gain in table.compare(table.read(tmp_path))[0]}
    p = {name: reference.binomtest(k, k).pvalue for name, k in (("a", 8), ("b", 6))}
    assert gains["a"].p_holm == pytest.approx(3 * p["a"])
    assert gains["b"].p_holm == pytest.approx(2 * p["b"])
    assert gains["c"].p_holm == 1


def test_questions_that_share_a_source_widen_the_error(tmp_path: Path) -> None:
    """Trap: ten questions on each of four texts are not forty texts."""
    marks = [1.0] * 10 + [0.0] * 20 + [1.0] * 10
    sources = [f"text {i // 10}" for i in range(40)]
    put_result(tmp_path, "a", [0.0] * 40, "base", sources=sources)
    put_result(tmp_path, "a", marks, sources=sources)
    (row,) = [row for result in table.read(tmp_path) for row in result.rows if row.role == "run"]
    # the plain squared error, and Miller's pairs within a text: 4 texts of 90 pairs, each product 1/4, over 40²
    assert row.stderr == pytest.approx(math.sqrt(0.25 / 39 + 4 * 90 * 0.25 / 40**2))
    assert (row.clusters, row.n) == (4, 40)
    (gain,) = table.compare(table.read(tmp_path))[0]
    assert gain.stderr == pytest.approx(row.stderr)
    low, high = reference.t.interval(0.95, 3, loc=0.5, scale=row.stderr)
    assert (gain.low, gain.high) == pytest.approx((low, high))
    assert gain.p == 0.5  # signs of two whole texts: 2 of 4 patterns are as far from 0
    table.build(tmp_path)
    assert "| 40 (4) |" in (tmp_path / "evals/tables/results.md").read_text()


def test_a_task_names_its_own_field_of_sources(tmp_path: Path) -> None:
    config = {"metric_list": [{"metric": "strict", "aggregation": "mean"}], "metadata": {"cluster": "question"}}
    put_result(tmp_path, "a", [1, 0, 1, 0], changes={"configs": {"heldout": config}})
    assert table.read(tmp_path)[0].rows[0].clusters is None  # each question is its own
    path = put_result(tmp_path, "a", [1, 0, 1, 0], sources=["x", "x", "y", ""])
    lines = path.with_name("heldout.samples.jsonl")
    lines.write_text(lines.read_text().replace('"cluster": ""', '"cluster": null'))
    _resign(path)
    with pytest.raises(UserError, match="1 of 4 questions name no 'cluster'"):
        table.read(tmp_path)


def _resign(path: Path, **changes: Any) -> None:
    """Make a result say that its samples, changed by hand, are its own."""
    import hashlib

    result = json.loads(path.read_text()) | changes
    samples = path.with_name(f"{path.stem}.samples.jsonl").read_bytes()
    result["duet"]["samples_sha256"] = hashlib.sha256(samples).hexdigest()
    path.write_text(json.dumps(result))


def test_filters_of_one_metric_are_rows_of_their_own(tmp_path: Path) -> None:
    """Trap: lm-eval's samples hold each question once for every filter."""
    put_result(tmp_path, "a", [1, 0, 1, 0], filters=("strict-match", "flexible-extract"))
    (result,) = table.read(tmp_path)
    assert [(row.filter, row.value, row.n) for row in result.rows] == [
        *(("flexible-extract", 0.5, 4), ("strict-match", 0.5, 4))
    ]


def test_a_value_that_is_no_mean_is_shown_and_not_paired(tmp_path: Path) -> None:
    """Trap: lm-eval's perplexity of a question is its log-likelihood; the mean of those is not the perplexity."""
    changes = {
        "results": {"wiki": {"perplexity,none": 7.5, "perplexity_stderr,none": 0.5}},
        "configs": {"wiki": {"metric_list": [{"metric": "perplexity", "aggregation": "perplexity"}]}},
        "higher_is_better": {"wiki": {"perplexity": False}},
    }
    for role in ("base", "run"):
        put_result(tmp_path, "a", [-2.0, -1.5], role, "wiki", metric="perplexity", changes=changes)
    results = table.read(tmp_path)
    row = results[1].rows[0]
    assert (row.value, row.stderr) == (7.5, 0.5)
    assert (row.low, row.high) == pytest.approx(reference.norm.interval(0.95, 7.5, 0.5))
    assert table.compare(results) == ([], [])
    table.build(tmp_path)
    assert _cells((tmp_path / "evals/tables/results.md").read_text(), "a")[5:10] == [
        "perplexity",
        "↓",
        "7.5000",
        "±",
        "0.5000",
    ]


def test_a_score_that_its_samples_do_not_give_is_refused(tmp_path: Path) -> None:
    """Trap: a number changed by hand in the result file."""
    path = put_result(tmp_path, "a", [1, 0, 1, 0])
    path.write_text(path.read_text().replace('"strict,none": 0.5', '"strict,none": 0.75'))
    with pytest.raises(
        UserError, match=r"strict is 0\.75 on 4 questions, its samples give 0\.5 on 4.*nox -s eval -- a"
    ):
        table.read(tmp_path)


def test_other_questions_are_not_compared(tmp_path: Path) -> None:
    """Trap: a start measured on fewer rows, or on as many others, gives a difference that is no difference."""
    put_result(tmp_path, "a", [1, 0], "base")
    put_result(tmp_path, "a", [1, 1, 1, 0])
    put_result(tmp_path, "b", [1, 1, 1, 0], "base", first=1)
    put_result(tmp_path, "b", [1, 1, 1, 0])
    assert table.compare(table.read(tmp_path)) == ([], ["a on heldout", "b on heldout"])


def test_the_same_question_twice_is_two_questions(tmp_path: Path) -> None:
    """Trap: marks by question's hash alone would lose the second."""
    for role, marks in (("base", [1, 0, 0]), ("run", [1, 0, 1])):
        path = put_result(tmp_path, "a", marks, role)
        samples = path.with_name("heldout.samples.jsonl")
        samples.write_text(samples.read_text().replace('"h1"', '"h0"'))
        _resign(path)
    (gain,) = table.compare(table.read(tmp_path))[0]
    assert (gain.n, gain.gained, gain.lost) == (3, 1, 0)


def test_rows_over_seeds_by_scipy(tmp_path: Path) -> None:
    """Trap: three seeds' questions pooled as if they were one run's hide the spread between seeds."""
    marks = _three_seeds(tmp_path)
    made = tables_text.tables(table.read(tmp_path))
    by_task = {row.task: row for row in made.pooled}
    assert list(by_task) == ["a", "b", "2 tasks"]
    scores = {task: [sum(found) / 40 for found in by_seed.values()] for task, by_seed in marks.items()}
    both = [(a + b) / 2 for a, b in zip(scores["a"], scores["b"], strict=True)]
    for task, values in (*scores.items(), ("2 tasks", both)):
        row = by_task[task]
        mean, error = sum(values) / 3, reference.sem(values)
        assert (row.mean, row.low, row.high) == pytest.approx((mean, *reference.t.interval(0.95, 2, mean, error)))
        # every base has half of the questions right
        bounds = reference.t.interval(0.95, 2, mean - 0.5, error)
        assert (row.difference, row.difference_low, row.difference_high) == pytest.approx((mean - 0.5, *bounds))
        assert row.p == pytest.approx(reference.ttest_1samp(values, 0.5).pvalue)
        assert row.seeds == 3
    # six scores without the lowest and the highest
    assert by_task["2 tasks"].iqm == pytest.approx(reference.trim_mean(scores["a"] + scores["b"], 0.25))
    assert by_task["2 tasks"].iqm_low <= by_task["2 tasks"].iqm <= by_task["2 tasks"].iqm_high
    ranked = sorted(made.pooled, key=lambda row: row.p)
    assert ranked[0].p_holm == pytest.approx(min(1, 3 * ranked[0].p))


def test_two_seeds_have_no_iqm_and_one_has_no_row(tmp_path: Path) -> None:
    for seed in (0, 1):
        put_result(tmp_path, f"demo-seed{seed}", [1, 0, seed, 0])
    put_result(tmp_path, "alone-seed0", [1, 0])
    (row,) = tables_text.tables(table.read(tmp_path)).pooled
    assert (row.experiment, row.seeds, row.mean) == ("demo", 2, 0.375)
    assert math.isnan(row.iqm)
    assert math.isnan(row.difference)  # no base was measured
    table.build(tmp_path)
    text = (tmp_path / "evals/tables/results.md").read_text().partition("## Over seeds")[2]
    assert _cells(text, "demo")[8:] == ["–", "–", "–"]


def test_the_same_results_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    """Trap: rows in the order of the folder's listing, or of the files' times."""
    one, other = tmp_path / "one", tmp_path / "other"
    _three_seeds(one)
    table.build(one)
    first = _files(one / "evals" / "tables")
    assert first.keys() == set(table.NAMES)
    table.build(one)
    assert _files(one / "evals" / "tables") == first
    paths = [path for path in (one / "evals" / "results").rglob("*") if path.is_file()]
    random.Random(1).shuffle(paths)
    for number, path in enumerate(paths):
        target = other / path.relative_to(one)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        os.utime(target, (number * 1000, number * 1000))
    table.build(other)
    assert _files(other / "evals" / "tables") == first


def test_all_four_forms_say_the_same(tmp_path: Path) -> None:
    put_result(tmp_path, "a_1", [1, 0, 0, 0], "base", tokens_per_s=10.0)
    put_result(tmp_path, "a_1", [1, 1, 1, 0], commit="f" * 40, lm_eval="0.4.13", task_sha256="d" * 64, backend="mlx")
    table.build(tmp_path)
    made = tmp_path / "evals" / "tables"
    base, run = csv.DictReader((made / "results.csv").open())
    content = json.loads((made / "results.json").read_text())
    assert (run["run"], run["role"], float(run["value"]), run["p_holm"]) == ("a_1", "run", 0.75, "0.5")
    assert (base["role"], base["p"], base["tokens_per_s"], run["tokens_per_s"]) == ("base", "", "10.0", "")
    assert [(row["value"], row["difference_value"]) for row in content["rows"]] == [(0.25, None), (0.75, 0.5)]
    assert content["sources"][1]["file"] == "evals/results/a_1/heldout.json"
    tex = (made / "results.tex").read_text()
    assert "a\\_1 & heldout & 1.0 & none & 0 & strict & $\\uparrow$ & 0.7500 & $\\pm$ & 0.2500 & 4 & +0.5000 {[}" in tex
    assert {line.count(" & ") for line in tex.splitlines() if line.endswith("\\\\")} == {14}
    for form in ("md", "tex"):  # provenance
        (line,) = [line for line in (made / f"results.{form}").read_text().splitlines() if "a_1/heldout.json" in line]
        assert line.endswith("a_1, weights –, task heldout dddddddddddd, lm-eval 0.4.13, commit ffffffffffff, mlx")


def test_a_table_of_chosen_runs_and_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _three_seeds(tmp_path)
    cli.main(["table", "demo-seed1", "--task", "b", "--out", str(tmp_path / "out")], tmp_path)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [(row["run"], row["task"]) for row in rows] == [("demo-seed1", "b")] * 2
    assert capsys.readouterr().out.startswith("demo-seed1 on b, strict: 0.500 → 0.")
    for argv, words in (["demo-seed7"], "did you mean 'demo-seed"), (["--task", "c"], "no result of this task"):
        with pytest.raises(UserError, match=words):
            cli.main(["table", *argv], tmp_path)


def test_seed_tables_go_when_there_are_no_seeds(tmp_path: Path) -> None:
    _three_seeds(tmp_path)
    table.build(tmp_path)
    for seed in (1, 2):
        shutil.rmtree(tmp_path / "evals" / "results" / f"demo-seed{seed}")
    assert {path.name for path in table.build(tmp_path)} == set(_files(tmp_path / "evals" / "tables"))


# --- bad results


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"version": 2.0}, "version 2.0 (aaaaaaaaaaaa)"),
        ({"task_sha256": "b" * 64}, "version 1.0 (bbbbbbbbbbbb)"),
    ],
)
def test_two_versions_of_a_task_make_no_table(tmp_path: Path, second: dict, words: str) -> None:
    """Trap: scores on an old and a new wording of a task side by side."""
    put_result(tmp_path, "a", [1, 1, 1, 0], task_sha256="a" * 64)
    table.build(tmp_path)
    before = _files(tmp_path / "evals" / "tables")
    put_result(tmp_path, "b", [1, 0, 1, 0], **{"task_sha256": "a" * 64, **second})
    with pytest.raises(UserError) as error:
        cli.main(["table"], tmp_path)
    assert words in str(error.value)
    assert "b/heldout.json" in str(error.value)
    assert "version 1.0 (aaaaaaaaaaaa)" in str(error.value)
    assert "nox -s eval -- a --tasks heldout --again" in str(error.value)
    assert "\n" not in str(error.value)
    assert _files(tmp_path / "evals" / "tables") == before
    assert table.build(tmp_path, ["b"])  # on its own it has a table


@pytest.mark.parametrize("broken", ["heldout.json", "heldout.samples.jsonl"])
def test_truncated_result_is_one_line_and_leaves_the_tables(tmp_path: Path, broken: str) -> None:
    put_result(tmp_path, "a", [1, 1, 1, 0])
    path = put_result(tmp_path, "b", [1, 0, 1, 0]).with_name(broken)
    table.build(tmp_path)
    before = _files(tmp_path / "evals" / "tables")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError) as error:
        cli.main(["table"], tmp_path)
    assert str(path) in str(error.value)
    assert "nox -s eval -- b --tasks heldout --again" in str(error.value)
    assert "\n" not in str(error.value)
    assert _files(tmp_path / "evals" / "tables") == before


def test_packed_samples_are_read_as_well(tmp_path: Path) -> None:
    path = put_result(tmp_path, "a", [1, 1, 1, 0])
    plain = path.with_name("heldout.samples.jsonl")
    packed = plain.with_name(f"{plain.name}.gz")
    packed.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    plain.unlink()
    assert table.read(tmp_path)[0].rows[0].value == 0.75
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"not the samples heldout\.json was made with"):
        table.read(tmp_path)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=30))
def test_no_number_turns_into_a_word(marks: list[float]) -> None:
    """Trap: `nan` and `inf` in a table, or -0.0000 for nothing."""
    result = stats.mean(marks)
    text = tables_text.interval(result.value - marks[0], result.low, result.high, "+.4f")
    assert not {"nan", "inf", "-0.0000"} & set(text.replace("[", " ").replace("]", " ").replace(",", " ").split())
