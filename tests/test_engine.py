"""The decode engine against Hugging Face's own forward, token by token and in fp32."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

import rl.rollouts  # noqa: F401  binds BLAS before mlx loads
from rl.errors import RunFailed, UserError
from rl.rollouts import load, parity
from rl.rollouts.engine import Engine, common_prefix
from rl.rollouts.result import GREEDY, Sampling

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
EOS = 2
FAMILIES = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 5e4}),
    "llama, grouped keys, untied head": LlamaConfig(
        **SMALL,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4},
    ),
    "llama, tied, biased, wide heads": LlamaConfig(
        **SMALL, num_key_value_heads=1, tie_word_embeddings=True, attention_bias=True, head_dim=16
    ),
    "llama 3 scaled RoPE": LlamaConfig(
        **SMALL,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "qwen2": Qwen2Config(
        **SMALL,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        use_sliding_window=False,
    ),
    "qwen3": Qwen3Config(
        **SMALL,
        num_key_value_heads=2,
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    ),
}


def make(folder: Path, config: Any, scale: float = 6.0) -> Any:
    """A random model with logits far from uniform, saved as transformers 5 saves it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.mul_(scale)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A random grouped-key Llama in torch and in MLX."""
    folder = tmp_path_factory.mktemp("llama")
    model = make(folder, FAMILIES["llama, grouped keys, untied head"])
    return model, load.load_sampler(folder)


def reference(model: Any, prompt: list[int], tokens: list[int], temperature: float = 1.0) -> np.ndarray:
    """Logprobs of `tokens` after `prompt` from one unpadded forward of the torch model."""
    ids = torch.tensor([prompt + tokens])
    with torch.no_grad():
        logprobs = (model(ids).logits[0].float() / temperature).log_softmax(-1)
    return logprobs[len(prompt) - 1 : -1].gather(-1, ids[0, len(prompt) :, None])[:, 0].numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gives_the_logprobs_of_transformers(family: str, tmp_path: Path) -> None:
    """Trap: transformers 5 hides rope_theta from mlx-lm, which then falls back to 10000 with no warning."""
    model = make(tmp_path, FAMILIES[family])
    sampler = load.load_sampler(tmp_path)
    found = parity.check(model, sampler, "float32", SMALL["vocab_size"])
    assert found.tokens == 25
    assert found.largest < 5e-5


def test_the_rope_trap_stops_the_run_and_names_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With RoPE's base left where mlx-lm does not look, the parity check names the first attention."""
    model = make(tmp_path, FAMILIES["llama"])
    monkeypatch.setattr(load, "sampler_config", lambda config: config)
    trapped = load.load_sampler(tmp_path)
    with pytest.raises(RunFailed, match=r"first to differ is model\.layers\.0\.self_attn"):
        parity.check(model, trapped, "float32", SMALL["vocab_size"])


def test_a_difference_deep_in_the_model_is_named_there(llama: tuple[Any, Any], tmp_path: Path) -> None:
    model, _ = llama
    model.save_pretrained(tmp_path)
    other = load.load_sampler(tmp_path)
    other.model.layers[1].mlp.up_proj.weight = other.model.layers[1].mlp.up_proj.weight * 1.5
    with pytest.raises(RunFailed, match=r"model\.layers\.1\.mlp"):
        parity.check(model, other, "float32", SMALL["vocab_size"])


@pytest.mark.parametrize("kind", ["mamba", "gemma2"])
def test_other_families_are_refused_by_name(kind: str) -> None:
    """Trap: hybrid and windowed caches would be wrong in a padded batch without an error."""
    with pytest.raises(UserError, match=f"{kind}.*llama, qwen2, qwen3"):
        load.sampler_config({"model_type": kind})


