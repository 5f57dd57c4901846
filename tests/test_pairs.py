"""On-policy pairs: right and wrong as graded, the same for the same seed, refused where they could teach nothing."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from config_helper import error_of
from hypothesis import given
from hypothesis import strategies as st
from preference_helper import LABELLED, PAIRS, make_config

from rl import config, data, files, models, pairs, start
from rl.__main__ import main
from rl.algorithms import seam
from rl.data import preferences
from rl.errors import RunFailed, UserError
from rl.rollouts.result import Completion

Row = dict[str, Any]


class Letters:
    """A tokenizer of one token a character; 0 is EOS."""

    chat_template = "any"

    def __call__(self, text: Sequence[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) for c in t] for t in text]}

    def apply_chat_template(self, messages: Sequence[list], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) for c in m[-1]["content"]] for m in messages]}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return "".join(chr(i) for i in ids if i)


class Script:
    """A sampler that says what it is told to, prompt by prompt; a text ending in … was cut by length."""

    def __init__(self, texts: dict[str, list[str]]):
        self.texts, self.calls = texts, []

    def generate(self, prompts: Sequence[list[int]], sampling: Any, **given: Any) -> list[Completion]:
        self.calls.append((len(prompts), sampling, given))
        seen: dict[str, int] = {}
        out = []
        for ids in prompts:
            prompt = "".join(map(chr, ids))
            text = self.texts[prompt][seen.get(prompt, 0)]
            seen[prompt] = seen.get(prompt, 0) + 1
            tokens = [ord(c) for c in text.removesuffix("…")] + ([] if text.endswith("…") else [0])
            out.append(Completion(tokens, [0.0] * len(tokens), finite=text != "NaN"))
        return out


def questions(answers: dict[str, str]) -> list[Row]:
    return [{"id": f"q{p}", "prompt": p, "answer": a, "task": "t"} for p, a in answers.items()]


def drawn(
    texts: dict[str, list[str]], rows: list[Row], algorithm: str = "dpo", seed: int = 0, metric: str = "strict"
) -> pairs.Drawn:
    k = len(next(iter(texts.values())))
    settings = make_config(
        Path("x.toml"),
        algorithm,
        seed=seed,
        rollout=config.Rollout(precision="full", samples=k, temperature=0.7, max_completion_length=9),
        eval=config.Eval(metric=metric),
    )
    return pairs.sample(settings, rows, Script(texts), Letters(), [0], {"run": "start"})


def test_only_questions_with_both_kinds_give_a_pair_of_one_right_and_one_wrong() -> None:
    texts = {"a": ["1", "1"], "b": ["2", "3"], "c": ["9", "8"], "d": ["5", "4"]}
    out = drawn(texts, questions({"a": "1", "b": "2", "c": "1", "d": "4"}))
    assert [(r["id"], r["chosen"], r["rejected"], r["answer"]) for r in out.rows] == [
        ("qb", "2", "3", "2"),
        ("qd", "4", "5", "4"),
    ]
    assert (out.questions, out.completions, out.mixed, out.right, out.cut) == (4, 8, 2, 4, 0)
    assert out.tokens == {"prompt": 8, "completion": 16}
    assert out.rows[0]["provenance"] == {
        **{"run": "start", "temperature": 0.7, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 0, "k": 2, "right": 1}
    }


@given(
    st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(0, 9), min_size=6, max_size=6)), min_size=1, max_size=9)
)
def test_any_draw_is_graded_right_and_wrong(problems: list[tuple[int, list[int]]]) -> None:
    """Property: chosen is an answer's own text, rejected never, both were said, none is kept of one-sided questions."""
    texts = {chr(97 + i): [str(s) for s in said] for i, (_, said) in enumerate(problems)}
    rows = questions({chr(97 + i): str(a) for i, (a, _) in enumerate(problems)})
    mixed = [p for p, (a, said) in zip(texts, problems, strict=True) if 0 < said.count(a) < 6]
    if not mixed:
        with pytest.raises(RunFailed, match="no pairs: 0 of"):
            drawn(texts, rows)
        return
    out = drawn(texts, rows)
    assert [row["prompt"] for row in out.rows] == mixed
    for row in out.rows:
        assert row["chosen"] == row["answer"] != row["rejected"]
        assert {row["chosen"], row["rejected"]} <= set(texts[row["prompt"]])


