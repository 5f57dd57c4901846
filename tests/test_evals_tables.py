"""Statistics against scipy and closed forms, and tables against result files with marks chosen by hand."""

import hashlib
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as reference

from evals import __main__ as cli
from evals import measure, stats, table
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


def _put(root: Path, run: str, role: str, marks: list[int]) -> Path:
    """A result as `measure` writes it, with these strict marks."""
    samples = "".join(
        json.dumps({"doc_id": i, "prompt_hash": f"h{i}", "strict": float(mark)}) + "\n" for i, mark in enumerate(marks)
    )
    path = measure.result_path(root, run, role, "heldout")
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "results": {"heldout": {"strict,none": sum(marks) / len(marks), "strict_stderr,none": 0.01}},
        "versions": {"heldout": 1.0},
        "n-shot": {"heldout": 0},
        "n-samples": {"heldout": {"effective": len(marks)}},
        "higher_is_better": {"heldout": {"strict": True}},
        "duet": {"run": run, "role": role, "samples_sha256": hashlib.sha256(samples.encode()).hexdigest()},
    }
    path.with_name("heldout.samples.jsonl").write_text(samples)
    path.write_text(json.dumps(result))
    return path


def test_table_compares_question_by_question(tmp_path: Path) -> None:
    _put(tmp_path, "a", "base", [1, 0, 0, 0])
    _put(tmp_path, "a", "run", [1, 1, 1, 0])
    (gain,) = table.compare(table.read(tmp_path))[0]
    assert (gain.before, gain.after, gain.value, gain.n) == (0.25, 0.75, 0.5, 4)
    assert gain.stderr == pytest.approx(math.sqrt(1 / 3 / 4))  # differences 0, 1, 1, 0
    table.build(tmp_path)
    text = (tmp_path / "evals/tables/results.md").read_text()
    assert "| a (base) | heldout | 1.0 | none | 0 | 4 | strict | ↑ | 0.2500 | ± | 0.0100 | 0.0456 – 0.6994 |" in text
    assert "| a | heldout | 4 | strict | 0.2500 | 0.7500 | +0.5000 | ± | 0.2887 | -0.0658 – +1.0658 |" in text


def test_other_questions_are_not_compared(tmp_path: Path) -> None:
    """Trap: a start measured on fewer rows gives a difference that is no difference."""
    _put(tmp_path, "a", "base", [1, 0])
    _put(tmp_path, "a", "run", [1, 1, 1, 0])
    differences, unlike = table.compare(table.read(tmp_path))
    assert (differences, unlike) == ([], ["a on heldout"])


@pytest.mark.parametrize("broken", ["heldout.json", "heldout.samples.jsonl"])
def test_truncated_result_is_one_line_and_leaves_the_tables(tmp_path: Path, broken: str) -> None:
    _put(tmp_path, "a", "run", [1, 1, 1, 0])
    path = _put(tmp_path, "b", "run", [1, 0, 1, 0]).with_name(broken)
    table.build(tmp_path)
    before = {file: file.read_bytes() for file in (tmp_path / "evals" / "tables").iterdir()}
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError) as error:
        cli.main(["table"], tmp_path)
    assert str(path) in str(error.value)
    assert "nox -s eval -- b --again" in str(error.value)
    assert "\n" not in str(error.value)
    assert {file: file.read_bytes() for file in (tmp_path / "evals" / "tables").iterdir()} == before
