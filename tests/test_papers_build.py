"""Reports, tables, imports and the index, from synthetic results."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from papers import __main__ as cli
from papers import build, claims, collect, evaluate, expression, index, jobs, results, runner, study, tables, template
from papers.results import Kept
from rl import files
from rl.algorithms import ALGORITHMS
from rl.errors import UserError
from tests import papers_helper

ROOT = papers_helper.ROOT


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one study, from the template, all of whose runs are made."""
    root = papers_helper.house(tmp_path_factory.mktemp("house"))
    template.write(root, "some")
    shutil.copy(ROOT / "papers" / "report.typ", root / "papers")
    papers_helper.fill(root, load(root), lambda run, seed: {"start": 0.3, "grpo": 0.8, "sft": 0.79}[run])
    return root


@pytest.fixture
def root(house: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(house, tmp_path / "root", symlinks=True))


def load(root: Path) -> study.Study:
    return study.load(study.find(root, "some"), root)


def facts(root: Path) -> dict:
    return json.loads((root / "papers" / "some" / "report.json").read_text())


def test_a_study_is_judged_and_set_from_its_results_alone(root: Path) -> None:
    """And twice the same, byte for byte: a committed report changes only with what it is made of."""
    verdicts = build.build(load(root), root)
    assert [one.outcome for one in verdicts] == [claims.HOLDS]
    folder = root / "papers" / "some"
    assert (folder / "report.pdf").read_bytes().startswith(b"%PDF")
    assert {path.suffix for path in (folder / "figures").iterdir()} == {".svg", ".pdf"}
    first = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    build.build(load(root), root)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == first
    kept = [results.read(folder / "results" / f"grpo-seed{seed}.json") for seed in range(5)]
    mean = sum(sum(one.after) / len(one.after) for one in kept) / 5
    assert f"{mean:.3f} [" in (folder / "tables" / "scores.md").read_text()
    assert facts(root)["outdated"] == []
    assert facts(root)["facts"]["Machine"] == "Some CPU, 8 cores, 16 GiB"


def test_a_changed_config_or_lock_marks_results_as_outdated(root: Path) -> None:
    path = root / "papers" / "some" / "paper.toml"
    path.write_text(path.read_text().replace("trainer.max_steps=150", "trainer.max_steps=140"))
    verdicts = build.build(load(root), root)
    assert facts(root)["outdated"][0] == "sft-seed0: trainer.max_steps: 150 → 140"
    assert len(facts(root)["outdated"]) == 5
    assert not verdicts[0].outdated  # it is about other runs
    lock = root / "uv.lock"
    lock.write_text(lock.read_text().replace('name = "torch"\nversion = "', 'name = "torch"\nversion = "9'))
    verdicts = build.build(load(root), root)
    assert verdicts[0].outdated == ("grpo", "start")
    assert "uv.lock: torch" in facts(root)["outdated"][0]
    assert "outdated" in tables.outcome(verdicts[0])


def test_a_parent_made_again_leaves_its_children_outdated(root: Path) -> None:
    one = load(root)
    plan = jobs.plan(one)
    kept = results.load(one, root, plan)
    kept["some.start-seed0"].record.inputs_sha256 = "0" * 64
    old = results.outdated(plan, kept, one, root)
    assert old["some.grpo-seed0"] == "some.start-seed0, which it builds on, was made again"


def test_a_missing_run_is_not_run_and_stays_in_the_report(root: Path) -> None:
    for path in (root / "papers" / "some" / "results").glob("grpo-*"):
        path.unlink()
    assert [one.outcome for one in build.build(load(root), root)] == [claims.NOT_RUN]
    assert facts(root)["claims"][0]["words"] == "not run (no result of grpo)"