def test_the_metric_decides_what_is_right() -> None:
    """'so 7' gives the answer leniently but not strictly: under strict it is the wrong one."""
    texts, rows = {"a": ["so 7", "7", "8"]}, questions({"a": "7"})
    strict = {drawn(texts, rows, seed=s).rows[0]["rejected"] for s in range(20)}
    lenient = {drawn(texts, rows, seed=s, metric="lenient").rows[0]["rejected"] for s in range(20)}
    assert strict == {"so 7", "8"}
    assert lenient == {"8"}


def test_a_completion_that_ended_is_preferred_to_one_cut_by_length() -> None:
    """TRL closes every text with EOS: a cut one would teach to stop in mid-word. With nothing else it is counted."""
    texts, rows = {"a": ["7", "8", "81…", "82…"]}, questions({"a": "7"})
    assert {drawn(texts, rows, seed=s).rows[0]["rejected"] for s in range(20)} == {"8"}
    out = drawn({"a": ["7", "81…"]}, rows)
    assert (out.rows[0]["rejected"], out.cut) == ("81", 1)


def test_a_question_is_drawn_by_seed_and_name_whatever_else_is_asked() -> None:
    texts = {"a": ["1", "2", "3", "4"], "b": ["1", "2", "3", "4"]}
    alone = [drawn(texts, questions({"b": "1"}), seed=s).rows[0] for s in range(12)]
    beside = [drawn(texts, questions({"a": "2", "b": "1"}), seed=s).rows[1] for s in range(12)]
    assert alone == beside
    assert len({row["rejected"] for row in alone}) == 3


def test_kto_gets_the_same_completions_with_labels() -> None:
    texts, rows = {"a": ["1", "2", "3"], "b": ["1", "2", "3"]}, questions({"a": "1", "b": "3"})
    paired, single = drawn(texts, rows).rows, drawn(texts, rows, "kto").rows
    assert [(r["id"], r["completion"], r["label"]) for r in single] == [
        item
        for row in paired
        for item in ((f"{row['id']}/right", row["chosen"], True), (f"{row['id']}/wrong", row["rejected"], False))
    ]
    assert not any("chosen" in row for row in single)


def test_chat_prompts_get_assistant_messages() -> None:
    """TRL refuses a chat prompt whose completion is bare text."""
    rows = questions({"a": "1"})
    rows[0]["prompt"] = [{"role": "user", "content": "a"}]
    row = drawn({"a": ["1", "2"]}, rows).rows[0]
    assert row["chosen"] == [{"role": "assistant", "content": "1"}]
    assert row["rejected"] == [{"role": "assistant", "content": "2"}]


def test_every_call_of_the_sampler_has_a_stream_of_its_own() -> None:
    """Trap: with one step number for all calls, questions at the same place would draw the same random numbers."""
    script = Script({"a": ["1", "2"] * pairs.QUESTIONS})
    rows = questions({"a": "1"}) * (pairs.QUESTIONS + 3)
    settings = make_config(Path("x"), "dpo", seed=5, rollout=config.Rollout(precision="full", samples=2))
    heard: list[int] = []
    pairs.sample(settings, rows, script, Letters(), [0], {}, heard.append)
    assert [(n, given["seed"], given["step"]) for n, _, given in script.calls] == [(128, 5, 0), (6, 5, 1)]
    assert heard == [64, 3]


