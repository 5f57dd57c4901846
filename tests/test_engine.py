"""The decode engine against Hugging Face's own forward, token by token and in fp32."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

import rl.rollouts  # noqa: F401  binds BLAS before mlx loads

import mlx.core as mx  # isort: skip
from rl.errors import RunFailed, UserError
from rl.rollouts import cache, device, fused, grouped, load, parity, routes, torch_prefill, torch_step
from rl.rollouts import engine as engines
from rl.rollouts.engine import Engine
from rl.rollouts.forward import prefill
from rl.rollouts.pool import common_prefix
from rl.rollouts.result import GREEDY, Sampling

VOCABULARY = 61
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
EOS = 2
LLAMA = LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=False)
WINDOWED = Qwen3Config(
    **SMALL, num_key_value_heads=2, head_dim=8, use_sliding_window=True, sliding_window=4, max_window_layers=1
)


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
    model = make(folder, LLAMA)
    return model, load.load_sampler(folder)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A random Qwen 3 whose second layer sees 4 tokens."""
    folder = tmp_path_factory.mktemp("windowed")
    model = make(folder, WINDOWED)
    return model, load.load_sampler(folder)


@pytest.fixture(scope="module")
def by_torch(llama: tuple[Any, Any], windowed: tuple[Any, Any], tmp_path_factory: Any) -> list[tuple[Any, Any]]:
    """The same two, run by torch from the prompts to the tokens, on a CPU."""
    made = []
    for model, _ in (llama, windowed):
        folder = tmp_path_factory.mktemp("by_torch")
        model.save_pretrained(folder)
        made.append((model, load.load_sampler(folder)))
        fused.fuse(made[-1][1])
    return made


def family_of(request: pytest.FixtureRequest, family: str) -> tuple[Any, Any]:
    """One of the four pairs above by its name."""
    if family.endswith("by torch"):
        return request.getfixturevalue("by_torch")[family.startswith("windowed")]
    return request.getfixturevalue(family)


def reference(model: Any, prompt: list[int], tokens: list[int], temperature: float = 1.0) -> np.ndarray:
    """Logprobs of `tokens` after `prompt` from one unpadded forward of the torch model."""
    ids = torch.tensor([prompt + tokens])
    with torch.no_grad():
        logprobs = (model(ids).logits[0].float() / temperature).log_softmax(-1)
    return logprobs[len(prompt) - 1 : -1].gather(-1, ids[0, len(prompt) :, None])[:, 0].numpy()


def test_the_rope_trap_stops_the_run_and_names_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With RoPE's base left where mlx-lm does not look, the parity check names the first attention."""
    model = make(tmp_path, LLAMA)
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


def letters(ids: Sequence[int]) -> str:
    """A tokenizer whose tokens are letters: id 3 is "D"."""
    return "".join(chr(65 + i) for i in ids)


def alone(sampler: Any, prompt: list[int], row: int, seed: int, how: Sampling, eos: list[int]) -> list[int]:
    """Row `row` decoded by itself, a token at a time, each by a forward over all that came before."""
    from rl.rollouts.forward import head
    from rl.rollouts.sampling import sample, uniforms_for

    uniforms = mx.array(uniforms_for(seed, 0, np.array([row]), 7))
    tokens: list[int] = []
    while len(tokens) < 7 and not (tokens and tokens[-1] in eos):
        hidden, _ = prefill(sampler, [prompt + tokens])
        token, _, _ = sample(head(sampler, hidden[:, -1]), uniforms[:, len(tokens)], how)
        tokens.append(token.item())
    return tokens