def test_runs_of_another_machine_are_known_by_their_inputs(root: Path) -> None:
    """Under any name; one of another config is not taken."""
    one, away = load(root), root / "away"
    kept = results.load(one, root, jobs.plan(one))
    shutil.rmtree(root / "papers" / "some" / "results")
    papers_helper.write_run(away, kept["some.start-seed0"], "another-name")
    papers_helper.write_run(away, kept["some.grpo-seed1"], "run-7")
    kept["some.grpo-seed2"].record.config["trainer"]["max_steps"] = 3
    papers_helper.write_run(away, kept["some.grpo-seed2"], "some.grpo-seed2")
    files.write_json(away / "machine.json", {**papers_helper.MACHINE, "cpu": "Far", "gpu": "Big GPU"})
    done = collect.bring(one, root, away)
    assert done.made == ["some.start-seed0", "some.grpo-seed1"]
    assert done.refused == {"some.grpo-seed2": "trainer.max_steps: 3 → 150"}
    found = results.load(one, root, jobs.plan(one))
    assert found["some.grpo-seed1"].after == kept["some.grpo-seed1"].after
    assert found["some.grpo-seed1"].machine["gpu"] == "Big GPU"
    assert not results.outdated(jobs.plan(one), found, one, root)
    with pytest.raises(UserError, match="holds no finished run"):
        collect.bring(one, root, root / "configs")


def test_a_study_grows_by_portions_and_its_report_with_it(root: Path) -> None:
    """Each portion from a machine that had to make the start again, under code with one setting more.

    Traps: the start's new hash marks all earlier results as stale; or a start that came out otherwise goes unseen.
    """
    one, plan = load(root), jobs.plan(load(root))
    kept = results.load(one, root, plan)
    for seed in (2, 3, 4):
        (root / "papers" / "some" / "results" / f"grpo-seed{seed}.json").unlink()
    build.build(one, root)
    assert [row[4] for row in facts(root)["runs"] if row[0] == "grpo"] == ["2 of 5"]
    start = kept["some.start-seed0"]
    start.record.inputs_sha256 = "1" * 64
    for seed in (2, 3):
        own = kept[f"some.grpo-seed{seed}"]
        own.record.parents = [{**own.record.parents[0], "inputs_sha256": "1" * 64}]
        away = root / f"portion-{seed}"
        papers_helper.write_run(away, start, "some.start-seed0")
        papers_helper.write_run(away, own, f"some.grpo-seed{seed}")
        done = collect.bring(one, root, away)
        assert (done.made, done.there) == ([f"some.grpo-seed{seed}"], ["some.start-seed0"])
        build.build(one, root)
        assert [row[4] for row in facts(root)["runs"] if row[0] == "grpo"] == [f"{seed + 1} of 5"]
        assert facts(root)["outdated"] == []
        assert f"{seed + 1} |" in (root / "papers" / "some" / "tables" / "scores.md").read_text().splitlines()[-2]
    last, away = kept["some.grpo-seed4"], root / "portion-4"
    last.record.base = {"id": "some.start-seed0", "sha256": "other"}
    papers_helper.write_run(away, last, "some.grpo-seed4")
    with pytest.raises(UserError, match="it went on from other weights than those of some"):
        collect.bring(one, root, away)


def test_a_valid_result_is_replaced_only_when_asked(root: Path) -> None:
    """Trap: another run of the same inputs has another time, and all that lasted as long as it would be outdated."""
    one = load(root)
    own = results.load(one, root, jobs.plan(one))["some.grpo-seed0"]
    own.record.wall_s = 1234.0
    papers_helper.write_run(root / "away", own, "some.grpo-seed0")
    file = root / "papers" / "some" / "results" / "grpo-seed0.json"
    assert collect.bring(one, root, root / "away").there == ["some.grpo-seed0"]
    assert results.read(file).record.wall_s != 1234.0
    assert collect.bring(one, root, root / "away", again=True).made == ["some.grpo-seed0"]
    assert results.read(file).record.wall_s == 1234.0


