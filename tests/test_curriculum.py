"""Mixtures keep their shares and train on nothing that is held out; a curriculum keeps what lies between."""

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import online_helper
import pytest
from config_helper import GRPO, error_of, write
from run_helper import train_until_ctrl_c
from safetensors.numpy import load_file

from rl import config, curriculum, data, models, train
from rl.algorithms import base
from rl.errors import RunFailed, UserError
from rl.rewards import build as build_rewards
from rl.rollouts.result import Completion

MIX = """
[run]
name = "{name}"
device = "cpu"
[model]
base = "tiny"
[model.tiny]
hidden = 32
layers = 2
intermediate = 64
[data]
source = "mix"
form = "char"
train_size = 24
[[data.mix]]
source = "arithmetic"
weight = 2
max_a = 4
max_b = 4
[[data.mix]]
source = "arithmetic"
max_a = 6
max_b = 2
[data.curriculum]
samples = 12
[rollout]
max_completion_length = 1
[[reward]]
name = "exact"
[trainer]
algorithm = "grpo"
per_device_train_batch_size = 8
num_generations = 4
steps_per_generation = 1
learning_rate = 5e-3
max_steps = 6
save_steps = 2
[eval]
size = 6
"""


def load(folder: Path, text: str = MIX, *overrides: str) -> config.Config:
    return config.load(write(folder, text.format(name="m")), overrides)


def test_shares_are_those_of_the_weights_and_short_sources_repeat(tmp_path: Path) -> None:
    loaded = load(tmp_path, MIX, "data.train_size=60", "eval.size=9")
    made = data.build(loaded)
    assert Counter(row["id"][0] for row in made.train) == {"0": 40, "1": 20}
    assert Counter(row["id"][0] for row in made.heldout) == {"0": 6, "1": 3}
    assert len({row["id"] for row in made.train}) == 60
    times = Counter(row["prompt"] for row in made.train if row["id"].startswith("0"))
    assert max(times.values()) - min(times.values()) <= 1  # repeated alike
    assert max(times.values()) > 1
    assert made.source == "mix of arithmetic, arithmetic"
    assert data.build(loaded) == made


@pytest.mark.parametrize("seed", range(8))
def test_what_one_source_holds_out_no_other_trains_on(tmp_path: Path, seed: int) -> None:
    """Trap: 2+3 held out by one table is trained on through the other, as it is or as 3+2."""
    made = data.build(load(tmp_path, MIX, f"data.seed={seed}", "data.train_size=60", "eval.size=12"))

    def pairs(rows: list[dict[str, Any]]) -> set[tuple[str, ...]]:
        return {tuple(sorted(row["prompt"].rstrip("=").split("+"))) for row in rows}

    assert not pairs(made.train) & pairs(made.heldout)


def test_jsonl_beside_a_generated_source(tmp_path: Path) -> None:
    rows = [{"prompt": f"{a}+0=", "answer": str(a)} for a in range(5)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = MIX.replace("max_a = 6\nmax_b = 2", "").replace(
        '[[data.mix]]\nsource = "arithmetic"\n\n', '[[data.mix]]\nsource = "jsonl"\npath = "r.jsonl"\n'
    )
    made = data.build(load(tmp_path, text))
    held = {row["prompt"] for row in made.heldout}
    assert {row["task"] for row in made.train} == {"arithmetic", "jsonl"}
    assert not held & {row["prompt"] for row in made.train}


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            ('source = "mix"', 'source = "arithmetic"'),
            "[data] source: found 'arithmetic' with [[data.mix]], valid: mix",
        ),
        (("weight = 2", "wieght = 2"), "[[data.mix]] 0 unknown key 'wieght', did you mean 'weight'?"),
        (
            ("max_a = 6", 'path = "x.jsonl"'),
            "[[data.mix]] 1 path: only for source = 'jsonl', found source = 'arithmetic'",
        ),
        (("weight = 2", "weight = 200"), "[data] train_size: found 24, of which a [[data.mix]] gets no row"),
        (
            ("samples = 12", "min_pass = 0.9\nmax_pass = 0.2"),
            "[data.curriculum] min_pass: found 0.9, valid: ≤ max_pass",
        ),
    ],
)
def test_errors_name_the_table(tmp_path: Path, edit: tuple[str, str], said: str) -> None:
    assert said in error_of(tmp_path, MIX.replace("{name}", "m").replace(*edit))


def test_a_mix_without_parts_and_a_curriculum_for_sft_are_refused(tmp_path: Path) -> None:
    text = GRPO.replace('source = "arithmetic"', 'source = "mix"')
    assert "[data] mix: missing, source = 'mix' needs at least one [[data.mix]]" in error_of(tmp_path, text)
    sft = GRPO.replace('"grpo"', '"sft"').replace("num_generations = 8\n", "") + "[data.curriculum]\nsamples = 4\n"
    assert "curriculum: found for algorithm 'sft', valid for grpo" in error_of(tmp_path, sft)


def test_old_configs_resolve_to_the_same_keys(tmp_path: Path) -> None:
    """A finished run is compared with its config: a new key there would make every run look outdated."""
    resolved = config.resolved(config.load(write(tmp_path)))
    assert "mix" not in resolved["data"]
    assert "curriculum" not in resolved["data"]
    again = config.resolved(load(tmp_path))
    assert again["data"]["mix"][0]["weight"] == 2.0
    assert again["data"]["curriculum"] == {"min_pass": 0.05, "max_pass": 0.95, "samples": 12}


