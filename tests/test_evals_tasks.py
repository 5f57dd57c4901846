"""Tasks: which there are, that none asks what a config trains on, how they score, and what missing data says."""

import dataclasses
import hashlib
import importlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evals_checkout import answering, put_llama, put_run

from evals import __main__ as cli
from evals import backends, catalog, harness, measure, runs
from evals.tasks import heldout, offline
from rl import config, data
from rl.data import gym
from rl.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
GYM = sorted(path.stem for path in catalog.TASKS.glob("gym_*.yaml"))
GYM_CONFIGS = [
    path for path in sorted(ROOT.glob("configs/**/*.toml")) if 'source = "reasoning-gym"' in path.read_text()
]
# of "prompt<TAB>answer" lines: a published score is of these very questions; other ones need another metadata.version
FINGERPRINTS = {
    "gym_chain_sum": "f221bd216fc10896",
    "gym_family_relationships": "23e3aced7abde7b2",
    "gym_gcd": "ca2a11bda9c73c76",
    "gym_lcm": "d5c5e9d555e8dc15",
    "gym_leg_counting": "ded93dba7dddad2b",
    "gym_letter_counting": "8910f8452a9c8625",
    "gym_needle_haystack": "8c21f4ae56626984",
    "gym_products": "cb2fffda92377c3f",
    "sums": "7cbc44e6ecafb9af",
}


def rows_of(task: str) -> list[dict[str, Any]]:
    found = catalog.ours(ROOT)[task].config
    maker = getattr(offline, found["custom_dataset"].partition(".")[2])
    return list(maker(**found["metadata"], **found["dataset_kwargs"])["test"])


# --- our own questions


def test_at_least_six_families() -> None:
    families = {catalog.ours(ROOT)[task].config["dataset_kwargs"]["family"] for task in GYM}
    assert len(families) == len(GYM) >= 6


@pytest.mark.parametrize("task", [*GYM, "sums"])
def test_questions_are_the_same_everywhere_and_their_own_answers_are_right(task: str) -> None:
    """Each gold answer is strictly right, at the end of a sentence leniently; inside a longer answer it is wrong."""
    rows = rows_of(task)
    assert len(rows) == catalog.size(catalog.ours(ROOT)[task])
    assert len({row["prompt"] for row in rows}) == len(rows)
    lines = "".join(f"{row['prompt']}\t{row['answer']}\n" for row in rows)
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == FINGERPRINTS[task]
    for row in rows[:40]:
        answer = row["answer"]
        assert heldout.process_results(row, [f" {answer}"]) == {"strict": 1, "lenient": 1, "wellformed": 1}
        assert heldout.process_results(row, [f" It is {answer}."])["lenient"] == 1
        assert heldout.process_results(row, [f" It is {answer}."])["strict"] == 0
        # reasoning-gym's default scorer pays for an answer that stands inside a longer one
        assert heldout.process_results(row, [f" {answer}{answer}7"])["lenient"] == 0


def test_sums_are_the_questions_grpo_keeps() -> None:
    kept = data.build(config.load(ROOT / "configs" / "grpo.toml")).heldout
    assert [(row["prompt"], row["answer"]) for row in rows_of("sums")] == [(r["prompt"], r["answer"]) for r in kept]


def _questions(task: str, prompt: str) -> list[str]:
    """What names each question of a prompt in any wording and order: the worked examples, then the one asked."""
    parts = [part.rpartition("\nAnswer:")[0] for part in prompt.split("Question: ")[1:]]
    return [gym.keys(task, part.strip())[1] for part in parts]


@pytest.mark.parametrize("path", GYM_CONFIGS, ids=lambda path: path.stem)
def test_no_config_trains_on_a_question(path: Path, tmp_path: Path) -> None:
    """Not reordered either, nor as a worked example, nor with more rows than its own; or its run is not asked."""
    assert len(GYM_CONFIGS) >= 3
    built = config.load(path, ["data.train_size=4000", "eval.size=64"])
    train = data.build(built).train
    for task in built.data.tasks:
        rows = [row for row in train if row["task"] == task.name]
        trained = {question for row in rows for question in _questions(task.name, row["prompt"])}
        asked = {_questions(task.name, row["prompt"])[-1] for row in rows_of(f"gym_{task.name}")}
        assert len(trained) > 200
        assert len(asked) > 90
        if built.data.seed == offline.SEED:
            assert not asked & trained
            continue
        run = runs.Run(path.stem, tmp_path, {"config": config.resolved(built)})
        with pytest.raises(UserError, match="it may have seen these"):
            measure.check_unseen(tmp_path, runs.Target(path.stem, [], run), catalog.ours(ROOT)[f"gym_{task.name}"])


