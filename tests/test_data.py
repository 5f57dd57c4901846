"""rl.data's own problems: rows against hand-made references, and no row on both sides."""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
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


def test_arithmetic_splits_uniformly() -> None:
    """Held-out problems easier or harder than those of train would measure the split, and not what was learned."""
    drawn, size = 1000, 24
    wanted = (config(size, max_a=11, max_b=9, seed=seed) for seed in range(drawn))
    times = Counter(row["id"] for one in wanted for row in data.build(one).heldout)
    assert sum(times.values()) == drawn * size
    share = size / 120
    spread = sum((times[f"{a}+{b}"] - drawn * share) ** 2 for a in range(12) for b in range(10))
    # 120 problems, up to two to a draw; the mean of chi-square is its degrees of freedom, its deviation about 20
    assert 60 < spread / (drawn * share * (1 - share)) < 220


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
        ({"from_": "sft.toml"}, r"from = 'sft.toml': its run is not made here"),
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


def chi_square_p(first: list[bool], second: list[bool]) -> float:
    """That two samples of yes and no come from one source: chi-square of the 2 x 2 table, one degree of freedom."""
    whole, yes = len(first) + len(second), sum(first) + sum(second)
    cross = sum(first) * (len(second) - sum(second)) - sum(second) * (len(first) - sum(first))
    return math.erfc(math.sqrt(whole * cross**2 / (yes * (whole - yes) * len(first) * len(second)) / 2))


def pairs_of(rows: list[dict[str, str]]) -> set[tuple[int, ...]]:
    """The operands of each row in order of size: both orders of a pair are one draw, not two."""
    return {tuple(sorted(int(n) for n in re.findall(r"\d+", row["prompt"][-1]["content"]))) for row in rows}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("task", "options", "likely", "least"),
    [
        ("gcd", {"min_value": 2, "max_value": 50}, lambda pair: math.gcd(*pair) == 1, 1800),  # of 49 * 49 - 512 = 1889
        (
            "products",
            {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
            lambda pair: max(pair) < 10,  # half of what the generator says, and 100 of its 8200 questions
            2000,
        ),
    ],
)
def test_gym_sides_are_alike_in_small_pools(
    task: str, options: dict[str, int], likely: Callable[[tuple[int, ...]], bool], least: int, seed: int
) -> None:
    """Drawn one side after the other, held-out got the likely questions: train had 77 % gcd 1, held-out 26 %."""
    tasks = (Task(name=task, options=options),)
    made = data.build(config(512, source="reasoning-gym", form="chat", tasks=tasks, train_size=2000, seed=seed))
    assert chi_square_p(*([likely(p) for p in sorted(pairs_of(rows))] for rows in (made.train, made.heldout))) > 1e-3
    assert len(made.heldout) == 512
    assert least <= len(made.train) <= 2000


def test_chi_square_p_against_a_known_table() -> None:
    """Expected counts are 15 and 35, so chi-square is 4 * 25 * (1/15 + 1/35) / 2 = 4.7619."""
    p = chi_square_p([True] * 10 + [False] * 40, [True] * 20 + [False] * 30)
    assert p == pytest.approx(0.0290963, rel=1e-5)


def test_gym_train_rows_of_any_train_size_are_never_held_out() -> None:
    """A run that goes on from one on more rows would otherwise be measured on what its model has seen."""
    tasks = (Task(name="gcd", options={"max_value": 200}), Task(name="gcd", options={"max_value": 40}))
    made = [
        data.build(config(64, source="reasoning-gym", form="chat", tasks=tasks, shots=1, train_size=size))
        for size in (100, 500, 3000)
    ]
    assert len({row["prompt"][1]["content"] for one in made for row in one.train + one.heldout}) == 2  # the shots
    for one in made:
        assert len(one.heldout) == 64
        for other in made:
            assert not pairs_of(one.heldout) & pairs_of(other.train)
    assert [len(one.train) for one in made] == sorted(len(one.train) for one in made)
    assert len(made[0].train) == 100


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
