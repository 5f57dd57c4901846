"""The calculator, the guessing game, and the configs that name tools: one clear line for what is no tool."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rl import data
from rl.config import load
from rl.data import arithmetic
from rl.environments import GuessNumber
from rl.errors import UserError
from rl.rewards.answers import text_of
from rl.tools import calculator, signatures, toolbox
from tests.config_helper import error_of, write

TOOLS = """
[run]
name = "t"
[model]
base = "smollm2-135m-instruct"
[data]
source = "arithmetic"
form = "chat"
train_size = 100
shots = 1
[rollout]
tools = ["rl.tools:calculator"]
[[reward]]
name = "exact"
[trainer]
algorithm = "grpo"
max_steps = 10
per_device_train_batch_size = 16
num_generations = 8
"""
GAME = (
    TOOLS.replace('tools = ["rl.tools:calculator"]', 'environment = "rl.environments:GuessNumber"')
    .replace('source = "arithmetic"', 'source = "environment"')
    .replace("shots = 1\n", "")
    .replace('name = "exact"', 'name = "environment"')
)


# --- the calculator


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12 * 7", "84"),
        (" 2*(3+4) ", "14"),
        ("-3 - -5", "2"),
        ("0.1 + 0.2", "0.3"),
        ("9 / 3", "3"),
        ("1 / 8", "0.125"),
        ("7 // 2 + 7 % 2", "4"),
        ("2 ** 10", "1024"),
        ("6 × 7 ÷ 2", "21"),
        ("10 ** 20 / 10", "10000000000000000000"),
        ("123456789 * 987654321", "121932631112635269"),
    ],
)
def test_calculator_values(expression: str, value: str) -> None:
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "open('x')",
        "a + 1",
        "'a' * 9",
        "True + 1",
        "[1][0]",
        "1 < 2",
        "1 +",
        "",
        "1 / 0",
        "1 % 0",
        "0 ** -1",
        "9 ** 9 ** 9",
        "(-8) ** 0.5",
        "1e308 * 10",
        "10.0 ** 400",
        "(" * 150 + "1" + ")" * 150,
        "1" * 5000,
        "1j",
    ],
)
def test_calculator_refuses_what_is_no_arithmetic(expression: str) -> None:
    """Every refusal is a ValueError with a text for the model, never another exception or a hang."""
    with pytest.raises(ValueError, match=r"\w"):
        calculator(expression)


# --- the game


def test_halving_finds_every_number_and_going_in_order_does_not() -> None:
    halved, in_order = 0, 0
    for offset in range(7):
        game = GuessNumber()
        game.reset(str(20 + offset), 20)
        while not game.found and game.left:
            game.guess((game.low + game.high) // 2)
        halved += game.get_reward() == 1.0
        game.reset(str(20 + offset), 20)
        for number in (20, 21, 22):
            game.guess(number)
        in_order += game.get_reward() == 1.0
    assert (halved, in_order) == (7, 3)


def test_the_game_says_what_is_left_and_counts_guesses() -> None:
    game = GuessNumber(guesses=2)
    game.reset("25", 20)
    assert game.guess(22) == "higher, 23 to 26"
    assert game.guess(99) == "lower, 23 to 26"
    assert game.guess(25) == "no guess is left"
    assert game.get_reward() == 0.0
    game.reset("25", 20)
    assert game.guess(25) == "right"
    assert game.guess(1) == "the game is over"
    assert game.get_reward() == 1.0


def test_games_are_split_without_a_game_on_both_sides(tmp_path: Path) -> None:
    config = load(write(tmp_path, GAME))
    one, again = data.build(config), data.build(load(write(tmp_path, GAME), ["data.train_size=50"]))
    games = [{(row["low"], row["answer"]) for row in rows} for rows in (one.train, one.heldout)]
    assert len(games[0]) == 100
    assert len(games[1]) == 256
    assert not games[0] & games[1]
    assert again.heldout == one.heldout
    shown = {m["content"] for m in one.heldout[0]["prompt"][:-1] if m["role"] == "user"}
    assert not shown & {row["prompt"][-1]["content"] for row in one.train + one.heldout}  # no example is asked


def test_arithmetic_shots_show_how_the_calculator_is_called(tmp_path: Path) -> None:
    train, heldout = arithmetic.rows(load(write(tmp_path, TOOLS)))
    row = train[0]
    assert [m["role"] for m in row["prompt"]] == ["user", "assistant", "tool", "assistant", "user"]
    call = row["prompt"][1]["tool_calls"][0]["function"]
    assert calculator(**call["arguments"]) == row["prompt"][2]["content"] == row["prompt"][3]["content"]
    assert call["arguments"] == {"expression": "12 + 34"}  # after 1 + 2 the start hardly ever calls
    assert not {"12+34", "34+12"} & {r["id"] for r in train + heldout}


def test_only_the_last_words_of_an_episode_are_its_answer() -> None:
    said = [{"role": "assistant", "content": "I ask"}, {"role": "tool", "name": "x", "content": "42"}]
    assert text_of(said) == ""
    assert text_of([*said, {"role": "assistant", "content": "41"}]) == "41"
    assert text_of(said[:1]) == "I ask"


# --- configs


def test_configs_with_tools_are_read(tmp_path: Path) -> None:
    config = load(write(tmp_path, TOOLS))
    assert config.rollout.tools == ("rl.tools:calculator",)
    box = toolbox.build(config)
    assert box is not None
    assert box.names() == ["calculator"]
    game = toolbox.build(load(write(tmp_path, GAME)))
    assert game is not None
    assert game.names() == ["guess"]


BAD = '''
import os
from tools_elsewhere import other

def untyped(x):
    """Do.

    Args:
        x: what.
    """

def silent(x: int) -> int:
    return x

def undescribed(x: int, y: int) -> int:
    """Do.

    Args:
        x: what.
    """

def many(*xs: int) -> int:
    """Do."""

async def later(x: int) -> int:
    """Do.

    Args:
        x: what.
    """

def fine(x: int) -> int:
    """Do.

    Args:
        x: what.
    """

class Still:
    def play(self, x: int) -> int:
        """Do.

        Args:
            x: what.
        """

class Mute:
    def reset(self) -> None:
        """Begin."""

class Wrong:
    def reset(self) -> None:
        """Begin."""

    def play(self, x) -> int:
        """Do."""
'''


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bad_tools:untyped", "'bad_tools:untyped' (line 5): parameter 'x' has no type"),
        ("bad_tools:silent", "(line 12) has no docstring"),
        ("bad_tools:undescribed", "parameter 'y' is not described under 'Args:'"),
        ("bad_tools:many", "takes *args"),
        ("bad_tools:later", "is async"),
        ("bad_tools:fin", "has no function 'fin', did you mean 'fine'?"),
        ("rl.tools:calculater", "has no function 'calculater', did you mean 'calculator'?; it has: calculator"),
        ("bad_tools:Still", "is a class"),
        ("bad_tools", "valid: 'module:function'"),
        ("no_such_tools:x", "there is no module 'no_such_tools'"),
    ],
)
def test_what_is_no_tool_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    (tmp_path / "bad_tools.py").write_text(BAD)
    monkeypatch.syspath_prepend(str(tmp_path))
    error = error_of(tmp_path, TOOLS.replace("rl.tools:calculator", name))
    assert error.startswith("x.toml: [rollout] tools: ")
    assert said in error
    assert "bad_tools" not in sys.modules  # nothing of the user's was run


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bad_tools:Still", "has no method reset()"),
        ("bad_tools:Mute", "has no method to call as a tool"),
        ("bad_tools:Wrong", "'bad_tools:Wrong.play' (line 55): parameter 'x' has no type"),
        ("bad_tools:fine", "is a function"),
    ],
)
def test_what_is_no_environment_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    (tmp_path / "bad_tools.py").write_text(BAD)
    monkeypatch.syspath_prepend(str(tmp_path))
    error = error_of(tmp_path, GAME.replace("rl.environments:GuessNumber", name))
    assert error.startswith("x.toml: [rollout] environment: ")
    assert said in error


@pytest.mark.parametrize(
    ("text", "override", "said"),
    [
        (TOOLS, "trainer.algorithm=rloo", "found for algorithm 'rloo'"),
        (TOOLS, "data.form=plain", "[data] form: found 'plain' with [rollout] tools"),
        (TOOLS, "rollout.max_turns=1", "max_turns"),
        (TOOLS, "rollout.tool_timeout_s=0", "tool_timeout_s"),
        (TOOLS, "rollout.max_turn_length=9999", "found 9999, valid: up to [rollout] max_completion_length"),
        (
            TOOLS.replace('tools = ["rl.tools:calculator"]\n', ""),
            "rollout.max_turn_length=8",
            "only with [rollout] tools",
        ),
        (TOOLS, "trainer.max_tool_calling_iterations=3", "it belongs in [rollout] max_turns"),
        (TOOLS, "reward.0.name=environment", "found 'environment', valid: with [rollout] environment"),
        (
            TOOLS.replace("shots = 1\n", ""),
            "data.source=environment",
            "found 'environment', valid: with [rollout] environment",
        ),
        (TOOLS, 'rollout.environment_options={"a"=1}', "only with [rollout] environment"),
    ],
)
def test_settings_that_do_not_go_with_tools(tmp_path: Path, text: str, override: str, said: str) -> None:
    assert said in error_of(tmp_path, text, override)


def test_options_of_an_environment_are_checked(tmp_path: Path) -> None:
    for option, said in (("{widht=3}", "did you mean 'width'"), ("{width=1}", "width = 1, valid: 2 to 98")):
        config = load(write(tmp_path, GAME), [f"rollout.environment_options={option}"])
        with pytest.raises(UserError, match=said):
            toolbox.build(config)


def test_a_wrong_tool_exits_with_2_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "bad_tools.py").write_text(BAD)
    path = write(tmp_path, TOOLS.replace("rl.tools:calculator", "bad_tools:silent"))
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from rl.__main__ import main\n"
        "try: code = main(['train', sys.argv[1]])\n"
        "except SystemExit as error: code = error.code\n"
        "assert not {'torch', 'mlx', 'trl'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "has no docstring" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_names_imported_from_elsewhere_are_followed() -> None:
    assert signatures.problem("rl.tools:calculator", "function") is None
    assert signatures.problem("rl.environments:GuessNumber", "class") is None


def test_the_pages_own_examples_are_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/tools-and-turns.md: its config is read, its tool and its environment are called."""
    page = (Path(__file__).parents[1] / "docs" / "tools-and-turns.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_tools.py").write_text("\n\n".join(code))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tables,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    rest = TOOLS.split("[rollout]")[0].replace('form = "chat"\n', "")
    body = tables.replace("[data]", rest, 1)
    trainer = TOOLS[TOOLS.index("[trainer]") :]
    config = load(write(tmp_path, body + trainer))
    box = toolbox.build(config)
    assert box is not None
    assert box.names() == ["calculator", "lookup", "guess"]
    assert box.functions[1](country="Peru") == "Lima"
    config = load(write(tmp_path, GAME), ["rollout.environment=my_tools:Countdown"])
    box = toolbox.build(config)
    assert box is not None
    seat = box.seat()
    assert seat.reset(seed=4, answer="") == " There are 6."
    assert seat.take(number=6) == "0 left"
    assert seat._reward() == 1.0
    sys.modules.pop("my_tools")