@pytest.mark.parametrize(
    ("family", "by_group"),
    [
        *[(family, by_group) for family in ("llama", "windowed") for by_group in (True, False)],
        ("llama by torch", True),
        ("windowed by torch", True),
    ],
)
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    shared=st.integers(0, 5),
    group=st.integers(1, 3),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    eos=st.lists(st.integers(0, 60), min_size=1, max_size=12, unique=True),
    seed=st.integers(0, 2**32 - 1),
    max_batch=st.sampled_from([1, 2, 3, 256]),
    tokens=st.sampled_from([21, 40, 60, None]),
    look_every=st.sampled_from([1, 3]),
    fixed=st.booleans(),
)
def test_a_completion_does_not_depend_on_its_neighbours(
    request: pytest.FixtureRequest,
    family: str,
    by_group: bool,
    lengths: list[int],
    shared: int,
    group: int,
    temperature: float,
    eos: list[int],
    seed: int,
    max_batch: int,
    tokens: int | None,
    look_every: int,
    fixed: bool,
) -> None:
    """Any batch, order, refill, memory bound, shrinking, look and layout: in fp32 the tokens of each row decoded by
    itself and the trainer's logprobs. `fixed` keeps shapes as for a compiled step."""
    model, sampler = family_of(request, family)
    generator = np.random.default_rng(seed)
    start = generator.integers(0, VOCABULARY, shared).tolist()
    prompts = [start + generator.integers(0, VOCABULARY, n).tolist() for n in lengths]
    prompts = [prompts[i] for i in generator.permutation(np.repeat(np.arange(len(prompts)), group))]
    how = Sampling(temperature=temperature)
    engine = Engine(sampler, eos, max_batch=max_batch, max_batch_tokens=tokens, grouped=by_group, compiled=fixed)
    engine.look_every = look_every
    if fixed:
        engine.step = lambda sampling, layout: engines.step_of(sampler, layout, sampling)
    if tokens is not None and max(map(len, prompts)) + shared + 7 > tokens:
        tokens = engine.max_batch_tokens = 60
    done = engine.generate(prompts, how, max_tokens=7, seed=seed)
    for row, (prompt, completion) in enumerate(zip(prompts, done, strict=True)):
        assert completion.tokens == alone(sampler, prompt, row, seed, how, eos)
        assert all(t not in eos for t in completion.tokens[:-1])
        expected = reference(model, prompt, completion.tokens, temperature)
        np.testing.assert_allclose(completion.logprobs, expected, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "windowed", "llama by torch", "windowed by torch"])
