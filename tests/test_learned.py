"""A reward model in the loop: a row's score whatever is beside it, the tokens it was trained on, fixed scaling."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from online_helper import inputs, make_job, make_trainer
from preference_helper import make_config
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import GRPOConfig

from rl import config, files, models, rewards, start
from rl.algorithms import grpo
from rl.errors import RunFailed, UserError
from rl.rewards import learned
from rl.rewards.functions import RewardFunction

CPU = torch.device("cpu")


def scorer(tiny: models.Base, folder: Path = Path()) -> tuple[Any, Any]:
    """A reward model with a head of order one, and its tokenizer."""
    tokenizer = learned.with_own_pad(models.load_tokenizer(tiny))
    begin = start.Start(tiny, tiny.sha256)
    model = start.load_scorer(make_config(folder / "x.toml", "reward"), begin, tokenizer, CPU)
    model.score.weight.data *= 50
    return model.eval(), tokenizer


@pytest.fixture
def saved(tiny_base: models.Base, tmp_path: Path) -> Path:
    """A reward model's folder as its run leaves it: mean 2, standard deviation 4."""
    model, tokenizer = scorer(tiny_base)
    folder = tmp_path / "judge"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    files.write_json(folder / learned.FILE, {"mean": 2.0, "std": 4.0, "n": 10})
    return folder


def alone(model: Any, ids: list[int]) -> float:
    """The score of one sequence in float64, read at its last token."""
    fresh = type(model)(model.config)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        hidden = fresh.double().eval().model(torch.tensor([ids])).last_hidden_state
        return float(fresh.score(hidden)[0, -1, 0])


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_score_does_not_depend_on_the_rows_beside_it(tiny_base: models.Base, batch_size: int) -> None:
    """Traps: padding that is read or attended to, rows handed back in order of length."""
    model, tokenizer = scorer(tiny_base)
    rng = np.random.default_rng(0)
    rows = [[int(i) for i in rng.integers(2, len(tokenizer), n)] for n in (5, 1, 9, 3, 9, 2, 7)]
    rows[3][-1] = tokenizer.eos_token_id
    wanted = [alone(model, row) for row in rows]
    assert np.ptp(wanted) > 1
    assert learned.scores(model, rows, batch_size) == pytest.approx(wanted, abs=1e-4)
    assert learned.scores(model, [], batch_size) == []


def test_scoring_leaves_the_model_as_it_was_and_takes_no_gradient(tiny_base: models.Base) -> None:
    model, _ = scorer(tiny_base)
    model.train()
    learned.scores(model, [[3, 4]])
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_sequence_beyond_the_context_stops_the_run(tiny_base: models.Base) -> None:
    model, _ = scorer(tiny_base)
    with pytest.raises(RunFailed, match="1025 tokens is longer than the reward model's context of 1024"):
        learned.scores(model, [[3] * 1025])


def test_padding_is_no_eos_where_the_tokenizer_pads_with_it(smollm2: models.Base) -> None:
    """Trap: SmolLM2 pads with its EOS; the score of a completion that ended would be read at the token before."""
    tokenizer = models.load_tokenizer(smollm2)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    own = learned.with_own_pad(tokenizer)
    assert own.pad_token_id != own.eos_token_id == tokenizer.eos_token_id
    assert len(own) == len(tokenizer)  # no token was added: the embedding stays as it is
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # the policy's is another object


def test_rewards_are_scaled_by_fixed_numbers_then_clipped(saved: Path, tiny_base: models.Base) -> None:
    tokenizer = models.load_tokenizer(tiny_base)
    prompts, said = ["1+2=", "9+9=", "7="], ["3", "18", ""]
    ids = [[*(tokenizer(text)["input_ids"] if text else []), 1] for text in said]
    asked = {"prompts": prompts, "completions": said, "completion_ids": ids, "answer": ["3", "18", "7"]}

    def served(**options: Any) -> np.ndarray:
        reward = learned.LearnedReward("x", **options)
        reward.open(saved, tokenizer, CPU)
        return np.array(reward(**asked))

    model = learned.load(saved, CPU, "x").model
    wanted = np.array([alone(model, [*tokenizer(p)["input_ids"], *i]) for p, i in zip(prompts, ids, strict=True)])
    np.testing.assert_allclose(served(normalise="none"), wanted, atol=1e-4)
    scaled = (wanted - 2) / 4
    np.testing.assert_allclose(served(), scaled, atol=1e-4)
    clip = float(np.median(np.abs(scaled)))
    clipped = served(clip=clip)
    np.testing.assert_allclose(clipped, np.clip(scaled, -clip, clip), atol=1e-4)
    assert np.abs(clipped - scaled).max() > 1e-2


def test_a_cut_completion_is_not_scored_as_one_that_ended(saved: Path, tiny_base: models.Base) -> None:
    tokenizer = models.load_tokenizer(tiny_base)
    reward = learned.LearnedReward("x", normalise="none")
    reward.open(saved, tokenizer, CPU)
    three = tokenizer("3")["input_ids"]
    ended, cut = reward(prompts=["1="] * 2, completions=["3"] * 2, completion_ids=[[*three, 1], three])
    assert abs(ended - cut) > 1e-3


