"""Reading a config: values, defaults, overrides, the configs it builds on, and the reference of its keys."""

import re
from pathlib import Path

import pytest
from config_helper import GRPO, error_of, write

from rl.config import Lora, Rollout, TinyModel, builds_on, describe, load
from rl.errors import UserError

REPOSITORY = Path(__file__).parent.parent


def test_defaults_are_the_documented_ones(tmp_path: Path) -> None:
    config = load(write(tmp_path))
    assert (config.run.name, config.run.seed, config.run.device) == ("g", 0, "auto")
    assert config.model.tiny == TinyModel(hidden=128, layers=4, heads=4, intermediate=384, alphabet="0123456789+-*= ")
    assert config.rollout == Rollout(
        engine="mlx",
        precision="full",
        dtype=None,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        max_completion_length=64,
        stop=(),
        correction="token_truncate",
        correction_cap=2.0,
        max_batch=256,
        max_batch_tokens=65536,
    )
    assert (config.data.max_a, config.data.max_b, config.data.operation, config.data.shots) == (50, 9, "+", 0)
    assert (config.data.split, config.data.heldout_split) == ("train", "test")
    assert (config.eval.size, config.eval.metric) == (256, "strict")
    assert config.rewards[0].weight == 1.0
    assert config.rewards[0].options == {"extract": "plain"}
    assert config.trainer.args == {"max_steps": 10, "per_device_train_batch_size": 16, "num_generations": 8}


@pytest.mark.parametrize(
    ("overrides", "precision"),
    [
        ((), "full"),
        (("model.lora.rank=8",), "full"),
        (("model.lora.rank=8", "model.quantization.bits=4"), "shared"),
        (("model.lora.rank=8", "model.quantization.bits=4", "rollout.precision=full"), "full"),
        (("model.lora.rank=8", "rollout.precision=shared"), "shared"),
    ],
)
def test_precision_is_shared_for_a_quantized_lora_run_and_full_otherwise(
    tmp_path: Path, overrides: tuple[str, ...], precision: str
) -> None:
    assert load(write(tmp_path), overrides).rollout.precision == precision


def test_set_parses_toml_falls_back_to_a_string_and_wins_over_the_file(tmp_path: Path) -> None:
    overrides = [
        "run.seed=7",
        "run.name=other",
        "trainer.learning_rate=1e-4",
        "trainer.max_steps = 20",
        "trainer.lr_scheduler_kwargs.num_cycles=2",
        "reward.0.name=colorsys:rgb_to_hsv",
        "reward.0.weight=0.5",
        "reward.0.pattern=^a=b$",
        'rollout.stop=["\\n", "x"]',
        "model.lora.targets=['q_proj']",
        "eval.metric=lenient",
    ]
    config = load(write(tmp_path), overrides)
    assert (config.run.seed, config.run.name) == (7, "other")
    assert config.trainer.args["learning_rate"] == 1e-4
    assert config.trainer.args["max_steps"] == 20
    assert config.trainer.args["lr_scheduler_kwargs"] == {"num_cycles": 2}
    assert config.rewards[0].weight == 0.5
    assert config.rewards[0].options == {"extract": "plain", "pattern": "^a=b$"}
    assert config.rollout.stop == ("\n", "x")
    assert config.model.lora == Lora(targets=("q_proj",))
    assert config.eval.metric == "lenient"
    assert (tmp_path / "x.toml").read_text() == GRPO


SFT = GRPO.split("[[reward]]")[0] + '[trainer]\nalgorithm = "sft"\nmax_steps = 5\n'


def test_configs_that_build_on_others_are_found_beside_the_file_not_the_working_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, SFT, "sft.toml")
    config = load(write(tmp_path / "sub", GRPO.replace('base = "tiny"', 'from = "../sft.toml"')))
    assert {role: other.resolve() for role, other in builds_on(config).items()} == {
        "model.from": (tmp_path / "sft.toml").resolve()
    }
    assert builds_on(load(tmp_path / "sft.toml")) == {}


def test_the_config_named_by_from_must_exist(tmp_path: Path) -> None:
    line = error_of(tmp_path, GRPO.replace('base = "tiny"', 'from = "no.toml"'))
    assert line == "x.toml: [model] from: no such file: 'no.toml' (paths are relative to the config's folder)"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.reference=sft.toml", "[model] reference: found 'sft.toml' with [trainer] beta = 0, valid: beta > 0"),
        ("data.from=sft.toml", "[data] from: found 'sft.toml' for algorithm 'grpo', valid for dpo, kto, "),
    ],
)
def test_a_run_that_cannot_be_built_on_is_refused_at_once_though_its_config_is_there(
    tmp_path: Path, override: str, said: str
) -> None:
    """Trap: found only by the trainer, minutes later, or never, and then the key did nothing."""
    write(tmp_path, SFT, "sft.toml")
    assert error_of(tmp_path, GRPO, override).startswith(f"--set: {said}")


def test_a_circle_of_configs_is_refused_with_its_chain(tmp_path: Path) -> None:
    write(tmp_path, SFT.replace('base = "tiny"', 'from = "b.toml"'), "a.toml")
    write(tmp_path, SFT.replace('base = "tiny"', 'from = "c.toml"'), "b.toml")
    write(tmp_path, SFT.replace('base = "tiny"', 'from = "b.toml"'), "c.toml")
    with pytest.raises(
        UserError, match=r"c\.toml: \[model\] from: configs build on each other: b\.toml -> c\.toml -> b"
    ):
        load(tmp_path / "a.toml")
    line = error_of(tmp_path, SFT.replace('base = "tiny"', 'from = "x.toml"'))
    assert line == "x.toml: [model] from: configs build on each other: x.toml -> x.toml"


def test_a_bad_config_further_down_is_named_by_its_own_file_and_knows_nothing_of_set(tmp_path: Path) -> None:
    write(tmp_path, SFT + "zzz = 1\n", "sft.toml")
    line = error_of(tmp_path, GRPO.replace('base = "tiny"', 'from = "sft.toml"'), "trainer.max_steps=3")
    assert line.startswith("sft.toml: [trainer] unknown key 'zzz', valid: ")


def test_rewards_beside_sft_are_for_measuring(tmp_path: Path) -> None:
    config = load(write(tmp_path, GRPO.split("[trainer]")[0] + '[trainer]\nalgorithm = "sft"\n'))
    assert config.rewards[0].name == "exact"


def test_the_reference_of_keys_in_configs_readme_is_the_one_in_the_code() -> None:
    readme = (REPOSITORY / "configs" / "README.md").read_text()
    assert describe() in readme, "run `python -m rl check --keys` and put its output into configs/README.md"


def test_every_key_says_what_it_means() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", describe(), flags=re.MULTILINE)
    assert len(rows) == 82
    assert all(len(meaning) >= 5 for _, meaning in rows)
