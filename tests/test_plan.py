"""rl/plan: sizes from config.json, time, machines, the verdict's settings, and a plan without torch."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from plan_helper import TINY, config_file

from rl import __main__ as cli
from rl import config as configs
from rl.device import GIB
from rl.errors import UserError
from rl.plan import architecture, command, machine, table, time, verdict, workload

ROOT = Path(__file__).resolve().parent.parent
# totals in 10^9 as the model cards (and their safetensors' metadata) give them
PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 0.1345,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1.711,
    "HuggingFaceTB/SmolLM3-3B": 3.075,
    "Qwen/Qwen2.5-0.5B-Instruct": 0.494,
    "Qwen/Qwen2.5-7B-Instruct": 7.616,
    "Qwen/Qwen2.5-72B-Instruct": 72.706,
    "Qwen/Qwen3-0.6B": 0.596,
    "Qwen/Qwen3-8B": 8.191,
    "meta-llama/Llama-3.2-1B-Instruct": 1.236,
    "meta-llama/Llama-3.3-70B-Instruct": 70.554,
    "google/gemma-3-1b-it": 1.000,
}
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 50, "head_dim": 16}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}


def on(memory_gb: float, chip: str = "m4-max") -> machine.Machine:
    return machine.named(chip, f"{memory_gb}GB")


# --- sizes


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_model_card(name: str) -> None:
    """Trap: a tied head counted twice, or Qwen3's head_dim taken for hidden / heads."""
    assert architecture.known(name).parameters / 1e9 == pytest.approx(PUBLISHED[name], abs=6e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", architecture.FAMILIES)
def test_parameters_and_adapters_are_those_torch_counts(family: str, tied: bool) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from rl.models import add_lora

    told = AutoConfig.for_model(family, **SMALL, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(told)
        shape = architecture.from_config(told.to_dict(), "here")
        assert sum(p.numel() for p in model.parameters()) == shape.parameters
        adapted = add_lora(model, configs.Lora(rank=5, layers=2, targets=("q_proj", "down_proj")))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == shape.adapter(5, ("q_proj", "down_proj"), 2)


def test_sliding_windows_are_counted_as_transformers_lays_them_out() -> None:
    assert architecture.known("google/gemma-3-1b-it").windows == 22  # of 26 layers every sixth is global
    assert architecture.known("Qwen/Qwen3-0.6B").windows == 0


def test_what_cannot_be_planned_is_said_in_one_line(tmp_path: Path) -> None:
    told = {"model_type": "mamba"}
    with pytest.raises(UserError, match=r"'mamba', the planner knows llama"):
        architecture.from_config(told, "here")
    with pytest.raises(UserError, match="no vocab_size there"):
        architecture.from_config({"model_type": "llama", "num_attention_heads": 2, "num_hidden_layers": 1}, "here")
    config = configs.load(config_file(tmp_path))
    hub = replace(config, model=configs.Model(base="nobody/nothing"))
    with pytest.raises(UserError, match="not one of the models known by name"):
        architecture.find(hub, tmp_path)


def test_a_folder_s_config_json_goes_before_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configs.load(config_file(tmp_path))
    told = architecture.config_json("Qwen/Qwen3-0.6B") | {"num_hidden_layers": 2}
    cached = tmp_path / "hub" / "models--Qwen--Qwen3-0.6B" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    (cached / "config.json").write_text(json.dumps(told))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    found = architecture.find(replace(config, model=configs.Model(base="Qwen/Qwen3-0.6B")), tmp_path)
    assert found.layers == 2
    alias = configs.Model(base="models/base/gemma-3-4b-it-text")
    assert architecture.find(replace(config, model=alias), tmp_path).hidden == 2560


# --- time


def test_learner_operations_against_the_rule_of_six() -> None:
    """6 operations a weight and token where all weights train, 4 with adapters (Kaplan et al. 2020, section 2.1)."""
    shape = architecture.known("HuggingFaceTB/SmolLM2-1.7B-Instruct")
    work = replace(table.standard("full", 8), checkpointing=False, completion=1, old_logps=False)
    tokens = work.rows * work.length
    assert time.learner_operations(shape, work) == pytest.approx(6 * shape.matrix * tokens, rel=0.06)
    adapted = replace(work, lora_rank=16)
    assert time.learner_operations(shape, adapted) == pytest.approx(4 * shape.matrix * tokens, rel=0.06)


def test_decoding_takes_the_weights_through_memory_once_a_token() -> None:
    """A 70B model's float16 weights on an M4 Max: 141 GB at 546 GB/s, of which 70 % are reached."""
    shape = architecture.known("meta-llama/Llama-3.3-70B-Instruct")
    work = replace(table.standard("LoRA", 1), rollout_rows=1, decoded=1, distinct=1, prompt=1, completion=100)
    seconds = time.predict(shape, work, on(512), 2 * shape.parameters)
    assert seconds is not None
    assert seconds.rollout / work.rollouts_per_step == pytest.approx(100 * 141.1e9 / (0.7 * 546e9), rel=0.02)


# --- machines


def test_memory_sizes_are_read_as_they_are_sold() -> None:
    assert machine.parse_memory("64GB") == machine.parse_memory("64") == machine.parse_memory("64 GiB") == 64 * GIB
    for wrong in ("64MB", "much", "0", "-1GB"):
        with pytest.raises(UserError, match="valid: a size such as 64GB"):
            machine.parse_memory(wrong)


def test_chips_are_known_by_name_or_refused() -> None:
    assert machine.named("Apple M4 Max", "36GB") == machine.named("m4-max", "36GB")
    with pytest.raises(UserError, match="valid: m1, m1-pro"):
        machine.named("m4-ultra", "36GB")  # was never sold
    with pytest.raises(UserError, match="give its memory too"):
        machine.named("m4", None)


def test_a_chip_newer_than_the_table_is_planned_without_its_speed(capsys: pytest.CaptureFixture[str]) -> None:
    newer = machine.named("Apple M5 Max", "64GB")
    assert (newer.name, newer.usable, newer.flops) == ("m5-max", on(64).usable, 0)
    assert cli.main(["plan", "configs/tiny/grpo.toml", "--chip", "m5", "--memory", "16GB"]) == 0
    assert "time: unknown, m5 is not a chip of the table\n" in capsys.readouterr().out


def test_a_busy_cpu_is_judged_by_a_thread_that_waits_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: on a machine of two cores with other work both threads reached 20 of 130 GFLOP/s, and steps were planned
    eight times too long. Many cores are not taken for as many times one."""
    found = {0: (1e9, 20e9), len(machine._ALONE): (2e9, 130e9)}
    monkeypatch.setattr(machine, "_measured", lambda environment: found[len(environment)])
    for cores, flops in ((1, 130e9), (2, 260e9), (64, 520e9)):
        monkeypatch.setattr(machine, "cores", lambda cores=cores: cores)
        assert machine._cpu_speed() == (2e9, flops)
    found[0] = (1e9, 900e9)  # idle
    assert machine._cpu_speed() == (2e9, 900e9)
    monkeypatch.undo()
    assert min(machine._measured({})) > 1e8
    assert machine.this("cpu", timed=False).flops == 0  # what train asks: memory alone


def test_a_mac_keeps_a_reserve_and_says_so() -> None:
    mac = on(64)
    assert mac.usable == pytest.approx(0.74 * 64 * GIB)
    assert mac.torch_limit == pytest.approx(0.8 * mac.usable)
    assert "not measured" in mac.reserve
    assert "not measured" in mac.source


def test_a_container_s_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("1073741824\n")
    monkeypatch.setattr(machine, "LIMITS", (str(limit),))
    assert machine.this("cpu").memory == GIB


# --- verdict and command


def test_settings_of_the_verdict_make_it_fit(tmp_path: Path) -> None:
    path = config_file(tmp_path, rows=512)
    wide = machine.Machine("small", "cpu", 3.5 * GIB, 1e10, 1e11, 1e11, "made up")
    assert not verdict.make(configs.load(path), wide, tmp_path).fits
    more = verdict.fitting(path, [], wide, tmp_path)
    assert more is not None
    assert verdict.make(configs.load(path, more), wide, tmp_path).fits
    work = workload.of(configs.load(path, more))
    assert work.rollout_rows == 512  # smaller pieces of the same rollout
    assert work.lora_rank == 0  # the least harm first: what is trained stays


def test_no_setting_helps_a_machine_that_is_too_small(tmp_path: Path) -> None:
    path = config_file(tmp_path)
    small = machine.Machine("small", "cpu", 1.6 * GIB, 1e10, 1e11, 1e11, "made up")
    assert verdict.fitting(path, [], small, tmp_path) is None


def test_command_prints_parts_and_verdict(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = "configs/mac/qwen3-8b-128gb.toml"
    assert cli.main(["plan", config, "--chip", "m4-max", "--memory", "128GB"]) == 0
    said = capsys.readouterr().out
    for word in (
        "trainer weights",
        "sampler weights",
        "activations",
        "allocator slack",
        "not measured",
        "verdict: fits",
    ):
        assert word in said
    assert cli.main(["plan", config, "--chip", "m4-max", "--memory", "16GB"]) == 1
    assert "verdict: use a larger machine" in capsys.readouterr().out
    assert cli.main(["plan", config, "--chip", "n9", "--memory", "16GB"]) == 2


def test_a_plan_imports_no_torch() -> None:
    """A plan is to be had in a second; torch alone takes longer."""
    code = (
        "import sys\nfrom rl.__main__ import main\n"
        "assert main(['plan', 'configs/mac/qwen3-1.7b-36gb.toml', '--chip', 'm4-max', '--memory', '36GB']) == 0\n"
        "heavy = {'torch', 'transformers', 'trl', 'mlx', 'datasets', 'lm_eval'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_train_stops_before_loading_what_would_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import rl.train

    path = config_file(tmp_path, rows=512)
    monkeypatch.chdir(tmp_path)
    small = machine.Machine("small", "cpu", 3.5 * GIB, 0, 0, 0, "made up")
    monkeypatch.setattr(machine, "named", lambda *_, **__: small)
    monkeypatch.setattr(machine, "this", lambda *_, **__: small)
    calls: list[Path] = []
    monkeypatch.setattr(rl.train, "main", lambda config, *_, **__: calls.append(config) or 0)
    assert cli.main(["train", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "fits with --set trainer.per_device_train_batch_size=" in said
    assert "--force" in said
    assert calls == []
    assert cli.main(["train", str(path), "--force"]) == 0
    assert calls == [path]
    assert cli.main(["train", str(path), "--plan"]) == 1
    assert calls == [path]
    assert [p.name for p in tmp_path.iterdir()] == ["x.toml"]  # nothing written


def test_no_run_is_refused_on_an_assumption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2 reads numbers a digit at a time: 120 digits are 120 tokens, where three characters a token make 40; and
    worked sums of its PPO config, assumed to have 288, an 80 GB card takes easily."""
    card = machine.Machine("h100", "cuda", 79.6 * GIB, 0, 0, 0, "made up")
    monkeypatch.setattr(machine, "this", lambda *_, **__: card)
    monkeypatch.chdir(ROOT)
    path = Path("configs/smollm2/ppo_reward.toml")
    assert not verdict.make(configs.load(path), card, ROOT).fits
    command.refuse(path, [])
    for name in ("train", "heldout"):
        rows = [f'{{"prompt": "{i}{"7" * (119 - i // 10)}", "answer": "1"}}' for i in range(10, 14)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n" if name == "train" else rows[0] + "\n")
    text = (
        TINY.format(rows=4096)
        .replace("size = 200", "size = 1024")
        .replace('base = "tiny"', 'base = "smollm2-135m-instruct"')
    )
    text = "\n".join(line for line in text.split("\n") if not line.startswith("tiny ="))
    text = text.replace(
        'source = "arithmetic"', 'source = "jsonl"\npath = "train.jsonl"\nheldout_path = "heldout.jsonl"'
    )
    (tmp_path / "x.toml").write_text(text.replace('form = "char"', 'form = "plain"').replace("size = 8", "size = 1"))
    with pytest.raises(UserError, match="with prompts of 120 tokens, counted, needs about"):
        command.refuse(tmp_path / "x.toml", [])


def test_a_model_that_cannot_be_planned_may_train(tmp_path: Path) -> None:
    text = TINY.format(rows=8).replace('base = "tiny"', 'base = "nobody/nothing"')
    text = "\n".join(line for line in text.split("\n") if not line.startswith("tiny =")).replace('"char"', '"plain"')
    path = tmp_path / "x.toml"
    path.write_text(text)
    command.refuse(path, [])
