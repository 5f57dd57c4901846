"""Reading a config: values, one-line errors, overrides, the configs it builds on, and the round trip."""

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl import config as rl_config
from rl.config import Config, Lora, Rollout, TinyModel, builds_on, describe, load, resolved
from rl.config_checks import generation_period, rollout_size
from rl.config_text import to_toml
from rl.errors import UserError

REPOSITORY = Path(__file__).parent.parent
GRPO = """
[run]
name = "g"
[model]
base = "tiny"
[data]
source = "arithmetic"
form = "char"
train_size = 100
[[reward]]
name = "exact"
extract = "plain"
[trainer]
algorithm = "grpo"
max_steps = 10
per_device_train_batch_size = 16
num_generations = 8
"""


def write(folder: Path, text: str = GRPO, name: str = "x.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def error_of(folder: Path, text: str = GRPO, *overrides: str) -> str:
    """The error's line, with the folder taken out."""
    with pytest.raises(UserError) as caught:
        load(write(folder, text), overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{folder}/", "")


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


BAD_FILES = {
    "unknown table": (GRPO + "\n[rollouts]\n", "x.toml: unknown table 'rollouts', did you mean 'rollout'?"),
    "unknown key": (
        GRPO + "num_generation = 4\n",
        "x.toml: [trainer] unknown key 'num_generation', did you mean 'num_generations'?",
    ),
    "unknown key, none near": (
        GRPO.replace("[data]", "[data]\nzzz = 1"),
        "x.toml: [data] unknown key 'zzz', valid: form, from, heldout_path, heldout_split, max_a, max_b, name, "
        "operation, path, seed, shots, source, split, system, task, train_size",
    ),
    "key of another table": (
        GRPO.replace("[run]", "[run]\ntemperature = 1.0"),
        "x.toml: [run] unknown key 'temperature', it belongs in [rollout]",
    ),
    "trainer key elsewhere": (
        GRPO.replace("[run]", "[run]\nlearning_rate = 1.0"),
        "x.toml: [run] unknown key 'learning_rate', it belongs in [trainer]",
    ),
    "argument of another algorithm": (
        GRPO + "packing = true\n",
        "x.toml: [trainer] unknown key 'packing', it is an argument of algorithm 'sft', this is 'grpo'",
    ),
    "key of a table in a list": (
        GRPO.replace("[[reward]]", "[[data.task]]\nname = 'gcd'\nsource = 'hub'\n[[reward]]"),
        "x.toml: [[data.task]] 0 unknown key 'source', it belongs in [data]",
    ),
    "no data": (GRPO.split("[data]")[0], "x.toml: missing table [data]"),
    "missing key": (GRPO.replace('name = "g"', ""), "x.toml: [run] missing key 'name', valid: str"),
    "missing algorithm": (
        GRPO.replace('algorithm = "grpo"', ""),
        "x.toml: [trainer] missing key 'algorithm', valid: sft, grpo",
    ),
    "table is a value": (
        "run = 3\n" + GRPO.replace("[run]", "[eval]").replace('name = "g"', ""),
        "x.toml: [run]: found 3",
    ),
    "list of tables as a table": (
        GRPO.replace("[[reward]]", "[reward]"),
        "x.toml: [reward]: found {'name': 'exact', 'extract': 'plain'}, valid: tables written as [[reward]]",
    ),
    "malformed": (
        GRPO.replace('name = "g"', "name = g"),
        "x.toml: not valid TOML: Invalid value (at line 3, column 8)",
    ),
    "no device of that name": (
        GRPO.replace("[run]", '[run]\ndevice = "gpu"'),
        "x.toml: [run] device: found 'gpu', valid: auto, mps, cuda, cpu, did you mean 'cpu'?",
    ),
    "no base": (
        GRPO.replace('base = "tiny"', ""),
        "x.toml: [model] base, from: neither is set, valid: exactly one of the two",
    ),
    "no reward for grpo": (
        re.sub(r"\[\[reward]].*?\[trainer]", "[trainer]", GRPO, flags=re.DOTALL),
        "x.toml: [trainer] algorithm: 'grpo' needs a reward, found none: add [[reward]] with a name",
    ),
    "date in a free option": (
        GRPO.replace('extract = "plain"', "when = 1979-05-27"),
        "x.toml: [[reward]] 0 when: found 1979-05-27 (date), valid: a string, finite number, boolean or table",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_line(tmp_path: Path, case: str) -> None:
    text, line = BAD_FILES[case]
    assert error_of(tmp_path, text).startswith(line)


# value given to --set -> the error after "--set: "
BAD_VALUES = {
    # no silent coercion: TOML's true is no 1, 2.0 is no 2, "1" is no 1
    "run.seed=true": "[run] seed: found true (boolean), valid: int",
    "run.seed=2.0": "[run] seed: found 2.0 (float), valid: int",
    'run.seed="1"': "[run] seed: found '1' (str), valid: int (write 1 without quotes)",
    "run.seed=-1": "[run] seed: found -1, valid: int ≥ 0 and ≤ 4294967295",
    "run.name=7": "[run] name: found 7 (int), valid: str (quote it)",
    "run.name=../x": "[run] name: found '../x', valid: up to 100 letters",
    "trainer.bf16=1": "[trainer] bf16: found 1 (int), valid: true or false",
    "trainer.bf16=True": "[trainer] bf16: found 'True' (str), valid: true or false (write true without quotes)",
    "trainer.learning_rate=true": "[trainer] learning_rate: found true (boolean), valid: float",
    "trainer.learning_rate=nan": "[trainer] learning_rate: found nan (float), valid: a string, finite number",
    "trainer.learning_rate=-1e-4": "[trainer] learning_rate: found -0.0001, valid: ≥ 0",
    "trainer.max_steps=1.5": "[trainer] max_steps: found 1.5 (float), valid: int",
    "trainer.max_steps=0": "[trainer] max_steps: found 0, valid: ≥ 1, or -1 for num_train_epochs",
    "trainer.report_to=3": "[trainer] report_to: found 3 (int), valid: str or list of str (quote it)",
    "trainer.lr_scheduler_type=cosin": "[trainer] lr_scheduler_type: found 'cosin', did you mean 'cosine'?",
    "trainer.loss_type=dap": "[trainer] loss_type: found 'dap', valid: grpo, bnpo, dr_grpo, dapo, luspo",
    "trainer.parallelism_config=1": "[trainer] parallelism_config: refused: it takes a Python object",
    "rollout.temperature=0": "[rollout] temperature: found 0.0, valid: float > 0",
    "rollout.temperature=inf": "[rollout] temperature: found inf (float), valid: float, finite",
    "rollout.top_p=0": "[rollout] top_p: found 0.0, valid: float > 0 and ≤ 1",
    "rollout.top_p=1.1": "[rollout] top_p: found 1.1, valid: float > 0 and ≤ 1",
    "rollout.top_k=-1": "[rollout] top_k: found -1, valid: int ≥ 0",
    "rollout.min_p=1.5": "[rollout] min_p: found 1.5, valid: float ≥ 0 and ≤ 1",
    "rollout.max_completion_length=0": "[rollout] max_completion_length: found 0, valid: int ≥ 1",
    "rollout.correction_cap=0.5": "[rollout] correction_cap: found 0.5, valid: float ≥ 1",
    "rollout.dtype=int8": "[rollout] dtype: found 'int8', valid: float32, float16, bfloat16",
    "rollout.engine=vllm": "[rollout] engine: found 'vllm', valid: mlx, torch",
    "rollout.stop=x": "[rollout] stop: found 'x' (str), valid: list of str",
    "rollout.stop=[1]": "[rollout] stop: found [1] (list), valid: list of str",
    'rollout.stop=[""]': "[rollout] stop: found an empty text",
    "rollout.precision=shared": "[rollout] precision: found 'shared' without [model.lora], valid: full",
    "rollout.precision=copy": "[rollout] precision: found 'copy', valid: shared, full",
    "model.lora.rank=0": "[model.lora] rank: found 0, valid: int ≥ 1",
    "model.lora.dropout=1.0": "[model.lora] dropout: found 1.0, valid: float ≥ 0 and < 1",
    "model.lora.targets=[]": "[model.lora] targets: found an empty list",
    "model.lora=8": "[model] lora: found 8 (int), valid: a table",
    "model.quantization.bits=4": "[model] quantization: a quantized base cannot be trained itself: add [model.lora]",
    "model.quantization.bits=3": "[model.quantization] bits: found 3 (int), valid: 4, 8",
    "model.tiny.heads=3": "[model.tiny] heads: found 3 heads for hidden 128, valid: a divisor of hidden",
    "model.tiny.alphabet=012": "[model.tiny] alphabet: found '012', without 3 4 5 6 7 8 9 + =",
    "model.tiny.alphabet=00": "[model.tiny] alphabet: found '00', valid: at least one character, each once",
    "data.form=plain": "[data] form: found 'plain', valid: char",
    "data.shots=2": "[data] shots: found 2 with form = 'char', valid: 0 there",
    "data.path=x.jsonl": "[data] path: only for source = 'jsonl', found source = 'arithmetic'",
    "data.train_size=0": "[data] train_size: found 0, valid: int ≥ 1",
    "data.train_size=1": "[data] train_size: found 1, valid: ≥ 2, the prompts of one rollout",
    "eval.size=0": "[eval] size: found 0, valid: int ≥ 1",
    "reward.0.weight=0": "[[reward]] 0 weight: found 0 for every [[reward]], valid: one other than 0",
    "reward.0.model=3": "[[reward]] 0 model: found 3, valid: the path of a config",
    "reward.0.model=no.toml": "[[reward]] 0 model: no such file: ",
    "model.reference=no.toml": "[model] reference: no such file: ",
    "data.from=no.toml": "[data] from: no such file: ",
    "trainer.num_generations=1": "[trainer] num_generations: found 1, valid: ≥ 2",
    "trainer.num_generations=5": (
        "[trainer] num_generations: per_device_train_batch_size 16 × gradient_accumulation_steps 1 = 16 completions, "
        "not divisible by 5; valid here: 4 or 8"
    ),
    "trainer.generation_batch_size=20": (
        "[trainer] generation_batch_size: found 20, valid: a multiple of per_device_train_batch_size (16), "
        "nearest 16 or 32"
    ),
    "trainer.save_strategy=best": "[trainer] save_strategy: found 'best', valid: steps, epoch, no",
    "trainer.save_steps=0.5": "[trainer] save_steps: found 0.5, valid: a whole number of steps, ≥ 1",
    "trainer.save_steps=2.5": "[trainer] save_steps: found 2.5, valid: a whole number ≥ 1, or a share below 1",
    "trainer.remove_unused_columns=true": "[trainer] remove_unused_columns: found true, valid: false",
}


@pytest.mark.parametrize("override", BAD_VALUES)
def test_a_bad_value_is_one_line_with_table_key_found_and_valid(tmp_path: Path, override: str) -> None:
    assert error_of(tmp_path, GRPO, override).startswith(f"--set: {BAD_VALUES[override]}")


# a setting has one home: in [trainer] it is refused with the place to put it
HOMES = {
    "seed": "[run] seed",
    "data_seed": "[run] seed",
    "temperature": "[rollout] temperature",
    "top_p": "[rollout] top_p",
    "top_k": "[rollout] top_k",
    "min_p": "[rollout] min_p",
    "max_completion_length": "[rollout] max_completion_length",
    "vllm_importance_sampling_correction": "[rollout] correction",
    "vllm_importance_sampling_mode": "[rollout] correction",
    "vllm_importance_sampling_clip_max": "[rollout] correction_cap",
    "vllm_importance_sampling_cap": "[rollout] correction_cap",
    "use_vllm": "[rollout] engine",
    "vllm_mode": "[rollout] engine",
    "generation_kwargs": "[rollout]",
    "use_transformers_continuous_batching": "[rollout] engine",
    "output_dir": "[run] name",
    "logging_dir": "[run] name",
    "run_name": "[run] name",
    "resume_from_checkpoint": "--resume",
    "reward_weights": "[[reward]] weight",
    "use_cpu": "[run] device",
    "no_cuda": "[run] device",
    "use_mps_device": "[run] device",
    "load_best_model_at_end": "refused: ",
    "push_to_hub": "refused: ",
    "hub_model_id": "refused: ",
    "hub_token": "refused: ",
    "quantization_config": "[model.quantization] is MLX's",
    "load_in_8bit": "[model.quantization] is MLX's",
    "save_only_model": "--resume",
    "ignore_data_skip": "--resume",
    "auto_find_batch_size": "refused: ",
}


@pytest.mark.parametrize("name", HOMES)
def test_a_setting_with_another_home_is_refused_in_trainer(tmp_path: Path, name: str) -> None:
    line = error_of(tmp_path, GRPO + f"{name} = 1\n")
    assert line.startswith(f"x.toml: [trainer] {name}: ")
    assert HOMES[name] in line


def test_sources_need_their_keys_and_refuse_those_of_others(tmp_path: Path) -> None:
    text = GRPO.replace('"tiny"', '"smollm2-135m-instruct"').replace('form = "char"', "")
    assert "[data] path: missing, source = 'jsonl'" in error_of(tmp_path, text, "data.source=jsonl")
    assert "[data] name: missing, source = 'hub'" in error_of(tmp_path, text, "data.source=hub")
    assert "[data] task: missing, source = 'reasoning-gym'" in error_of(tmp_path, text, "data.source=reasoning-gym")
    assert "[data] max_a: only for source = 'arithmetic', found source = 'hub'" in error_of(
        tmp_path, text, "data.source=hub", "data.name=a/b", "data.max_a=3"
    )
    # a default that is written out changes nothing
    assert load(write(tmp_path, text), ["data.source=hub", "data.name=a/b", "data.max_a=50"]).data.name == "a/b"


def test_shared_quantized_base_in_bfloat16_is_refused_for_its_0_40_logprob_gap(tmp_path: Path) -> None:
    lora = ("model.lora.rank=8", "model.quantization.bits=4")
    line = error_of(tmp_path, GRPO, *lora, "rollout.dtype=bfloat16")
    assert (
        line == "--set: [rollout] dtype: found 'bfloat16' for a quantized base that is shared, valid: float32, float16"
    )
    assert load(write(tmp_path), [*lora, "rollout.dtype=float16"]).rollout.dtype == "float16"


def test_vespo_with_sequence_correction_is_refused_as_trl_would_if_the_seam_did_not_skip_it(tmp_path: Path) -> None:
    line = error_of(tmp_path, GRPO, "trainer.loss_type=vespo", "rollout.correction=sequence_mask")
    assert "valid: none, token_truncate, token_mask" in line


def test_save_steps_off_a_rollout_boundary_loses_trls_buffer_and_is_refused_with_the_nearest(tmp_path: Path) -> None:
    line = error_of(
        tmp_path, GRPO, "trainer.num_iterations=2", "trainer.steps_per_generation=2", "trainer.save_steps=6"
    )
    assert line == "--set: [trainer] save_steps: found 6, valid: a multiple of the 4 steps per rollout, nearest 4 or 8"
    three = ("trainer.num_iterations=3", "trainer.max_steps=1000")
    assert "save_steps: found 500 (TRL's default), valid: a multiple of the 3" in error_of(tmp_path, GRPO, *three)
    assert load(write(tmp_path), ["trainer.num_iterations=3"]).trainer.args["max_steps"] == 10  # never saves by default
    line = error_of(tmp_path, GRPO, "trainer.gradient_accumulation_steps=3", "trainer.steps_per_generation=2")
    assert "one must divide the other" in line


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))
def test_generation_period_matches_a_count_of_micro_steps(spg: int, accumulation: int, iterations: int) -> None:
    """Walks TRL's loop: a new rollout each steps_per_generation × num_iterations micro-steps, as `_prepare_inputs`."""
    period = spg * iterations
    if period % accumulation and accumulation % period:
        return  # refused
    args = {"steps_per_generation": spg, "gradient_accumulation_steps": accumulation, "num_iterations": iterations}
    clean = [step for step in range(1, 50) if (step * accumulation) % period == 0]
    assert clean[0] == generation_period(args)
    assert all(step % clean[0] == 0 for step in clean)


def test_errors_of_combinations_say_that_set_took_part(tmp_path: Path) -> None:
    assert error_of(tmp_path, GRPO, "trainer.per_device_train_batch_size=4").startswith(
        "x.toml with --set: [trainer] num_generations: per_device_train_batch_size 4 × "
    )


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, name="grpo.toml")
    with pytest.raises(UserError, match=r"grop\.toml: no such file; did you mean 'grpo\.toml'\?"):
        load(tmp_path / "grop.toml")
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "no" / "grpo.toml")
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'[run]\nname = "\xe9"\n')
    with pytest.raises(UserError, match="not UTF-8 text: byte 14 is 0xe9"):
        load(tmp_path / "latin.toml")


