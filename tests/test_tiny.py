"""The tiny character-level Llama: size, seeds, tokens and the settings that are refused."""

import hashlib
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl import config, models, tiny
from rl.__main__ import main
from rl.errors import UserError

LETTERS = """
[run]
name = "letters"
[model]
base = "tiny"
[model.tiny]
hidden = 32
layers = 2
intermediate = 64
[data]
source = "jsonl"
path = "rows.jsonl"
form = "char"
train_size = 30
[trainer]
algorithm = "sft"
max_steps = 1
[eval]
size = 4
"""


def test_tiny_default_has_the_parameters_counted_by_hand(make_config, tmp_path):
    base = models.resolve_base(make_config("tiny"), tmp_path)
    model = models.load_policy(base, "float32", "cpu")
    attention, feed_forward, norms = 4 * 128 * 128, 3 * 128 * 384, 2 * 128
    assert sum(p.numel() for p in model.parameters()) == 17 * 128 + 4 * (attention + feed_forward + norms) + 128
    assert model.lm_head.weight is model.model.embed_tokens.weight
    spread = model.model.layers[0].mlp.up_proj.weight.std().item()
    assert math.isclose(spread, 0.02, rel_tol=0.02)


def test_tiny_weights_follow_the_seed_and_leave_the_random_state_alone(make_config, tmp_path, tiny_base):
    small = config.TinyModel(hidden=32, layers=2, heads=4, intermediate=64)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    again = models.resolve_base(make_config("tiny", tiny=small), tmp_path)
    other = models.resolve_base(make_config("tiny", seed=1, tiny=small), tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert (
        again.sha256 == tiny_base.sha256 == hashlib.sha256((again.path / "model.safetensors").read_bytes()).hexdigest()
    )
    assert other.sha256 != again.sha256
    assert other.path != again.path
    assert again.gguf is None


@given(st.text(alphabet="0123456789+-*= ", max_size=30))
def test_tiny_tokens_are_characters_in_order(text):
    tokenizer = tiny.char_tokenizer("0123456789+-*= ")
    ids = tokenizer.encode(text).ids
    assert ids == ["0123456789+-*= ".index(char) + 2 for char in text]
    assert tokenizer.decode(ids) == text


def test_tiny_decoding_adds_no_spaces_and_drops_specials(tiny_base):
    tokenizer = models.load_tokenizer(tiny_base)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, None)
    assert tokenizer("12+3=").input_ids == [3, 4, 12, 5, 15]
    assert tokenizer.decode([3, 4, 12, 5, 15, 1, 0], skip_special_tokens=True) == "12+3="
    batch = tokenizer(["1", "1+2"], padding=True)
    assert batch["input_ids"] == [[0, 0, 3], [3, 12, 4]]
    assert batch["attention_mask"] == [[0, 0, 1], [1, 1, 1]]


def test_characters_outside_the_alphabet_never_vanish(tiny_base):
    tokenizer = models.load_tokenizer(tiny_base)
    with pytest.raises(Exception, match="WordLevel"):
        tokenizer("1?2")
    tiny.check_text(tokenizer, ["1+2=", "3"], "c.toml")
    with pytest.raises(UserError) as error:
        tiny.check_text(tokenizer, ["1+2?", "x"], "c.toml")
    assert "'?' 'x'" in str(error.value)
    assert tiny.is_character_level(tokenizer)


def write(folder, first, more=""):
    """rows.jsonl, whose first completion is `first`, and x.toml."""
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1), "completion": str(i + 1) if i else first} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "x.toml").write_text(LETTERS + more)


def test_training_on_letters_is_refused_in_one_line_before_the_run_has_a_folder(tmp_path, monkeypatch, capsys):
    """Trap: the tokenizer's own error is a traceback that names neither the file nor the alphabet."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "one")
    assert main(["train", "x.toml", "--force"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: x.toml: the data holds 'e' 'n' 'o', which the tiny model has no token for: add")
    assert not (tmp_path / "models" / "checkpoints").exists()


def test_a_reward_that_fails_to_import_is_said_before_the_run_has_a_folder(tmp_path, monkeypatch, capsys):
    """Trap: found while the run is recorded, it leaves a failed run behind, and every next try asks for --restart."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "breaking.py").write_text("raise ValueError('no such file')\n\ndef f(completions): return []\n")
    write(tmp_path, "1", "[[reward]]\nname = 'breaking:f'\n")
    assert main(["train", "x.toml", "--force"]) == 2
    assert "cannot import 'breaking'" in capsys.readouterr().err
    assert not (tmp_path / "models" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"hidden": 30, "heads": 4}, "hidden = 30 must be a multiple of 2 × heads (4)"),
        ({"alphabet": "0120"}, "alphabet repeats '0'"),
        ({"alphabet": ""}, "alphabet is empty"),
    ],
)
def test_impossible_tiny_models_are_refused_and_leave_nothing(make_config, tmp_path, settings, found):
    with pytest.raises(UserError) as error:
        models.resolve_base(make_config("tiny", tiny=config.TinyModel(**settings)), tmp_path)
    assert found in str(error.value)
    assert not list(tmp_path.rglob("*tiny*"))
