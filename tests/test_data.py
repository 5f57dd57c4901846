"""rl.data's own problems: rows against hand-made references, and no row on both sides."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl import data
from rl.config import Config, Data, Eval, Model, Run, Task, Trainer
from rl.data import gym
from rl.errors import UserError

EASY = (
    Task(name="chain_sum", options={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    Task(name="gcd", weight=2.0, options={"max_value": 20}),
    Task(name="spell_backward", options={"min_word_len": 3, "max_word_len": 4}),
)


def config(size: int = 256, file: Path = Path("configs/x.toml"), **options: object) -> Config:
    settings = {"source": "arithmetic", "train_size": 100_000} | options
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


# --- arithmetic


@pytest.mark.parametrize(
    ("form", "options", "prompt", "completion"),
    [
        ("plain", {"shots": 2}, "1 + 2 = 3\n5 + 4 = 9\n12 + 7 =", " 19\n"),
        ("plain", {}, "12 + 7 =", " 19\n"),
        ("char", {}, "12+7=", "19"),
        (
            "chat",
            {},
            [{"role": "user", "content": "What is 12 + 7?"}],
            [{"role": "assistant", "content": "19"}],
        ),
        (
            "chat",
            {"system": "Be brief.", "shots": 1},
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "What is 1 + 2?"},
                {"role": "assistant", "content": "3"},
                {"role": "user", "content": "What is 12 + 7?"},
            ],
            [{"role": "assistant", "content": "19"}],
        ),
        (
            "chat",
            {"system": "End with Answer: <value>"},
            [{"role": "system", "content": "End with Answer: <value>"}, {"role": "user", "content": "What is 12 + 7?"}],
            [{"role": "assistant", "content": "Answer: 19"}],
        ),
    ],
)
def test_arithmetic_forms(form: str, options: dict[str, object], prompt: object, completion: object) -> None:
    made = data.build(config(form=form, **options))
    (row,) = [row for row in made.train + made.heldout if row["id"] == "12+7"]
    assert row == {"id": "12+7", "prompt": prompt, "answer": "19", "task": "arithmetic", "completion": completion}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 25),
    st.integers(0, 25),
    st.sampled_from("+-*"),
    st.integers(0, 5),
    st.integers(0, 2**32 - 1),
    st.integers(1, 60),
)
def test_arithmetic_lists_every_problem_once_and_commuted_ones_on_one_side(
    max_a: int, max_b: int, operation: str, shots: int, seed: int, size: int
) -> None:
    """3 + 5 in train and 5 + 3 held out would measure memory."""
    shown = [{1, 2}, {5, 4}, {8, 3}, {2, 6}, {7, 1}][:shots]
    pool = {(a, b) for a in range(max_a + 1) for b in range(max_b + 1) if {a, b} not in shown}
    wanted = config(size, max_a=max_a, max_b=max_b, operation=operation, shots=shots, seed=seed)
    try:
        made = data.build(wanted)
    except UserError:
        assert len(pool) <= size + 1
        return
    pairs = [tuple(int(x) for x in re.split(r"(?<=\d)[-+*]", row["id"])) for row in made.train + made.heldout]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) <= pool
    assert len(pairs) >= len(pool) - 1
    assert len(made.heldout) == size
    heldout = {frozenset(pair) for pair in pairs[len(made.train) :]}
    assert not heldout & {frozenset(pair) for pair in pairs[: len(made.train)]}
    for (a, b), row in zip(pairs, made.train + made.heldout, strict=True):
        assert int(row["answer"]) == {"+": a + b, "-": a - b, "*": a * b}[operation]


def test_heldout_rows_do_not_depend_on_the_train_size_but_on_the_seed() -> None:
    few, many, other = (data.build(config(**o)) for o in ({"train_size": 10}, {}, {"seed": 1}))
    assert few.heldout == many.heldout
    assert few.train == many.train[:10]
    assert len(few.train) == 10
    assert other.heldout != many.heldout
    assert len({made.fingerprint for made in (few, many, other)}) == 3


def test_arithmetic_rows_are_the_same_on_every_machine() -> None:
    """A fingerprint worked out once: when it changes, every result made before is of other data."""
    made = data.build(config(shots=2, train_size=300))
    assert (len(made.train), len(made.heldout)) == (250, 256)
    assert made.fingerprint[:8] == "4603ea69"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 600, "shots": 2}, r"\[eval\] size = 600, but there are 506 problems \(a 0-50, b 0-9, less 2 shots\)"),
        ({"size": 510}, r"but there are 510 problems"),
        ({"shots": 9}, r"\[data\] shots = 9: arithmetic has at most 8"),
        ({"shots": 1, "form": "char"}, r"shots = 1: form 'char' has no shots"),
        ({"max_a": 10**6, "max_b": 10**6}, r"more than 4000000 problems"),
        ({"system": "Be brief."}, r"system needs form = 'chat', found form = 'plain'"),
        ({"tasks": EASY}, r"only source 'reasoning-gym' has tasks"),
        ({"from_": "sft.toml"}, r"from = 'sft.toml': source 'arithmetic' builds on no run"),
    ],
)
def test_arithmetic_that_cannot_be_had(options: dict[str, object], message: str) -> None:
    refused(config(**options), r"^configs/x.toml: .*" + message)


# --- reasoning-gym


def words(question: str) -> tuple[str, ...]:
    return tuple(sorted(re.findall(r"\w+|[+*/-]", question)))


def test_gym_heldout_questions_never_occur_in_train() -> None:
    """1-digit sums come from a pool of 200, so seeds alone would put nearly every held-out question into train."""
    made = data.build(config(source="reasoning-gym", form="chat", tasks=EASY, train_size=1000))
    asked = {side: [row["prompt"][-1]["content"] for row in getattr(made, side)] for side in ("train", "heldout")}
    assert len(set(asked["train"])) == len(asked["train"])
    assert len(set(asked["heldout"])) == 256
    assert not set(asked["train"]) & set(asked["heldout"])
    sums = {side: {words(q) for q in asked[side] if "Greatest" in q or "arithmetic" in q} for side in asked}
    assert not sums["train"] & sums["heldout"]  # gcd(4, 6) and gcd(6, 4)
    assert Counter(row["task"] for row in made.heldout) == {"chain_sum": 64, "gcd": 128, "spell_backward": 64}
    assert Counter(row["task"] for row in made.train)["spell_backward"] == 250
    assert len({row["id"] for row in made.train + made.heldout}) == len(made.train) + 256


def test_gym_rows_carry_what_grading_needs() -> None:
    made = data.build(config(64, source="reasoning-gym", form="chat", tasks=EASY, train_size=64))
    for row in made.train + made.heldout:
        system, question = row["prompt"]
        assert system["content"] == 'Answer the question. End with a line of its own of the form "Answer: <value>".'
        assert row["completion"] == [{"role": "assistant", "content": f"Answer: {row['answer']}"}]
        assert gym.score(row, row["answer"]) == 1.0
        if row["task"] == "chain_sum":
            assert int(row["answer"]) == eval(json.loads(row["metadata"])["expression"])  # an independent reference
            assert json.loads(row["metadata"])["expression"] in question["content"]


def test_gym_plain_form_shows_examples_of_the_same_task() -> None:
    made = data.build(config(40, source="reasoning-gym", tasks=EASY, train_size=40, shots=2))
    for row in made.train + made.heldout:
        *shots, last = row["prompt"].split("\n\n")
        assert len(shots) == 2
        assert last.startswith("Question: ")
        assert last.endswith("\nAnswer:")
        assert row["completion"] == f" {row['answer']}\n"
        start = {"chain_sum": "Question: State", "gcd": "Question: Find", "spell_backward": "Question: Spell"}
        assert all(part.startswith(start[row["task"]]) for part in (*shots, last))
        assert last not in [shot.rsplit(" ", 1)[0] for shot in shots]


def test_gym_rows_are_the_same_in_another_process() -> None:
    """Some generators follow Python's hash seed; those are refused, and the others must not."""
    wanted = config(30, source="reasoning-gym", form="chat", tasks=EASY, train_size=30)
    script = (
        "from tests.test_data import *;"
        "print(data.build(config(30, source='reasoning-gym', form='chat', tasks=EASY, train_size=30)).fingerprint)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    root = Path(__file__).parent.parent
    said = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=root, capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == data.build(wanted).fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ()}, r"\[\[data.task\]\] is missing"),
        ({"tasks": (Task(name="gdc"),)}, r"unknown name 'gdc', did you mean 'gcd'\?"),
        (
            {"tasks": (Task(name="gcd", options={"max_valu": 9}),)},
            r"unknown option 'max_valu', did you mean 'max_value'",
        ),
        ({"tasks": (Task(name="gcd", options={"seed": 9}),)}, r"unknown option 'seed'.*; valid: min_numbers, "),
        ({"tasks": (Task(name="gcd", options={"min_value": 0}),)}, r"'gcd' .*min_value must be"),
        ({"tasks": (Task(name="ransom_note"),)}, r"'ransom_note' cannot be used: .*hash seed"),
        ({"tasks": (Task(name="time_intervals"),)}, r"'time_intervals' cannot be used: .*today's date"),
        ({"tasks": (Task(name="graph_color"),)}, r"'graph_color': its own answer to a question scores below 1"),
        (
            {"tasks": (Task(name="count_bits", options={"max_n": 9}),)},
            r"'count_bits': 9 different questions left for 20 ",
        ),
        ({"form": "char"}, r"form = 'char': reasoning-gym asks in words"),
    ],
)
def test_gym_settings_that_cannot_be_used(options: dict[str, object], message: str) -> None:
    settings = {"source": "reasoning-gym", "form": "chat", "tasks": EASY, "train_size": 10} | options
    refused(config(20, **settings), r"^configs/x.toml: " + ".*" + message)


def test_missing_reasoning_gym_says_how_to_go_on_with_jsonl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    refused(config(20, source="reasoning-gym", tasks=EASY), r"reasoning-gym cannot be imported .*source = 'jsonl'")
