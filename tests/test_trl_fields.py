"""TRL's arguments as read from its sources, against the real dataclasses of the installed trl and transformers."""

import ast
import dataclasses
import importlib
import inspect
import types
import typing
from pathlib import Path

import pytest

from rl.config.reading import Source, conforms
from rl.errors import UserError
from rl.trl_fields import CLASSES, SOURCES, VALUES, arguments, check, home_of

OWN = list({name: algorithm for algorithm, name in reversed(CLASSES.items())}.values())  # one algorithm a class


def real(algorithm: str) -> dict[str, dataclasses.Field[typing.Any]]:
    package, file = SOURCES[CLASSES[algorithm]]
    module = importlib.import_module(f"{package}.{file.removesuffix('.py').replace('/', '.')}")
    return {f.name: f for f in dataclasses.fields(getattr(module, CLASSES[algorithm]))}


@pytest.mark.parametrize("algorithm", OWN)
def test_names_are_those_of_the_real_dataclass(algorithm: str) -> None:
    assert arguments(algorithm).keys() == real(algorithm).keys()
    assert len(arguments(algorithm)) > 120


@pytest.mark.parametrize("algorithm", OWN)
def test_defaults_are_those_of_the_real_dataclass(algorithm: str) -> None:
    for name, f in real(algorithm).items():
        if name == "optim":  # depends on the installed torch
            assert arguments(algorithm)[name].default is None
        elif f.default is not dataclasses.MISSING:
            assert arguments(algorithm)[name].default == f.default, name


@pytest.mark.parametrize("algorithm", OWN)
def test_types_accept_every_default_and_only_plain_values(algorithm: str) -> None:
    for name, argument in arguments(algorithm).items():
        if argument.type is None:
            assert name == "parallelism_config"
        elif argument.default is not None:
            assert conforms(argument.default, argument.type), name


@pytest.mark.parametrize("algorithm", OWN)
def test_plain_types_are_those_of_the_real_annotations(algorithm: str) -> None:
    plain = {int, float, bool, str}
    seen = 0
    for name, f in real(algorithm).items():
        parts = typing.get_args(f.type) if isinstance(f.type, types.UnionType) else (f.type,)
        kept = {part for part in parts if part is not type(None)}
        mine = arguments(algorithm)[name].type
        if kept <= plain and typing.get_origin(mine) is not typing.Literal:
            assert set(typing.get_args(mine) or (mine,)) == kept, name
            seen += 1
    assert seen > 90


def test_enum_values_are_read_so_that_a_misspelt_scheduler_fails_before_training() -> None:
    from transformers import SchedulerType
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy
    from transformers.training_args import OptimizerNames

    enums = {
        "lr_scheduler_type": SchedulerType,
        "eval_strategy": IntervalStrategy,
        "save_strategy": SaveStrategy,
        "optim": OptimizerNames,
    }
    for name, enum in enums.items():
        assert set(typing.get_args(arguments("grpo")[name].type)) == {member.value for member in enum}


def test_values_trl_checks_in_mid_training_are_those_of_its_source() -> None:
    """Leans on the comparisons in `GRPOTrainer` of TRL 1.16."""
    import trl.trainer.grpo_trainer as module

    expected = {name: set(values) for (algorithm, name), values in VALUES.items() if algorithm == "grpo"}
    compared: dict[str, set[str]] = {name: set() for name in expected}
    for node in ast.walk(ast.parse(Path(inspect.getfile(module)).read_text())):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and node.left.attr in compared:
            constants = (c for part in node.comparators for c in ast.walk(part) if isinstance(c, ast.Constant))
            compared[node.left.attr] |= {str(c.value) for c in constants}
    assert compared == expected


def test_every_bitsandbytes_or_torchao_optimizer_is_refused_and_torchs_own_are_not() -> None:
    from transformers.trainer_optimizer import _BITSANDBYTES_OPTIMIZERS, _TORCHAO_OPTIMIZERS

    source = Source("x.toml")
    for optimizer in [*_BITSANDBYTES_OPTIMIZERS, *_TORCHAO_OPTIMIZERS]:
        with pytest.raises(UserError, match=r"\[trainer\] optim: found .*\[model.quantization\] is MLX's"):
            check("grpo", {"optim": optimizer.value}, source)
    for name in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop"):
        check("grpo", {"optim": name}, source)


@pytest.mark.parametrize("algorithm", OWN)
def test_evaluation_by_the_trainer_is_refused_but_for_the_word_that_it_is_off(algorithm: str) -> None:
    """Trap: TRL has no held-out rows here; it would raise after the base is loaded, or score without our verifier."""
    source = Source("x.toml")
    names = [name for name in arguments(algorithm) if "eval" in name]
    assert len(names) >= 12
    for name in names:
        with pytest.raises(UserError, match=rf"\[trainer\] {name}: refused: the run measures .* by itself: \[eval\]"):
            check(algorithm, {name: "steps"}, source)
    check(algorithm, {"eval_strategy": "no"}, source)


@pytest.mark.parametrize("algorithm", OWN)
def test_no_vllm_or_hub_argument_slips_through_under_a_name_of_its_own(algorithm: str) -> None:
    for name in arguments(algorithm):
        if "vllm" in name or "hub" in name or "continuous_batching" in name:
            assert home_of(name), name
