"""rl.rewards: grading against values worked out by hand, and the wrapper's promises when a reward misbehaves."""

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl import rewards
from rl.config import Reward
from rl.data import gym
from rl.errors import RunFailed, UserError
from rl.rewards import Score, grade
from rl.rewards.answers import EXTRACTS, extract, last_number, parse_number, render
from rl.rewards.equivalence import equivalent

RIGHT, LENIENT, WRONG_FORMED, WRONG = (
    Score(True, True, True),
    Score(False, True, False),
    Score(False, False, True),
    Score(False, False, False),
)
LENIENT_FORMED = Score(False, True, True)


def reward(name: str, **options: object) -> Reward:
    return Reward(name=name, options=options)


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (" 19\n", "19", RIGHT),
        ("19", "19", RIGHT),
        (" 19\n5 + 4 = 9", "19", RIGHT),  # what follows the stop is another problem
        (" 18\n", "19", WRONG_FORMED),
        (" 18\n19", "19", WRONG_FORMED),
        ("  19\n", "19", LENIENT),  # one leading space, not two
        (" 19 ", "19", LENIENT),
        ("\n19\n", "19", LENIENT),
        ("007", "7", LENIENT),
        ("7.0", "7", LENIENT),
        ("+7", "7", LENIENT),
        ("1,000", "1000", LENIENT),
        (" 12 + 7 = 19\n", "19", LENIENT),
        (" 19 or 20\n", "19", WRONG),  # the last number counts: no hedging
        ("119", "19", WRONG_FORMED),  # never a substring
        ("190", "19", WRONG_FORMED),
        (" -4\n", "-4", RIGHT),
        (" 4\n", "-4", WRONG_FORMED),
        ("is −4", "-4", LENIENT),  # U+2212
        ("0-4", "-4", WRONG),  # a difference, not a sign
        ("3.50", "3.5", LENIENT_FORMED),
        ("", "19", WRONG),
        ("\n", "19", WRONG),
        (" nus", "nus", RIGHT),
        (" The word is nus.", "nus", LENIENT_FORMED),  # a text answer has no form but to be there
        (" bonus", "nus", WRONG_FORMED),
        (" nus, backwards", "nus", WRONG_FORMED),
        (" YES", "Yes", LENIENT_FORMED),
        (" -5/3", "5/3", WRONG_FORMED),
        (" +", "-", WRONG_FORMED),
    ],
)
def test_plain_form(completion: str, answer: str, expected: Score) -> None:
    assert grade(completion, {"answer": answer}, {}) == expected


