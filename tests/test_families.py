"""Every family that the engine decodes against transformers' own forward in float32, and the others refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

import rl.rollouts  # noqa: F401  binds BLAS before mlx loads
from rl.errors import UserError
from rl.rollouts import families, load, parity
from rl.rollouts.engine import Engine
from rl.rollouts.result import Sampling

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DEEP = SMALL | {"num_hidden_layers": 5}
THETA = {"rope_type": "default", "rope_theta": 5e4}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=4, rope_parameters=THETA),
    "llama, grouped keys, untied head": LlamaConfig(
        **SMALL, num_key_value_heads=2, tie_word_embeddings=False, rope_parameters=THETA
    ),
    "llama, tied, biased, wide heads": LlamaConfig(
        **SMALL, num_key_value_heads=1, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=16
    ),
    "llama 3 RoPE": LlamaConfig(**SMALL, num_key_value_heads=2, max_position_embeddings=512, rope_parameters=LLAMA3),
    "llama, linear RoPE": LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "llama, yarn RoPE": LlamaConfig(**SMALL, max_position_embeddings=64, rope_parameters=YARN),
    "mistral, window of 4": MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4, rope_parameters=THETA),
    "mistral, no window, wide heads": MistralConfig(
        **SMALL, num_key_value_heads=2, sliding_window=None, head_dim=16, rope_parameters=THETA
    ),
    "smollm3": SmolLM3Config(**DEEP, num_key_value_heads=2, pad_token_id=0, rope_parameters=THETA),
    "smollm3, windows where there is no RoPE": SmolLM3Config(
        **DEEP, num_key_value_heads=2, pad_token_id=0, use_sliding_window=True, sliding_window=3, rope_parameters=THETA
    ),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2, rope_parameters=THETA, use_sliding_window=False),
    "qwen2, windows from layer 1 on": Qwen2Config(
        **SMALL, num_key_value_heads=2, rope_parameters=THETA, use_sliding_window=True, sliding_window=4,
        max_window_layers=1,
    ),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, rope_parameters=THETA, tie_word_embeddings=True),
    "qwen3, untied, windows": Qwen3Config(
        **SMALL, num_key_value_heads=1, head_dim=16, rope_parameters=THETA, use_sliding_window=True, sliding_window=5,
        max_window_layers=0, tie_word_embeddings=False,
    ),
    "gemma 3": Gemma3TextConfig(
        **SMALL | {"num_hidden_layers": 7}, num_key_value_heads=2, head_dim=8, sliding_window=4,
        query_pre_attn_scalar=12,
    ),
    "gemma 3, every other layer global, linear RoPE": Gemma3TextConfig(
        **SMALL | {"num_hidden_layers": 3}, num_key_value_heads=1, head_dim=16, sliding_window=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 2e4, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
}  # fmt: skip


def make(folder: Path, config: Any, seed: int = 0, size: float = 0.3) -> Any:
    """A random model of `config`, saved in `folder`, with weights large enough that its choices differ."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * (size if weight.ndim > 1 else 0.1) + ("norm" in name))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gives_the_logprobs_of_transformers(family: str, tmp_path: Path) -> None:
    """Read whole and drawn token by token. Trap: transformers 5 hides rope_theta from mlx-lm, and mlx-lm's Qwen knows
    no windows: both would be wrong without a word."""
    model = make(tmp_path, FAMILIES[family])
    sampler = load.load_sampler(tmp_path)
    found = parity.compare(model, sampler, parity.probe(61, (5, 9, 14, 25)))
    assert found.tokens == 49
    assert found.largest < 1e-4
    prompts = [[3, 9, 20, 41, 7, 7, 13], [3, 9, 20, 41, 7, 7, 13], [3, 9]]
    for grouped in (True, False):
        engine = Engine(sampler, [60], grouped=grouped, compiled=False, max_batch=2)
        for prompt, done in zip(prompts, engine.generate(prompts, Sampling(), max_tokens=12, seed=4), strict=True):
            (forced,) = parity.trainer_logprobs(model, [prompt + done.tokens])
            np.testing.assert_allclose(done.logprobs, forced[len(prompt) - 1 :], atol=1e-4)


@pytest.mark.parametrize("kind", ["mamba", "gemma2", "mixtral"])
def test_other_families_are_refused_by_name(kind: str) -> None:
    """Trap: hybrid caches would be wrong in a batch without an error."""
    with pytest.raises(UserError, match=f"{kind}.*llama, mistral, smollm3, qwen2, qwen3, gemma3_text"):
        load.sampler_config({"model_type": kind})


BASE = {"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention layers"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention layers"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "RoPE of type 'dynamic'"),
        ({"rope_scaling": {"type": "longrope"}}, "RoPE of type 'longrope'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": YARN | {"attention_factor": 1.3}}, "yarn RoPE with its own attention_factor"),
        ({"model_type": "qwen3", "attention_bias": True}, "biases in its attention"),
        ({"model_type": "qwen2", "head_dim": 16}, "head_dim 16"),
        ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ({"model_type": "gemma3_text", "hidden_activation": "silu"}, "hidden_activation 'silu'"),
        (
            {
                "model_type": "gemma3_text",
                "sliding_window": 4,
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            },
            "global layers that are not every n-th",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_mlx_lm_s_layers_lack_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        load.sampler_config(BASE | settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_are_those_of_transformers_layers(family: str, tmp_path: Path) -> None:
    """With and without `layer_types`, which files from before transformers 4.53 do not have."""
    config = FAMILIES[family]
    config.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    model = AutoModelForCausalLM.from_config(config)
    expected = tuple(getattr(layer.self_attn, "sliding_window", None) for layer in model.model.layers)
    if told["model_type"] == "mistral":
        expected = (config.sliding_window,) * config.num_hidden_layers
    assert families.windows(told) == expected
    if "every other" not in family:  # a pattern that only layer_types can tell
        told.pop("layer_types", None)
        assert families.windows(told) == expected


def test_saved_config_is_what_the_trap_is_about(tmp_path: Path) -> None:
    """Contract with transformers 5.23: RoPE's base is only inside rope_parameters."""
    make(tmp_path, FAMILIES["llama"])
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_theta" not in saved
    assert saved["rope_parameters"]["rope_theta"] == 5e4
    assert load.sampler_config(saved)["rope_theta"] == 5e4
