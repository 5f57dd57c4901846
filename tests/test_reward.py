"""Reward models: TRL's loss on our rows against float64, whole runs that sample their pairs, what they leave behind."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from config_helper import tiny_run
from preference_helper import LABELLED, PAIRS, disturb, make_config, make_job
from run_helper import train_until_ctrl_c
from safetensors.numpy import load_file

from rl import config, data, models, pairs, reward_run, start, train
from rl.algorithms import base, offline, reward
from rl.display import Display
from rl.errors import RunFailed, UserError
from rl.rewards import learned

ROWS = [row | {"margin": margin} for row, margin in zip(PAIRS, (0.5, 0.0, 2.0, -1.0), strict=True)]


def reward_job(tiny: models.Base, folder: Path, rows: list[dict[str, Any]], *, lora: bool = False, **args: Any) -> Any:
    settings = make_config(folder / "x.toml", "reward", lora=lora, trainer=args)
    job = make_job(tiny, settings, rows, folder)
    job.tokenizer = learned.with_own_pad(job.tokenizer)
    job.model = start.load_scorer(settings, start.Start(tiny, tiny.sha256), job.tokenizer, torch.device("cpu"))
    return job


def built(monkeypatch: pytest.MonkeyPatch, job: base.Job) -> Any:
    """The trainer that `reward.train` makes, before its first step."""
    with monkeypatch.context() as patched:
        patched.setattr(offline, "run_trainer", lambda job, trainer, guard, recorder: trainer)
        return reward.train(job)


@torch.no_grad()
def score(model: Any, tokenizer: Any, prompt: str, completion: str) -> float:
    """The score in float64 at the EOS of one row, and so without padding; an adapter is merged."""
    whole = copy.deepcopy(model)
    if hasattr(whole, "peft_config"):
        whole = whole.merge_and_unload()
    fresh = type(whole)(whole.config)
    fresh.load_state_dict(whole.state_dict())
    ids = [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
    hidden = fresh.double().eval().model(torch.tensor([ids])).last_hidden_state
    return float(fresh.score(hidden)[0, -1, 0])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("margins", "centring"), [(False, 0.0), (True, 0.0), (True, 0.3)])
def test_loss_is_its_formula(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool, margins: bool, centring: float
) -> None:
    """Traps: a score read at padding or before EOS, a margin of the wrong sign, a head that the adapter leaves out."""
    rows = ROWS if margins else PAIRS
    job = reward_job(tiny_base, tmp_path, rows, lora=lora, center_rewards_coefficient=centring)
    trainer = built(monkeypatch, job)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("score" in name for name in trained)
    disturb(trainer.model, seed=1, size=0.1)
    losses = []
    for row in rows:
        c, r = (score(trainer.model, job.tokenizer, row["prompt"], row[k]) for k in ("chosen", "rejected"))
        losses.append(-math.log(1 / (1 + math.exp(-(c - r - row.get("margin", 0.0))))) + centring * (c + r) ** 2)
    assert max(losses) - min(losses) > 1e-2  # the rows tell formulas apart
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    trainer.model.train()
    assert float(trainer.compute_loss(trainer.model, batch).detach()) == pytest.approx(np.mean(losses), abs=2e-5)


def test_the_head_is_drawn_from_the_seed_and_the_rest_is_the_start(tiny_base: models.Base, tmp_path: Path) -> None:
    def scorer(seed: int) -> Any:
        settings = make_config(tmp_path / "x.toml", "reward", seed=seed)
        begin, tokenizer = start.Start(tiny_base, tiny_base.sha256), models.load_tokenizer(tiny_base)
        torch.manual_seed(99)  # whatever was drawn before
        return start.load_scorer(settings, begin, tokenizer, torch.device("cpu"))

    first, again, other = scorer(0), scorer(0), scorer(1)
    assert torch.equal(first.score.weight, again.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    policy = models.load_policy(tiny_base, "float32", "cpu")
    for name, weight in policy.model.state_dict().items():
        assert torch.equal(first.model.state_dict()[name], weight), name


def test_a_start_with_an_adapter_is_merged(tiny_base: models.Base, tmp_path: Path) -> None:
    """Trap: the sequence classifier of a LoRA run's base would know nothing of what the run has learned."""
    policy = models.add_lora(models.load_policy(tiny_base, "float32", "cpu"), config.Lora(rank=4, alpha=8.0))
    disturb(policy, seed=2, size=0.2)
    policy.save_pretrained(tmp_path / "adapter")
    begin = start.Start(tiny_base, "x", tmp_path / "adapter")
    settings = make_config(tmp_path / "x.toml", "reward")
    tokenizer = models.load_tokenizer(tiny_base)
    made = start.load_scorer(settings, begin, tokenizer, torch.device("cpu"))
    merged = policy.merge_and_unload()
    plain = models.load_policy(tiny_base, "float32", "cpu")
    for name, weight in merged.model.state_dict().items():
        torch.testing.assert_close(made.model.state_dict()[name], weight)
    assert not all(torch.equal(w, plain.model.state_dict()[n]) for n, w in merged.model.state_dict().items())