@pytest.mark.parametrize(
    ("how", "completion", "answer", "expected"),
    [
        ("answer_line", "Answer: 19", "19", RIGHT),
        ("answer_line", "12 + 7 = 19\nAnswer: 19\n", "19", RIGHT),
        ("answer_line", "Answer: 18\nAnswer: 19", "19", RIGHT),
        ("answer_line", "Answer: 18", "19", WRONG_FORMED),
        ("answer_line", "Answer: 19\nAnswer: 18", "19", WRONG_FORMED),
        ("answer_line", "answer: 19", "19", LENIENT),
        ("answer_line", "Answer:19", "19", LENIENT),
        ("answer_line", "Answer: 19\nI hope this helps!", "19", LENIENT),
        ("answer_line", "So Answer: 19", "19", LENIENT),
        ("answer_line", "19", "19", LENIENT),
        ("answer_line", "Answer: 19.", "19", LENIENT),
        ("answer_line", "Answer: 12\nI added 7 to get 19", "19", WRONG),
        ("answer_line", "Answer: <value>", "19", WRONG),
        ("answer_line", "Answer: 119", "19", WRONG_FORMED),
        ("answer_line", "Answer: 1 2\n3 4", "1 2\n3 4", RIGHT),  # an answer of several lines
        ("boxed", r"so \boxed{19}.", "19", RIGHT),
        ("boxed", r"\boxed{18} then \boxed{19}", "19", RIGHT),
        ("boxed", r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", RIGHT),  # balanced braces
        ("boxed", r"\boxed{19", "19", LENIENT),
        ("boxed", r"\boxed{18}, not 19", "19", WRONG_FORMED),
        ("boxed", r"\boxed{}", "19", WRONG),
        ("last_number", "12 plus 7 is 19.", "19", RIGHT),
        ("last_number", "it is 0019", "19", LENIENT),
        ("last_number", "19 is 12 plus 7", "19", WRONG_FORMED),
        ("last_number", "nineteen", "19", WRONG),
        ("last_number", "x19", "19", WRONG),  # part of a name, not a number
    ],
)
def test_chat_forms(how: str, completion: str, answer: str, expected: Score) -> None:
    message = [{"role": "assistant", "content": completion}]
    assert grade(completion, {"answer": answer}, {"extract": how}) == expected
    assert grade(message, {"answer": answer}, {"extract": how}) == expected


def test_prompt_decides_the_form_where_no_option_does() -> None:
    asks = [{"role": "system", "content": 'End with "Answer: <value>".'}, {"role": "user", "content": "12 + 7?"}]
    quiet = [{"role": "user", "content": "12 + 7?"}]
    assert grade("Answer: 19", {"prompt": asks, "answer": "19"}).strict
    assert not grade("19", {"prompt": asks, "answer": "19"}).strict
    assert grade("19", {"prompt": quiet, "answer": "19"}).strict
    assert grade("19", {"prompt": asks, "answer": "19"}, {"extract": "plain"}).strict


def test_stop_option_replaces_the_newline() -> None:
    row = {"answer": "19"}
    assert grade("19;20", row, {"stop": ";"}) == RIGHT
    assert grade("19;20", row) == WRONG


texts = st.text(alphabet=st.sampled_from("0123456789 -+.,:\nAnswer\\boxed{}$x"), max_size=30) | st.text(max_size=12)
answers = st.integers(-999, 9999).map(str) | st.text(min_size=1, max_size=8).map(str.strip).filter(bool)


@given(texts, answers, st.sampled_from(EXTRACTS))
def test_strict_implies_lenient_and_wellformed(text: str, answer: str, how: str) -> None:
    score = grade(text, {"answer": answer}, {"extract": how})
    assert not score.strict or (score.lenient and score.wellformed)


@given(st.text(max_size=15).filter(lambda t: t.strip() and "\n" not in t), texts, st.integers(-99, 999).map(str))
def test_text_after_the_stop_never_counts(text: str, rest: str, answer: str) -> None:
    row = {"answer": answer}
    assert grade(f"{text}\n{rest}", row) == grade(f"{text}\n", row)


@given(answers.filter(lambda a: "\n" not in a), st.sampled_from(EXTRACTS))
def test_rendered_answer_is_extracted_again_and_graded_right(answer: str, how: str) -> None:
    if how == "last_number" and (parse_number(answer) is None or answer.startswith("+")):
        return
    if how == "boxed" and ("{" in answer or "}" in answer or "\\" in answer):
        return
    assert extract(render(answer, how), how) == answer
    assert grade(render(answer, how), {"answer": answer}, {"extract": how}) == RIGHT


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_numbers_parse_back_however_they_are_written(number: Decimal) -> None:
    for text in (f"{number:f}", f"{number:,f}", f" {number:f}\n", f"+{number:f}" if number >= 0 else f"{number}"):
        assert parse_number(text) == number
    assert last_number(f"first 3, then = {number:f}.") == number


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_a_number_with_more_digits_around_it_is_another_number(number: int, other: int) -> None:
    """The substring trap: 19 is in 190 and in 119."""
    for text in (f"{number}{other}", f"{other}{number}"):
        assert not grade(text, {"answer": str(number)}).lenient


# --- reasoning-gym: the default scorer pays for substrings

WORD_ROW = {"id": "w", "task": "letter_counting", "answer": "1", "metadata": "{}"}


def test_reasoning_gym_reward_gives_nothing_for_the_substring_its_own_scorer_pays_for() -> None:
    """Answering every digit at once earns 0.1 from letter_counting's own scorer, and two answers a third."""
    for text, paid in (("1234567890", 0.1), ("1 2", 1 / 3)):
        assert gym.score(WORD_ROW, text) == pytest.approx(paid)
        (function,) = rewards.build((reward("reasoning-gym", extract="plain"),))
        columns = {name: [value] for name, value in WORD_ROW.items()}
        assert function(prompts=["How many?"], completions=[text], **columns) == [0.0]
        assert not rewards.grader((reward("reasoning-gym"),))(text, WORD_ROW).lenient


def test_reasoning_gym_reward_takes_the_tasks_own_verdict() -> None:
    """spell_backward ignores case, so strict equality would refuse what the task accepts."""
    row = {"task": "spell_backward", "answer": "suS", "metadata": '{"word": "Sus"}', "prompt": "Spell Sus backward"}
    assert rewards.grader((reward("reasoning-gym"),))("sus", row) == RIGHT
    assert rewards.grader((reward("exact"),))("sus", row) == LENIENT_FORMED
    assert rewards.grader((reward("reasoning-gym"),))("ssu", row) == WRONG_FORMED


def test_reasoning_gym_reward_on_rows_of_another_source_stops_the_run() -> None:
    (function,) = rewards.build((reward("reasoning-gym"),))
    with pytest.raises(RunFailed, match=r"'reasoning-gym' failed on every one of 1 .*row 'r1'.*use the reward 'exact'"):
        function(prompts=["1 + 1 ="], completions=["2"], id=["r1"], task=["arithmetic"], answer=["2"])


# --- named rewards

BATCH = {
    "prompts": ["12 + 7 =", "1 + 1 =", "2 + 2 ="],
    "completions": [" 19\n", "3", "four"],
    "completion_ids": [[5, 6, 7], [5], [5, 6]],
    "id": ["a", "b", "c"],
    "answer": ["19", "2", "4"],
    "trainer_state": object(),
}


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        (reward("exact"), [1.0, 0.0, 0.0]),
        (reward("format"), [1.0, 1.0, 0.0]),
        (reward("regex", pattern=r" ?\d+\n?"), [1.0, 1.0, 0.0]),
        (reward("regex", pattern=r"\d"), [0.0, 1.0, 0.0]),  # a full match, not a search
        (reward("length", target=1), [-0.02, 0.0, -0.01]),
        (reward("length", target=0, per_token=1), [-3.0, -1.0, -2.0]),
        (reward("json", schema={"type": "integer", "maximum": 10}), [0.0, 1.0, 0.0]),  # 19 is too large, a word no JSON
        (reward("json", schema={}), [1.0, 1.0, 0.0]),
    ],
)
def test_named_rewards(term: Reward, expected: list[float]) -> None:
    (function,) = rewards.build((term,))
    assert function(**BATCH) == pytest.approx(expected)
    assert function.__name__ == term.name
    assert (function.stats.calls, function.stats.samples, function.stats.errors) == (1, 3, 0)
    assert function.stats.seconds > 0


