"""Online DPO: which completions make a pair, the loss of those pairs, the step that is shared out, exact resume."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from config_helper import GRPO, error_of, tiny_run, write
from hypothesis import given
from hypothesis import strategies as st
from online_helper import logged, make_job
from preference_helper import disturb, plain
from run_helper import train_until_ctrl_c
from safetensors.numpy import load_file

from rl import config, models, train
from rl.algorithms import base, online_dpo
from rl.algorithms.online_dpo import best_and_worst

BETA = 0.7
NO_GROUPS = {"num_generations": None, "steps_per_generation": None}
TEXT = GRPO.replace('"grpo"', '"online_dpo"').replace("num_generations = 8\n", "")


def job_of(tiny: models.Base, folder: Path, reward: Any = None, engine: str = "mlx", **args: Any) -> base.Job:
    given_ = {"reward": reward} if reward else {}
    job = make_job(tiny, folder, "online_dpo", engine=engine, rollout={"samples": 4}, beta=BETA, **given_, **args)
    for name in NO_GROUPS:
        del job.config.trainer.args[name]
    return job


def built(monkeypatch: pytest.MonkeyPatch, job: base.Job) -> Any:
    with monkeypatch.context() as patched:
        patched.setattr(online_dpo, "run_trainer", lambda job, trainer, guard, recorder: trainer)
        trainer = online_dpo.train(job)
    trainer.model.train()
    return trainer


@given(st.lists(st.one_of(st.floats(-5, 5), st.just(math.nan)), min_size=1, max_size=6))
def test_the_pair_is_the_highest_and_the_lowest_or_none(scores: list[float]) -> None:
    known = [s for s in scores if not math.isnan(s)]
    found = best_and_worst(scores)
    if not known or max(known) - min(known) <= 1e-6:
        assert found is None
        return
    best, worst = found
    assert (scores[best], scores[worst]) == (max(known), min(known))
    assert (best, worst) == (scores.index(max(known)), scores.index(min(known)))


def test_ties_within_rounding_are_no_preference() -> None:
    assert best_and_worst([0.1 + 0.2, 0.3]) is None
    assert best_and_worst([1.0, math.nan, math.nan]) is None
    assert best_and_worst([0.0, 1.0, 1.0, 0.0]) == (1, 0)


def test_loss_is_dpos_on_the_best_and_worst_of_what_was_sampled(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64, from the rollout's tokens: prompts whose completions tie have no part, nor in the mean."""
    values = [0.0, 1.0, 2.0, -1.0, 3.0, 3.0, 3.0, 3.0, 0.5, 0.0, 0.0, 0.0]
    job = job_of(tiny_base, tmp_path, lambda prompts, completions, **c: values)
    start = plain(job.model)
    trainer = built(monkeypatch, job)
    disturb(trainer.model, seed=1)
    policy = plain(trainer.model)
    batches, _ = trainer.get_batch_samples(iter([job.train[:3]]), 1, torch.device("cpu"))
    assert len(batches) == 1
    loss = float(trainer.compute_loss(trainer.model, batches[0]).detach())

    def logp(model: Any, prompt: list[int], said: list[int]) -> float:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]
        return float(logits.log_softmax(-1).gather(1, torch.tensor(said)[:, None]).sum())

    losses = []
    for row, best, worst in ((0, 2, 3), (2, 8, 9)):
        prompt = job.tokenizer(job.train[row]["prompt"])["input_ids"]
        margins = [
            logp(policy, prompt, trainer.completions[i]) - logp(start, prompt, trainer.completions[i])
            for i in (best, worst)
        ]
        losses.append(math.log(1 + math.exp(-BETA * (margins[0] - margins[1]))))
    assert loss == pytest.approx(np.mean(losses), abs=2e-5)
    metrics = trainer._metrics["train"]
    assert metrics["pairs/share"] == [2 / 3]
    assert metrics["reward"] == [pytest.approx(np.mean(values))]


def test_the_rollout_is_of_the_policy_as_it_is_now(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap: without the hand-over the sampler would stay the start, and online would be offline."""
    job = job_of(tiny_base, tmp_path)
    trainer = built(monkeypatch, job)
    said = []
    for _ in range(2):
        trainer.get_batch_samples(iter([job.train[:8]]), 1, torch.device("cpu"))
        said.append(trainer.completions)
        with torch.no_grad():
            for p in trainer.model.parameters():
                p.mul_(3.0)
    assert said[0] != said[1]


def test_micro_batches_weigh_by_their_pairs(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same four prompts in one batch and in two, where one half has three pairs' worth and the other none or one:
    gradients are equal. Trap: a mean of means would let a lonely pair count as much as all others."""
    values = [0.0, 1.0, 0.0, 0.0] * 2 + [1.0, 1.0, 1.0, 1.0] + [0.0, 0.0, 0.0, 2.0]
    gradients = []
    for sizes in ((4,), (2, 2), (2, 1, 1)):
        job = job_of(tiny_base, tmp_path, lambda prompts, completions, **c: values)
        trainer = built(monkeypatch, job)
        disturb(trainer.model, seed=1)
        rows = iter(job.train)
        given_ = iter([[next(rows) for _ in range(size)] for size in sizes])
        batches, _ = trainer.get_batch_samples(given_, len(sizes), torch.device("cpu"))
        assert len(batches) == len(sizes)
        trainer.current_gradient_accumulation_steps = len(sizes)
        trainer.model.zero_grad()
        for batch in batches:
            trainer.training_step(trainer.model, batch)
        gradients.append([p.grad.clone() for p in trainer.model.parameters()])
    for other in gradients[1:]:
        for mine, theirs in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)
    assert max(float(g.abs().max()) for g in gradients[0]) > 1e-3