def test_set_parses_toml_falls_back_to_a_string_and_wins_over_the_file(tmp_path: Path) -> None:
    overrides = [
        "run.seed=7",
        "run.name=other",
        "trainer.learning_rate=1e-4",
        "trainer.max_steps = 20",
        "trainer.lr_scheduler_kwargs.num_cycles=2",
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


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seed", "--set: 'seed' is not table.key=value"),
        ("run=3", "--set: 'run=3' is not table.key=value"),
        ("runs.seed=3", "--set: unknown table 'runs', did you mean 'run'?"),
        ("run.sede=3", "--set: [run] unknown key 'sede', did you mean 'seed'?"),
        ("run.name.x=3", "--set: 'run.name.x=3': run.name is a value, not a table"),
        ("reward.1.weight=3", "--set: 'reward.1.weight=3': no item '1' in reward, valid: reward.0"),
        ("data.task.0.name=x", "--set: 'data.task.0.name=x': no item '0' in data.task, valid: none, it is empty"),
    ],
)
def test_a_bad_set_is_one_line(tmp_path: Path, override: str, line: str) -> None:
    assert error_of(tmp_path, GRPO, override).startswith(line)


SFT = GRPO.split("[[reward]]")[0] + '[trainer]\nalgorithm = "sft"\nmax_steps = 5\n'


