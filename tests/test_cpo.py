"""CPO and SimPO: TRL's losses on our rows against few-line float64 references; what says nothing is refused."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from config_helper import GRPO, error_of, write
from preference_helper import LABELLED, PAIRS, built, disturb, logp, loss_of, make_config, make_job, plain

from rl import config, models
from rl.algorithms import cpo
from rl.errors import UserError

BETA, ALPHA, GAMMA = 0.7, 0.3, 0.4
TEXT = GRPO.replace('"grpo"', '"cpo"').replace("num_generations = 8\n", "")


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


# (sums of logprobs and lengths of chosen and rejected) -> loss of one pair without its cross-entropy
REFERENCES: dict[str, tuple[dict[str, Any], Any]] = {
    "sigmoid": ({}, lambda c, r, nc, nr: -log_sigmoid(BETA * (c - r))),
    "smoothed": (
        {"label_smoothing": 0.1},
        lambda c, r, nc, nr: -0.9 * log_sigmoid(BETA * (c - r)) - 0.1 * log_sigmoid(-BETA * (c - r)),
    ),
    "hinge": ({"loss_type": "hinge"}, lambda c, r, nc, nr: max(0.0, 1 - BETA * (c - r))),
    "ipo": ({"loss_type": "ipo"}, lambda c, r, nc, nr: (c / nc - r / nr - 1 / (2 * BETA)) ** 2),
    "simpo": (
        {"loss_type": "simpo", "simpo_gamma": GAMMA},
        lambda c, r, nc, nr: -log_sigmoid(BETA * (c / nc - r / nr) - GAMMA),
    ),
}


@pytest.mark.parametrize(
    ("kind", "alpha", "lora"),
    [*((kind, ALPHA, False) for kind in REFERENCES), ("sigmoid", 0.0, True), ("simpo", 0.0, True)],
)
def test_loss_is_its_formula(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, alpha: float, lora: bool
) -> None:
    """The cross-entropy is of the chosen completions' tokens, prompt and padding left out."""
    args, reference = REFERENCES[kind]
    settings = make_config(tmp_path / "x.toml", "cpo", lora=lora, trainer={"beta": BETA, "cpo_alpha": alpha, **args})
    job = make_job(tiny_base, settings, PAIRS, tmp_path)
    trainer = built(monkeypatch, cpo, job)
    disturb(trainer.model, seed=1)
    policy = plain(trainer.model)
    losses, sums, tokens = [], 0.0, 0
    for row in PAIRS:
        c, r = (logp(policy, job.tokenizer, row["prompt"], row[k]) for k in ("chosen", "rejected"))
        lengths = len(row["chosen"]) + 1, len(row["rejected"]) + 1
        losses.append(reference(c, r, *lengths))
        sums, tokens = sums + c, tokens + lengths[0]
    assert max(losses) - min(losses) > 1e-3
    assert loss_of(trainer, len(PAIRS)) == pytest.approx(np.mean(losses) - alpha * sums / tokens, abs=2e-5)


def test_alphapo_is_simpo_of_another_reward(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """r = (1 - p^-a) / a with p the mean probability of a token (geometric); no cross-entropy whatever `cpo_alpha`."""
    args = {"loss_type": "alphapo", "beta": BETA, "alpha": 0.2, "simpo_gamma": GAMMA, "cpo_alpha": ALPHA}
    job = make_job(tiny_base, make_config(tmp_path / "x.toml", "cpo", trainer=args), PAIRS, tmp_path)
    trainer = built(monkeypatch, cpo, job)
    disturb(trainer.model, seed=1)
    policy = plain(trainer.model)
    losses = []
    for row in PAIRS:
        rewards = []
        for k in ("chosen", "rejected"):
            mean = logp(policy, job.tokenizer, row["prompt"], row[k]) / (len(row[k]) + 1)
            rewards.append((1 - math.exp(mean) ** -0.2) / 0.2)
        losses.append(-log_sigmoid(BETA * (rewards[0] - rewards[1]) - GAMMA))
    assert loss_of(trainer, len(PAIRS)) == pytest.approx(np.mean(losses), abs=2e-5)


def test_a_step_changes_the_weights(tiny_base: models.Base, tmp_path: Path) -> None:
    job = make_job(tiny_base, make_config(tmp_path / "x.toml", "cpo", trainer={"max_steps": 1}), PAIRS, tmp_path)
    before = {n: p.detach().clone() for n, p in job.model.named_parameters()}
    outcome = cpo.train(job)
    assert (outcome.steps, outcome.skipped, outcome.failure) == (1, 0, None)
    assert any(not p.equal(before[n]) for n, p in job.model.named_parameters())


def test_wrong_rows_are_named_with_the_columns_they_lack(tiny_base: models.Base, tmp_path: Path) -> None:
    job = make_job(tiny_base, make_config(tmp_path / "x.toml", "cpo"), LABELLED, tmp_path)
    with pytest.raises(UserError, match="no column 'chosen', 'rejected'; cpo needs prompt, chosen, rejected"):
        cpo.train(job)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("trainer.beta=0", "[trainer] beta: found 0, valid: > 0"),
        ("trainer.loss_type=sigmoyd", "[trainer] loss_type: found 'sigmoyd'"),
        ("trainer.label_smoothing=0.5", "[trainer] label_smoothing: found 0.5, valid: ≥ 0 and < 0.5"),
        ("trainer.cpo_alpha=-1.0", "[trainer] cpo_alpha: found -1.0, valid: ≥ 0"),
        ("trainer.generate_during_eval=true", "[trainer] generate_during_eval: refused: the run measures"),
        ("trainer.f_divergence_type=forward_kl", "it is an argument of algorithm 'dpo', this is 'cpo'"),
    ],
)
def test_settings_that_are_none_of_its_loss_are_refused(tmp_path: Path, given: str, said: str) -> None:
    assert said in error_of(tmp_path, TEXT, given)


def test_smoothing_without_a_term_for_it_is_refused(tmp_path: Path) -> None:
    """Trap: TRL only warns and goes on without it."""
    text = TEXT + 'loss_type = "hinge"\n'
    assert "found 0.1 with loss_type 'hinge'" in error_of(tmp_path, text, "trainer.label_smoothing=0.1")
    assert config.load(write(tmp_path, text))