@pytest.mark.parametrize("engine", ["mlx", "torch"])
def test_a_run_changes_weights_and_logs_its_rollouts(tiny_base: models.Base, tmp_path: Path, engine: str) -> None:
    job = job_of(tiny_base, tmp_path, engine=engine, max_steps=3)
    rows = logged(job)
    before = {n: p.detach().clone() for n, p in job.model.named_parameters()}
    outcome = online_dpo.train(job)
    assert (outcome.steps, outcome.failure, outcome.skipped) == (3, None, 0)
    assert any(not torch.equal(before[n], p) for n, p in job.model.named_parameters())
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # at the start the policy is its reference
    for row in rows:
        assert 0 < row["pairs/share"] <= 1
        assert {"reward", "completions/mean_length", "time/rollout", "time/reward"} <= row.keys()
    assert job.tokens["completion"] >= 3 * 8 * 4


def test_steps_without_a_preference_leave_the_weights(tiny_base: models.Base, tmp_path: Path) -> None:
    """All rewards equal at every step: gradient 0, no NaN from an empty mean."""
    job = job_of(tiny_base, tmp_path, lambda prompts, completions, **c: [1.0] * len(completions), weight_decay=0.0)
    rows = logged(job)
    before = {n: p.detach().clone() for n, p in job.model.named_parameters()}
    outcome = online_dpo.train(job)
    assert (outcome.steps, outcome.failure, outcome.skipped) == (2, None, 0)
    assert [row["pairs/share"] for row in rows] == [0.0, 0.0]
    for name, weight in job.model.named_parameters():
        assert torch.equal(before[name], weight), name


def test_logits_that_are_not_finite_skip_the_step(tiny_base: models.Base, tmp_path: Path) -> None:
    job = job_of(tiny_base, tmp_path)
    generate, calls = job.sampler.generate, []

    def breaking(*args: Any, **kwargs: Any) -> list[Any]:
        out = generate(*args, **kwargs)
        calls.append(len(out))
        if len(calls) == 1:
            out[0] = type(out[0])([job.stop_ids[0]], [math.nan], finite=False)
        return out

    job.sampler.generate = breaking
    outcome = online_dpo.train(job)
    assert (outcome.steps, outcome.skipped) == (2, 1)
    assert "logits of the sampler in 1 of 32 completions" in outcome.causes[0]


def test_settings(tmp_path: Path) -> None:
    assert config.load(write(tmp_path, TEXT)).trainer.algorithm == "online_dpo"
    assert "'online_dpo' needs a reward" in error_of(
        tmp_path, TEXT.replace(TEXT[TEXT.index("[[reward]]") : TEXT.index("[trainer]")], "")
    )
    assert "precompute_ref_log_probs: refused" in error_of(tmp_path, TEXT, "trainer.precompute_ref_log_probs=true")
    assert "sync_ref_model: refused" in error_of(tmp_path, TEXT, "trainer.sync_ref_model=true")
    assert "loss_type: found 'x'" in error_of(tmp_path, TEXT, "trainer.loss_type=x")
    assert "label_smoothing: found 0.7" in error_of(
        tmp_path, TEXT + 'loss_type = "robust"\n', "trainer.label_smoothing=0.7"
    )
    assert "it is an argument of algorithm 'grpo'" in error_of(tmp_path, TEXT, "trainer.num_generations=4")


RUN = tiny_run(
    "online_dpo",
    most=9,
    train_size=20,
    size=8,
    rollout="samples = 4",
    rewards='[[reward]]\nname = "length"\ntarget = 1',
    trainer="per_device_train_batch_size = 4\ngradient_accumulation_steps = 2\nlearning_rate = 5e-3\n"
    "max_steps = 7\nsave_steps = 2",
)


def test_a_run_resumes_to_the_same_weights_in_another_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the third epoch of 20 rows, whose last step has one micro-batch of two."""
    monkeypatch.chdir(tmp_path)
    for name in ("whole", "broken"):
        Path(f"{name}.toml").write_text(RUN.format(name=name))
    assert train.main(Path("whole.toml")) == 0
    train_until_ctrl_c(monkeypatch, Path("broken.toml"), 5)
    assert train.main(Path("broken.toml"), resume=True) == 0
    folders = [Path("models/final", name) for name in ("whole", "broken")]
    whole, broken = (load_file(f / "model.safetensors") for f in folders)
    for name, weight in whole.items():
        np.testing.assert_array_equal(broken[name], weight, err_msg=name)
    records = [json.loads((f / "run.json").read_text()) for f in folders]
    assert records[0]["tokens"] == records[1]["tokens"]
    rows = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in folders]
    assert [row["reward"] for row in rows[0]] == [row["reward"] for row in rows[1]]
    assert len({row["reward"] for row in rows[0]}) > 1