def test_other_options_and_mixtures_do_not_train_on_a_question_either() -> None:
    """The held-out side is the question's own, not that of one config's pool."""
    family = config.Task(name="gcd", options={"min_value": 1, "max_value": 60})
    other = config.Task(name="lcm", options={"max_value": 60})
    built = config.load(ROOT / "configs" / "smollm2" / "gcd.toml", ["data.train_size=3000"])
    table = dataclasses.replace(built.data, tasks=(other, family), shots=0)
    rows = data.build(dataclasses.replace(built, data=table, eval=config.Eval(size=32))).train
    for task in ("gcd", "lcm"):
        trained = {_questions(task, row["prompt"])[-1] for row in rows if row["task"] == task}
        asked = {_questions(task, row["prompt"])[-1] for row in rows_of(f"gym_{task}")}
        assert len(trained) > 500
        assert not asked & trained


@pytest.mark.parametrize(
    ("table", "task", "refused"),
    [
        ({"source": "reasoning-gym", "seed": 7, "task": [{"name": "gcd"}]}, "gym_gcd", True),
        ({"source": "reasoning-gym", "seed": 0, "task": [{"name": "gcd"}]}, "gym_gcd", False),
        ({"source": "reasoning-gym", "seed": 7, "task": [{"name": "gcd"}]}, "gym_lcm", False),
        ({"source": "arithmetic", "seed": 0, "max_a": 99, "max_b": 99, "shots": 0}, "sums", True),
        ({"source": "arithmetic", "seed": 0, "max_a": 50, "max_b": 9, "shots": 2}, "sums", False),
    ],
)
def test_a_run_is_not_asked_what_it_may_have_seen(tmp_path: Path, table: dict, task: str, refused: bool) -> None:
    """Trap: another [data] seed splits another way. A run that goes on from such a run is no better."""
    parent = put_run(tmp_path, "parent", "random")
    child = put_run(tmp_path, "child", "random")
    for folder, changes in (
        (parent, {"config": {"data": table}}),
        (child, {"parents": [{"role": "model.from", "name": "parent"}]}),
    ):
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(record | changes))
    target = runs.Target("child", [], runs.load(tmp_path, "child"))
    if not refused:
        measure.check_unseen(tmp_path, target, catalog.ours(ROOT)[task])
        return
    with pytest.raises(UserError, match="it may have seen these; --tasks heldout"):
        measure.check_unseen(tmp_path, target, catalog.ours(ROOT)[task])


