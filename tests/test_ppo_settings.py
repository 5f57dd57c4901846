"""PPO's settings: what a config may say, and that reading them imports nothing heavy."""

import dataclasses
from pathlib import Path

import pytest
from config_helper import GRPO, error_of, write

from rl import config, trl_fields
from rl.algorithms.ppo_settings import PPOConfig
from rl.config.reading import conforms

TEXT = GRPO.replace('"grpo"', '"ppo"').replace("num_generations = 8\n", "")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.gamma=1.5"], "[trainer] gamma: found 1.5, valid: ≥ 0 and ≤ 1"),
        (["trainer.lam=-0.5"], "[trainer] lam: found -0.5, valid: ≥ 0"),
        (["trainer.cliprange=0"], "[trainer] cliprange: found 0, valid: > 0 and < 1"),
        (["trainer.kl_estimator=k2"], "[trainer] kl_estimator: found 'k2', valid: k1, k3"),
        (["trainer.value_model=none"], "[trainer] value_model: found 'none', valid: separate, shared"),
        (["trainer.num_mini_batches=8"], "[data] train_size: found 100, valid: ≥ 128, the prompts of one rollout"),
        (["trainer.max_steps=20", "trainer.save_steps=6"], "[trainer] save_steps: found 6, valid: a multiple of the 4"),
        (["trainer.num_generations=8"], "it is an argument of algorithm 'grpo', this is 'ppo'"),
        (["trainer.seed=1"], "[trainer] seed: it belongs in [run] seed"),
        (["trainer.temperature=0.7"], "it belongs in [rollout] temperature"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(tmp_path: Path, overrides: list[str], said: str) -> None:
    assert said in error_of(tmp_path, TEXT, *overrides)


def test_dropout_of_an_adapter_is_refused_since_none_is_applied(tmp_path: Path) -> None:
    text = TEXT.replace("[data]", "[model.lora]\nrank = 4\ndropout = 0.1\n[data]")
    assert "[model.lora] dropout: found 0.1 with algorithm 'ppo', valid there: 0" in error_of(tmp_path, text)


def test_ppo_needs_a_reward(tmp_path: Path) -> None:
    text = TEXT.replace('[[reward]]\nname = "exact"\nextract = "plain"\n', "")
    assert "'ppo' needs a reward" in error_of(tmp_path, text)
    assert config.load(write(tmp_path, TEXT)).trainer.algorithm == "ppo"


def test_arguments_read_from_the_source_are_the_real_dataclass() -> None:
    """They are read with `ast`, like TRL's, so that checking a config imports no torch."""
    found, real = trl_fields.arguments("ppo"), {f.name: f for f in dataclasses.fields(PPOConfig)}
    assert found.keys() == real.keys()
    for name, field in real.items():
        if field.default is not dataclasses.MISSING and name != "optim":  # which depends on the installed torch
            assert found[name].default == field.default, name
            assert found[name].type is None or field.default is None or conforms(field.default, found[name].type), name
    assert (found["learning_rate"].default, found["adam_epsilon"].default) == (3e-6, 1e-5)
