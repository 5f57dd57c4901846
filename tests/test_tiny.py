"""The tiny character-level Llama: size, seeds, tokens and the settings that are refused."""

import hashlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl import config, models, tiny
from rl.errors import UserError


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