def test_a_name_used_twice_gets_its_own_metric() -> None:
    terms = (reward("length", target=1), Reward(name="exact", weight=2.0), reward("length", target=2))
    built = rewards.build(terms)
    assert [f.__name__ for f in built] == ["length", "exact", "length_2"]
    assert [f.weight for f in built] == [1.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            reward("exat"),
            r"^\[\[reward\]\] 0: unknown name 'exat', did you mean 'exact'\?; valid: exact, reasoning-gym",
        ),
        (reward("exact", extrct="boxed"), r"unknown key 'extrct', did you mean 'extract'\?; valid: extract, stop"),
        (reward("exact", extract="box"), r"extract = 'box', must be one of plain, answer_line, last_number, boxed"),
        (reward("exact", stop=""), r"stop = '', must be a text that is not empty"),
        (reward("regex"), r"\(regex\): needs 'pattern'"),
        (reward("regex", pattern="("), r"pattern = '\(' is no regular expression: missing \)"),
        (reward("regex", pattern=["a"]), r"pattern = \['a'\], must be a regular expression"),
        (reward("json"), r"\(json\): needs 'schema', a table, the JSON schema"),
        (reward("json", schema={"typ": "integer"}), r"schema: unknown keyword 'typ'; valid: type"),
        (reward("model"), r"\(model\): needs 'model', a config of algorithm 'reward'"),
        (reward("model", model="x", normalise="batch"), r"normalise = 'batch', must be 'standard' or 'none'"),
        (reward("model", model="x", batch_size=0), r"batch_size = 0, must be a number of completions, 1 or more"),
        (reward("length", target=True), r"target = True, must be a number of tokens"),
        (reward("length", target=3, per_token=math.nan), r"per_token = nan, must be a number, 0 or more"),
    ],
)
def test_bad_terms_are_refused_in_one_line(term: Reward, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        rewards.build((term,))
    assert "\n" not in str(caught.value)


MATH = [  # completion, the row's answer, (strict, lenient)
    (r"\boxed{\frac{1}{2}}", "0.5", (True, True)),
    (r"so \boxed{x^2 + 2x + 1}", "(x+1)^2", (True, True)),
    (r"\boxed{12.0}", "12", (True, True)),  # another way to write it
    (r"\boxed{13} or \boxed{12}", "13", (False, False)),  # the last box counts
    (r"\boxed{1/3}", "0.33", (False, False)),
    (r"it is 12", "12", (False, True)),  # no box
    (r"\boxed{}", "12", (False, False)),
    (r"\boxed{" + "9^" * 200 + "9}", "1", (False, False)),  # a tower that sympy would never climb
]


@pytest.mark.parametrize(("completion", "answer", "expected"), MATH)
def test_math_verify_takes_what_is_equal_and_only_in_the_box(
    completion: str, answer: str, expected: tuple[bool, bool]
) -> None:
    """The reward and the held-out grader of the same config agree on strict."""
    term = reward("math-verify", extract="boxed")
    (function,) = rewards.build((term,))
    row = {"prompt": "q", "answer": answer}
    assert function(["q"], [completion], answer=[answer]) == [float(expected[0])]
    score = rewards.grader((reward("length", target=1), term))(completion, row)
    assert (score.strict, score.lenient) == expected


def test_math_verify_works_off_the_main_thread() -> None:
    """Trap: its time limit is a signal, which only the main thread may set."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(equivalent, "2/4", {"answer": "1/2"}).result()


# --- a user's own function

OWN = """
import math

def only_even(prompts, completions, answer, bonus=0.0):
    return [bonus + float(int(c) % 2 == 0) for c in completions]

def all_columns(prompts, completions, **columns):
    return [float(len(columns["id"])) for _ in completions]

def short(completions, **_): return [1.0]
def scalar(completions, **_): return 1.0
def not_finite(completions, **_): return [math.nan, math.inf, 1]
def all_nan(completions, **_): return [math.nan] * len(completions)
def words(completions, **_): return ["0.5", None, True]
def broken(completions, **_): return [1 / 0 for _ in completions]
async def later(completions, **_): return [1.0]
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_reward.py").write_text(OWN)
    (tmp_path / "own_syntax.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_reward", raising=False)
    return "own_reward"


def test_own_function_gets_its_options_and_only_the_columns_it_takes(own: str) -> None:
    (even, columns) = rewards.build((reward(f"{own}:only_even", bonus=0.5), reward(f"{own}:all_columns")))
    batch = BATCH | {"completions": ["2", "3", "4"]}
    assert even(**batch) == [1.5, 0.5, 1.5]
    assert columns(**batch) == [3.0, 3.0, 3.0]


def test_one_bad_sample_costs_only_itself(own: str) -> None:
    """int('four') raises on the batch; the two others are scored one by one and keep their rewards."""
    (even,) = rewards.build((reward(f"{own}:only_even"),))
    assert even(**BATCH) == [0.0, 0.0, None]
    assert even(**BATCH) == [0.0, 0.0, None]
    assert (even.stats.calls, even.stats.samples, even.stats.errors) == (2, 6, 2)
    assert even.stats.first_error is not None
    assert even.stats.first_error.startswith("row 'c' (prompt '2 + 2 ='): ValueError: invalid literal for int()")
    assert "own_reward.py line 5" in even.stats.first_error


def test_rewards_that_are_not_finite_become_none_and_are_counted(own: str) -> None:
    (function,) = rewards.build((reward(f"{own}:not_finite"),))
    assert function(**BATCH) == [None, None, 1.0]
    assert function.stats.errors == 2
    assert function.stats.first_error == "row 'a' (prompt '12 + 7 ='): returned nan"


def test_a_reward_in_words_is_an_error_but_none_is_not(own: str) -> None:
    (function,) = rewards.build((reward(f"{own}:words"),))
    assert function(**BATCH) == [None, None, 1.0]
    assert function.stats.errors == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", r"'own_reward:broken' failed on every one of 3 samples; row 'a' \(prompt '12 \+ 7 ='\): "
                   r"ZeroDivisionError: .* \(own_reward.py line 15\)$"),
        ("all_nan", r"failed on every one of 3 samples; row 'a' .*: returned nan$"),
        ("short", r"'own_reward:short' returned 1 rewards for 3 completions$"),
        ("scalar", r"'own_reward:scalar' returned float, not a list of numbers$"),
    ],
)  # fmt: skip
def test_a_reward_that_fails_throughout_stops_the_run_in_one_line(own: str, name: str, message: str) -> None:
    (function,) = rewards.build((reward(f"{own}:{name}"),))
    with pytest.raises(RunFailed, match=message) as caught:
        function(**BATCH)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("no_such_module:f", {}, r"cannot import 'no_such_module' from .*: ModuleNotFoundError"),
        ("own_syntax:f", {}, r"cannot import 'own_syntax' from .*: SyntaxError"),
        (
            "own_reward:only_evn",
            {},
            r"has no function 'only_evn', did you mean 'only_even'\?; it has: only_even, all_col",
        ),
        ("own_reward:math", {}, r"has no function 'math'"),
        ("own_reward:later", {}, r"'later' is async"),
        ("own_reward:only_even", {"bonsu": 1}, r"takes no option 'bonsu', did you mean 'bonus'\?"),
        ("own_reward:all_columns", {"prompts": 1}, r"takes no option 'prompts'"),
    ],
)
def test_own_functions_that_cannot_be_used(own: str, name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        rewards.build((reward(name, **options),))
    assert "\n" not in str(caught.value)


def test_chat_prompts_are_named_by_their_last_message(own: str) -> None:
    (function,) = rewards.build((reward(f"{own}:all_nan"),))
    with pytest.raises(RunFailed, match=r"sample 0 \(prompt …'x{57} 9\?'\)"):
        function(prompts=[[{"role": "user", "content": "x" * 80 + " 9?"}]], completions=["9"])
