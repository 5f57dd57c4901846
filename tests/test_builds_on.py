"""Configs that build on others: where a name may stand, what it must make, circles, and what the runs do with it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from config_helper import error_of, tiny_run
from online_helper import inputs, make_trainer
from online_helper import make_job as online_job
from preference_helper import PAIRS, disturb, logp, make_config, make_job, plain
from trl import GRPOConfig, RLOOConfig

from rl import config, data, models, pairs, start, train
from rl.algorithms import dpo, grpo, offline, rloo
from rl.errors import UserError

BASE = tiny_run(
    "{algorithm}",
    most=9,
    train_size=16,
    size=8,
    model="{model}",
    data="{data}",
    rollout="samples = 32",
    rewards="{rewards}",
    trainer="per_device_train_batch_size = {batch}\nmax_steps = 2\n{trainer}",
    metric="lenient",
)
GRPO = "num_generations = 4\nbeta = 0.1\nsteps_per_generation = 1\n"
LEARNED = '[[reward]]\nname = "model"\nmodel = "reward.toml"\n[[reward]]\nname = "exact"\nweight = 0.0\n'


def text_of(name: str, algorithm: str, **given: Any) -> str:
    parts: dict[str, Any] = {"model": "", "data": "", "rewards": "", "trainer": "", "batch": 8}
    return BASE.format(name=name, algorithm=algorithm, **parts | given)


def write(folder: Path, name: str, algorithm: str, **given: Any) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text_of(name, algorithm, **given))
    return path


def test_every_name_of_a_config_is_listed_by_its_place(tmp_path: Path) -> None:
    write(tmp_path, "reward", "reward")
    write(tmp_path, "sft", "sft")
    made = write(tmp_path, "g", "grpo", model='reference = "sft.toml"', rewards=LEARNED, trainer=GRPO)
    found = config.builds_on(config.load(made))
    assert found == {"model.reference": tmp_path / "sft.toml", "reward.0.model": tmp_path / "reward.toml"}
    write(tmp_path, "dpo", "dpo")
    made = write(tmp_path, "k", "kto", data='from = "dpo.toml"')
    assert config.builds_on(config.load(made)) == {"data.from": tmp_path / "dpo.toml"}
    folder = LEARNED.replace("reward.toml", "org/judge")  # no config: found when the run starts
    assert config.builds_on(config.load(write(tmp_path, "h", "grpo", rewards=folder, trainer=GRPO))) == {}


BAD = {
    "reference of an algorithm without one": (
        ("sft", {"model": 'reference = "sft.toml"'}),
        "[model] reference: found 'sft.toml', and algorithm 'sft' has no KL term, valid for dpo, kto, grpo",
    ),
    "reference that the loss never asks": (
        ("grpo", {"model": 'reference = "sft.toml"', "rewards": LEARNED, "trainer": GRPO.replace("0.1", "0.0")}),
        "[model] reference: found 'sft.toml' with [trainer] beta = 0, valid: beta > 0",
    ),
    "reference that is a reward model": (
        ("dpo", {"model": 'reference = "reward.toml"'}),
        "[model] reference: found 'reward.toml', whose algorithm is 'reward': a reward model scores texts",
    ),
    "reward model that is a policy": (
        ("grpo", {"rewards": LEARNED.replace("reward.toml", "sft.toml"), "trainer": GRPO}),
        "[[reward]] 0 model: found 'sft.toml', whose algorithm is 'sft', valid: a config of algorithm 'reward'",
    ),
    "reward model that is not there": (
        ("grpo", {"rewards": LEARNED.replace("reward.toml", "no.toml"), "trainer": GRPO}),
        "[[reward]] 0 model: no such file:",
    ),
    "reward model where a verifier grades": (
        ("dpo", {"rewards": LEARNED}),
        "[[reward]] 0 name: found 'model', and 'dpo' asks a verifier only, valid there: exact, reasoning-gym",
    ),
    "pairs of a run that samples none": (
        ("dpo", {"data": 'from = "sft.toml"'}),
        "[data] from: found 'sft.toml', whose algorithm is 'sft', valid: one that samples pairs: dpo",
    ),
    "pairs from labels": (
        ("dpo", {"data": 'from = "kto.toml"'}),
        "[data] from: found 'kto.toml', whose algorithm is 'kto', valid: one that samples pairs: dpo",
    ),
    "pairs where questions are asked": (
        ("grpo", {"data": 'from = "dpo.toml"', "rewards": LEARNED, "trainer": GRPO}),
        "[data] from: found 'dpo.toml' for algorithm 'grpo', valid for dpo, kto",
    ),
    "a circle of three": (("dpo", {"model": 'reference = "a.toml"'}), "a.toml: [data] from: configs build on each"),
    "a tokenizer changed behind the model": (
        ("reward", {"trainer": "pad_token = '<eos>'"}),
        "[trainer] pad_token: refused: the base's tokenizer decides",
    ),
    "a centring that pushes away": (
        ("reward", {"trainer": "center_rewards_coefficient = -0.1"}),
        "[trainer] center_rewards_coefficient: found -0.1, valid: ≥ 0",
    ),
    "an option of a learned reward": (
        ("grpo", {"rewards": LEARNED.replace('"reward.toml"', '"reward.toml"\nclip = 0'), "trainer": GRPO}),
        "[[reward]] 0 clip = 0, must be a number above 0",
    ),
    "a schema": (
        ("grpo", {"rewards": '[[reward]]\nname = "json"\nschema = { type = "int" }', "trainer": GRPO}),
        "[[reward]] 0 schema.type: found 'int', must be one of object",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_built_on_is_one_line(tmp_path: Path, case: str) -> None:
    for name in ("sft", "reward", "dpo", "kto"):
        write(tmp_path, name, name)
    write(tmp_path, "a", "dpo", data='from = "x.toml"')
    (algorithm, given), said = BAD[case]
    assert said in error_of(tmp_path, text_of("x", algorithm, **given))


# --- the reference


def other(tiny: models.Base) -> Any:
    """A frozen policy that is not the start."""
    made = models.load_policy(tiny, "float32", "cpu")
    disturb(made, seed=7, size=0.1)
    return made.requires_grad_(False)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_dpo_is_held_to_the_reference_it_is_given(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool
) -> None:
    """Trap: with an adapter TRL makes a reference of its own."""
    job = make_job(
        tiny_base, make_config(tmp_path / "x.toml", "dpo", lora=lora, trainer={"beta": 0.7}), PAIRS, tmp_path
    )
    job.reference = other(tiny_base)
    policy, reference = plain(job.model), plain(job.reference)
    monkeypatch.setattr(offline, "run_trainer", lambda job, trainer, guard, recorder: trainer)
    trainer = dpo.train(job)
    losses = []
    for row in PAIRS:
        c, r = (
            logp(policy, job.tokenizer, row["prompt"], row[k]) - logp(reference, job.tokenizer, row["prompt"], row[k])
            for k in ("chosen", "rejected")
        )
        losses.append(-math.log(1 / (1 + math.exp(-0.7 * (c - r)))))
    assert abs(np.mean(losses) - math.log(2)) > 1e-2  # what the start as the reference would give
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.model.train()
    assert float(trainer.compute_loss(trainer.model, batch).detach()) == pytest.approx(np.mean(losses), abs=2e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("algorithm", "trainer_class", "config_class"),
    [("grpo", grpo.DuetGRPOTrainer, GRPOConfig), ("rloo", rloo.DuetRLOOTrainer, RLOOConfig)],
)
def test_the_kl_of_a_sampled_batch_is_to_the_reference_it_is_given(
    tiny_base: models.Base, tmp_path: Path, algorithm: str, trainer_class: Any, config_class: Any, lora: bool
) -> None:
    rollout = {"correction": "sequence_truncate", "temperature": 0.7}
    job = online_job(tiny_base, tmp_path, algorithm, lora=lora, rollout=rollout, beta=0.3)
    job.reference = other(tiny_base)
    reference, policy = plain(job.reference), plain(job.model)
    trainer = make_trainer(job, trainer_class, config_class)
    seen: list[torch.Tensor] = []
    ask = trainer._get_per_token_logps_and_entropies

    def heard(model: Any, *args: Any, **kwargs: Any) -> Any:
        out = ask(model, *args, **kwargs)
        if model is trainer.ref_model:
            seen.append(out[0])
        return out

    trainer._get_per_token_logps_and_entropies = heard
    batch = trainer._generate_and_score_completions(inputs(job, 2))
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    columns = batch["completion_ids"].shape[1]

    def logps(model: Any) -> torch.Tensor:
        with torch.no_grad():
            logits = model(ids, attention_mask=mask).logits[:, -columns - 1 : -1] / 0.7
        return logits.log_softmax(-1).gather(2, batch["completion_ids"][..., None])[..., 0]

    kept = batch["completion_mask"].bool()
    wanted = logps(reference)[kept]
    assert len(seen) == 1
    np.testing.assert_allclose(seen[0][kept].numpy(), wanted.numpy(), atol=1e-4)
    assert (wanted - logps(policy)[kept]).abs().max() > 1e-2


def test_an_adapter_run_serves_as_a_merged_reference(tiny_base: models.Base, tmp_path: Path) -> None:
    adapter = models.add_lora(models.load_policy(tiny_base, "float32", "cpu"), config.Lora(rank=4, alpha=8.0))
    disturb(adapter, seed=3, size=0.2)
    folder = tmp_path / "run"
    adapter.save_pretrained(folder)
    models.load_tokenizer(tiny_base).save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tiny_base.path)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    here = make_config(tmp_path / "x.toml", "dpo")
    made = start.load_reference(here, tmp_path, folder, models.load_tokenizer(tiny_base), torch.device("cpu"))
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(made(ids).logits, adapter.eval()(ids).logits)
    assert not any(p.requires_grad for p in made.parameters())
    assert start.load_reference(here, tmp_path, None, None, torch.device("cpu")) is None


def test_a_reference_with_another_vocabulary_is_refused(
    tiny_base: models.Base, smollm2: models.Base, tmp_path: Path
) -> None:
    here = make_config(tmp_path / "x.toml", "dpo")
    with pytest.raises(UserError, match=r"\[model\] reference: .* has another vocabulary than the policy"):
        start.load_reference(here, tmp_path, tiny_base.path, models.load_tokenizer(smollm2), torch.device("cpu"))


# --- pairs of another run


@pytest.fixture
def of_run(tmp_path: Path) -> Callable[..., data.Dataset]:
    """`of_run(algorithm, rows)`: the data of a config whose [data] from names a run that has sampled `rows`."""

    def made(algorithm: str, rows: list[dict[str, Any]] | None, **given: Any) -> data.Dataset:
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        if rows is not None:
            pairs.write(folder / pairs.FILE, rows)
        table = config.Data(source="arithmetic", form="char", max_a=9, max_b=9, from_="p.toml", **given)
        settings = make_config(tmp_path / "x.toml", algorithm, data=table)
        return data.build(settings, folder)

    return made


def sampled(prompt: str) -> dict[str, Any]:
    row = {"id": prompt, "prompt": prompt, "answer": "3", "task": "t", "chosen": "3", "rejected": "4"}
    return row | {"prompt_ids": [5], "chosen_ids": [6, 1], "rejected_ids": [7, 1]}


def test_pairs_of_a_run_are_the_rows_without_its_token_ids(of_run: Callable) -> None:
    rows = [sampled(f"{a}+2=3;") for a in range(5)]
    made = of_run("dpo", rows, train_size=3)
    assert len(made.train) == 3
    assert all(row in [pairs.preferences.portable(r) for r in rows] for row in made.train)
    assert made.source == "pairs of run"
    assert len(made.heldout) == 8
    assert all("answer" in row and "chosen" not in row for row in made.heldout)
    assert made.fingerprint != of_run("dpo", rows[:4], train_size=3).fingerprint


def test_pairs_on_held_out_prompts_are_left_out(of_run: Callable) -> None:
    """Trap: the other run's seed may have put questions into training that are held out here."""
    held = of_run("dpo", [sampled("x")], train_size=9).heldout
    made = of_run("dpo", [sampled("x"), *(sampled(row["prompt"]) for row in held)], train_size=99)
    assert [row["prompt"] for row in made.train] == ["x"]
    with pytest.raises(UserError, match="every prompt of its pairs is held out here"):
        of_run("dpo", [sampled(row["prompt"]) for row in held], train_size=99)