def test_rows_wait_refill_and_wrap_around_the_ring(
    request: pytest.FixtureRequest, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty prompts through three rows and a ring of 7 columns that starts with 2; no prompt is read twice, though its
    completions do not all fit at once."""
    model, sampler = family_of(request, family)
    monkeypatch.setattr(cache, "RING_STEP", 2)
    read: list[tuple[int, ...]] = []

    def counting(real: Any) -> Any:
        def counted(model: Any, prompts: Any, common: Any) -> Any:
            if common is not None:
                read.extend(tuple(p) for p in prompts)
            return real(model, prompts, common)

        return counted

    monkeypatch.setattr(routes, "prefill_last", counting(routes.prefill_last))
    monkeypatch.setattr(torch_prefill, "read", counting(torch_prefill.read))
    prompts = [[7, i % 10 + 20, *[3] * (i % 4)] for i in range(40)]
    for by_group in (True,) if family.endswith("torch") else (True, False):
        read.clear()
        engine = Engine(sampler, [EOS, 5, 9, 11], max_batch=3, grouped=by_group, compiled=False)
        done = engine.generate(prompts, Sampling(), max_tokens=7, seed=1)
        assert len(read) == len(set(read)) == len({tuple(p) for p in prompts})
        assert len({len(c.tokens) for c in done}) > 3  # lengths differ, so that rows joined at different steps
        for prompt, completion in zip(prompts, done, strict=True):
            expected = reference(model, prompt, completion.tokens)
            np.testing.assert_allclose(completion.logprobs, expected, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "llama by torch"])
def test_a_long_completion_does_not_hold_the_waiting(
    request: pytest.FixtureRequest, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap: in waves each takes as long as its longest row. Here the steps are those of the rows' sum, nearly."""
    _, sampler = family_of(request, family)
    steps = 0
    real = engines.decode_step

    def counted(*of: Any) -> Any:
        step = real(*of)

        def run(*arrays: Any) -> Any:
            nonlocal steps
            steps += 1
            return step(*arrays)

        return run

    def by_torch(*given: Any) -> Any:
        nonlocal steps
        steps += 1
        return logits(*given)

    logits = torch_step.logits
    monkeypatch.setattr(torch_step, "logits", by_torch)
    monkeypatch.setattr(engines, "decode_step", counted)
    engine = Engine(sampler, [EOS, 3, 5, 7], max_batch=4, grouped=True, compiled=False)
    done = engine.generate([[i % 50 + 5] for i in range(64)], Sampling(), max_tokens=60, seed=3)
    lengths = [len(c.tokens) for c in done]
    waves = sum(max(lengths[i : i + 4]) for i in range(0, 64, 4))
    assert max(lengths) > 3 * np.median(lengths)  # a long tail
    assert steps < sum(lengths) / 4 + max(lengths) < waves


@pytest.mark.parametrize(("family", "by_group"), [("llama", True), ("llama", False), ("llama by torch", True)])
def test_held_tokens_stay_within_max_batch_tokens(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, family: str, by_group: bool
) -> None:
    _, sampler = family_of(request, family)
    held: list[int] = []
    layout, about = (grouped.Grouped, "coming") if by_group else (cache.Joined, "arrays")
    real = getattr(layout, about)

    def heard(self: Any, *told: Any) -> Any:
        out = real(self, *told)
        parts = [self.prompt[0], self.own[0]] if by_group else [self.own[0][0]]
        held.append(sum(a.shape[-4 if not by_group else -3] * a.shape[-2] for a in parts))
        return out

    monkeypatch.setattr(layout, about, heard)
    monkeypatch.setattr(cache, "RING_STEP", 4)
    prompts = [[i] * (2 + i % 9) for i in range(3, 30) for _ in range(2)]
    engine = Engine(sampler, [EOS], max_batch_tokens=100, grouped=by_group, compiled=False)
    done = engine.generate(prompts, Sampling(), max_tokens=8, seed=3)
    assert len(done) == len(prompts)
    # a joined prompt's columns come in steps of RING_STEP
    assert 50 < max(held) <= (100 if by_group else 100 + 4 * 8)
    with pytest.raises(UserError, match=r"\[rollout\] max_batch_tokens: found 15, valid: ≥ the longest prompt's 10"):
        Engine(sampler, [EOS], max_batch_tokens=15).generate(prompts, Sampling(), max_tokens=8)


def test_bytes_per_token_are_those_of_the_arrays(llama: tuple[Any, Any], windowed: tuple[Any, Any]) -> None:
    for _, sampler in (llama, windowed):
        _, found = prefill(sampler, [[1, 2, 3, 4, 5]])
        assert sum(a.nbytes for a in found.keys + found.values) == 5 * cache.bytes_per_token(sampler)


def test_a_compiled_step_follows_the_weights(
    llama: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap: mx.compile takes what a function closes over as constants, and the sampler would stay at its first sync."""
    monkeypatch.setattr(device, "torch_is_faster", lambda: False)  # torch cannot be part of a compiled step
    model, _ = llama
    model.save_pretrained(tmp_path)
    sampler = load.load_sampler(tmp_path)
    engine = Engine(sampler, [EOS], grouped=False, compiled=True)
    prompts = [[5, 6, 7], [5, 6, 7], [8]]
    first = engine.generate(prompts, Sampling(), max_tokens=5, seed=2)
    for prompt, completion in zip(prompts, first, strict=True):
        np.testing.assert_allclose(completion.logprobs, reference(model, prompt, completion.tokens), atol=2e-4)
    weight = sampler.model.layers[1].mlp.down_proj.weight
    sampler.model.layers[1].mlp.down_proj.weight = weight * -1.5
    second = engine.generate(prompts, Sampling(), max_tokens=5, seed=2)
    for prompt, completion in zip(prompts, second, strict=True):
        (expected,) = parity.sampler_logprobs(sampler, [prompt + completion.tokens])
        np.testing.assert_allclose(completion.logprobs, expected[len(prompt) - 1 :], atol=2e-4)
    assert np.abs(np.subtract(first[0].logprobs[0], second[0].logprobs[0])) > 1e-3


@pytest.mark.parametrize(
    ("family", "by_group", "look_every"), [("llama", True, 1), ("llama", False, 4), ("llama by torch", True, 1)]
)
def test_stop_texts_end_a_completion_with_their_last_token(
    request: pytest.FixtureRequest, family: str, by_group: bool, look_every: int
) -> None:
    """Texts over several tokens, each row with its own; what was drawn behind it before the look is cut off."""
    _, sampler = family_of(request, family)
    engine = Engine(sampler, [60], decode=letters, max_batch=3, grouped=by_group)
    engine.look_every = look_every
    prompts = [[i + 3] for i in range(12)]
    free = engine.generate(prompts, Sampling(), max_tokens=12, seed=5)
    texts = [letters(c.tokens) for c in free]
    stops = [(text[4:7],) if i % 3 else () for i, text in enumerate(texts)]
    stops[1] = ("never there", texts[1][5:9])
    done = engine.generate(prompts, Sampling(), max_tokens=12, seed=5, stop=stops)
    for text, stop, before, after in zip(texts, stops, free, done, strict=True):
        ends = [text.index(s) + len(s) for s in stop if s in text]
        assert after.tokens == before.tokens[: min(ends, default=len(text))]
        assert after.logprobs == pytest.approx(before.logprobs[: len(after.tokens)], abs=1e-4)
    assert sum(len(c.tokens) < 12 for c in done) >= 7
    with pytest.raises(ValueError, match="decode"):
        Engine(sampler, [60], stop=("A",)).generate(prompts, Sampling(), max_tokens=2)


@pytest.mark.parametrize("family", ["llama", "windowed", "llama by torch", "windowed by torch"])
def test_greedy_is_the_argmax_of_transformers(request: pytest.FixtureRequest, family: str) -> None:
    model, sampler = family_of(request, family)
    prompts = [[5, 9, 11], [5, 9, 11, 40, 3], [7]]
    for prompt, completion in zip(prompts, Engine(sampler, [EOS]).generate(prompts, GREEDY, max_tokens=6), strict=True):
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=EOS, pad_token_id=0
        )
        assert completion.tokens == out[0, len(prompt) :].tolist()
        np.testing.assert_allclose(completion.logprobs, reference(model, prompt, completion.tokens), atol=2e-4)


@pytest.mark.parametrize("by_torch", [False, True])
def test_a_row_that_is_not_finite_is_marked_and_spares_the_others(
    llama: tuple[Any, Any], tmp_path: Path, by_torch: bool
) -> None:
    """Trap: TRL turns a NaN logprob into ratio 1, and the sampler looks perfect."""
    model, _ = llama
    model.save_pretrained(tmp_path)
    broken = load.load_sampler(tmp_path)
    weight = np.array(broken.model.embed_tokens.weight)
    weight[17] = np.nan
    broken.model.embed_tokens.weight = mx.array(weight)
    if by_torch:
        fused.fuse(broken)
    good, bad = Engine(broken, [EOS]).generate([[5, 6], [5, 17]], Sampling(), max_tokens=3)
    assert not bad.finite
    assert bad.tokens == [EOS]
    assert np.isnan(bad.logprobs[0])
    assert good.finite or 17 in good.tokens


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


def test_a_run_on_the_cpu_leaves_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: asked for a GPU alone, MLX says yes even after the default device was set to the CPU."""
    from rl.rollouts import device

    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: "the GPU")
    assert device.backend() == "cuda"
    monkeypatch.undo()
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    device.use_cpu()
    assert device.backend() == "cpu"
