"""SFT: the loss is of completion tokens, and packing changes neither it nor what a token sees."""

from pathlib import Path
from typing import Any

import pytest
import torch
from config_helper import GRPO, error_of, write
from preference_helper import built, disturb, logp, make_config, make_job, plain

from rl import config, models
from rl.algorithms import base, sft
from rl.errors import UserError

ROWS = [
    {"id": str(i), "prompt": f"{a}+{b}=", "completion": str(a + b)}
    for i, (a, b) in enumerate([(1, 2), (12, 30), (7, 7), (99, 9), (5, 0), (40, 41), (3, 98)])
]
PACKED = {"packing": True, "max_length": 24}
TEXT = GRPO.replace('"grpo"', '"sft"').replace("num_generations = 8\n", "")


def job_of(tiny: models.Base, folder: Path, lora: bool = False, **args: Any) -> base.Job:
    settings = make_config(folder / "x.toml", "sft", lora=lora, trainer={"max_steps": 1, **args})
    return make_job(tiny, settings, ROWS, folder)


def reference(job: base.Job, policy: Any) -> float:
    """Mean cross-entropy of a completion token (EOS with them), row by row in float64."""
    sums = [logp(policy, job.tokenizer, row["prompt"], row["completion"]) for row in ROWS]
    return -sum(sums) / sum(len(row["completion"]) + 1 for row in ROWS)


def whole_batch(trainer: Any) -> dict[str, Any]:
    return trainer.data_collator(list(trainer.train_dataset))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_loss_is_of_the_completions_tokens(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool, packed: bool
) -> None:
    """Traps of packing: a token that sees the example before its own, positions that run on, a first token scored by
    the last example's end."""
    job = job_of(tiny_base, tmp_path, lora, **(PACKED if packed else {}))
    trainer = built(monkeypatch, sft, job)
    disturb(trainer.model, seed=1, size=0.2)
    expected = reference(job, plain(trainer.model))
    batch = whole_batch(trainer)
    assert batch["input_ids"].shape[0] == (1 if packed else len(ROWS))
    trainer.model.eval()
    loss = float(trainer.compute_loss(trainer.model, batch).detach())
    assert loss == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_example_sees_no_other(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    """One example replaced by other tokens: its own logits change, the others' by not one bit."""
    job = job_of(tiny_base, tmp_path, **PACKED)
    job.model.set_attn_implementation(attention)
    trainer = built(monkeypatch, sft, job)
    batch = {name: value for name, value in whole_batch(trainer).items() if name != "labels"}
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) == len(ROWS)
    trainer.model.eval()
    other = batch["input_ids"].clone()
    inside = slice(starts[1], starts[2])
    other[0, inside] = (other[0, inside] + 1) % 8
    with torch.no_grad():
        before = trainer.model(**batch, use_cache=False).logits[0]
        after = trainer.model(**batch | {"input_ids": other}, use_cache=False).logits[0]
    changed = (before != after).any(-1)
    assert bool(changed[inside].all())
    changed[inside] = False
    assert not bool(changed.any())


def test_packing_trains_and_is_the_same_for_the_same_seed(tiny_base: models.Base, tmp_path: Path) -> None:
    results = []
    for _ in range(2):
        job = job_of(tiny_base, tmp_path, max_steps=4, per_device_train_batch_size=1, **PACKED)
        before = {n: p.detach().clone() for n, p in job.model.named_parameters()}
        outcome = sft.train(job)
        assert (outcome.steps, outcome.skipped, outcome.failure) == (4, 0, None)
        results.append({n: p.detach() for n, p in job.model.named_parameters()})
        assert any(not torch.equal(before[n], p) for n, p in results[-1].items())
    for name, weight in results[0].items():
        assert torch.equal(weight, results[1][name]), name


def test_packing_that_mixes_examples_is_refused(tmp_path: Path) -> None:
    packed = TEXT + "packing = true\n"
    assert config.load(write(tmp_path, packed))
    assert "[trainer] packing_strategy: found 'wrapped', where examples attend to their neighbours, valid: bfd" in (
        error_of(tmp_path, packed, "trainer.packing_strategy=wrapped")
    )
    assert "[trainer] padding_free: found true without packing" in error_of(tmp_path, TEXT, "trainer.padding_free=true")


def test_data_without_completions_is_named(tiny_base: models.Base, tmp_path: Path) -> None:
    job = job_of(tiny_base, tmp_path)
    job.train = [*ROWS, {"id": "q", "prompt": "1+1=", "answer": "2"}]
    with pytest.raises(UserError, match="no gold completion in row 'q'; sft needs the columns prompt and completion"):
        sft.train(job)