def test_logits_that_are_not_finite_stop_the_sampling() -> None:
    with pytest.raises(RunFailed, match="not finite in 1 of 2 completions"):
        drawn({"a": ["1", "NaN"]}, questions({"a": "1"}))


def test_mlx_pairs_are_graded_and_the_same_for_the_same_seed(tiny_base: models.Base, tmp_path: Path) -> None:
    """On random weights: the number that ends `chosen` is the sum, that of `rejected` not; another seed, others."""

    def made(seed: int, algorithm: str = "dpo") -> list[Row]:
        settings = make_config(tmp_path / "x.toml", algorithm, seed=seed)
        begin = start.Start(tiny_base, tiny_base.sha256)
        tokenizer = models.load_tokenizer(tiny_base)
        fixed = make_config(tmp_path / "x.toml", algorithm)  # the weights do not depend on the seed of sampling
        policy = start.load_policy(fixed, begin, torch.device("cpu"))
        stop = seam.stop_ids(tokenizer, ())
        sampler = start.load_sampler(fixed, begin, policy, tokenizer, stop)
        return pairs.sample(settings, data.build(settings).train, sampler, tokenizer, stop, {}).rows

    first, again, other = made(0), made(0), made(1)
    assert first == again
    assert [r["rejected"] for r in first] != [r["rejected"] for r in other]
    assert len(first) > 5

    def said(text: str) -> int | None:
        found = re.findall(r"(?<!\d)-?\d+", text)
        return int(found[-1]) if found else None

    for row in first:
        a, b = row["prompt"].removesuffix("=").split("+")
        assert said(row["chosen"]) == int(a) + int(b) != said(row["rejected"])


# --- ready rows in files


@pytest.fixture
def in_files(tmp_path: Path) -> Callable[..., config.Config]:
    """`in_files(algorithm, rows)`: a config on a jsonl file of `rows` with two held-out questions beside it."""

    def made(algorithm: str, rows: list[Row], **given: Any) -> config.Config:
        pairs.write(tmp_path / "rows.jsonl", rows)
        pairs.write(tmp_path / "held.jsonl", [{"prompt": "5+5=", "answer": "10"}, {"prompt": "6+6=", "answer": 12}])
        table = {"source": "jsonl", "path": "rows.jsonl", "heldout_path": "held.jsonl", "train_size": 99} | given
        return make_config(tmp_path / "x.toml", algorithm, data=config.Data(**table), eval=config.Eval(size=2))

    return made


@pytest.mark.parametrize(("algorithm", "rows"), [("dpo", PAIRS), ("kto", LABELLED)])
def test_preferences_in_a_file_are_trained_on_as_they_are(in_files: Callable, algorithm: str, rows: list[Row]) -> None:
    settings = in_files(algorithm, rows)
    dataset = data.build(settings)
    assert [{k: v for k, v in row.items() if k != "task"} for row in dataset.train] == rows
    assert [row["answer"] for row in dataset.heldout] == ["10", "12"]
    assert not pairs.wanted(settings, dataset.train)


def test_written_pairs_are_read_back_as_the_same_rows(in_files: Callable) -> None:
    rows = drawn({"a": ["1", "2\u2028", "é"]}, questions({"a": "1"})).rows
    assert rows[0]["chosen_ids"] == [ord("1"), 0]
    assert data.build(in_files("dpo", rows)).train == [preferences.portable(row) for row in rows]


def test_questions_are_left_for_the_run_to_sample(in_files: Callable) -> None:
    """A gold completion in the rows is no preference: kto's own `completion` column is told apart by `label`."""
    for algorithm in ("dpo", "kto"):
        settings = in_files(algorithm, [{"prompt": "1+1=", "answer": "2", "completion": "2"}])
        assert pairs.wanted(settings, data.build(settings).train)
    assert pairs.wanted(settings, [{"id": "a", "prompt": "1+1=", "answer": "2"}])
    assert not pairs.wanted(make_config(Path("x"), "sft"), [{"id": "a", "prompt": "1+1=", "answer": "2"}])