def test_keep_drops_always_and_never() -> None:
    rows = [{"id": str(i)} for i in range(5)]
    right = {"0": 0, "1": 1, "2": 4, "3": 8, "4": 7}
    kept, told = curriculum.keep(rows, right, 8, 0.05, 0.95)
    assert [row["id"] for row in kept] == ["1", "2", "4"]
    assert told == "3 of 5 questions are right in 5% to 95% of 8 answers (1 never, 1 always)"
    assert [row["id"] for row in curriculum.keep(rows, right, 8, 0.0, 0.5)[0]] == ["0", "1", "2"]


class Sevens:
    """A sampler that says 7 to the first k of each question's answers, k its first digit; notes its calls."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.calls = tokenizer, []

    def generate(self, prompts: list[list[int]], sampling: Any, *, max_tokens: int, seed: int, step: int) -> list:
        self.calls.append((len(prompts), step))
        said: Counter[tuple[int, ...]] = Counter()
        out = []
        for prompt in prompts:
            said[tuple(prompt)] += 1
            wanted = int(self.tokenizer.decode(prompt)[0])
            text = "7" if said[tuple(prompt)] <= wanted else "8"
            out.append(Completion(self.tokenizer(text)["input_ids"], [0.0]))
        return out


def job_with(tiny: models.Base, folder: Path, samples: int = 9, **changes: Any) -> base.Job:
    job = online_helper.make_job(tiny, folder, "grpo", engine="torch")
    wanted = config.Curriculum(samples=samples, **changes)
    rewards = (config.Reward(name="exact"),)
    job.config = replace(job.config, data=replace(job.config.data, curriculum=wanted), rewards=rewards)
    job.rewards = build_rewards(rewards)
    job.train = [{"id": f"{n}", "prompt": f"{n % 10}+1=", "answer": "7", "task": "t"} for n in range(70)]
    return job


def test_rates_are_counted_cached_and_kept_for_the_run(tiny_base: models.Base, tmp_path: Path) -> None:
    from rl.display import Display

    display = Display(open(os.devnull, "w"))  # noqa: SIM115
    job = job_with(tiny_base, tmp_path)
    sampler = Sevens(job.tokenizer)
    kept = curriculum.for_job(job, sampler, "p" * 64, tmp_path, display)
    assert {row["prompt"][0] for row in kept} == set("12345678")  # 0 never, 9 of 9 always
    assert [row["id"] for row in kept] == [str(n) for n in range(70) if n % 10 not in (0, 9)]
    assert sampler.calls == [(10 * 9, curriculum.FIRST_STEP)]  # each different question once
    assert job.tokens["completion"] == 90
    made = json.loads((job.folder / curriculum.FILE).read_text())["right"]
    assert made["13"] == 3
    # another run, the same policy, rows and sampling: nothing is sampled
    other = job_with(tiny_base, tmp_path / "b")
    assert curriculum.for_job(other, Sevens(other.tokenizer), "p" * 64, tmp_path, display) == kept
    assert other.tokens["completion"] == 0
    # another policy, other sampling: asked anew
    for policy, samples in (("q" * 64, 9), ("p" * 64, 10)):
        third = job_with(tiny_base, tmp_path / f"{policy[0]}{samples}", samples)
        asking = Sevens(third.tokenizer)
        curriculum.for_job(third, asking, policy, tmp_path, display)
        assert asking.calls
    hard = job_with(tiny_base, tmp_path / "h", min_pass=1.0, max_pass=1.0)
    hard.train = [row for row in hard.train if row["prompt"][0] != "9"]
    with pytest.raises(RunFailed, match="0 of 63 questions are right in 100% to 100% of 9 answers"):
        curriculum.for_job(hard, Sevens(hard.tokenizer), "p" * 64, tmp_path, display)


def test_interrupted_and_resumed_is_bit_for_bit_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the cache of pass rates went in between: the run's own folder holds them."""
    monkeypatch.chdir(tmp_path)

    def named(name: str) -> Path:
        return write(tmp_path, MIX.format(name=name), f"{name}.toml")

    assert train.main(named("whole")) == 0
    rates = json.loads(Path("models/final/whole", curriculum.FILE).read_text())["right"]
    assert 0 < sum(count > 0 for count in rates.values()) < len(rates)  # some were dropped
    train_until_ctrl_c(monkeypatch, named("broken"), 3)
    for path in Path("data/processed/pass_rates").iterdir():
        path.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(curriculum, "count", lambda *a: pytest.fail("sampled again"))
        assert train.main(named("broken"), resume=True) == 0
    whole, broken = (load_file(f"models/final/{name}/model.safetensors") for name in ("whole", "broken"))
    for name, weight in whole.items():
        np.testing.assert_array_equal(weight, broken[name])


def test_everything_held_out_elsewhere_is_an_error(tmp_path: Path) -> None:
    for name, asked in (("a", "3+3"), ("a-held", "1+1"), ("b", "1+1"), ("b-held", "2+2")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": f"{asked}=", "answer": "2"}) + "\n")
    part = '[[data.mix]]\nsource = "jsonl"\npath = "{0}.jsonl"\nheldout_path = "{0}-held.jsonl"\n'
    head, tail = MIX.partition("[[data.mix]]")[0], MIX.partition("[data.curriculum]")[2]
    text = head + part.format("a") + part.format("b") + "[data.curriculum]" + tail
    with pytest.raises(
        UserError, match=r"\[\[data.mix\]\] 1 \(jsonl\): every one of its questions is held out by another"
    ):
        data.build(load(tmp_path, text, "eval.size=2"))
