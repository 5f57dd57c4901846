"""lm-eval's results among the published files: what is copied, and tables that follow from the copies alone."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
from evals_helper import put_result

from evals import __main__ as cli
from evals import published, table
from rl.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two measured models that are no runs, one of them with a base and two tasks; nothing published."""
    put_result(tmp_path, "hub", [1, 0, 0, 0], "base", task_sha256="a" * 64)
    put_result(tmp_path, "hub", [1, 1, 1, 0], task_sha256="a" * 64)
    put_result(tmp_path, "hub", [1, 1, 0, 0], task="gcd")
    put_result(tmp_path, "other", [1, 1, 0, 0], task_sha256="a" * 64)
    return tmp_path


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_chosen_results_are_copied_with_their_samples_packed(root: Path) -> None:
    (made,) = published.publish(root, ["hub"], tasks=["heldout"])
    assert made == root / "evals" / "published" / "results" / "hub"
    names = {"heldout.json", "heldout.samples.jsonl.gz"}
    assert _files(made).keys() == names | {f"base/{name}" for name in names}
    source = root / "evals" / "results" / "hub"
    assert (made / "heldout.json").read_bytes() == (source / "heldout.json").read_bytes()
    samples = gzip.decompress((made / "heldout.samples.jsonl.gz").read_bytes())
    assert samples == (source / "heldout.samples.jsonl").read_bytes()
    first = _files(root / "evals" / "published")
    published.publish(root, ["hub"], tasks=["heldout"])
    assert _files(root / "evals" / "published") == first


def test_published_tables_are_those_of_the_same_results_and_need_nothing_else(root: Path) -> None:
    published.publish(root, ["hub", "other"])
    table.build(root)
    made, own = root / "evals" / "published" / "tables", root / "evals" / "tables"
    assert _files(made).keys() == {"results.md", "results.csv", "results.tex", "results.json"}
    assert (made / "results.csv").read_bytes() == (own / "results.csv").read_bytes()
    text = (own / "results.md").read_text().replace("evals/results/", "evals/published/results/")
    assert (made / "results.md").read_text() == text
    first = _files(root / "evals" / "published")
    shutil.rmtree(made)
    shutil.rmtree(root / "evals" / "results")
    (root / "evals" / "published" / "README.md").unlink()
    published.build(root)
    assert _files(root / "evals" / "published") == first
    assert "(tables/results.md)" in (root / "evals" / "published" / "README.md").read_text()


@pytest.mark.parametrize("name", ["results.md", "results.csv", "results.tex", "results.json"])
def test_check_finds_a_table_changed_by_hand(root: Path, name: str) -> None:
    published.publish(root, ["hub"])
    assert published.check(root) == 0  # no runs among them
    path = root / "evals" / "published" / "tables" / name
    path.write_text(path.read_text().replace("0.75", "0.95"))
    with pytest.raises(UserError, match=rf"^evals/published/tables/{name}: not what .* python -m evals published$"):
        published.check(root)
    published.build(root)
    published.check(root)


def test_check_finds_a_result_changed_by_hand_and_a_table_left_over(root: Path) -> None:
    published.publish(root, ["hub", "other"])
    (root / "evals" / "published" / "tables" / "seeds.tex").write_text("of seeds that were once here")
    with pytest.raises(UserError, match=r"^evals/published/tables/seeds\.tex: not what"):
        published.check(root)
    published.build(root)
    assert not (root / "evals" / "published" / "tables" / "seeds.tex").exists()
    path = root / "evals" / "published" / "results" / "hub" / "heldout.json"
    path.write_text(path.read_text().replace('"strict,none": 0.75', '"strict,none": 0.95'))
    with pytest.raises(UserError, match=r"its samples give 0\.75 on 4.*publish it again: python -m evals publish hub"):
        cli.main(["check"], root)
    shutil.rmtree(path.parent)
    with pytest.raises(UserError, match=r"tables/results\.md"):  # hub's rows are still there
        published.check(root)


def test_results_of_another_version_are_refused_before_anything_is_copied(root: Path) -> None:
    """Trap: a publication of today beside one made with last year's task."""
    published.publish(root, ["hub"])
    put_result(root, "other", [1, 1, 0, 0], task_sha256="b" * 64)
    before = _files(root)
    with pytest.raises(
        UserError, match=r"heldout version 1\.0 \(b+\), but .*hub/.*heldout\.json has version 1\.0 \(a+\)"
    ):
        published.publish(root, ["other"])
    assert _files(root) == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["hub", "--tasks", "gdc"], "--tasks gdc: no result of it in "),
        (["hub", "--as", "x"], "hub: no run but a measured model, which has neither --as nor --note"),
        (["hbu"], "no run 'hbu'"),
    ],
)
def test_what_cannot_be_published_is_one_line_and_writes_nothing(root: Path, argv: list[str], words: str) -> None:
    before = _files(root)
    with pytest.raises(UserError) as error:
        cli.main(["publish", *argv], root)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert _files(root) == before


def test_a_result_that_names_a_place_or_has_lost_its_samples_is_refused(root: Path) -> None:
    path = root / "evals" / "results" / "other" / "heldout.json"
    good = path.read_text()
    path.write_text(json.dumps(json.loads(good) | {"model_source": "/srv/me/model"}))
    with pytest.raises(UserError, match="model_source names '/srv/me/model'"):
        published.publish(root, ["other"])
    path.write_text(good)
    path.with_name("heldout.samples.jsonl").unlink()
    with pytest.raises(UserError, match=r"not the samples heldout\.json was made with"):
        published.publish(root, ["other"])
    assert not (root / "evals" / "published").exists()
