"""The adapter in one piece: the bits of the way tensor by tensor, and that way wherever the plan does not cover all."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_families import FAMILIES, make
from test_sync import LORA, VOCABULARY, policy_of, sampler_of, shake

import rl.rollouts  # noqa: F401  binds BLAS before mlx loads

import mlx.core as mx  # isort: skip
import mlx.nn as nn

from rl import config, models
from rl.rollouts import device, fused, handover, parity, sync
from rl.rollouts import sampler as samplers

ALL = config.Lora(rank=20, alpha=12.0)
SOME = config.Lora(rank=3, alpha=7.0, targets=("q_proj", "v_proj", "up_proj"))


def plan_of(sampler: samplers.MLXSampler) -> handover.Plan | None:
    return fused.of(sampler.model).plan


def synced(base: models.Base, lora: config.Lora = ALL) -> tuple[Any, samplers.MLXSampler]:
    """Policy and sampler after two hand-overs, the second in one piece."""
    policy, sampler = policy_of(base, lora), sampler_of(base.path)
    for _ in range(2):
        shake(policy)
        sampler.sync(policy)
    assert plan_of(sampler) is not None
    return policy, sampler


def follows(sampler: samplers.MLXSampler, policy: Any) -> bool:
    return parity.compare(policy, sampler.model, parity.probe(VOCABULARY)).largest < 2e-4


def bits_of(sampler: samplers.MLXSampler) -> list[dict[str, tuple[Any, ...]]]:
    states = [{n: v for n, v in state.items() if n in ("a", "b", "where")} for state in fused.of(sampler.model).state]
    return [{n: (v.dtype, v.shape, np.array(v.astype(mx.float32)).tobytes()) for n, v in s.items()} for s in states]


@pytest.mark.parametrize("family", FAMILIES)
def test_after_each_step_the_sampler_follows_the_trainer(family: str, tmp_path: Path) -> None:
    make(tmp_path, FAMILIES[family])
    policy = policy_of(models.Base(family, tmp_path, ""), config.Lora(rank=4, alpha=3.0))
    sampler = sampler_of(tmp_path)
    rows = parity.probe(61, (5, 9, 14))
    for step in range(4):
        shake(policy, 0.1)
        if step:
            assert parity.compare(policy, sampler.model, rows).mean > 1e-3
        sampler.sync(policy)
        assert (plan_of(sampler) is None) == (step == 0)
        assert parity.compare(policy, sampler.model, rows).largest < 1e-4


@pytest.mark.parametrize("tile", [1, fused.TILE])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("lora", [ALL, SOME, LORA], ids=["all", "some layers of a product", "the upper layers"])
@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16], ids=str)
def test_it_brings_the_bits_of_the_way_tensor_by_tensor(
    tiny_base: models.Base,
    trained: torch.dtype,
    lora: config.Lora,
    dtype: str,
    tile: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "takes_own_kernels", lambda: tile > 1)
    policy = policy_of(tiny_base, lora)
    for name, parameter in policy.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(trained)
    one, each = (
        samplers.build(tiny_base.path, precision="full", dtype=dtype, eos_ids=[1], context=None) for _ in range(2)
    )
    reports = []
    for _ in range(3):
        shake(policy)
        reports = [one.sync(policy), each._sync_each(policy) if each.adapted else each.sync(policy)]
        assert bits_of(one) == bits_of(each)
    assert plan_of(one) is not None
    assert plan_of(each) is None
    told = [(report.tensors, report.bytes, report.way) for report in reports]
    assert told[0] == told[1]
    assert reports[0].seconds > 0


def test_what_the_optimizer_writes_afterwards_is_not_seen(tiny_base: models.Base) -> None:
    policy, sampler = synced(tiny_base)
    before = bits_of(sampler)
    shake(policy)
    assert bits_of(sampler) == before
    sampler.sync(policy)
    assert bits_of(sampler) != before


def test_products_keep_their_dictionaries_and_find_their_matrices_aligned(tiny_base: models.Base) -> None:
    """Compiled steps hold the dictionaries; a kernel would copy what does not lie in one piece, at each step."""
    policy, sampler = synced(tiny_base, SOME)
    states = fused.of(sampler.model).state
    shake(policy)
    sampler.sync(policy)
    now = fused.of(sampler.model).state
    assert all(a is b for a, b in zip(states, now, strict=True))
    arrays = [np.array(state[name], copy=False) for state in now for name in ("a", "b") if name in state]
    starts = [array.ctypes.data for array in arrays]
    assert all(array.flags.c_contiguous for array in arrays)
    assert {(start - min(starts)) % handover.ALIGNED for start in starts} == {0}


def other_layer(policy: Any, sampler: samplers.MLXSampler) -> Any:
    fresh = nn.Linear(2, 2, bias=False)
    fresh.weight = mx.array(sampler.model.model.layers[1].mlp.up_proj.linear.weight)
    sampler.model.model.layers[1].mlp.up_proj.linear = fresh
    return policy


def by_hand(policy: Any, sampler: samplers.MLXSampler) -> Any:
    sync.sync_adapter(sampler.model, sync.adapter_tensors(policy))
    assert follows(sampler, policy)
    return policy


def new_parameters(policy: Any, sampler: samplers.MLXSampler) -> Any:
    layer = policy.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight = torch.nn.Parameter(layer.lora_A["default"].weight.detach() + 1)
    return policy


def other_type(policy: Any, sampler: samplers.MLXSampler) -> Any:
    for name, parameter in policy.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.double()
    return policy


CHANGES: dict[str, Callable[[Any, samplers.MLXSampler], Any]] = {
    "a layer of the sampler": other_layer,
    "a sync past the plan": by_hand,
    "new parameters": new_parameters,
    "another type": other_type,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_planned_anew(change: str, tiny_base: models.Base) -> None:
    policy, sampler = synced(tiny_base)
    old = plan_of(sampler)
    CHANGES[change](policy, sampler)
    for _ in range(2):
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if ".lora_" in name:
                    parameter.mul_(1.1)
        sampler.sync(policy)
        if change != "another type":  # which transformers would not multiply
            assert follows(sampler, policy)
    sampler.sync(policy)
    assert plan_of(sampler) is not None
    assert plan_of(sampler) is not old


def test_another_policy_is_not_taken_for_the_first(tiny_base: models.Base) -> None:
    policy, sampler = synced(tiny_base)
    other = policy_of(tiny_base, ALL)
    shake(other)
    sampler.sync(other)
    assert follows(sampler, other)
    assert not follows(sampler, policy)


def test_what_the_plan_does_not_cover_goes_tensor_by_tensor(tiny_base: models.Base) -> None:
    """Trap: something is trained, and the sampler never hears of it."""
    policy, sampler = synced(tiny_base)
    weight = policy.base_model.model.model.norm.weight
    weight.requires_grad_(True)
    shake(policy, 0.05)
    weight.data.fill_(1.0)
    report = sampler.sync(policy)
    assert plan_of(sampler) is None
    assert report.tensors == len([n for n, _ in policy.named_parameters() if ".lora_" in n])
    weight.requires_grad_(False)
    shake(policy, 0.05)
    sampler.sync(policy)
    assert plan_of(sampler) is not None
    assert follows(sampler, policy)


def test_an_adapter_that_is_not_the_sampler_s_is_an_error(tiny_base: models.Base) -> None:
    _, sampler = synced(tiny_base, SOME)
    before = bits_of(sampler)
    with pytest.raises(sync.SyncError, match="unknown"):
        sampler.sync(policy_of(tiny_base, ALL))
    with pytest.raises(sync.SyncError, match="missing"):
        sampler.sync(policy_of(tiny_base, config.Lora(rank=3, alpha=7.0, targets=("q_proj",))))
    assert bits_of(sampler) == before


@pytest.mark.parametrize(("kind", "value"), [("lora_A", np.nan), ("lora_B", np.inf), ("lora_B", 6e4)])
def test_values_that_are_not_finite_are_named_and_change_nothing(
    kind: str, value: float, tiny_base: models.Base, tmp_path: Path
) -> None:
    """60,000 fits float16, and not times a scale of 2."""
    policy = policy_of(tiny_base, config.Lora(rank=4, alpha=8.0))
    sampler = samplers.build(tiny_base.path, precision="full", dtype="float16", eos_ids=[1], context=None)
    for _ in range(2):
        sampler.sync(policy)
    before = bits_of(sampler)
    layer = policy.base_model.model.model.layers[1].mlp.up_proj
    held = getattr(layer, kind)["default"].weight
    good = held.detach().clone()
    with torch.no_grad():
        held[-1, 0] = value
    where = rf"layers.1.mlp.up_proj.{kind.lower()}: .* not finite in the sampler's float16"
    with pytest.raises(sync.SyncError, match=where):
        sampler.sync(policy)
    assert bits_of(sampler) == before
    held.data.copy_(good)
    shake(policy)
    sampler.sync(policy)
    assert bits_of(sampler) != before


def test_the_layers_own_matrices_say_that_they_are_not_read(tiny_base: models.Base) -> None:
    _, sampler = synced(tiny_base)
    layer = sampler.model.model.layers[0].mlp.down_proj
    assert np.isnan(np.array(layer.lora_a)).all()
    assert np.isnan(np.array(layer.lora_b)).all()


def test_a_policy_that_is_gone_is_not_kept(tiny_base: models.Base) -> None:
    policy, sampler = synced(tiny_base)
    plan = plan_of(sampler)
    del policy
    gc.collect()
    assert plan.policy() is None
    assert not plan.tensors
    policy = policy_of(tiny_base, ALL)
    shake(policy)
    sampler.sync(policy)
    assert follows(sampler, policy)
