"""ORPO: the paper's loss against a float64 reference, certain completions, our tokens in TRL's experimental trainer."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preference_helper import PAIRS, built, disturb, logp, loss_of, make_config, make_job, plain

from rl import models
from rl.algorithms import base, orpo
from rl.errors import UserError

BETA = 0.7


def job_of(tiny: models.Base, folder: Path, rows: list[dict[str, Any]], lora: bool = False, **args: Any) -> base.Job:
    return make_job(tiny, make_config(folder / "x.toml", "orpo", lora=lora, trainer=args), rows, folder)


def odds(p: float) -> float:
    return p / (1 - p)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_loss_is_the_papers(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool
) -> None:
    """Equations 3, 4, 6 and 7 with plain probabilities. Trap: TRL's cross-entropy is of the prompt too."""
    job = job_of(tiny_base, tmp_path, PAIRS, lora, beta=BETA)
    trainer = built(monkeypatch, orpo, job)
    disturb(trainer.model, seed=1)
    policy = plain(trainer.model)
    losses, prompts = [], []
    for row in PAIRS:
        c, r = (logp(policy, job.tokenizer, row["prompt"], row[k]) / (len(row[k]) + 1) for k in ("chosen", "rejected"))
        ratio = odds(math.exp(c)) / odds(math.exp(r))
        losses.append(-c + BETA * -math.log(ratio / (1 + ratio)))
        prompts.append(len(row["prompt"]))
    assert max(losses) - min(losses) > 1e-3  # the rows tell formulas apart
    assert loss_of(trainer, len(PAIRS)) == pytest.approx(np.mean(losses), abs=2e-5)
    assert len(set(prompts)) > 1  # so that padding is there


def test_a_certain_completion_has_a_finite_loss_and_gradient(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap: at probability 1 the odds are infinite and TRL's gradient is NaN, which a well-trained policy reaches."""
    trainer = built(monkeypatch, orpo, job_of(tiny_base, tmp_path, PAIRS))
    chosen = torch.tensor([0.0, -1e-9, -0.5], requires_grad=True)
    rejected = torch.tensor([-2.0, 0.0, -30.0], requires_grad=True)
    losses = trainer.odds_ratio_loss(chosen, rejected)[0]
    gradients = torch.autograd.grad(losses.sum(), [chosen, rejected])
    assert bool(torch.isfinite(losses).all())
    assert all(bool(torch.isfinite(g).all()) for g in gradients)
    c, r = math.exp(-0.5), math.exp(-30.0)
    ratio = odds(c) / odds(r)
    assert -float(losses[2].detach()) == pytest.approx(-0.1 * math.log(ratio / (1 + ratio)), rel=1e-4)


def test_sampled_rows_keep_their_tokens_and_long_ones_lose_their_end(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traps: TRL's own tokenisation would close a completion that was cut, and put a BOS before each prompt."""
    rows = [
        {"id": i, "prompt": "x", "chosen": "x", "rejected": "y"}
        | {"prompt_ids": [3, 4], "chosen_ids": [5, 6, 1], "rejected_ids": [7, 8, 9, 5]}
        for i in "ab"
    ]
    trainer = built(monkeypatch, orpo, job_of(tiny_base, tmp_path, rows, max_length=5))
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert batch["chosen_input_ids"].tolist() == [[3, 4, 5, 6, 1]] * 2
    assert batch["chosen_labels"].tolist() == [[-100, -100, 5, 6, 1]] * 2
    assert batch["rejected_input_ids"].tolist() == [[3, 4, 7, 8, 9]] * 2


def test_files_are_tokenised_as_for_dpo(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a BOS token TRL's trainer would train on prompts that the sampler never sees."""
    job = job_of(tiny_base, tmp_path, PAIRS)
    job.tokenizer.bos_token = "9"
    trainer = built(monkeypatch, orpo, job)
    row, tokenizer = trainer.train_dataset[0], job.tokenizer
    assert row["prompt_input_ids"] == tokenizer("1+2=")["input_ids"]
    assert row["chosen_input_ids"] == tokenizer("1+2=3")["input_ids"] + [tokenizer.eos_token_id]


def test_wrong_rows_are_named_with_the_columns_they_lack(tiny_base: models.Base, tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "1+1=", "completion": "2", "label": True}]
    with pytest.raises(UserError, match="no column 'chosen', 'rejected'; orpo needs prompt, chosen, rejected"):
        orpo.train(job_of(tiny_base, tmp_path, rows))
