"""A bad config is one line that names file, table, key, what was found and what is valid."""

import re
from pathlib import Path

import pytest
from config_helper import GRPO, error_of, write

from rl.config import load
from rl.errors import UserError

BAD_FILES = {
    "unknown table": (GRPO + "\n[rollouts]\n", "x.toml: unknown table 'rollouts', did you mean 'rollout'?"),
    "unknown key": (
        GRPO + "num_generation = 4\n",
        "x.toml: [trainer] unknown key 'num_generation', did you mean 'num_generations'?",
    ),
    "unknown key, none near": (
        GRPO.replace("[data]", "[data]\nzzz = 1"),
        "x.toml: [data] unknown key 'zzz', valid: curriculum, form, from, heldout_path, heldout_split, max_a, max_b, "
        "mix, name, operation, path, seed, shots, source, split, system, task, train_size",
    ),
    "the beginning of a key's words": (
        GRPO + "grad_accum = 4\n",
        "x.toml: [trainer] unknown key 'grad_accum', did you mean 'gradient_accumulation_steps'?",
    ),
    "initials of a key": (GRPO + "lr = 1e-4\n", "x.toml: [trainer] unknown key 'lr', did you mean 'learning_rate'?"),
    "the end of several keys": (
        GRPO + "batch_size = 4\n",
        "x.toml: [trainer] unknown key 'batch_size', did you mean 'per_device_train_batch_size' "
        "or 'generation_batch_size'?",
    ),
    "a trainer key that nothing resembles": (
        GRPO + "zzz = 4\n",
        "x.toml: [trainer] unknown key 'zzz', valid: algorithm and the arguments of TRL's GRPOConfig",
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
        "x.toml: [trainer] missing key 'algorithm', valid: sft, bon, grpo",
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
    "trainer.algorithm=GRPO": "[trainer] algorithm: found 'GRPO', did you mean 'grpo'?",
    "model.base=smollm2-135m": "[model] base: found 'smollm2-135m', and there is no such folder, valid: "
    "'smollm2-135m-instruct', 'tiny', a model folder, a .gguf file, or a hub id 'org/name', did you mean",
    "reward.0={name='nowhere:f'}": "[[reward]] 0 name: there is no module 'nowhere' (looked for from '",
    "reward.0={name='colorsys:rgb_to_hvs'}": "[[reward]] 0 name: 'colorsys' has no function 'rgb_to_hvs', did you mean "
    "'rgb_to_hsv'?; it has: rgb_to_yiq, ",
    "reward.0={name='asyncio.subprocess:create_subprocess_exec'}": "[[reward]] 0 name: 'asyncio.subprocess:create_subp",
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
    "rollout.precision=copied": "[rollout] precision: found 'copied', valid: shared, full, copy, did you mean",
    "rollout.bits=4": "[rollout] bits: found 4, only for precision = 'copy'; [model.quantization] is for a base that",
    "rollout.group_size=64": "[rollout] group_size: found 64, only for precision = 'copy'",
    "rollout.max_batch_tokens=64": "[rollout] max_batch_tokens: found 64, valid: > max_completion_length 64",
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
    "data.system=x": "[data] system: only for form = 'chat', found form = 'char'",
    "reward.0.name=exat": "[[reward]] 0 unknown name 'exat', did you mean 'exact'?",
    "reward.0.extrct=plain": "[[reward]] 0 unknown key 'extrct', did you mean 'extract'?",
    "reward.0.extract=plian": "[[reward]] 0 extract = 'plian', must be one of ",
    "reward.0.model=3": "[[reward]] 0 unknown key 'model'; valid: extract, stop",
    "data.path=x.jsonl": "[data] path: only for source = 'jsonl', found source = 'arithmetic'",
    "data.train_size=0": "[data] train_size: found 0, valid: int ≥ 1",
    "data.train_size=1": "[data] train_size: found 1, valid: ≥ 2, the prompts of one rollout",
    "eval.size=0": "[eval] size: found 0, valid: int ≥ 1",
    "reward.0.weight=0": "[[reward]] 0 weight: found 0 for every [[reward]], valid: one other than 0",
    "model.reference=no.toml": "[model] reference: found 'no.toml' with [trainer] beta = 0, valid: beta > 0",
    "data.from=no.toml": "[data] from: found 'no.toml' for algorithm 'grpo', valid for dpo, kto, ",
    "trainer.eval_strategy=steps": "[trainer] eval_strategy: refused: the run measures before and after by itself",
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
    "greater_is_better": "refused: ",
    "eval_strategy": "[eval]",
    "eval_steps": "[eval]",
    "per_device_eval_batch_size": "[eval]",
    "num_generations_eval": "[eval]",
    "do_eval": "[eval]",
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


def test_codes_are_held_only_where_the_base_is_shared(tmp_path: Path) -> None:
    """Other precisions send merged weights, and a reward model is no causal language model."""
    lora = ("model.lora.rank=8", "model.quantization.bits=4", "model.quantization.hold=packed")
    assert load(write(tmp_path), lora).model.quantization.hold == "packed"
    line = error_of(tmp_path, GRPO, *lora, "rollout.precision=full")
    assert line.startswith("--set: [model.quantization] hold: found 'packed', valid for a reward model")


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


def test_a_missing_jsonl_file_is_found_before_anything_is_imported(tmp_path: Path) -> None:
    text = GRPO.replace('"tiny"', '"org/name"').replace('form = "char"', "")
    line = error_of(tmp_path, text, "data.source=jsonl", "data.path=rows.jsonl")
    assert line == "--set: [data] path: no such file: 'rows.jsonl' (paths are relative to the config's folder)"
    write(tmp_path, "", "rows.jsonl")
    assert load(write(tmp_path, text), ["data.source=jsonl", "data.path=rows.jsonl"]).data.path == "rows.jsonl"
    assert "only for form = 'chat'" in error_of(tmp_path, text, "data.system=x")


def test_the_options_of_a_reasoning_gym_reward_are_checked_without_its_import(tmp_path: Path) -> None:
    import sys

    before = "reasoning_gym" in sys.modules
    line = error_of(tmp_path, GRPO.replace('"exact"', '"reasoning-gym"').replace("extract", "extrct"))
    assert line.startswith("x.toml: [[reward]] 0 unknown key 'extrct', did you mean 'extract'?")
    assert ("reasoning_gym" in sys.modules) == before
