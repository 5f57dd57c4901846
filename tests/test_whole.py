"""All layers of a decode step in one kernel, run on a CPU with all its blocks at once (tests/cuda_on_cpu.hpp)."""

import subprocess
from pathlib import Path

import pytest
import torch
from kernels_helper import compiler
from test_kernels import (  # noqa: F401  fixtures
    FAMILIES,
    SMALL,
    THETA,
    adapters,
    apart,
    as_on_cuda,
    check_codes,
    decode,
    libraries,
    same_but_for_rounding,
    sampler,
)
from transformers import LlamaConfig

import rl.rollouts  # noqa: F401  binds BLAS before mlx loads

import mlx.nn as nn  # isort: skip

from rl.rollouts import bench, device, kernels, parted, streamed, sync, turns, whole
from rl.rollouts.engine import Engine
from rl.rollouts.forward import prefill_last
from rl.rollouts.result import Sampling

pytestmark = pytest.mark.skipif(compiler is None, reason="no C++ compiler, which runs the kernels here")
USABLE = whole.usable


@pytest.fixture
def in_one(as_on_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """A card of three processors."""
    monkeypatch.setattr(device, "processors", lambda: 3)
    monkeypatch.setattr(whole, "usable", USABLE)
    for made in (whole._kernel, whole._describe):
        made.cache_clear()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_decodes_as_by_operations(
    family: str, tmp_path: Path, in_one: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through refill and windows."""
    model = sampler(tmp_path, FAMILIES[family])
    same_but_for_rounding(model, monkeypatch)
    assert whole.chosen(model)


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(("names", "rank"), [(ALL, 20), (("v_proj", "up_proj"), 4)])
def test_adapters_are_read_inside(
    names: tuple[str, ...], rank: int, tmp_path: Path, in_one: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a later sync too, which lie elsewhere. Trap: addresses of an older policy's."""
    model = sampler(tmp_path, FAMILIES["llama"])
    found = [decode(model, own=True, monkeypatch=monkeypatch)]
    adapters(model, rank, names)
    found.append(same_but_for_rounding(model, monkeypatch))
    for _, layer in model.named_modules():
        if "lora_b" in layer:
            layer.lora_b = 0.8 * layer.lora_b
    found.append(same_but_for_rounding(model, monkeypatch))
    assert whole.chosen(model)
    first, second, third = ([c.tokens for c in done] for done in found)
    assert first != second != third


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_read_inside(bits: int, tmp_path: Path, in_one: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert whole.chosen(check_codes(bits, tmp_path, monkeypatch))


def large(folder: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A model whose products count as large."""
    monkeypatch.setattr(streamed, "LARGE", 0)
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 16}
    return sampler(folder, LlamaConfig(**SMALL | sizes, rope_parameters=THETA), size=0.1)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_large_model_decodes_as_by_operations(
    adapted: bool, tmp_path: Path, in_one: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stages ask for weights before they meet. Trap: what a stage still reads is asked over."""
    model = large(tmp_path, monkeypatch)
    if adapted:
        adapters(model, 4, ("q_proj", "o_proj", "up_proj", "down_proj"), size=0.05)
    same_but_for_rounding(model, monkeypatch)
    assert streamed.chosen(model)
    assert whole.chosen(model)


def test_copies_may_come_at_once(tmp_path: Path, in_one: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as they are asked for, and not when they are waited for."""
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **how: run([*command, "-DCOPIES_AT_ONCE"], **how))
    model = large(tmp_path, monkeypatch)
    assert apart(model, decode(model, own=True, monkeypatch=monkeypatch)) < 0.05
    assert whole.chosen(model)


@pytest.mark.parametrize("stream", [False, True])
def test_blocks_that_do_not_meet_are_found_out(
    stream: bool, tmp_path: Path, in_one: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each stage needs what all blocks have made: the trial sees it where they go on alone, and the other kernels
    decode."""
    read = kernels.read
    monkeypatch.setattr(kernels, "read", lambda name: read(name).replace("if (!met) meet(counter, goal);", ""))
    model = large(tmp_path, monkeypatch) if stream else sampler(tmp_path, FAMILIES["llama"])
    assert Engine(model, [60], grouped=False, compiled=False).generate([[3]], Sampling(), max_tokens=2)[0].finite
    assert not whole.chosen(model)
    assert kernels.usable(model)
    assert parted.layout_of(model, grouped=False) is parted.Parted
    assert "a step of 71 rows" in caplog.text


def test_layers_that_differ_are_left_to_the_other_kernels(
    tmp_path: Path, in_one: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter on one layer alone."""
    model = sampler(tmp_path, FAMILIES["llama"])
    tensors = {"model.layers.1.mlp.down_proj": (torch.ones(4, 96).bfloat16(), torch.ones(64, 4).bfloat16(), 1.0)}
    sync.attach_adapter(model, tensors)
    sync.sync_adapter(model, tensors)
    same_but_for_rounding(model, monkeypatch)
    assert not whole.chosen(model)


def test_a_step_is_few_operations(tmp_path: Path, in_one: None) -> None:
    """However many layers: an embedding, a norm, a head and their like."""
    model = sampler(tmp_path, FAMILIES["llama"])
    prefill_last(model, [[1]])
    turns.reach(model, 8)
    assert parted.layout_of(model, grouped=False) is parted.Told
    assert bench.launches(model, 2) < 16