def test_another_vocabulary_is_asked_in_words(saved: Path, tiny_base: models.Base, smollm2: models.Base) -> None:
    """Trap: the policy's token ids mean something else to a reward model with its own tokenizer."""
    policy, own = models.load_tokenizer(smollm2), models.load_tokenizer(tiny_base)
    reward = learned.LearnedReward("x", normalise="none")
    reward.open(saved, policy, CPU)
    ids = [[*policy("18")["input_ids"], policy.eos_token_id], policy("18")["input_ids"]]
    made = reward(prompts=["9+9="] * 2, completions=["18"] * 2, completion_ids=ids)
    model, plain = learned.load(saved, CPU, "x").model, own("9+9=18")["input_ids"]
    assert made == pytest.approx([alone(model, [*plain, own.eos_token_id]), alone(model, plain)], abs=1e-4)


def test_a_model_made_elsewhere_reads_one_text_and_has_no_scale(saved: Path, tiny_base: models.Base) -> None:
    (saved / learned.FILE).unlink()
    tokenizer = models.load_tokenizer(tiny_base)
    with pytest.raises(UserError, match=r"normalise = 'standard' needs reward_model.json .* set normalise = 'none'"):
        learned.LearnedReward("x").open(saved, tokenizer, CPU)
    reward = learned.LearnedReward("x", normalise="none")
    reward.open(saved, tokenizer, CPU)
    whole = tokenizer("1+2=3")["input_ids"]
    model = learned.load(saved, CPU, "x").model
    made = reward(prompts=["1+2="], completions=["3"], completion_ids=[[9, 9]])
    assert made == pytest.approx([alone(model, [*whole, tokenizer.eos_token_id])], abs=1e-4)


@pytest.mark.parametrize(
    ("content", "said"),
    [("{}", "not what a reward model's run writes"), ('{"mean": 1, "std": 0, "n": 3}', "std is 0.0: the model gives")],
)
def test_broken_statistics_are_one_line(saved: Path, content: str, said: str) -> None:
    (saved / learned.FILE).write_text(content)
    with pytest.raises(UserError, match=said):
        learned.load(saved, CPU, "x")


def test_what_is_no_reward_model_is_refused(saved: Path, tiny_base: models.Base) -> None:
    with pytest.raises(UserError, match=r"x: .* holds LlamaForCausalLM, no reward model"):
        learned.load(tiny_base.path, CPU, "x")
    shape = json.loads((saved / "config.json").read_text())
    two = LlamaConfig(**shape | {"id2label": None, "label2id": None, "num_labels": 2})
    LlamaForSequenceClassification(two).save_pretrained(saved)
    with pytest.raises(UserError, match="gives 2 scores, valid: 1"):
        learned.load(saved, CPU, "x")


def test_a_reward_that_was_never_opened_stops_the_run() -> None:
    built = rewards.build((config.Reward(name="model", options={"model": "judge", "clip": 2.0, "batch_size": 8}),))
    assert (built[0].function.clip, built[0].function.batch_size) == (2.0, 8)
    with pytest.raises(RunFailed, match="asked before it was loaded"):
        built[0](["1="], ["1"], completion_ids=[[3]])


# --- several rewards in TRL's trainer


def sevens(prompts: list, completions: list, **_: Any) -> list[float]:
    return [float(c.count("7")) for c in completions]


def lengths(prompts: list, completions: list, **_: Any) -> list[float]:
    return [100.0 * len(c) for c in completions]


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("how", ["sum_then_normalize", "normalize_then_sum"])
def test_advantages_of_two_rewards_are_their_formula(
    tiny_base: models.Base, tmp_path: Path, how: str, weight: float
) -> None:
    """GDPO (Liu et al. 2026, arXiv 2601.05242): each reward by its own group's spread, then the sum over the batch.

    Traps: the reward of the larger scale decides alone; a reward of weight 0 that is trained on, or is not logged.
    """
    job = make_job(tiny_base, tmp_path, "grpo", multi_objective_aggregation=how, per_device_train_batch_size=16)
    job.rewards = [RewardFunction("sevens", 1.0, sevens), RewardFunction("lengths", weight, lengths)]
    trainer = make_trainer(job, grpo.DuetGRPOTrainer, GRPOConfig)
    batch = trainer._generate_and_score_completions(inputs(job, 4))
    texts = job.tokenizer.batch_decode(trainer.completions, skip_special_tokens=True)
    both = np.array([sevens([], texts), lengths([], texts)]).T.reshape(4, 4, 2)  # prompt, completion, reward
    weights = np.array([1.0, weight])
    if how == "sum_then_normalize":
        total = both @ weights
        wanted = (total - total.mean(1, keepdims=True)) / (total.std(1, ddof=1, keepdims=True) + 1e-4)
    else:
        scaled = (both - both.mean(1, keepdims=True)) / (both.std(1, ddof=1, keepdims=True) + 1e-4)
        total = (scaled @ weights).ravel()
        wanted = (total - total.mean()) / (total.std(ddof=1) + 1e-4)
    assert np.ptp(wanted) > 0.5
    np.testing.assert_allclose(batch["advantages"].numpy().ravel(), wanted.ravel(), atol=1e-4)
    logged = trainer._metrics["train"]
    assert logged["rewards/lengths/mean"][-1] == pytest.approx(both[..., 1].mean(), rel=1e-5)
    assert logged["reward"][-1] == pytest.approx((both @ weights).mean(), rel=1e-5)
