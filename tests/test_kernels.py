"""The kernels of a CUDA decode step, run thread by thread on a CPU, give what the operations give that they replace."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernels_helper import compiler, cuda_kernel
from mlx_lm.tuner.lora import LoRALinear
from test_families import LLAMA3, THETA, YARN, make
from transformers import Gemma3TextConfig, LlamaConfig, Qwen2Config, Qwen3Config, SmolLM3Config

import rl.rollouts  # noqa: F401  binds BLAS before mlx loads

import mlx.core as mx  # isort: skip
import mlx.nn as nn

from rl.rollouts import attention, bench, device, fused, kernels, load, parity, streamed, sync, turns, whole
from rl.rollouts.engine import Engine
from rl.rollouts.forward import prefill_last
from rl.rollouts.result import Sampling

pytestmark = pytest.mark.skipif(compiler is None, reason="no C++ compiler, which runs the kernels here")

SMALL = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = {
    "llama": LlamaConfig(**SMALL, rope_parameters=THETA),
    "llama 3, yarn": LlamaConfig(**SMALL, max_position_embeddings=64, rope_parameters=YARN),
    "llama 3 RoPE": LlamaConfig(**SMALL, max_position_embeddings=512, rope_parameters=LLAMA3),
    "qwen2, biased, window of 4": Qwen2Config(
        **SMALL | {"num_attention_heads": 2, "num_key_value_heads": 1}, rope_parameters=THETA, use_sliding_window=True,
        sliding_window=4, max_window_layers=1,
    ),
    "qwen3, normed queries and keys": Qwen3Config(**SMALL | {"head_dim": 64}, rope_parameters=THETA),
    "smollm3, layers without RoPE": SmolLM3Config(
        **SMALL | {"num_hidden_layers": 4, "hidden_size": 128}, pad_token_id=0, rope_parameters=THETA
    ),
}  # fmt: skip
PROMPTS = [[3, 9, 20, 41, 7, 7, 13], [3, 9, 20, 41, 7, 7, 13], [3, 9]]


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch, libraries: Path) -> None:
    """The kernels are run by this CPU; all else is left to MLX."""
    monkeypatch.setattr(device, "torch_is_faster", lambda: False)
    monkeypatch.setattr(device, "masks_fused_attention", lambda: False)
    monkeypatch.setattr(device, "takes_own_kernels", lambda: True)
    monkeypatch.setattr(attention, "kernel_works", lambda: False)
    monkeypatch.setattr(device, "cuda_kernel", partial(cuda_kernel, libraries))
    monkeypatch.setattr(whole, "usable", lambda model: False)  # tests/test_whole.py
    for made in (kernels._product, kernels._attend, streamed._stream, streamed._finish):
        made.cache_clear()


def sampler(folder: Path, config: Any, size: float = 0.3) -> Any:
    make(folder, config, size=size)
    model = load.load_sampler(folder, "bfloat16")
    fused.fuse(model)
    return model


def adapters(model: Any, rank: int, names: tuple[str, ...], size: float = 0.2) -> None:
    """LoRA with random matrices on the layers of these names."""
    torch.manual_seed(3)
    tensors = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in names:
            out = module.weight.shape[0]
            inputs = module.weight.shape[1] * (32 // module.bits if "scales" in module else 1)
            a, b = torch.randn(rank, inputs) * size, torch.randn(out, rank) * size
            tensors[name] = (a.bfloat16(), b.bfloat16(), 1.5)
    sync.attach_adapter(model, tensors)
    sync.sync_adapter(model, tensors)


def decode(model: Any, *, own: bool, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Greedy completions by the kernels, or by operations."""
    with monkeypatch.context() as here:
        if not own:
            here.setattr(kernels, "usable", lambda model: False)
        engine = Engine(model, [60], grouped=False, compiled=False, max_batch=2)
        done = engine.generate(PROMPTS, Sampling(temperature=0.0), max_tokens=12)
    if own:
        assert kernels.usable(model)
    return done


def apart(model: Any, done: list[Any]) -> float:
    """Mean |Δlogp| of what was drawn, token by token, and of the same tokens read at once by operations."""
    rows = [prompt + completion.tokens for prompt, completion in zip(PROMPTS, done, strict=True)]
    forced = parity.sampler_logprobs(model, rows)
    pairs = zip(PROMPTS, done, forced, strict=True)
    return float(np.concatenate([np.abs(c.logprobs - whole[len(p) - 1 :]) for p, c, whole in pairs]).mean())