def test_kto_gets_both_halves_of_each_pair(of_run: Callable) -> None:
    made = of_run("kto", [sampled("x")], train_size=9).train
    halves = [(row["id"], row["completion"], row["label"]) for row in made]
    assert halves == [("x/right", "3", True), ("x/wrong", "4", False)]
    assert not any("chosen" in row or "prompt_ids" in row for row in made)


def test_a_run_that_sampled_nothing_is_named(of_run: Callable) -> None:
    with pytest.raises(UserError, match=r"\[data\] from = 'p.toml': that run has sampled no pairs .* came from a file"):
        of_run("dpo", None, train_size=9)


# --- a whole chain


def test_a_chain_is_made_first_used_and_made_again_when_its_start_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = Path()
    write(here, "sft", "sft", trainer="learning_rate = 1e-2")
    write(here, "reward", "reward", batch=4)
    path = write(here, "g", "grpo", model='reference = "sft.toml"', rewards=LEARNED, trainer=GRPO)
    assert train.main(path) == 0
    record = json.loads(Path("models/final/g/run.json").read_text())
    parents = {p["role"]: p for p in record["parents"]}
    assert {role: p["name"] for role, p in parents.items()} == {"model.reference": "sft", "reward.0.model": "reward"}
    made = json.loads(Path("models/final/reward/run.json").read_text())
    assert parents["reward.0.model"]["inputs_sha256"] == made["inputs_sha256"]
    rows = [json.loads(line) for line in Path("models/final/g/metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["reward"] == pytest.approx(row["rewards/model/mean"], abs=1e-6)  # the verifier weighs nothing
        assert 0 <= row["rewards/exact/mean"] <= 1
        assert row["time/reward"] > 0
    assert rows[0]["kl"] > 1e-4  # to sft's model, not to the start, where it would be 0

    write(here, "reward", "reward", batch=8)
    with pytest.raises(UserError, match=r"finished with other inputs: .*parents"):
        train.main(path)
    again = json.loads(Path("models/final/reward/run.json").read_text())
    assert again["config"]["trainer"]["per_device_train_batch_size"] == 8
    assert again["inputs_sha256"] != made["inputs_sha256"]


def test_a_folder_serves_as_well_as_a_config_and_its_weights_count(tiny_base: models.Base, tmp_path: Path) -> None:
    def found(name: str) -> dict[str, models.Base]:
        terms = (config.Reward(name="exact"), config.Reward(name="model", options={"model": name}))
        return start.reward_models(make_config(tmp_path / "x.toml", "grpo", rewards=terms), tiny_base.path.parent)

    assert found("reward.toml") == {}  # a run, which `builds_on` lists
    made = found(tiny_base.path.name)["reward.1.model"]
    assert (made.id, made.path, made.sha256) == (tiny_base.path.name, tiny_base.path, tiny_base.sha256)
    with pytest.raises(UserError, match=r"\[\[reward\]\] 1 model = 'none at all': no such folder, valid: a config"):
        found("none at all")