def test_sampled_rows_keep_their_tokens_and_texts_get_an_eos(tiny_base: models.Base, tmp_path: Path) -> None:
    sampled = PAIRS[0] | {"prompt_ids": [3, 4], "chosen_ids": [5, 1], "rejected_ids": [7, 8]}  # the second was cut
    job = reward_job(tiny_base, tmp_path, [sampled, PAIRS[1]])
    encode, eos = (lambda text: job.tokenizer(text)["input_ids"]), job.tokenizer.eos_token_id
    assert reward.training_rows(job, None) == [
        {"chosen_ids": [3, 4, 5, 1], "rejected_ids": [3, 4, 7, 8]},
        {"chosen_ids": [*encode("12+30=42"), eos], "rejected_ids": [*encode("12+30="), eos]},
    ]


def test_rows_that_are_too_long_are_told_and_not_cut(tiny_base: models.Base, tmp_path: Path) -> None:
    said: list[str] = []
    job = reward_job(tiny_base, tmp_path, PAIRS)
    job.hooks.warn = said.append
    kept = reward.training_rows(job, 7)
    assert [len(row["chosen_ids"]) for row in kept] == [6, 7]  # "1+2=3" and "7+7=14"
    assert said == ["2 of 4 pairs left out: longer than [trainer] max_length = 7"]
    with pytest.raises(UserError, match=r"each of 4 pairs is longer than \[trainer\] max_length = 3"):
        reward.training_rows(job, 3)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (LABELLED, "row 'a/True' has no column 'chosen', 'rejected'; reward needs prompt, chosen, rejected"),
        ([ROWS[0], PAIRS[1]], "row 'b' has no 'margin', which others have"),
        ([PAIRS[0] | {"margin": "1"}], "row 'a': 'margin' must be a number, found '1'"),
        ([PAIRS[0] | {"margin": True}], "row 'a': 'margin' must be a number, found True"),
    ],
)
def test_wrong_rows_are_named(tiny_base: models.Base, tmp_path: Path, rows: list, said: str) -> None:
    with pytest.raises(UserError, match=said):
        reward.train(reward_job(tiny_base, tmp_path, rows))