def without(row: Row, *columns: str) -> Row:
    return {k: v for k, v in row.items() if k not in columns}


@pytest.mark.parametrize(
    ("algorithm", "rows", "said"),
    [
        ("dpo", LABELLED, "no column 'chosen', 'rejected', found: id, prompt, completion, label; dpo takes prompt, "),
        ("kto", PAIRS, "no column 'completion', 'label', found: id, prompt, chosen, rejected; kto takes prompt, "),
        ("dpo", [without(PAIRS[0], "rejected")], "line 1: no column 'rejected', found: id, prompt, chosen; dpo takes"),
        ("kto", [LABELLED[0], without(LABELLED[1], "label")], "line 2: no column 'label'"),
        ("dpo", [PAIRS[0], {"id": "q", "prompt": "1+1=", "answer": "2"}], "row 'q' lacks 'chosen' and 'rejected'"),
        ("kto", [LABELLED[0] | {"label": 1}], "'label' must be true or false, found 1"),
        ("dpo", [PAIRS[0] | {"chosen": 3}], "'chosen' must be a text, as the prompt is one, found 3"),
        ("dpo", [PAIRS[0] | {"rejected": "3"}], "'chosen' and 'rejected' are the same, '3': no preference"),
        ("dpo", [without(PAIRS[0], "prompt")], "no column 'prompt'"),
    ],
)
def test_a_wrong_file_is_named_with_what_it_lacks(
    in_files: Callable, algorithm: str, rows: list[Row], said: str
) -> None:
    settings = in_files(algorithm, rows)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        pairs.wanted(settings, data.build(settings).train)
    assert "\n" not in str(caught.value)


def test_preferences_need_questions_to_be_measured_on(in_files: Callable) -> None:
    with pytest.raises(UserError, match=r"\[data\] heldout_path is missing: rows.jsonl holds preferences"):
        data.build(in_files("dpo", PAIRS, heldout_path=None))


def test_other_algorithms_still_ask_for_answers(in_files: Callable) -> None:
    with pytest.raises(UserError, match=r"no column 'answer', found: id, prompt, chosen, rejected$"):
        data.build(in_files("grpo", PAIRS))


def test_a_chat_file_may_give_texts_or_messages(in_files: Callable) -> None:
    say = [{"role": "assistant", "content": "x"}]
    rows = [{"id": "a", "prompt": [{"role": "user", "content": "q"}], "chosen": say, "rejected": "y"}]
    row = data.build(in_files("dpo", rows)).train[0]
    assert row["chosen"] == say
    assert row["rejected"] == [{"role": "assistant", "content": "y"}]
    assert preferences.COLUMNS["dpo"] == ("chosen", "rejected")


# --- settings that are refused before anything is loaded

DPO = """
[run]
name = "d"
[model]
base = "tiny"
[data]
source = "arithmetic"
form = "char"
train_size = 100
[trainer]
algorithm = "dpo"
max_steps = 10
"""
KTO = DPO.replace('"dpo"', '"kto"')