def test_sliding_layers_are_refused() -> None:
    with pytest.raises(UserError, match="sliding_attention"):
        load.sampler_config({"model_type": "llama", "layer_types": ["full_attention", "sliding_attention"]})


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    shared=st.integers(0, 5),
    group=st.integers(1, 3),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    eos=st.lists(st.integers(0, 60), min_size=1, max_size=12, unique=True),
    seed=st.integers(0, 2**32 - 1),
    max_batch=st.sampled_from([2, 256]),
)
def test_batched_equals_one_at_a_time(
    llama: tuple[Any, Any],
    lengths: list[int],
    shared: int,
    group: int,
    temperature: float,
    eos: list[int],
    seed: int,
    max_batch: int,
) -> None:
    """Mixed lengths, shared prefixes, groups, early EOS, compaction: tokens and logprobs as when decoded alone."""
    model, sampler = llama
    generator = np.random.default_rng(seed)
    head = generator.integers(0, 61, shared).tolist()
    prompts = [head + generator.integers(0, 61, n).tolist() for n in lengths for _ in range(1)]
    prompts = [p for p in prompts for _ in range(group)]
    sampling = Sampling(temperature=temperature)
    together = Engine(sampler, eos, max_batch=max_batch).generate(prompts, sampling, max_tokens=7, seed=seed)
    for row, (prompt, completion) in enumerate(zip(prompts, together, strict=True)):
        tokens = completion.tokens
        assert 1 <= len(tokens) <= 7
        assert all(t not in eos for t in tokens[:-1])
        assert len(tokens) == 7 or tokens[-1] in eos  # the EOS stays
        assert len(completion.logprobs) == len(tokens)
        np.testing.assert_allclose(completion.logprobs, reference(model, prompt, tokens, temperature), atol=2e-4)
        alone = [[0]] * row + [prompt]  # the stream belongs to the row's number, not to its neighbours
        assert Engine(sampler, eos).generate(alone, sampling, max_tokens=7, seed=seed)[row].tokens == tokens


def test_greedy_is_the_argmax_of_transformers(llama: tuple[Any, Any]) -> None:
    model, sampler = llama
    prompts = [[5, 9, 11], [5, 9, 11, 40, 3], [7]]
    for prompt, completion in zip(prompts, Engine(sampler, [EOS]).generate(prompts, GREEDY, max_tokens=6), strict=True):
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=EOS, pad_token_id=0
        )
        assert completion.tokens == out[0, len(prompt) :].tolist()
        np.testing.assert_allclose(completion.logprobs, reference(model, prompt, completion.tokens), atol=2e-4)


def test_a_row_that_is_not_finite_is_marked_and_spares_the_others(llama: tuple[Any, Any], tmp_path: Path) -> None:
    """Trap: TRL turns a NaN logprob into ratio 1, and the sampler looks perfect."""
    model, _ = llama
    model.save_pretrained(tmp_path)
    broken = load.load_sampler(tmp_path)
    weight = np.array(broken.model.embed_tokens.weight)
    weight[17] = np.nan
    broken.model.embed_tokens.weight = rl_array(weight)
    good, bad = Engine(broken, [EOS]).generate([[5, 6], [5, 17]], Sampling(), max_tokens=3)
    assert not bad.finite
    assert bad.tokens == [EOS]
    assert np.isnan(bad.logprobs[0])
    assert good.finite or 17 in good.tokens


def rl_array(value: np.ndarray) -> Any:
    import mlx.core as mx

    return mx.array(value)


def test_prompts_that_cannot_be_decoded_are_named(llama: tuple[Any, Any]) -> None:
    engine = Engine(llama[1], [EOS], context=10)
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        engine.generate([[1], []], GREEDY, max_tokens=2)
    with pytest.raises(ValueError, match="prompt 0 has 9 tokens and 2 more may follow, but the model's context is 10"):
        engine.generate([[1] * 9], GREEDY, max_tokens=2)


def test_common_prefix_leaves_every_prompt_a_token() -> None:
    assert common_prefix([[1, 2, 3], [1, 2, 4]]) == 2
    assert common_prefix([[1, 2, 3], [1, 2]]) == 1
    assert common_prefix([[1, 2, 3]]) == 2
    assert common_prefix([[4], [4]]) == 0


def test_saved_config_is_what_the_trap_is_about(tmp_path: Path) -> None:
    """Contract with transformers 5.23: RoPE's base is only inside rope_parameters."""
    make(tmp_path, FAMILIES["llama"])
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_theta" not in saved
    assert saved["rope_parameters"]["rope_theta"] == 5e4
    assert load.sampler_config(saved)["rope_theta"] == 5e4