def test_a_step_that_is_not_finite_changes_nothing(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = reward_job(tiny_base, tmp_path, ROWS, max_steps=2)
    seen: list[dict[str, torch.Tensor]] = []
    compute = reward.DuetRewardTrainer.compute_loss

    def poisoned(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        if self.state.global_step == 0:
            inputs["margin"] = inputs["margin"] * float("nan")
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(reward.DuetRewardTrainer, "compute_loss", poisoned)
    outcome = reward.train(job)
    assert outcome.skipped == 1
    assert outcome.causes == ["step 1: margin of the batch"]
    assert all(torch.equal(seen[0][name], p) for name, p in seen[-1].items())
    after = dict(job.model.named_parameters())
    assert any(not torch.equal(seen[0][name], p) for name, p in after.items())


def test_held_out_scores_that_are_not_finite_stop_the_run(tiny_base: models.Base, tmp_path: Path) -> None:
    job = reward_job(tiny_base, tmp_path, PAIRS)
    job.model.score.weight.data[:] = math.inf
    with pytest.raises(RunFailed, match="8 of 8 scores of the reward model are not finite"):
        reward_run.ranked(job.model, job.tokenizer, PAIRS)


def test_statistics_are_numpys() -> None:
    scores = [(1.0, -0.5), (2.5, 0.25), (-1.0, 0.0)]
    made = reward_run.statistics(scores)
    assert (made.mean, made.std, made.n) == (pytest.approx(np.mean(scores)), pytest.approx(np.std(scores, ddof=1)), 6)


# --- whole runs

RUN = tiny_run(
    "{algorithm}",
    most=9,
    train_size=24,
    size=12,
    model="{lora}",
    data="{data}",
    rollout="samples = 32",
    trainer="per_device_train_batch_size = 4\nlearning_rate = 5e-3\nmax_steps = 5\nsave_steps = 2\n{trainer}",
    metric="lenient",
)
LORA = "[model.lora]\nrank = 4\nalpha = 8.0"


def write(name: str, algorithm: str = "reward", *, lora: bool = False, **given: str) -> Path:
    path = Path(f"{name}.toml")
    parts = {"data": "", "trainer": ""} | given
    text = RUN.format(name=name, algorithm=algorithm, lora=LORA if lora else "", **parts)
    path.write_text(text)
    return path


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_run_resumes_to_the_same_weights_and_leaves_a_whole_classifier(
    lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traps: other pairs after a resume, a head that no checkpoint holds, an adapter or a head lost from the result."""
    monkeypatch.chdir(tmp_path)
    assert train.main(write("whole", lora=lora)) == 0
    path = write("broken", lora=lora)
    train_until_ctrl_c(monkeypatch, path, 3)
    with monkeypatch.context() as patched:
        patched.setattr("rl.pairs.sample", lambda *_, **__: pytest.fail("sampled again"))
        assert train.main(path, resume=True) == 0
    folders = [Path("models/final", name) for name in ("whole", "broken")]
    for file in ("pairs.jsonl", "heldout.jsonl", "samples.jsonl", "reward_model.json"):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes(), file
    whole, broken = (load_file(folder / "model.safetensors") for folder in folders)
    assert whole.keys() == broken.keys()
    assert "score.weight" in whole
    for name, weight in whole.items():
        np.testing.assert_array_equal(broken[name], weight, err_msg=name)

    served = learned.load(folders[0], torch.device("cpu"), "test")
    samples = [json.loads(line) for line in (folders[0] / "samples.jsonl").read_text().splitlines()]
    held = [json.loads(line) for line in (folders[0] / "heldout.jsonl").read_text().splitlines()]
    again = reward_run.ranked(served.model, served.tokenizer, held)
    np.testing.assert_allclose(again, [sample["after"] for sample in samples], atol=1e-5)
    result = json.loads((folders[0] / "run.json").read_text())["result"]
    assert result["after"]["n"] == len(samples) == len(held)
    assert result["after"]["value"] == pytest.approx(np.mean([c > r for c, r in again]))
    assert result["strict"] == result["lenient"]
    assert served.statistics.mean == pytest.approx(np.mean(again), abs=1e-5)
    assert {row["id"] for row in held}.isdisjoint(row["id"] for row in pairs.read(folders[0]))
    assert "text-classification" in (folders[0] / "README.md").read_text()


def test_an_adapter_run_is_a_start_for_sampling_and_for_scoring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap: pairs of the base without its adapter, or an adapter that [model.lora] would have to repeat."""
    monkeypatch.chdir(tmp_path)
    write("sft", "sft", lora=True)
    text = write("judge").read_text()
    tiny = text[text.index("[model.tiny]") : text.index("[data]")]
    path = Path("judge.toml")
    path.write_text(text.replace('base = "tiny"', 'from = "sft.toml"').replace(tiny, ""))
    assert train.main(path) == 0
    final = Path("models/final/judge")
    assert not (final / "adapter_config.json").exists()
    assert pairs.read(final)[0]["provenance"]["run"] == "sft"
    assert learned.load(final, torch.device("cpu"), "test").statistics.n == 2 * len(
        (final / "heldout.jsonl").read_text().splitlines()
    )


def test_held_out_pairs_are_the_same_for_every_seed(tiny_base: models.Base, tmp_path: Path) -> None:
    """Trap: by the run's seed each seed would be measured on other pairs; by training's streams, on the same draws."""
    made = []
    for seed in (0, 1):
        settings = make_config(tmp_path / "x.toml", "reward", seed=seed)
        job = make_job(tiny_base, settings, data.build(settings).train, tmp_path / str(seed))
        begin = start.Start(tiny_base, tiny_base.sha256)
        policy = start.load_policy(make_config(tmp_path / "x.toml", "reward"), begin, job.device)  # the same for both
        sampler = start.load_sampler(settings, begin, policy, job.tokenizer, job.stop_ids)
        train_rows = pairs.for_job(job, sampler, {}, Display())
        held = pairs.heldout_for_job(job, job.train, sampler, {}, Display())
        assert job.tokens["prompt"] == 2 * 32 * sum(len(row["prompt"]) for row in job.train)
        assert pairs.heldout_for_job(job, [], None, {}, Display()) == held  # kept
        made.append((train_rows, held))
    assert made[0][1] == made[1][1]
    assert made[0][0] != made[1][0]
    assert made[0][0] != made[0][1]


def test_pairs_of_a_file_are_split_and_none_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward model is measured on pairs: a file of pairs alone is enough, with or without a file of held-out ones."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": str(a)} for a in range(20)]
    pairs.write(Path("rows.jsonl"), rows)
    pairs.write(Path("held.jsonl"), [row | {"prompt": "0" + row["prompt"]} for row in rows])
    monkeypatch.setattr("rl.pairs.sample", lambda *_, **__: pytest.fail("sampled"))
    path = write("split")
    arithmetic = 'source = "arithmetic"\nform = "char"\nmax_a = 9\nmax_b = 9\ntrain_size = 24\n'
    jsonl = 'source = "jsonl"\nform = "char"\npath = "rows.jsonl"\ntrain_size = 24\n'
    text = path.read_text().replace(arithmetic, jsonl)
    path.write_text(text.replace(jsonl, jsonl + 'heldout_path = "held.jsonl"\n'))
    two = data.build(config.load(path))
    assert (len(two.train), len(two.heldout)) == (20, 12)
    assert all(row["prompt"].startswith("0") and "chosen" in row for row in two.heldout)
    path.write_text(text)
    assert train.main(path) == 0
    record = json.loads(Path("models/final/split/run.json").read_text())
    assert (record["result"]["after"]["n"], record["data"]["rows"]["train"]) == (12, 8)
    assert not Path("models/final/split/pairs.jsonl").exists()
