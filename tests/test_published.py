"""Published runs: tables against numpy and scipy on small hand-made runs, and what may not be published."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from evals_helper import put_result
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as reference

from evals import __main__ as cli
from evals import published, runs
from evals.published_table import fill
from rl.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
ANSWERS = ["7", "1", "7", "12", "7", "3", "1", "9"]  # always 7: 3 of 8
BEFORE = [1, 0, 0, 0, 1, 0, 0, 0]  # 0.25
AFTER = {0: [1, 1, 1, 0, 1, 1, 0, 1], 1: [1, 1, 1, 1, 1, 1, 0, 1], 2: [1, 0, 1, 0, 1, 1, 0, 1]}  # .75 .875 .625


def _score(marks: list[int]) -> dict:
    return {"value": float(np.mean(marks)), "stderr": float(reference.sem(marks)), "n": len(marks)}


def _compared(before: list[int], after: list[int]) -> dict:
    change = np.subtract(after, before)
    bounds = reference.norm.interval(0.95, change.mean(), reference.sem(change))
    difference = {"value": float(change.mean()), "ci95": [float(bound) for bound in bounds]}
    return {"before": _score(before), "after": _score(after), "difference": difference}


def _put(parent: Path, name: str, seed: int = 0, after: list[int] | None = None, **changes) -> Path:
    """A run's folder as training leaves it, weights aside; lenient scores one more question right before."""
    after = after or AFTER[seed]
    strict = _compared(BEFORE, after)
    result = {"metric": "strict", **strict, "strict": strict, "lenient": _compared([1, 1, *BEFORE[2:]], after)}
    run = {
        "name": name,
        "status": "finished",
        "command": "nox -s train -- configs/demo.toml",
        "config": {"run": {"name": "demo", "seed": seed}, "model": {"base": "tiny"}, "trainer": {"algorithm": "grpo"}},
        "config_sha256": "c" * 64,
        "git": {"commit": "a" * 40, "dirty": False},
        "packages": {"torch": "2.15.0", "mlx": None, "rich": "15.0.0"},
        "packages_match_lock": True,
        "python": "3.13.0",
        "device": "cpu: 2 cores",
        "seed": seed,
        "base": {"id": "tiny", "sha256": "b" * 64},
        "data": {"source": "arithmetic", "fingerprint": "d" * 64},
        "wall_s": 61.2,
        "steps": 40,
        "rollout": {"mean_abs_dlogp": 3.21e-5, "tokens_per_s": 1234.4},
        "result": {**result, "wellformed": {"before": 0.5, "after": 1.0}},
    }
    folder = parent / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run | changes))
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    (folder / "curves.png").write_bytes(b"\x89PNG")
    rows = [
        {"id": str(i), "answer": answer, "before": "x", "after": "y", "right": [bool(b), bool(a)]}
        for i, (answer, b, a) in enumerate(zip(ANSWERS, BEFORE, after, strict=True))
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with a README, three seeds of `demo` in models/final and nothing published."""
    for seed in AFTER:
        _put(tmp_path / "models" / "final", f"demo-seed{seed}", seed)
    (tmp_path / "README.md").write_text("# Top\n\n<!-- published: demo -->\nold\n<!-- end -->\nbelow\n")
    return tmp_path


def _cells(text: str, first: str) -> list[str]:
    """Cells of the only table row that starts with `first`."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {first}")]
    return [cell.strip() for cell in row.strip("|").split(" | ")]


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what is copied


def test_publishing_copies_the_record_and_no_weights(root: Path) -> None:
    published.publish(root, ["demo-seed0"], note="A note.\nOn two lines.")
    copied = root / "evals" / "published" / "runs" / "demo-seed0"
    assert set(_files(copied)) == {"run.json", "metrics.jsonl", "curves.png", "samples.jsonl", "note.md"}
    source = root / "models" / "final" / "demo-seed0"
    for name in published.COPIED:
        assert (copied / name).read_bytes() == (source / name).read_bytes()
    assert "\nA note. On two lines.\n" in (root / "evals" / "published" / "README.md").read_text()