def test_configs_that_build_on_others_are_found_beside_the_file_not_the_working_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, SFT, "sft.toml")
    path = write(tmp_path / "sub", GRPO.replace('base = "tiny"', 'from = "../sft.toml"\nreference = "../sft.toml"'))
    config = load(path, ["reward.0.model=../sft.toml", "data.from=../sft.toml"])
    expected = {"model.from", "model.reference", "data.from", "reward.0.model"}
    assert builds_on(config).keys() == expected
    assert {other.resolve() for other in builds_on(config).values()} == {(tmp_path / "sft.toml").resolve()}


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


# -- round trip ---------------------------------------------------------------------------------------------------

text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
word = st.text("abcdefghij_", min_size=1, max_size=6).filter(lambda name: name not in ("model", "name", "weight"))
number = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
leaf = text | number | st.booleans()
free = st.dictionaries(
    word,
    st.recursive(leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(word, inner, max_size=3)),
    max_size=3,
)


def some(**optional: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=optional)


share = st.floats(0.01, 1.0)
lora = some(
    rank=st.integers(1, 64),
    alpha=st.floats(0.5, 64),
    dropout=st.floats(0, 0.9),
    layers=st.integers(1, 30),
    targets=st.lists(word, min_size=1, max_size=3),
)
rollout = some(
    engine=st.sampled_from(["mlx", "torch"]),
    dtype=st.sampled_from(["float32", "float16"]),
    temperature=st.floats(0.1, 2) | st.integers(1, 2),
    top_p=share,
    top_k=st.integers(0, 50),
    min_p=st.floats(0, 1),
    max_completion_length=st.integers(1, 512),
    stop=st.lists(text.filter(bool), max_size=2),
    correction=st.sampled_from(["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]),
    correction_cap=st.floats(1, 10),
    max_batch=st.integers(1, 999),
)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Tables of a valid config."""
    model: dict[str, Any] = {"base": draw(st.sampled_from(["smollm2-135m-instruct", "org/name", "models/x.gguf"]))}
    if draw(st.booleans()):
        model["lora"] = draw(lora)
        if draw(st.booleans()):
            sizes = st.sampled_from([32, 64, 128])
            model["quantization"] = {"bits": draw(st.sampled_from([4, 8]))} | draw(some(group_size=sizes))
    source = draw(st.sampled_from(["arithmetic", "reasoning-gym", "jsonl", "hub"]))
    own: dict[str, st.SearchStrategy[Any]] = {
        "arithmetic": some(operation=st.sampled_from(list("+-*")), max_a=st.integers(0, 99), shots=st.integers(0, 5)),
        "reasoning-gym": st.fixed_dictionaries(
            {
                "task": st.lists(
                    st.fixed_dictionaries({"name": word}, optional={"weight": share, "options": free}), min_size=1
                )
            }
        ),
        "jsonl": st.fixed_dictionaries({"path": text}, optional={"heldout_path": text}),
        "hub": st.fixed_dictionaries({"name": text}, optional={"split": text, "heldout_split": text}),
    }
    rewards = [
        {"name": draw(text.filter(str.strip)), "weight": 0.5} | draw(free) for _ in range(draw(st.integers(1, 3)))
    ]
    algorithm, group, prompts = draw(st.sampled_from(["sft", "grpo"])), draw(st.integers(2, 8)), draw(st.integers(1, 8))
    args: dict[str, Any] = {"per_device_train_batch_size": group * prompts, "learning_rate": draw(st.floats(0, 1))}
    if algorithm == "grpo":
        args |= {"num_generations": group, "loss_type": draw(st.sampled_from(["dapo", "grpo"]))}
    return {
        "run": {"name": draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True))}
        | draw(some(seed=st.integers(0, 2**32 - 1), device=st.sampled_from(["auto", "mps", "cuda", "cpu"]))),
        "model": model,
        "data": {"source": source, "train_size": draw(st.integers(8, 10**6))} | draw(own[source]),
        "rollout": draw(rollout),
        "reward": rewards,
        "trainer": {"algorithm": algorithm} | args,
        "eval": draw(some(size=st.integers(1, 999), metric=st.sampled_from(["strict", "lenient"]))),
    }


def emit(value: Any) -> str:
    """Inline TOML, written apart from `rl.config_text`: every character beyond ASCII letters escaped."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + "".join(c if c.isascii() and c.isalnum() else f"\\U{ord(c):08x}" for c in value) + '"'
    if isinstance(value, list):
        return "[" + ",".join(map(emit, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{emit(name)}={emit(item)}" for name, item in value.items()) + "}"
    return repr(value)


@settings(max_examples=60, deadline=None)
@given(configs())
def test_resolved_round_trips_through_toml_and_json(tables: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), "".join(f"{name}={emit(table)}\n" for name, table in tables.items()))
        first = load(path)
        full = resolved(first)
        assert json.loads(json.dumps(full, allow_nan=False)) == full
        assert load(write(Path(folder), "".join(f"{n}={emit(t)}\n" for n, t in full.items()))) == first
        assert load(write(Path(folder), to_toml(full))) == first  # what `check` prints is a config
        for table, given_keys in tables.items():
            if isinstance(given_keys, dict):
                assert given_keys.keys() <= full[table].keys()
        assert resolved(replace(first, path=Path("elsewhere"))) == full  # no machine's path in the record


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(2, 9),
    st.none() | st.integers(1, 5),
    st.none() | st.integers(1, 40),
    st.integers(1, 4),
)
def test_batches_are_accepted_exactly_where_trls_own_config_accepts_them(
    batch: int, group: int, steps: int | None, generation_batch: int | None, accumulation: int
) -> None:
    """Leans on what `GRPOConfig.__post_init__` of TRL 1.16 says of generation_batch_size and num_generations."""
    from trl import GRPOConfig

    args = {"per_device_train_batch_size": batch, "num_generations": group, "gradient_accumulation_steps": accumulation}
    args |= {} if steps is None else {"steps_per_generation": steps}
    args |= {} if generation_batch is None else {"generation_batch_size": generation_batch}
    try:
        reference = GRPOConfig(output_dir="unused", use_cpu=True, bf16=False, **args)  # type: ignore[arg-type]
    except ValueError:
        reference = None
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"trainer.{name}={value}" for name, value in args.items()]
        try:
            config: Config | None = load(write(Path(folder)), overrides)
        except UserError as error:
            if "one must divide the other" in str(error):
                return  # stricter than TRL, for exact resume
            config = None
    assert (config is None) == (reference is None)
    if config is not None and reference is not None:
        assert rollout_size(config.trainer.args) == reference.generation_batch_size


def test_the_reference_of_keys_in_configs_readme_is_the_one_in_the_code() -> None:
    readme = (REPOSITORY / "configs" / "README.md").read_text()
    assert describe() in readme, "run `python -m rl check --keys` and put its output into configs/README.md"


def test_every_key_says_what_it_means() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", describe(), flags=re.MULTILINE)
    assert len(rows) == 53
    assert all(len(meaning) >= 5 for _, meaning in rows)
    assert not hasattr(rl_config, "torch")