@pytest.mark.parametrize(
    ("text", "override", "said"),
    [
        (DPO, "trainer.loss_type='sigmoyd'", "[trainer] loss_type: found 'sigmoyd', did you mean 'sigmoid'?"),
        (DPO, "trainer.loss_type=['ipo', 'hing']", "[trainer] loss_type: found 'hing', did you mean 'hinge'?"),
        (DPO, "trainer.loss_type=[]", "found an empty list"),
        (DPO, "trainer.loss_weights=[1.0, 2.0]", "found 2 for 1 in loss_type, valid: one for each"),
        (DPO, "trainer.beta=0", "[trainer] beta: found 0, valid: > 0"),
        (DPO, "trainer.loss_type='exo_pair'", "label_smoothing: found 0.0 with loss_type 'exo_pair'"),
        (DPO, "trainer.sync_ref_model=true", "[trainer] sync_ref_model: refused: a reference that moves"),
        (
            DPO,
            "trainer.desirable_weight=2.0",
            "unknown key 'desirable_weight', it is an argument of algorithm 'kto', this is 'dpo'",
        ),
        (KTO, "trainer.per_device_train_batch_size=1", "found 1, valid for loss 'kto': ≥ 2"),
        (KTO, "trainer.train_sampling_strategy='random'", "found 'random', valid for loss 'kto': sequential"),
        (KTO, "trainer.loss_type='ipo'", "[trainer] loss_type: found 'ipo', valid: kto, apo_zero_unpaired"),
        (DPO, "rollout.samples=1", "[rollout] samples"),
    ],
)
def test_impossible_settings_are_one_line(tmp_path: Path, text: str, override: str, said: str) -> None:
    assert said in error_of(tmp_path, text, override)


@pytest.mark.parametrize(
    "override",
    ["trainer.loss_type='ipo'", "trainer.loss_type=['sigmoid', 'sft']", "trainer.beta=2", "rollout.samples=16"],
)
def test_possible_settings_pass(tmp_path: Path, override: str) -> None:
    (tmp_path / "x.toml").write_text(DPO)
    loaded = config.load(tmp_path / "x.toml", [override])
    assert loaded.trainer.algorithm == "dpo"


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_tiny_configs_build_on_sft(name: str) -> None:
    loaded = config.load(Path(__file__).parents[1] / "configs" / "tiny" / f"{name}.toml")
    assert config.builds_on(loaded)["model.from"].name == "sft.toml"
    assert loaded.run.name == f"tiny-{name}"


# --- the command


def test_the_command_writes_the_same_file_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = '"tiny"\n[model.tiny]\nhidden = 32\nlayers = 2\nintermediate = 64'
    tail = "max_a = 9\n[rollout]\nmax_completion_length = 3\nsamples = 32\n[eval]\nsize = 8\nmetric = 'lenient'\n"
    text = DPO.replace('"tiny"', tiny, 1).replace("train_size = 100\n", f"train_size = 24\n{tail}")
    Path("d.toml").write_text(text)
    assert main(["pairs", "d.toml", "--out", "one.jsonl"]) == 0
    assert main(["pairs", "d.toml", "--out", "two.jsonl"]) == 0
    assert Path("one.jsonl").read_bytes() == Path("two.jsonl").read_bytes()
    rows = [json.loads(line) for line in Path("one.jsonl").read_text().splitlines()]
    assert f"{len(rows)} of 24 questions have a right and a wrong completion among 32" in capsys.readouterr().out
    base = next(Path("models/base").glob("tiny-*"))
    from rl.hf_folder import check_folder, weights_sha256

    origin = rows[0]["provenance"]
    assert (origin["run"], origin["seed"], origin["k"], origin["temperature"]) == (None, 0, 32, 1.0)
    assert origin["sha256"] == weights_sha256(check_folder(base, "test"))
    assert not Path("models/checkpoints").exists()  # nothing was trained
    capsys.readouterr()
    assert main(["pairs", "d.toml", "--out", "."]) == 2
    assert "is a folder, valid: a file" in capsys.readouterr().err
    files.write_text(Path("held.jsonl"), '{"prompt": "1", "answer": "1"}\n')
    pairs.write(Path("rows.jsonl"), PAIRS)
    ready = re.sub(
        r"source.*?train_size = 24\nmax_a = 9",
        'source = "jsonl"\npath = "rows.jsonl"\nheldout_path = "held.jsonl"\ntrain_size = 9',
        text,
        flags=re.DOTALL,
    ).replace("size = 8", "size = 1")
    Path("r.toml").write_text(ready)
    assert main(["pairs", "r.toml", "--out", "three.jsonl"]) == 2
    assert "[data] holds preferences already" in capsys.readouterr().err