def test_a_run_whose_score_is_not_that_of_its_samples_is_refused(root: Path) -> None:
    one = load(root)
    kept = results.load(one, root, jobs.plan(one))["some.start-seed0"]
    papers_helper.write_run(root / "away", kept, "r")
    path = root / "away" / "r" / "samples.jsonl"
    path.write_text(path.read_text().replace("true]", "false]", 1))
    with pytest.raises(UserError, match="do not belong together"):
        results.distil(root / "away" / "r", ["reward"], {}, {})


def test_check_trains_nothing_and_says_each_outcome(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(ROOT / "rl" / "algorithms", root / "rl" / "algorithms")
    assert cli.main(["papers/some", "--check"], root) == 0
    said = capsys.readouterr().out
    assert "holds: GRPO answers more questions right" in said
    assert "1 of 1 claims hold; papers/some/report.pdf" in said
    page = (root / "papers" / "README.md").read_text()
    assert "| GRPO answers more questions right than the policy it starts from. |" in page
    assert "2026-01-02, Some CPU, 8 cores, 16 GiB" in page
    assert not (root / "models").exists()


def test_quick_makes_all_of_it_below_build(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trap: toy results beside real ones. Training is stood in for; the next time nothing is made."""
    asked = []

    def make(
        one: study.Study, root: Path, settings: runner.Settings, wanted: list[str], known: dict[str, Kept]
    ) -> dict[str, str]:
        asked.append(wanted)
        for job, kept in papers_helper.made(root, one, jobs.plan(one, quick=True), lambda run, seed: 0.5):
            papers_helper.write_run(root / "models" / "final", kept, job.name)
        return {}

    monkeypatch.setattr(runner, "make", make)
    committed = {path: path.read_bytes() for path in (root / "papers").rglob("*") if path.is_file()}
    for _ in range(2):
        assert cli.main(["papers/some", "--quick"], root) == 0
    assert asked == [
        [f"some-quick.{stem}" for stem in ("start-seed0", "grpo-seed0", "sft-seed0", "grpo-seed1", "sft-seed1")]
    ]
    assert json.loads((root / "build" / "papers" / "some-quick" / "report.json").read_text())["toy"]
    assert "build/papers/some-quick/report.pdf" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (root / "papers").rglob("*") if path.is_file()} == committed


def test_evaluations_are_asked_for_until_they_are_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / "papers" / "some" / "paper.toml"
    path.write_text(path.read_text() + '[[evaluation]]\ntask = "gcd"\nruns = ["start"]\n')
    one = load(root)
    assert evaluate.wanted(one, root) == [("some.start-seed0", "gcd")]
    assert "weights are not here" in evaluate.measure(one, root)["some.start-seed0"]
    files.write_text(root / "away" / "some.start-seed0" / "results" / "gcd.json", "{}")
    monkeypatch.setattr(evaluate, "_marks", lambda name, path: {"q1": 1.0, "q0": 0.5})
    evaluate.take(one, root, root / "away")
    assert evaluate.wanted(one, root) == []
    kept = results.load(one, root, jobs.plan(one))["some.start-seed0"]
    found = claims.measure(expression.parse("score(start, 'gcd')", ["start"]), {"start": [kept]}, ["start"])
    assert (found.estimate.value, found.estimate.stderr) == (0.75, pytest.approx(0.25))


def test_a_measurement_that_failed_leaves_nothing_to_take(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: the run was made again, measuring it failed, and the measurement of its weights before still lies there."""
    path = root / "papers" / "some" / "paper.toml"
    path.write_text(path.read_text() + '[[evaluation]]\ntask = "gcd"\nruns = ["start", "grpo"]\n')
    one, asked = load(root), []
    for name in ("start-seed0", "grpo-seed1"):
        files.write_text(root / "models" / "final" / f"some.{name}" / "run.json", "{}")
        files.write_text(root / "evals" / "results" / f"some.{name}" / "gcd.json", "{}")
    monkeypatch.setattr(evaluate, "_marks", lambda name, path: {"q0": 1.0})
    for code in (1, 0):
        run = lambda command, cwd, code=code: asked.append(command[3:]) or SimpleNamespace(returncode=code)  # noqa: E731
        monkeypatch.setattr(evaluate.subprocess, "run", run)
        failed = evaluate.measure(one, root)
        assert ("ended with 1" in failed.get("some.grpo-seed1", "")) == bool(code)
        kept = results.load(one, root, jobs.plan(one))
        assert bool(kept["some.grpo-seed1"].scores) == (not code)
    assert asked == [["some.start-seed0", "some.grpo-seed1", "--tasks", "gcd"]] * 2


def test_a_wrong_test_is_said_before_anything_is_trained(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "papers" / "some" / "paper.toml"
    path.write_text(path.read_text().replace("wall_s(x)", "wal_s(x)"))
    monkeypatch.setattr(runner, "make", lambda *given: pytest.fail("trained"))
    assert cli.main(["papers/some"], root) == 2
    assert "papers/some/paper.toml: table 'scores': test 'wal_s(x)': no function 'wal_s'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "papers/nowhere: no study"),
        (["new", "Bad Name"], "valid: lower case"),
        (["new", "some"], "is there"),
    ],
)
def test_wrong_words_exit_2(root: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv, root) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("slug", ["some", *study.slugs(ROOT)])
def test_no_number_is_typed_into_a_report(slug: str, house: Path) -> None:
    source = (house if slug == "some" else ROOT) / "papers" / slug / "report.typ"
    for line in source.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#import"):
            assert not re.search(r"\d", line), line


@pytest.mark.parametrize("slug", study.slugs(ROOT))
def test_claims_tables_and_figures_of_committed_studies_are_in_the_language(slug: str) -> None:
    one = study.load(study.find(ROOT, slug), ROOT)
    runs = [spec.name for spec in one.runs]
    nothing: dict[str, list[Kept]] = {name: [] for name in runs}
    assert {claims.judge(claim, nothing, runs).outcome for claim in one.claims} == {claims.NOT_RUN}
    for table in one.tables:
        assert all(row[1] == tables.NONE for row in tables.make(one, table, nothing, []).rows)
    source = (one.folder / "report.typ").read_text(encoding="utf-8")
    assert set(re.findall(r'#drawing\("([\w-]+)"\)', source)) == {figure.name for figure in one.figures}
    assert set(re.findall(r'#results\("([\w-]+)"\)', source)) == {table.name for table in one.tables}


def test_the_index_is_what_the_studies_and_the_code_give() -> None:
    """Run `nox -s paper -- index` where this fails."""
    assert (ROOT / "papers" / "README.md").read_text(encoding="utf-8") == index.text(ROOT)


def test_every_method_has_a_config_and_says_its_paper() -> None:
    rows = index._methods(ROOT)[2:]
    assert len(rows) == len(ALGORITHMS)
    assert not [row for row in rows if "| none |" in row]
    assert "GRPO: Group Relative Policy Optimization" in "\n".join(rows)


def test_markdown_and_latex_hold_the_same_cells() -> None:
    made = tables.Made("t", "A & B.", ["", "x_1"], [["a|b", "0.5 [−1, 2]"]], [])
    assert tables.markdown(made).splitlines()[-1] == "| a\\|b | 0.5 [−1, 2] |"
    assert "A \\& B." in tables.latex(made)
    assert "a|b & 0.5 [$-$1, 2] \\\\" in tables.latex(made)


def test_the_list_of_runs_counts_seeds_and_what_is_outdated(root: Path) -> None:
    path = root / "papers" / "some" / "paper.toml"
    path.write_text(path.read_text().replace("trainer.max_steps=150", "trainer.max_steps=140"))
    (root / "papers" / "some" / "results" / "sft-seed4.json").unlink()
    build.build(load(root), root)
    (row,) = [row for row in facts(root)["runs"] if row[0] == "sft"]
    assert row[1:] == [
        "configs/tiny/sft_more.toml run.device=cpu trainer.max_steps=140",
        "30",
        row[3],
        "4 of 5, 4 outdated",
    ]
    assert 20 <= int(row[3]) <= 25
