"""rl.data from files and the hub, written out and read back; errors name file and line."""

import json
import sys
from pathlib import Path

import pytest

from rl import data
from rl.config import Config, Data, Eval, Model, Run, Task, Trainer
from rl.errors import UserError


def config(size: int = 256, file: Path = Path("configs/x.toml"), **options: object) -> Config:
    settings = {"source": "jsonl", "train_size": 100_000} | options
    return Config(
        path=file,
        run=Run(name="x"),
        model=Model(base="tiny"),
        data=Data(**settings),
        trainer=Trainer(algorithm="sft", args={}),
        eval=Eval(size=size),
    )


def refused(settings: Config, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        data.build(settings)
    assert "\n" not in str(caught.value)


TASKS = (Task(name="gcd", options={"max_value": 20}), Task(name="spell_backward"))

# --- jsonl


def write(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def numbered(first: int, count: int) -> list[object]:
    return [{"prompt": f"{i} + 1 =", "answer": i + 1} for i in range(first, first + count)]


@pytest.mark.parametrize("form", ["chat", "plain"])
def test_exported_rows_read_back_as_the_same_rows_without_reasoning_gym(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = data.build(config(30, source="reasoning-gym", form=form, tasks=TASKS, train_size=40))
    train, heldout = data.export(made, tmp_path)
    assert (train.name, heldout.name) == ("train.jsonl", "heldout.jsonl")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    again = config(30, tmp_path / "x.toml", form=form, path=train.name, heldout_path=heldout.name)
    read = data.build(again)
    assert (read.train, read.heldout) == (made.train, made.heldout)
    assert read.fingerprint == made.fingerprint
    assert read.source == "jsonl:train.jsonl"


def test_jsonl_rows_keep_order_and_other_columns(tmp_path: Path) -> None:
    """U+2028 inside a text is no end of line."""
    rows = [
        {"prompt": "a\u2028b", "answer": 3, "id": 7, "level": "easy"},
        {"prompt": [{"role": "user", "content": "c"}], "answer": " 1.5 "},
    ]
    (tmp_path / "r.jsonl").write_text("\ufeff\n" + "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    held = write(tmp_path / "h.jsonl", numbered(0, 3))
    made = data.build(config(3, tmp_path / "x.toml", path="r.jsonl", heldout_path=held))
    assert made.train[0] == {"task": "jsonl", "prompt": "a\u2028b", "answer": "3", "id": "7", "level": "easy"}
    assert made.train[1]["answer"] == "1.5"
    assert [row["answer"] for row in made.heldout] == ["1", "2", "3"]


def test_jsonl_chat_form_wraps_texts_and_adds_the_system_message(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "b"}]
    rows = [{"prompt": "a", "answer": "1", "completion": "1"}, {"prompt": chat, "answer": "2", "completion": "2"}]
    settings = {"form": "chat", "system": "Be brief.", "path": write(tmp_path / "r.jsonl", rows)}
    held = write(tmp_path / "h.jsonl", numbered(0, 1))
    made = data.build(config(1, tmp_path / "x.toml", heldout_path=held, **settings))
    assert made.train[0]["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
    assert made.train[0]["completion"] == [{"role": "assistant", "content": "1"}]
    assert made.train[1]["prompt"] == chat


def test_heldout_split_by_hash_is_stable_when_rows_are_added(tmp_path: Path) -> None:
    """A split by position would move rows from held-out to train when the file grows."""
    rows = numbered(0, 200)
    name = write(tmp_path / "r.jsonl", rows)
    before = data.build(config(50, tmp_path / "x.toml", path=name))
    assert len(before.heldout) == 50
    assert len(before.train) == 150
    assert {row["id"] for row in before.heldout}.isdisjoint(row["id"] for row in before.train)
    write(tmp_path / "r.jsonl", numbered(1000, 1) + rows)
    after = data.build(config(50, tmp_path / "x.toml", path=name))
    assert len({row["id"] for row in before.heldout} & {row["id"] for row in after.heldout}) >= 49


def test_rows_whose_prompt_is_held_out_are_not_trained_on(tmp_path: Path) -> None:
    train = write(tmp_path / "r.jsonl", [*numbered(0, 20), *numbered(5, 1)])
    heldout = write(tmp_path / "h.jsonl", numbered(5, 5))
    made = data.build(config(5, tmp_path / "x.toml", path=train, heldout_path=heldout))
    assert [row["answer"] for row in made.train] == [str(i + 1) for i in range(20) if not 5 <= i < 10]
    split = data.build(config(10, tmp_path / "x.toml", path=train))
    assert not {r["prompt"] for r in split.train} & {r["prompt"] for r in split.heldout}
    assert len({row["id"] for row in split.train}) == len(split.train)


def test_a_split_off_heldout_repeats_prompts_as_often_as_train(tmp_path: Path) -> None:
    """Split by row, a prompt given often is nearly always held out, and then none of its rows is left to train on."""
    often = [{"prompt": f"{i % 90}", "answer": 1} for i in range(540)]
    name = write(tmp_path / "r.jsonl", [*often, *numbered(1000, 540)])
    shares = []
    for seed in range(20):
        made = data.build(config(216, tmp_path / "x.toml", path=name, seed=seed))
        assert len(made.heldout) == 216
        shares.append([sum(row["answer"] == "1" for row in rows) / len(rows) for rows in (made.train, made.heldout)])
    train, heldout = (sum(side) / len(side) for side in zip(*shares, strict=True))
    assert abs(train - 0.5) < 0.02  # by row: .25 in train and .5 held out
    assert abs(heldout - 0.5) < 0.04


def test_train_size_chooses_by_seed_and_keeps_file_order(tmp_path: Path) -> None:
    name = write(tmp_path / "r.jsonl", numbered(0, 100))
    made = [data.build(config(20, tmp_path / "x.toml", path=name, train_size=30, seed=s)).train for s in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    answers = [int(row["answer"]) for row in made[0]]
    assert len(answers) == 30
    assert answers == sorted(answers)
    assert answers != list(range(answers[0], answers[0] + 30))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"rows.jsonl: no rows"),
        (b"\n \n", r"rows.jsonl: no rows"),
        (b'{"prompt": "a", "answer": 1}\n{"prompt": "b", "ans', r"line 2: not JSON \(Unterminated.*, column 17\)"),
        (b'\n{"prompt": "a", "reply": 1}\n', r"line 2: no column 'answer', found: prompt, reply$"),
        (b'{"question": "a", "answer": 1}\n', r"line 1: no column 'prompt', found: question, answer$"),
        (b"[1, 2]\n", r"line 1: found list, must be an object"),
        (b'{"prompt": "", "answer": 1}\n', r"line 1: 'prompt' must be a text or a list .*found ''"),
        (b'{"prompt": [{"role": "user"}], "answer": 1}\n', r"line 1: 'prompt' must be .*found \[\{'role': 'user'\}\]"),
        (b'{"prompt": "a", "answer": null}\n', r"line 1: 'answer' must be a text or a number, found None"),
        (b'{"prompt": "a", "answer": true}\n', r"line 1: 'answer' must be a text or a number, found True"),
        (b'{"prompt": "a", "answer": " "}\n', r"line 1: 'answer' must be"),
        (b'{"id": 1, "prompt": "a", "answer": 1}\n' * 2, r"line 2: id '1' is also on line 1"),
        (b"\xff\xfe{}", r"not UTF-8 text \(byte 0\)"),
        (b'{"prompt": "a", "answer": 1}\n', r"\[eval\] size = 5, but rows.jsonl has 1 rows"),
        (b'{"prompt": "a", "answer": 1}\n' * 5, r"\[eval\] size = 5 leaves none of the rows of rows.jsonl to train on"),
    ],
)
def test_malformed_jsonl_names_file_and_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    refused(config(5, tmp_path / "x.toml", path="rows.jsonl"), message)


def test_missing_jsonl_is_named(tmp_path: Path) -> None:
    refused(config(5, tmp_path / "x.toml", path="no.jsonl"), r"no.jsonl: cannot be read \(No such file")
    refused(config(5), r"\[data\] path is missing")
    refused(config(5, path="a", shots=1), r"shots = 1: source 'jsonl' takes its prompts as they are")


# --- hub


def test_hub_rows_come_from_load_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder stands for the hub; GSM8K's columns and its '#### 72' are understood."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    rows = [{"question": f"q{i}", "answer": f"so it is\n#### {i}"} for i in range(20)]
    write(tmp_path / "set" / "train.jsonl", rows[:12])
    write(tmp_path / "set" / "test.jsonl", rows[10:])
    made = data.build(config(10, source="hub", name=str(tmp_path / "set")))
    assert [(row["prompt"], row["answer"]) for row in made.heldout] == [(f"q{i}", str(i)) for i in range(10, 20)]
    assert [row["prompt"] for row in made.train] == [f"q{i}" for i in range(10)]
    split = data.build(config(4, source="hub", name=str(tmp_path / "set"), heldout_split="train"))
    assert (len(split.train), len(split.heldout)) == (8, 4)
    refused(
        config(4, source="hub", name=str(tmp_path / "set"), split="dev"), r"split 'dev': cannot be loaded \(ValueError"
    )


def test_hub_without_a_network_says_how_to_fetch_the_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refused(
        config(4, source="hub", name="openai/gsm8k:main"),
        r"^configs/x.toml: \[data\] name = 'openai/gsm8k:main', split 'train': cannot be loaded \(ConnectionError.*"
        r"'hf download --repo-type dataset openai/gsm8k'.*HF_HOME.*source = 'jsonl'\)$",
    )
    refused(config(4, source="hub"), r"\[data\] name is missing")


# --- lengths


def test_check_lengths_names_the_longest_row() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    rows = [{"id": "short", "prompt": "a b"}, {"id": "long", "prompt": "a b c d e"}]
    data.check_lengths(rows, tokenizer, 5, "x.toml")
    with pytest.raises(UserError, match=r"^x.toml: row 'long' has a prompt of 5 tokens, and 4 fit"):
        data.check_lengths(rows, tokenizer, 4, "x.toml")

    chat = [{"id": "chat", "prompt": [{"role": "user", "content": "a b"}]}]
    with pytest.raises(UserError, match=r"row 'chat' is a chat prompt, .* no chat template"):
        data.check_lengths(chat, tokenizer, 4, "x.toml")
    turns = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}assistant :{% endif %}"
    data.check_lengths(chat, tokenizer, 6, "x.toml")  # "user : a b assistant :"
    with pytest.raises(UserError, match=r"row 'chat' has a prompt of 6 tokens, and 5 fit"):
        data.check_lengths(chat, tokenizer, 5, "x.toml")