def test_a_note_is_kept_until_another_is_given(root: Path) -> None:
    note = root / "evals" / "published" / "runs" / "demo-seed0" / "note.md"
    published.publish(root, ["demo-seed0"], note="first")
    published.publish(root, ["demo-seed0"])
    assert note.read_text() == "first\n"
    published.publish(root, ["demo-seed0"], note="")
    assert not note.exists()


def test_a_run_brought_from_another_machine_gets_no_results_of_this_one(root: Path) -> None:
    """Trap: evals/results/<run> here belongs to this machine's run of that name."""
    brought = root / "brought"
    _put(brought, "demo-seed0", after=AFTER[1])
    (root / "evals" / "results" / "demo-seed0").mkdir(parents=True)
    (root / "evals" / "results" / "demo-seed0" / "heldout.json").write_text("{}")
    own = put_result(brought, "demo-seed0", [1, 0, 0, 1], "base")
    own.parent.parent.rename(brought / "demo-seed0" / "results")
    (made,) = published.publish(root, ["demo-seed0"], source=brought, alias="demo-gpu")
    assert made.name == "demo-gpu-seed0"
    copied = {name for name in _files(made) if "results" in name}
    assert copied == {"results/base/heldout.json", "results/base/heldout.samples.jsonl.gz"}
    text = (root / "evals" / "published" / "README.md").read_text()
    assert "## demo-gpu\n" in text
    assert "(runs/demo-gpu-seed0/results/base/heldout.json)" in text
    assert _cells(text, "[demo-gpu-seed0]")[4] == "0.875 ± 0.125"  # sqrt(7/64 * 8/7 / 8) = 1/8


