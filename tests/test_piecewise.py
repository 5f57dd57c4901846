"""A batch in pieces against whole rows, in every family that is said to be known."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from rl.algorithms import piecewise
from rl.algorithms.learner import Shared, forward
from tests.test_learner import assert_equal, batch, both, every_prompt, groups, plain

SIZES = {
    "vocab_size": 17,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
WINDOWS = {
    "mistral": {"sliding_window": 6},
    "phi3": {"sliding_window": 6},
    "starcoder2": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": {
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def model_of(kind: str, **more: Any) -> Any:
    """A tiny random model of a family, with the head that TRL gives a policy; its weights are not near zero, where
    every family would be alike."""
    torch.manual_seed(3)
    sizes = SIZES | ({"head_dim": 8} if kind in ("gemma3_text", "qwen3") else {}) | more
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.12)
            elif not bool(weight.any()):
                weight.normal_(std=0.1)
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    return model


@pytest.mark.parametrize("kind", piecewise.KNOWN)
def test_every_known_family_gives_the_same_logprobs_and_gradients(kind: str) -> None:
    """Traps: a family that mixes tokens outside attention, or hands attention what the pieces do not pass on."""
    model = model_of(kind)
    assert piecewise.knows(model)
    ids, mask, columns = groups(9, [3, 5, 1], [4, 2, 3, 1, 1, 4])
    for shared in (Shared(9), every_prompt(ids, mask, int(columns), 9), every_prompt(ids, mask, int(columns), 0)):
        assert_equal(*both(model, ids, mask, int(columns), shared))


@pytest.mark.parametrize("kind", WINDOWS)
def test_a_sliding_window_counts_tokens_and_not_columns(kind: str) -> None:
    """Trap: prompts of several lengths leave gaps before their completions, which a window of columns would count."""
    model = model_of(kind, **WINDOWS[kind])
    ids, mask, columns = groups(2, [9, 3, 14], [4, 7, 9, 1, 2, 5])
    whole = plain(model, ids, mask, int(columns))[0]
    wide = plain(model_of(kind), ids, mask, int(columns))[0]
    assert (whole - wide).abs().max() > 1e-3  # the window is one
    for prefix in (0, 2):
        assert_equal(*both(model, ids, mask, int(columns), every_prompt(ids, mask, int(columns), prefix)))
    ids, mask, columns = batch(12, [3, 1, 6], [4, 9, 3])
    assert_equal(*both(model, ids, mask, int(columns), Shared(12)))


def test_the_model_attends_as_before_once_the_pass_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: a pass that fails would leave generation and evaluation with attention that wants a layout, and the head
    with the last piece alone."""
    model = model_of("llama")
    ids, mask, columns = groups(0, [4, 3], [2, 3, 1, 2])
    before = plain(model, ids, mask, int(columns))[0]
    shared = every_prompt(ids, mask, int(columns), 0)
    forward(model, ids, mask, int(columns), shared)
    torch.testing.assert_close(plain(model, ids, mask, int(columns))[0], before)
    monkeypatch.setattr(piecewise.Layout, "mask", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forward(model, ids, mask, int(columns), shared)
    torch.testing.assert_close(plain(model, ids, mask, int(columns))[0], before)


def test_other_models_and_other_attentions_are_not_known() -> None:
    model = model_of("llama")
    other = copy.copy(model.config)
    other._attn_implementation = "eager"
    assert not piecewise.knows(type("Model", (), {"config": other}))
    other._attn_implementation, other.model_type = "sdpa", "mamba"
    assert not piecewise.knows(type("Model", (), {"config": other}))


def test_a_token_that_is_not_there_is_seen_by_none_that_is() -> None:
    """By hand: a prefix of two, prompts of two and one more tokens, completions of two and of one."""
    behind = piecewise.BEHIND
    layout = piecewise.Layout(
        [
            piecewise.Piece(torch.tensor([[0, 1]])),
            piecewise.Piece(torch.tensor([[2, 3], [2, behind]]), torch.tensor([0, 0])),
            piecewise.Piece(torch.tensor([[3, 4], [4, behind]]), torch.tensor([1, 0])),
        ]
    )
    assert layout.positions.tolist() == [[0, 1, 2, 3, 2, 0, 3, 4, 4, 0]]
    assert layout.mask(0, None) is None
    assert layout.mask(2, None)[:, 0].int().tolist() == [
        [[1, 1, 1, 0, 1, 0], [1, 1, 1, 0, 1, 1]],
        [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]],
    ]
    assert layout.mask(2, 2)[:, 0].int().tolist()[0] == [[0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 1, 1]]
    assert layout.mask(0, 1)[0, 0].int().tolist() == [[1, 0], [0, 1]]