def same_but_for_rounding(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A model of large random weights in bfloat16 is no smoother than that."""
    assert apart(model, decode(model, own=False, monkeypatch=monkeypatch)) < 1e-4
    done = decode(model, own=True, monkeypatch=monkeypatch)
    assert apart(model, done) < 0.05
    return done


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_decodes_as_by_operations(
    family: str, tmp_path: Path, as_on_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through refill and windows. Trap: a kernel that takes one family's layer for another's samples from another
    policy without a word."""
    model = sampler(tmp_path, FAMILIES[family])
    same_but_for_rounding(model, monkeypatch)


@pytest.mark.parametrize(
    ("names", "rank"),
    [(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 20), (("v_proj", "up_proj"), 4)],
)
def test_adapters_are_read_inside(
    names: tuple[str, ...], rank: int, tmp_path: Path, as_on_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that fill no tile, and layers without an adapter beside layers with one."""
    model = sampler(tmp_path, FAMILIES["llama"])
    plain = decode(model, own=False, monkeypatch=monkeypatch)
    adapters(model, rank, names)
    assert [c.tokens for c in plain] != [c.tokens for c in same_but_for_rounding(model, monkeypatch)]


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_read_inside(bits: int, tmp_path: Path, as_on_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: MLX packs the first code into a word's lowest bits."""
    check_codes(bits, tmp_path, monkeypatch)


def check_codes(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model of codes against the values that they stand for: MLX's own product of codes in bfloat16 is a hundredth
    off on a CPU."""
    make(tmp_path, FAMILIES["llama"])
    model, values = load.load_sampler(tmp_path, "bfloat16"), load.load_sampler(tmp_path, "bfloat16")
    nn.quantize(model, group_size=32, bits=bits)
    for (_, codes), (_, layer) in zip(model.named_modules(), values.named_modules(), strict=True):
        if "scales" in codes:
            layer.weight = mx.dequantize(codes.weight, codes.scales, codes.biases, group_size=32, bits=bits)
    for one in (model, values):
        fused.fuse(one)
        adapters(one, 4, ("q_proj", "down_proj"))
    done = decode(model, own=True, monkeypatch=monkeypatch)
    assert apart(values, done) < 0.1
    return model


def test_many_rows_are_several_blocks(tmp_path: Path, as_on_cuda: None) -> None:
    """Rows that fill no block, in each of the shapes that a block may have."""
    model = sampler(tmp_path, FAMILIES["llama"])
    prefill_last(model, [[1]])
    one = fused.of(model).layers[0].down
    x = mx.random.normal((71, 96), key=mx.random.key(0)).astype(mx.bfloat16)
    expected = np.array(x.astype(mx.float32)) @ np.array(one.state["weight"].astype(mx.float32)).T
    found = np.array(kernels.product(one, x).astype(mx.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("tiles", [1, 2, 4])
def test_a_block_may_make_several_tiles(tiles: int, monkeypatch: pytest.MonkeyPatch, as_on_cuda: None) -> None:
    """As it does for wide layers, against float64."""
    monkeypatch.setattr(kernels, "tiles_of", lambda *_, **__: tiles)
    layers = [nn.Linear(96, 64) for _ in range(2)]
    for layer in layers:
        layer.set_dtype(mx.bfloat16)
    one = fused.Product(fused.TILE)
    one.refresh(layers)
    x = mx.random.normal((9, 96), key=mx.random.key(0)).astype(mx.bfloat16)
    weight, bias = (np.array(one.state[name].astype(mx.float32), np.float64) for name in ("weight", "bias"))
    expected = np.array(x.astype(mx.float32), np.float64) @ weight.T + bias
    found = np.array(kernels.product(one, x).astype(mx.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """As for large layers; the list is told each choice."""
    chosen, choose = [], kernels._wide
    monkeypatch.setattr(kernels, "WIDE", 0)
    monkeypatch.setattr(kernels, "FEW_ROWS", 0)
    monkeypatch.setattr(kernels, "_wide", lambda *a: chosen.append(choose(*a)) or chosen[-1])
    return chosen


def linears(inputs: int, sizes: list[int], ranks: list[int], *, bias: bool = False, bits: int = 16) -> fused.Product:
    """Random layers of one input, with an adapter where its rank is not 0."""
    layers = []
    for i, (size, rank) in enumerate(zip(sizes, ranks, strict=True)):
        layer = nn.Linear(inputs, size, bias=bias)
        if bits < 16:
            layer = nn.QuantizedLinear.from_linear(layer, group_size=64, bits=bits)
        layer.set_dtype(mx.bfloat16)
        if rank:
            layer = LoRALinear.from_base(layer, r=rank, scale=2.0)
            layer.lora_b = mx.random.normal((rank, size), key=mx.random.key(i)) * 0.2
            layer.set_dtype(mx.bfloat16)
        layers.append(layer)
    one = fused.Product(fused.TILE)
    one.refresh(layers)
    return one


def normal(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(sum(shape))).astype(mx.bfloat16)


def exact(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32), np.float64)


def reference(
    one: fused.Product, rows: mx.array, *, norm: nn.RMSNorm | None, gated: bool, more: mx.array | None
) -> np.ndarray:
    """`kernels.product` in float64."""
    x, state = exact(rows), one.state
    if norm is not None:
        x = x / np.sqrt((x**2).mean(1, keepdims=True) + norm.eps) * exact(norm.weight)
    weight = state["weight"]
    if one.settings:
        weight = mx.dequantize(weight, state["scales"], state["biases"], **one.settings)
    out = x @ exact(weight).T
    if "a" in state:
        out += x @ exact(state["a"]).T @ exact(state["b"])
    if "bias" in state:
        out += exact(state["bias"])
    if gated:
        gate, up = np.split(out, 2, axis=1)
        out = gate / (1 + np.exp(-gate)) * up
    return out if more is None else out + exact(more)


def check_wide(one: fused.Product, rows: int, *, norm: bool = False, gated: bool = False, add: bool = False) -> None:
    """As in float64 but for rounding, and the same bits each time."""
    own = nn.RMSNorm(one.inputs)
    own.weight = 1 + normal(one.inputs) / 8
    more = normal(rows, sum(one.sizes) // (2 if gated else 1)) if add else None
    kinds = {"norm": own if norm else None, "gated": gated, "more": more}
    x = normal(rows, one.inputs)
    found, again = kernels.product(one, x, **kinds), kernels.product(one, x, **kinds)
    expected = reference(one, x, **kinds)
    assert np.abs(exact(found) - expected).max() < 0.015 * np.abs(expected).max()
    assert mx.array_equal(found, again)


@pytest.mark.parametrize("tiles", [4, 2])
def test_large_layers_read_a_weight_once(
    tiles: int, as_on_cuda: None, wide: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any number of rows, and of several chunks of inputs. Traps: a block of few rows takes those of another;
    a chunk is read where the next one lies already; the last of an odd number of chunks is left out."""
    monkeypatch.setattr(kernels, "WIDE_BLOCKS", 1)
    one = linears(3 * 64 * 8 // tiles, [16 * tiles, 32 * tiles], [0, 0], bias=True)
    for rows in (1, 9, 64, 71):
        check_wide(one, rows, add=True)
    assert set(wide) == {tiles}


@pytest.mark.parametrize("tiles", [4, 2])
@pytest.mark.parametrize(("norm", "ranks"), [(True, [20, 0, 4]), (False, [4, 16, 0])], ids=["rank 20", "rank 16"])
def test_large_layers_share_out_their_adapters(
    tiles: int, norm: bool, ranks: list[int], as_on_cuda: None, wide: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that fill no tile, layers without an adapter beside others. Traps: warps that take turns at A leave a step
    out, or take it twice; squares of a row from lanes that had another."""
    monkeypatch.setattr(kernels, "WIDE_BLOCKS", 1)
    one = linears(3 * 64 * 8 // tiles, [16 * tiles] * 3, ranks)
    for rows in (9, 64):
        check_wide(one, rows, norm=norm)
    assert set(wide) == {tiles}


@pytest.mark.parametrize("tiles", [4, 2])
@pytest.mark.parametrize("ranks", [[12, 4], [0, 12], [12, 0], [20, 20]], ids=str)
def test_large_layers_gate_inside(
    tiles: int, ranks: list[int], as_on_cuda: None, wide: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters on both sides or on one. Trap: up's product taken with gate's adapter."""
    monkeypatch.setattr(kernels, "WIDE_BLOCKS", 1)
    one = linears(64 * 8 // tiles, [16 * tiles] * 2, ranks)
    check_wide(one, 71, norm=True, gated=True)
    assert set(wide) == {None if tiles == 2 and ranks == [20, 20] else tiles}


@pytest.mark.parametrize(("tiles", "bits"), [(4, 4), (2, 8)])
def test_large_layers_open_their_codes(
    tiles: int, bits: int, as_on_cuda: None, wide: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap: codes are asked for a chunk before they are opened, by then with the next chunk's scale."""
    monkeypatch.setattr(kernels, "WIDE_BLOCKS", 1)
    one = linears(2 * 64 * 8 // tiles, [16 * tiles] * 2, [4, 0], bits=bits)
    check_wide(one, 9, norm=True, gated=True)
    check_wide(one, 9, add=True)
    assert set(wide) == {tiles}


def test_few_rows_of_a_large_layer(as_on_cuda: None, wide: list[int | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """They go the small layers' way, to the same outputs. Trap: the choice is made where a block fills up."""
    monkeypatch.setattr(kernels, "FEW_ROWS", 32)
    one = linears(256, [512, 512], [4, 0])
    for rows in (1, 32):
        check_wide(one, rows, norm=True)
    assert not wide
    check_wide(one, 33, norm=True)
    assert set(wide) == {2}


def test_which_layers_are_large() -> None:
    """A small model's stay with product.cu, and so does what fills no block."""

    def choice(inputs: int, sizes: list[int], rank: int = 0, *, gated: bool = False) -> int | None:
        one = fused.Product(fused.TILE)
        one.sizes, one.state = sizes, {"weight": mx.zeros((sum(sizes), inputs), mx.bfloat16)}
        return kernels._wide(one, sum(sizes) // (2 if gated else 1), 2 if gated else 1, rank // fused.TILE)

    assert choice(576, [1536, 1536], gated=True) is None
    assert choice(2048, [2048, 2048, 2048]) == 4
    assert choice(2048, [8192, 8192], 32, gated=True) == 4
    assert choice(2048, [2048]) == choice(8192, [2048], 32) == 2
    assert choice(2048, [2048, 2048], 32, gated=True) is None
    assert choice(2048, [8192, 8208]) is None
    assert choice(2048 + 64, [8192]) is None


def test_a_model_of_large_layers_decodes_as_by_operations(
    tmp_path: Path, as_on_cuda: None, wide: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every product of it, with adapters on some."""
    monkeypatch.setattr(kernels, "WIDE_BLOCKS", 1)
    config = LlamaConfig(**SMALL | {"hidden_size": 128, "intermediate_size": 256}, rope_parameters=THETA)
    model = sampler(tmp_path, config)
    adapters(model, 4, ("q_proj", "o_proj", "up_proj", "down_proj"))
    same_but_for_rounding(model, monkeypatch)
    assert set(wide) == {4}


def test_a_kernel_that_is_wrong_is_not_used(
    tmp_path: Path, as_on_cuda: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a machine that nobody has tried."""
    model = sampler(tmp_path, FAMILIES["llama"])
    right = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *inputs: 1.1 * right(*inputs))
    assert Engine(model, [60], grouped=False, compiled=False).generate([[3]], Sampling(), max_tokens=2)[0].finite
    assert not kernels.usable(model)
    assert "attention of 5 rows by 1.0e-01" in caplog.text

    def fails(*_: Any, **__: Any) -> mx.array:
        raise RuntimeError("no such device")

    model = sampler(tmp_path, FAMILIES["llama"])
    monkeypatch.setattr(kernels, "attend", fails)
    prefill_last(model, [[1]])
    assert not kernels.usable(model)
    assert "no such device" in caplog.text


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (LlamaConfig(**SMALL), "float32"),
        (LlamaConfig(**SMALL | {"head_dim": 16}), "bfloat16"),
        (LlamaConfig(**SMALL | {"intermediate_size": 48}), "bfloat16"),
        (Gemma3TextConfig(**SMALL), "bfloat16"),
    ],
    ids=["float32", "narrow heads", "48 inputs", "gemma 3"],
)
def test_other_models_are_left_to_operations(config: Any, dtype: str, tmp_path: Path, as_on_cuda: None) -> None:
    make(tmp_path, config)
    model = load.load_sampler(tmp_path, dtype)
    fused.fuse(model)
    prefill_last(model, [[1]])
    assert not kernels.usable(model)
    assert Engine(model, [60], grouped=False, compiled=False).generate([[3]], Sampling(), max_tokens=2)[0].finite


def test_a_layer_takes_five(tmp_path: Path, as_on_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever adapters it has."""
    model = sampler(tmp_path, FAMILIES["llama"])
    prefill_last(model, [[1]])
    turns.reach(model, 8)
    assert kernels.usable(model)
    count = []
    for name in ("product", "attend"):
        right = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, right=right, **k: count.append(1) or right(*a, **k))
    adapters(model, 4, ("q_proj", "o_proj"))
    prefill_last(model, [[1]])
    assert bench.launches(model, 2) > 0
    assert len(count) >= 5 * len(model.model.layers)