def test_results_of_other_weights_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: a run trained again keeps its name, and the scores of the old weights lie there still."""
    subject = runs.Subject("run", root / "models" / "final" / "demo-seed0")
    monkeypatch.setattr(runs, "subjects", lambda root, run: [subject])
    path = put_result(root, "demo-seed0", [1, 0], weights_sha256=runs.weights_sha256(subject))
    (made,) = published.publish(root, ["demo-seed0"])
    assert (made / "results" / "heldout.json").read_bytes() == path.read_bytes()
    (subject.model / "model.safetensors").write_bytes(b"trained again")
    with pytest.raises(UserError, match="measured on other weights than demo-seed0 has"):
        published.publish(root, ["demo-seed0"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "interrupted"}, "status is 'interrupted'"),
        ({"result": None}, "`result` is no measurement"),
        ({"base": {"id": "/ckpt", "sha256": "b"}}, "base.id names '/ckpt'"),
        ({"config": {"data": {"path": "/data/me/a.jsonl"}}}, "config.data.path names '/data/me/a.jsonl'"),
        ({"config": {"reward": [{"x": "~/r.py"}]}}, r"config.reward\[0\].x names '~/r.py'"),
        ({"config": {"model": {"base": "C:\\models\\m"}}}, "a place on one machine"),
        ({"command": "nox -s train -- demo.toml --set data.path=/data/x/y"}, "command names '/data/x/y'"),
    ],
)
def test_what_may_not_be_published_leaves_nothing_behind(root: Path, changes: dict, message: str) -> None:
    _put(root / "models" / "final", "demo-seed1", 1, **changes)
    before = _files(root)
    with pytest.raises(UserError, match=message) as raised:
        published.publish(root, ["demo-seed0", "demo-seed1"])
    assert "\n" not in str(raised.value)
    assert _files(root) == before


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("file:///srv/x", True),
        ("--set a=/srv/x/y", True),
        ("at:/srv/x/y", True),
        ("configs/smollm2/gcd.toml", False),
        ("org/name", False),
        ("https://example.org/a/b", False),
        ("<think>a</think>/b/c", False),
        ("6 / 2 / 3", False),
        ("/usr/lib/libcudnn.so.9", False),
    ],
)
def test_places_of_a_machine_are_recognised(text: str, found: bool) -> None:
    assert bool(published.PLACE.search(text)) == found


def test_where_the_checkout_was_is_cut_from_the_command(root: Path) -> None:
    command = "nox -s train -- /srv/me/duet/configs/demo.toml --seeds 0,1"
    _put(root / "models" / "final", "demo-seed0", command=command)
    (made,) = published.publish(root, ["demo-seed0"])
    assert json.loads((made / "run.json").read_text())["command"] == "nox -s train -- configs/demo.toml --seeds 0,1"


@pytest.mark.parametrize("name", ["metrics.jsonl", "curves.png", "samples.jsonl"])
def test_a_folder_that_is_not_whole_is_refused(root: Path, name: str) -> None:
    (root / "models" / "final" / "demo-seed0" / name).unlink()
    with pytest.raises(UserError, match=f"{name} missing"):
        published.publish(root, ["demo-seed0"])


def test_scores_that_are_not_those_of_the_samples_are_refused(root: Path) -> None:
    """Trap: a run.json beside the samples of another run of the same name."""
    folder, other = (root / "models" / "final" / f"demo-seed{seed}" for seed in (0, 1))
    (folder / "samples.jsonl").write_bytes((other / "samples.jsonl").read_bytes())
    with pytest.raises(UserError, match=r"0\.2500 → 0\.7500 on 8 questions, but samples\.jsonl has 0\.2500 → 0\.8750"):
        published.publish(root, ["demo-seed0"])


def test_an_unknown_or_unfinished_name_says_which_there_are(root: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'demo-seed"):
        published.publish(root, ["demo-seed7"])
    _put(root / "models" / "checkpoints", "late", status="running")
    with pytest.raises(UserError, match="'running', not finished"):
        published.publish(root, ["late"])


def test_runs_that_differ_in_more_than_the_seed_make_no_mean(root: Path) -> None:
    """Trap: a mean over two experiments that share a name."""
    published.publish(root, ["demo-seed0"])
    _put(root / "models" / "final", "demo-seed1", 1, packages={"torch": "2.16.0", "mlx": None})
    with pytest.raises(UserError, match=r"packages\.torch: .*2\.15\.0.* → .*2\.16\.0.*--as NAME"):
        published.publish(root, ["demo-seed1"])
    published.publish(root, ["demo-seed1"], alias="demo-newer")
    with pytest.raises(UserError, match="without -seed<N>"):
        published.publish(root, ["demo-seed0"], alias="x-seed1")
    with pytest.raises(UserError, match="each may occur once"):  # `demo` and `demo-seed0` are the same seed
        published.publish(root, [_put(root / "models" / "final", "demo").name])


# --- the tables


def test_the_section_of_three_seeds_by_hand(root: Path) -> None:
    published.publish(root, [f"demo-seed{seed}" for seed in AFTER])
    text = (root / "evals" / "published" / "README.md").read_text()
    stderr = np.std(AFTER[0], ddof=1) / np.sqrt(8)
    gains = np.subtract(AFTER[0], BEFORE)
    low, high = gains.mean() + reference.norm.ppf([0.025, 0.975]) * gains.std(ddof=1) / np.sqrt(8)
    assert _cells(text, "[demo-seed0]") == [
        *("[demo-seed0](runs/demo-seed0/run.json)", "0", "8", "0.250 ± 0.164", f"0.750 ± {stderr:.3f}"),
        *(f"+0.500 [{low:+.3f}, {high:+.3f}]", "0.375 ± 0.183", "0.750 ± 0.164", "0.500", "1.000"),
        *("40", "1 min 01 s", "cpu: 2 cores", "3.2e-05", "1,234"),
    ]
    afters = [np.mean(marks) for marks in AFTER.values()]
    interval = reference.t.interval(0.95, df=2, loc=0.75, scale=reference.sem(afters))
    mean = _cells(text, "mean of 3")
    assert mean[3] == "0.250"  # one start for all seeds: no spread to speak of
    assert mean[4] == f"0.750 [{interval[0]:.3f}, {interval[1]:.3f}]"
    assert mean[5] == f"+0.500 [{interval[0] - 0.25:+.3f}, {interval[1] - 0.25:+.3f}]"
    assert mean[8:10] == ["0.500", "1.000"]
    assert "`7` (3 of 8), always giving it scores 0.375." in text
    assert "- Command: `nox -s train -- configs/demo.toml`\n" in text
    assert "- Commit: `aaaaaaaaaaaa`\n" in text
    assert "- Packages: Python 3.13.0, torch 2.15.0 (all as locked)\n" in text
    assert "(runs/demo-seed2/curves.png)" in text


def test_what_differs_between_seeds_is_named_with_its_seed(root: Path) -> None:
    """Trap: one commit under a table whose runs were made from two."""
    _put(root / "models" / "final", "demo-seed1", 1, git={"commit": "f" * 40, "dirty": True})
    published.publish(root, ["demo-seed0", "demo-seed1"])
    text = (root / "evals" / "published" / "README.md").read_text()
    assert "- Commit: `aaaaaaaaaaaa` (seed 0); `ffffffffffff` with local changes (seed 1)\n" in text


def test_a_run_that_did_not_sample_shows_no_sampler_numbers(root: Path) -> None:
    _put(root / "models" / "final", "sft", rollout={"mean_abs_dlogp": None, "tokens_per_s": None})
    published.publish(root, ["sft"])
    assert _cells((root / "evals" / "published" / "README.md").read_text(), "[sft]")[-2:] == ["–", "–"]


def test_the_readme_block_is_filled_and_the_rest_left_alone(root: Path) -> None:
    published.publish(root, [f"demo-seed{seed}" for seed in AFTER])
    text = (root / "README.md").read_text()
    assert text.startswith("# Top\n\n<!-- published: demo -->\n")
    assert text.endswith("<!-- end -->\nbelow\n")
    assert "\nold\n" not in text
    cells = _cells(text, "1 | ")
    assert cells[:3] == ["1", "0.250 ± 0.164", "0.875 ± 0.125"]
    assert cells[3].startswith("+0.625 [")
    assert cells[4:] == ["1 min 01 s", "0.375 → 0.875"]
    assert "Strict scores, greedy, n = 8 held-out questions" in text


def test_a_family_shows_each_experiment_with_its_constant_answer(root: Path) -> None:
    for name in ("smollm2-gcd", "smollm2-sums", "smollm1"):
        _put(root / "models" / "final", name)
    (root / "README.md").write_text("<!-- published: smollm2-* -->\n<!-- end -->\n")
    published.publish(root, ["smollm2-sums", "smollm2-gcd", "smollm1"])
    text = (root / "README.md").read_text()
    assert _cells(text, "smollm2-gcd")[0] == "smollm2-gcd"
    assert "Strict scores, greedy" in text
    assert _cells(text, "smollm2-gcd")[-1] == "`7` (3 of 8), scores 0.375"
    assert text.index("smollm2-gcd") < text.index("smollm2-sums")
    assert "smollm1" not in text


def test_a_family_shows_several_seeds_by_their_mean_and_longest_time(root: Path) -> None:
    """One row an experiment, or a README of ten experiments is a wall; the runs stand in evals/published/README.md."""
    (root / "README.md").write_text("<!-- published: dem* -->\n<!-- end -->\n")
    published.publish(root, [f"demo-seed{seed}" for seed in AFTER])
    rows = [line for line in (root / "README.md").read_text().splitlines() if line.startswith("| demo")]
    assert len(rows) == 1
    assert rows[0].startswith("| demo | mean of 3 | 0.250 | 0.750 [")
    assert "| ≤ 1 min 01 s |" in rows[0]
    assert "`7` (3 of 8), scores 0.375" in rows[0]


def test_a_family_of_two_metrics_says_which_is_whose(root: Path) -> None:
    """Trap: a lenient gain read as a strict one."""
    for name in ("x-strict", "x-lenient"):
        folder = _put(root / "models" / "final", name)
        run = json.loads((folder / "run.json").read_text())
        run["result"]["metric"] = name[2:]
        (folder / "run.json").write_text(json.dumps(run))
    (root / "README.md").write_text("<!-- published: x-* -->\n<!-- end -->\n")
    published.publish(root, ["x-strict", "x-lenient"])
    text = (root / "README.md").read_text()
    lenient, strict = _cells(text, "x-lenient (lenient)"), _cells(text, "x-strict (strict)")
    assert (lenient[2][:5], lenient[4][:6], lenient[6]) == ("0.375", "+0.375", "0.250 → 0.750")
    assert (strict[2][:5], strict[4][:6], strict[6]) == ("0.250", "+0.500", "0.375 → 0.750")
    assert "Strict scores" not in text


def test_blocks_in_code_are_left_alone_and_an_open_one_is_named() -> None:
    """Trap: a README that explains the marker would lose the explanation."""
    code = "```\n<!-- published: demo -->\n```\n~~~\n```\n<!-- published: demo -->\n~~~\n"
    assert fill(code, []) == (code, [])
    empty = "<!-- published: demoo -->\n\n<!-- end -->"
    assert fill(empty, []) == (empty, ["demoo"])
    filled = fill("<!-- published: demoo -->\n| 0.9 |\n<!-- end -->", [])[0]
    assert filled == "<!-- published: demoo -->\n\nNo run of `demoo` is published yet.\n\n<!-- end -->"
    assert fill(filled, []) == (filled, ["demoo"])
    for broken in ("a\n<!-- published: x -->\nb\n", "a\n<!-- published: x -->\n<!-- published: y -->\n<!-- end -->\n"):
        with pytest.raises(UserError, match=r"line 2: <!-- published: x --> has no <!-- end -->"):
            fill(broken, [])


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_text_without_a_block_stays_as_it_is(text: str) -> None:
    assert fill(text, [])[0] == text


# --- check


def test_building_again_gives_the_same_bytes(root: Path) -> None:
    published.publish(root, ["demo-seed1", "demo-seed0"])
    first = _files(root)
    assert published.build(root) == []
    (root / "evals" / "published" / "README.md").unlink()
    (root / "README.md").write_text("# Top\n\n<!-- published: demo -->\n<!-- end -->\nbelow\n")
    assert len(published.build(root)) == 2
    assert _files(root) == first


def test_check_finds_a_number_changed_by_hand(root: Path) -> None:
    published.publish(root, ["demo-seed0"])
    assert published.check(root) == 1
    for path in (root / "README.md", root / "evals" / "published" / "README.md"):
        good = path.read_text()
        path.write_text(good.replace("0.750", "0.950"))
        with pytest.raises(UserError, match=rf"^{path.relative_to(root)}: not what .* python -m evals published$"):
            published.check(root)
        path.write_text(good)
    # and one in the record itself, since the samples say otherwise
    record = root / "evals" / "published" / "runs" / "demo-seed0" / "run.json"
    record.write_text(record.read_text().replace("0.75", "0.95"))
    with pytest.raises(UserError, match="copy both again"):
        published.check(root)


def test_the_repository_itself_follows_from_its_published_files() -> None:
    assert published.check(ROOT) == len(list((ROOT / "evals" / "published" / "runs").glob("*/run.json")))


def test_the_command_exits_2_with_one_line(tmp_path: Path) -> None:
    """Also without torch: a check in CI has to be quick."""
    code = "import sys; from pathlib import Path; from evals import __main__ as cli\n"
    code += "cli.main(['check'], Path(sys.argv[1]))\n"
    code += "assert not {'torch', 'transformers', 'mlx', 'trl', 'lm_eval', 'matplotlib'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "the tables follow from 0 published runs\n"), done.stderr
    asked = [sys.executable, "-m", "evals", "publish", "no-such-run", "--from", str(tmp_path)]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}: no run 'no-such-run'; it holds no run\n"


def test_main_publishes_and_says_where(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["publish", "demo-seed0", "demo-seed1", "--as", "sums", "--note", "Why."], root)
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [
        "published: evals/published/runs/sums-seed0",
        "published: evals/published/runs/sums-seed1",
        "the tables follow from 2 published runs",
    ]
    assert said[3] == "README.md: no published run belongs to the block 'demo'"
    cli.main(["published"], root)
    assert capsys.readouterr().out.startswith("wrote: nothing, all is up to date\n")