# --- names


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """lm-eval's task folder with a few files in all the forms its own have; also the root of the checkout."""
    folder = tmp_path / "lm_eval_tasks"
    files = {
        "capitals.yaml": "task: capitals\ndataset_path: Org/MyCapitals\ndataset_name: big\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{country}}'\ndoc_to_target: '{{capital}}'\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]\n",
        "a/_base": "tag: [first, second]\ndataset_path: json\ndataset_kwargs: {data_files: {test: gone.jsonl}}\n",
        "a/one.yaml": 'include: _base\n"task": "one" # a comment\n',
        "a/two.yaml": "include: _base\ntask: two\ntag:\n  - second\n",
        "group.yaml": "group: both\ntask:\n  - two\n  - inner\n",
        "inner.yaml": "group: inner\ntask: [one]\n",
        "odd.yaml": "group: odd\ntask:\n  - task: one\n    num_fewshot: 3\n",
        "python.yaml": "task: scripted\ngroup: not_a_group\nclass: !function code.Scripted\n",
        "broken.yaml": "nothing: here\n",
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(catalog, "lm_eval_tasks", lambda: folder)
    return tmp_path


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("gym_gcd, heldout", ["gym_gcd", "heldout"]),
        ("gym_l*", ["gym_lcm", "gym_leg_counting", "gym_letter_counting"]),
        ("capitals,sums", ["capitals", "sums"]),
        ("both", ["two", "one"]),
        ("first", ["one"]),
        ("second", ["one", "two"]),
        ("on?", ["one"]),
        ("scripted", ["scripted"]),
    ],
)
def test_names_groups_tags_and_patterns(library: Path, names: str, found: list[str]) -> None:
    assert [task.name for task in catalog.find(library, names)] == found
    assert [task.name for task in catalog.find(library, names)] == found  # the second time from build/


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("capitols", "unknown task 'capitols', did you mean 'capitals'?"),
        ("gym_gdc,capitals", "unknown task 'gym_gdc', did you mean 'gym_gcd'"),
        ("odd", "group 'odd' changes the settings of its tasks"),
        (
            "bigbench_hindu_choice",
            "python -m evals fetch bigbench:hindu`, or put the file at data/raw/bigbench/hindu/task",
        ),
        (" , ", "no task given"),
    ],
)
def test_unknown_names_are_one_line_with_the_nearest(library: Path, names: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        catalog.find(library, names)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_names_are_read_as_lm_eval_reads_them() -> None:
    """Trap: keys in quotes, tags that come by include. All 13,123 were compared once; here every 150th."""
    from lm_eval.tasks._yaml_loader import load_yaml

    files = sorted(catalog.lm_eval_tasks().rglob("*.yaml"))[::150]
    assert len(files) > 80
    for file in files:
        real, ours = load_yaml(file, resolve_func=False), catalog._top(file)
        for key in ("task", "group"):
            if isinstance(real.get(key), str):
                assert ours[key] == real[key]
        tags = real.get("tag") or []
        assert catalog._words(ours.get("tag", "")) == (tags if isinstance(tags, list) else [tags])


def test_a_task_is_another_one_when_a_file_it_includes_changes(library: Path) -> None:
    (task,) = catalog.find(library, "one")
    before = task.sha256
    included = library / "lm_eval_tasks" / "a" / "_base"
    included.write_text(included.read_text() + "description: hello\n")
    assert task.sha256 != before


# --- data


def test_missing_data_names_the_data_set_and_how_to_get_it(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(library / "cache"))
    capitals, one = catalog.find(library, "capitals,one")
    with pytest.raises(UserError) as error:  # HF_HUB_OFFLINE is set for all tests
        harness.ensure_data(capitals)
    said = str(error.value)
    assert said.startswith("task capitals: data set Org/MyCapitals (big) is not on this machine")
    assert "datasets.load_dataset('Org/MyCapitals', 'big')" in said
    assert said.endswith(f"bring {library}/cache/Org___my_capitals here")
    with pytest.raises(UserError, match=r"task one: file gone\.jsonl is missing"):
        harness.ensure_data(one)


def test_a_silent_network_is_waited_for_a_moment_only(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: the client's own time limit does not cover name resolution, which can take minutes."""
    import huggingface_hub

    monkeypatch.setenv("HF_DATASETS_CACHE", str(library / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(harness, "HUB_SECONDS", 0.05)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: time.sleep(20))
    started = time.monotonic()
    with pytest.raises(UserError, match=r"is not on this machine.* \(the hub: no answer\)$"):
        harness.ensure_data(catalog.find(library, "capitals")[0])
    assert time.monotonic() - started < 5


def test_a_cached_data_set_is_asked_without_the_hub(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    cache = library / "cache"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for module, name in ((datasets.config, "HF_HUB_OFFLINE"), (huggingface_hub.constants, "HF_HUB_OFFLINE")):
        monkeypatch.setattr(module, name, False)
    rows = [{"country": "Peru", "capital": "Lima"}, {"country": "Togo", "capital": "Lomé"}]
    (library / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = datasets.load_dataset(
        "json", data_files={"test": str(library / "rows.jsonl")}, cache_dir=str(library / "made")
    )
    (arrow,) = (library / "made").rglob("json-test.arrow")
    folder = cache / "Org___my_capitals" / "big" / "0.0.0" / "abc"
    folder.mkdir(parents=True)
    (folder / "my_capitals-test.arrow").write_bytes(arrow.read_bytes())
    info = json.loads((arrow.parent / "dataset_info.json").read_text()) | {
        "dataset_name": "my_capitals",
        "config_name": "big",
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert made["test"].num_rows == 2

    (task,) = catalog.find(library, "capitals")
    harness.ensure_data(task)
    assert catalog.size(task) == 2
    result = harness.evaluate(
        answering(lambda prompt: {"Peru": "Lima"}.get(prompt, "Rome")), harness.asked(task), None, 0
    )
    assert result["results"]["capitals"]["exact_match,none"] == 0.5
    assert not datasets.config.HF_HUB_OFFLINE


# --- models that are no runs


def test_folders_and_hub_ids(tmp_path: Path) -> None:
    put_llama(tmp_path / "models" / "base" / "random", seed=0)
    put_llama(tmp_path / "elsewhere" / "My model!", seed=0)
    target = runs.target(tmp_path, "models/base/random")
    assert (target.name, target.run, target.subjects[0].role) == ("random", None, "run")
    other = runs.target(tmp_path, str(tmp_path / "elsewhere" / "My model!"))
    assert re.fullmatch(r"My-model--[0-9a-f]{6}", other.name)
    with pytest.raises(UserError, match=r"model 'org/nothing'.*hf download org/nothing"):
        runs.target(tmp_path, "org/nothing")


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (lambda f: (f / "model.safetensors").unlink(), r"random: no model\*.safetensors, so there is no model"),
        (lambda f: (f / "config.json").unlink(), "random: no config.json, so it is not a model folder"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not whole JSON"),
    ],
)
def test_a_folder_that_is_no_model_is_one_line(tmp_path: Path, breaks: Callable[[Path], None], words: str) -> None:
    put_llama(tmp_path / "models" / "base" / "random", seed=0)
    breaks(tmp_path / "models" / "base" / "random")
    with pytest.raises(UserError, match=words):
        cli.main(["models/base/random"], tmp_path)
    assert not (tmp_path / "evals" / "results").exists()


def test_heldout_needs_a_run(tmp_path: Path) -> None:
    put_llama(tmp_path / "models" / "base" / "random", seed=0)
    with pytest.raises(UserError, match="random: task heldout asks the questions that a run kept"):
        cli.main(["models/base/random", "--tasks", "heldout"], tmp_path)


def test_backend_follows_the_family(tmp_path: Path) -> None:
    """MLX where the engine decodes the family; naming torch's device chooses hf; asked for in vain, one line."""
    put_llama(tmp_path / "llama", seed=0)
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    llama, gpt = (runs.Subject("run", tmp_path / name) for name in ("llama", "gpt"))
    assert backends.choose("auto", "auto", llama) == "mlx"
    assert backends.choose("auto", "auto", gpt) == "hf"
    assert backends.choose("auto", "cpu", llama) == "hf"
    with pytest.raises(
        UserError, match=r"--backend mlx: .*'gpt2' family; the MLX engine decodes llama.*use --backend hf"
    ):
        backends.choose("mlx", "auto", gpt)
    with pytest.raises(UserError, match="--device cpu is for --backend hf"):
        backends.choose("mlx", "cpu", llama)


def test_the_guide_names_what_there_is() -> None:
    """Each command, option and task in docs/evals.md exists, and its YAML is that of the task."""
    text = (ROOT / "docs" / "evals.md").read_text()
    modules = {name: importlib.import_module(f"evals.{module}") for name, module in cli.COMMANDS.items()}
    parsers = {name: module.parser for name, module in modules.items() if hasattr(module, "parser")}
    made = {n: make(n) if cli.COMMANDS[n] == "published" else make() for n, make in parsers.items()}
    known = {word for parser in (cli.parser(), *made.values()) for word in parser._option_string_actions}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= known
    used = set(re.findall(r"python -m evals (\w+)", text))
    assert len(used) >= 6
    assert used <= cli.COMMANDS.keys()
    names = {name for asked in re.findall(r"--tasks '?([\w,*@]+)", text) for name in asked.split(",")}
    lm_eval = {"arc_easy", "lambada_openai"}
    assert {task.partition("@")[0] for task in names - lm_eval - {"A", "B", "arc_*"}} <= {*catalog.ours(ROOT), "gym_*"}
    example = text.partition("```yaml\n")[2].partition("```")[0]
    assert (catalog.TASKS / "gym_products.yaml").read_text().endswith(example)
