"""rl/rollouts/once.py: a frozen base lies in memory once, and training leaves it as it is."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rl.rollouts  # noqa: F401  binds BLAS before mlx loads

import mlx.core as mx  # isort: skip
from mlx.utils import tree_flatten

from rl import config as configs
from rl import models, packed
from rl.rollouts import device, fused, parity, quantized, sync
from rl.rollouts import sampler as samplers
from rl.rollouts.load import load_sampler
from rl.rollouts.once import hold_once
from rl.tiny import write_tiny

pytestmark = pytest.mark.skipif(device.backend() != "cpu", reason="here torch is on the CPU, and so must MLX be")
RANK = configs.Lora(rank=4, alpha=8.0)
LAYERS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama's shared 4-bit base."""
    folder = tmp_path_factory.mktemp("once")
    write_tiny(folder / "tiny", configs.TinyModel(), 0, "test")
    quantized.build(folder / "tiny", None, 4, 32, folder / "shared", source="x")
    return folder / "shared"


def adapted(model: Any) -> Any:
    torch.manual_seed(2)
    return models.add_lora(model, RANK)


def on_values(base: Path) -> Any:
    return adapted(models.load_policy(models.Base("b", base, "", None), torch.float32, "cpu"))


def on_codes(base: Path) -> Any:
    return adapted(packed.load_policy(base, torch.float32, "cpu"))


def addresses(model: Any) -> dict[str, int]:
    """Where MLX's arrays begin, read through numpy."""
    held = tree_flatten(model.parameters())
    return {name: np.frombuffer(memoryview(v), np.uint8).ctypes.data for name, v in held if v.size}


def kept(policy: Any) -> set[int]:
    """Where the policy's frozen tensors begin."""
    tensors = [*policy.named_parameters(), *policy.named_buffers()]
    return {t.data_ptr() for name, t in tensors if not t.requires_grad and "rotary" not in name}


def steps(policy: Any, sampler: Any, count: int = 3) -> None:
    """Optimizer steps on the adapter, each handed over."""
    ids = torch.randint(2, 17, (4, 12), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(count):
        policy(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sync.sync_adapter(sampler, sync.adapter_tensors(policy))


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("load", [on_values, on_codes])
def test_both_read_the_same_memory_and_steps_leave_it_alone(base: Path, load: Any, fuse: bool) -> None:
    """Also where the sampler's layers are views into products of several, as they are off a CPU."""
    policy = load(base)
    sampler = load_sampler(base, packed=load is on_codes)
    sync.attach_adapter(sampler, sync.adapter_tensors(policy))
    sync.sync_adapter(sampler, sync.adapter_tensors(policy))
    if fuse:
        fused.fuse(sampler)
    before = {n: np.array(v) for n, v in tree_flatten(sampler.parameters()) if ".lora_" not in n}
    own = {name: p.data_ptr() for name, p in policy.named_parameters() if p.requires_grad}
    saved = hold_once(policy, sampler)
    where = {name: at for name, at in addresses(sampler).items() if ".lora_" not in name}
    assert kept(policy) == set(where.values())  # all of the base, and nothing beside it
    assert saved == sum(v.nbytes for v in before.values())
    assert {name: p.data_ptr() for name, p in policy.named_parameters() if p.requires_grad} == own
    assert not own.keys() & where.keys()
    gc.collect()
    steps(policy, sampler)
    assert parity.compare(policy, sampler, parity.probe(17)).largest < 2e-4
    for name, value in tree_flatten(sampler.parameters()):
        if ".lora_" in name:
            assert float(mx.abs(value).sum()) > 0  # they have learned
        else:
            np.testing.assert_array_equal(np.array(value), before[name], err_msg=name)
    assert {name: at for name, at in addresses(sampler).items() if ".lora_" not in name} == where


@pytest.mark.parametrize("load", [on_values, on_codes])
def test_it_learns_as_it_does_with_a_copy_of_its_own(base: Path, load: Any) -> None:
    weights = []
    for once in (False, True):
        policy, sampler = load(base), load_sampler(base, packed=load is on_codes)
        sync.attach_adapter(sampler, sync.adapter_tensors(policy))
        if once:
            assert hold_once(policy, sampler) > 0
        steps(policy, sampler)
        weights.append(torch.cat([p.detach().flatten() for p in policy.parameters() if p.requires_grad]))
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-6)


def test_the_memory_lives_as_long_as_torch_reads_it(base: Path) -> None:
    policy, sampler = on_codes(base), load_sampler(base, packed=True)
    expected = [b.clone() for b in policy.buffers()]
    hold_once(policy, sampler)
    del sampler
    gc.collect()
    mx.clear_cache()
    other = [mx.full((384, 64), 7, mx.uint32) for _ in range(50)]  # takes memory that was freed
    mx.eval(other)
    assert all(torch.equal(found, want) for found, want in zip(policy.buffers(), expected, strict=True))


def test_what_is_trained_or_differs_in_a_bit_is_not_shared(base: Path) -> None:
    """Trap: two bases of one shape, an untrained embedding beside a trained one, 0 and -0."""
    whole = models.load_policy(models.Base("b", base, "", None), torch.float32, "cpu")
    for parameter in whole.parameters():
        parameter.requires_grad_(True)
    assert hold_once(whole, load_sampler(base)) == 0
    assert hold_once(on_codes(base), load_sampler(base)) < 10_000  # codes and values: the norms alone are alike
    half = load_sampler(base, "float16")
    assert hold_once(on_values(base), half) == 0
    policy, sampler = on_values(base), load_sampler(base)
    down = policy.base_model.model.model.layers[1].mlp.down_proj.base_layer.weight
    at = down.data_ptr()
    with torch.no_grad():
        down[3, 5] = -0.0 if down[3, 5] == 0 else down[3, 5].nextafter(torch.tensor(9.0))
    assert hold_once(policy, sampler) == sum(v.nbytes for _, v in tree_flatten(sampler.parameters())) - down.nbytes
    assert down.data_ptr() == at


def test_a_samplers_base_is_its_trainers(base: Path) -> None:
    policy = on_values(base)
    sampler = samplers.build(base, precision="shared", dtype="float32", eos_ids=[1], context=None)
    sampler.sync(policy)
    assert sampler.hold_once(policy) == sampler.base_shared_bytes > 0
    assert sampler.hold_once(policy) == sampler.base_shared_bytes  # asked again: nothing is counted twice
