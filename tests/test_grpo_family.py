"""Each recipe over GRPO: TRL's loss with its arguments against the paper's formula, in float64, and DAPO's sampling."""

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from config_helper import GRPO, error_of, write
from online_helper import inputs, logged, make_job, make_trainer
from trl import GRPOConfig
from trl.rewards import get_soft_overlong_punishment

from rl import algorithms, config, models, rewards
from rl.algorithms import dynamic_sampling, grpo

B, T, LENGTH = 6, 5, 7
# one token, truncated (no padding) and between, as completions come
MASK = torch.tensor([[1] * n + [0] * (T - n) for n in (5, 1, 3, 2, 5, 4)])
Terms = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]], torch.Tensor]


def batch(seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logprobs to differentiate, and a batch whose ratios go far beyond every clip."""
    torch.manual_seed(seed)
    logps = (torch.randn(B, T, dtype=torch.float64) - 2).requires_grad_()
    old = logps.detach() + 0.5 * torch.randn(B, T, dtype=torch.float64)
    return logps, {
        "prompt_ids": torch.zeros(B, 2, dtype=torch.long),
        "prompt_mask": torch.ones(B, 2, dtype=torch.long),
        "completion_ids": torch.zeros(B, T, dtype=torch.long),
        "completion_mask": MASK,
        "advantages": torch.tensor([1.3, -0.7, 0.0, -1.1, 0.4, 0.9], dtype=torch.float64),
        "old_per_token_logps": old,
        "importance_sampling_ratio": torch.rand(B, T, dtype=torch.float64) + 0.5,
        "num_items_in_batch": MASK.sum(),
    }


def loss_of(trainer: Any, logps: torch.Tensor, values: dict[str, torch.Tensor]) -> torch.Tensor:
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (logps, torch.zeros(B, T), None)
    return trainer._compute_loss(trainer.model, values)


def clipped(low: float, high: float) -> Terms:
    def terms(logps: torch.Tensor, ratio: torch.Tensor, advantage: torch.Tensor, _: dict) -> torch.Tensor:
        return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)

    return terms


def weight_only(most: float) -> Terms:
    return lambda logps, ratio, advantage, _: -ratio.clamp(max=most).detach() * advantage * logps


def gate(logps: torch.Tensor, ratio: torch.Tensor, advantage: torch.Tensor, _: dict) -> torch.Tensor:
    tau = torch.where(advantage > 0, 1.0, 1.05).double()  # TRL holds 1.05 in float32
    return -4 / tau / (1 + torch.exp(-tau * (ratio - 1))) * advantage


def of_sequence(logps: torch.Tensor, ratio: torch.Tensor, advantage: torch.Tensor, v: dict) -> torch.Tensor:
    """s_i, one number a sequence, in every token's place."""
    difference = (logps - v["old_per_token_logps"]) * MASK
    s = (difference.sum(1) / MASK.sum(1)).exp()[:, None]
    return clipped(3e-4, 4e-4)(logps, s, advantage, v).expand(B, T)


def by_sequence(x: torch.Tensor) -> torch.Tensor:
    return ((x * MASK).sum(1) / MASK.sum(1)).mean()


def by_token(x: torch.Tensor) -> torch.Tensor:
    return (x * MASK).sum() / MASK.sum()


PAPERS: dict[str, tuple[Terms, Callable[[torch.Tensor], torch.Tensor]]] = {
    "dr_grpo": (clipped(0.2, 0.2), lambda x: (x * MASK).sum() / (B * LENGTH)),
    "dapo": (clipped(0.2, 0.28), by_token),
    "gspo": (of_sequence, by_sequence),
    "cispo": (weight_only(5.0), by_token),
    "sapo": (gate, by_sequence),
}


@pytest.fixture(scope="module")
def trainer_of(tiny_base: models.Base, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def get(algorithm: str) -> Any:
        if algorithm not in made:
            job = make_job(
                tiny_base, tmp_path_factory.mktemp("a"), algorithm, rollout={"max_completion_length": LENGTH}
            )
            kind = dynamic_sampling.DynamicTrainer if algorithm == "dapo" else grpo.DuetGRPOTrainer
            made[algorithm] = make_trainer(job, kind, GRPOConfig)
        return made[algorithm]

    return get


@pytest.mark.parametrize("algorithm", PAPERS)
def test_loss_and_gradient_are_the_papers(trainer_of: Callable[[str], Any], algorithm: str) -> None:
    """With ratios beyond the clip on both sides: CISPO's weight has no gradient of its own, its token keeps one."""
    terms, mean = PAPERS[algorithm]
    for seed in range(3):
        logps, values = batch(seed)
        found = loss_of(trainer_of(algorithm), logps, values)
        (gradient,) = torch.autograd.grad(found, logps)
        mine = logps.detach().clone().requires_grad_()
        ratio = (mine - values["old_per_token_logps"]).exp()
        weighted = terms(mine, ratio, values["advantages"][:, None], values) * values["importance_sampling_ratio"]
        expected = mean(weighted)
        (reference,) = torch.autograd.grad(expected, mine)
        assert found.dtype == torch.float64
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)
        torch.testing.assert_close(gradient, reference, atol=1e-14, rtol=1e-10)
        assert not gradient[MASK == 0].any()
        assert not gradient[2].any()  # advantage 0


def test_clip_higher_lets_an_unlikely_token_grow_between_1_2_and_1_28(trainer_of: Callable[[str], Any]) -> None:
    """The asymmetry: up to 1.28 upwards, still 0.8 downwards; GRPO's own clip stops both at 0.2."""
    for ratio, advantage, moves in [(1.25, 1, True), (1.3, 1, False), (0.81, -1, True), (0.75, -1, False)]:
        logps, values = batch()
        values["old_per_token_logps"] = logps.detach() - math.log(ratio)
        values["advantages"] = torch.full((B,), float(advantage), dtype=torch.float64)
        (gradient,) = torch.autograd.grad(loss_of(trainer_of("dapo"), logps, values), logps)
        assert bool(gradient[MASK == 1].any()) == moves


@pytest.mark.parametrize("algorithm", PAPERS)
def test_on_policy_the_gradient_is_the_policy_gradient(trainer_of: Callable[[str], Any], algorithm: str) -> None:
    """At ratio 1 every member is -A times the gradient of log pi, whatever its clip or gate, over its own divisor."""
    logps, values = batch()
    values["old_per_token_logps"] = logps.detach().clone()
    values["importance_sampling_ratio"] = torch.ones(B, T, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(loss_of(trainer_of(algorithm), logps, values), logps)
    lengths = MASK.sum(1, keepdim=True)
    divisor = {"dr_grpo": B * LENGTH, "gspo": B * lengths, "sapo": B * lengths}.get(algorithm, MASK.sum())
    expected = -values["advantages"][:, None] * MASK / divisor
    torch.testing.assert_close(gradient, expected.double(), atol=1e-14, rtol=1e-10)


def alike(prompts: list, completions: list, **columns: Any) -> list[float]:
    return [0.1] * len(completions)


@pytest.mark.parametrize(("algorithm", "scaled"), [("dr_grpo", False), ("gspo", True), ("cispo", True), ("sapo", True)])
def test_advantages_of_a_rollout(tiny_base: models.Base, tmp_path: Path, algorithm: str, scaled: bool) -> None:
    """Dr. GRPO's are not divided by the group's spread; a group whose rewards are all equal has none."""
    given = [0.0, 1.0, 1.0, 4.0, 0.1, 0.1, 0.1, 0.1]
    job = make_job(tiny_base, tmp_path, algorithm, reward=lambda prompts, completions, **c: given)
    found = make_trainer(job, grpo.DuetGRPOTrainer, GRPOConfig)._generate_and_score_completions(inputs(job, 2))
    first = torch.tensor(given[:4])
    expected = (first - first.mean()) / (first.std() + 1e-4 if scaled else 1.0)
    torch.testing.assert_close(found["advantages"], torch.cat([expected, torch.zeros(4)]), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("algorithm", algorithms.RECIPES)
def test_a_run_takes_the_recipes_arguments_and_changes_weights(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    """Two steps to a rollout: sampler and trainer stay together, and the arguments TRL gets are the recipe's."""
    job = make_job(tiny_base, tmp_path, algorithm, max_steps=4, steps_per_generation=2, learning_rate=1e-3)
    rows, taken = logged(job), {}
    run = grpo.online.run

    def spied(job: Any, settings: Any, trainer_class: Any) -> Any:
        taken.update(vars(settings))
        return run(job, settings, trainer_class)

    monkeypatch.setattr(grpo.online, "run", spied)
    before = {n: p.detach().clone() for n, p in job.model.named_parameters()}
    outcome = importlib.import_module(f"rl.algorithms.{algorithm}").train(job)
    assert (outcome.steps, outcome.failure, outcome.skipped) == (4, None, 0)
    recipe = algorithms.defaults(algorithm)
    assert recipe
    assert {name: taken[name] for name in recipe} == recipe
    assert any(not torch.equal(before[n], p) for n, p in job.model.named_parameters())
    for row in (rows[0], rows[2]):  # rollouts
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
        assert row["sampling/ess"] == pytest.approx(1.0, abs=1e-4)


def test_a_kl_term_works_with_a_reference_of_its_own(tiny_base: models.Base, tmp_path: Path) -> None:
    """Full fine-tuning with beta > 0: TRL's copy of the start has a head without entropy, which once broke the step."""
    job = make_job(tiny_base, tmp_path, "dr_grpo", beta=0.05)
    rows = logged(job)
    assert grpo.train(job).steps == 2
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert rows[1]["kl"] > 1e-6


# --- DAPO's sampling


def test_varied_finds_groups_with_a_reward_that_differs_and_leaves_out_what_is_missing() -> None:
    nan = math.nan
    rewards_ = torch.tensor([[0.0, 1], [0, 1], [0, 1], [1, 1], [0.1, nan], [0.1, nan], [nan, 0.5], [nan, 0.7]])
    assert dynamic_sampling.varied(rewards_, 2).tolist() == [False, True, False, True]
    assert dynamic_sampling.varied(rewards_[:, :1], 2).tolist() == [False, True, False, False]
    assert not dynamic_sampling.varied(torch.full((4, 1), 0.1), 4).any()  # a mean of floats is not exactly 0.1
    assert not dynamic_sampling.varied(torch.full((4, 2), nan), 4).any()


def test_join_pads_prompts_left_and_completions_right() -> None:
    def part(prompt: int, completion: int, value: int) -> dict[str, torch.Tensor]:
        ones = torch.ones(1, completion, dtype=torch.long)
        return {
            "prompt_ids": torch.full((1, prompt), value),
            "completion_ids": ones * value,
            "completion_mask": ones,
            "old_per_token_logps": -ones.float(),
            "advantages": torch.tensor([float(value)]),
            "num_items_in_batch": torch.tensor(99),
        }

    joined = dynamic_sampling.join([part(2, 1, 5), part(1, 3, 6)], pad_token=9)
    assert joined["prompt_ids"].tolist() == [[5, 5], [9, 6]]
    assert joined["completion_ids"].tolist() == [[5, 9, 9], [6, 6, 6]]
    assert joined["completion_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert joined["old_per_token_logps"].tolist() == [[-1, 0, 0], [-1, -1, -1]]
    assert joined["advantages"].tolist() == [5, 6]
    assert joined["num_items_in_batch"].item() == 4


def test_dynamic_sampling_replaces_uniform_groups_and_keeps_the_rest(tiny_base: models.Base, tmp_path: Path) -> None:
    """Each call scores one group as uniform, until the third; every row of the batch then has a part in the loss."""
    calls: list[int] = []

    def reward(prompts: list, completions: list, **columns: Any) -> list[float]:
        calls.append(len(completions))
        uniform = [0.5] * 4 if len(calls) < 3 else []
        rest = len(completions) - len(uniform)
        return uniform + [float(i % 4) + 10 * len(calls) for i in range(rest)]

    # no masking: the random model seldom ends a completion by itself
    job = make_job(tiny_base, tmp_path, "dapo", reward=reward, mask_truncated_completions=False)
    trainer = make_trainer(job, dynamic_sampling.DynamicTrainer, GRPOConfig)
    given = inputs(job, 2)
    found = trainer._generate_and_score_completions(given)
    assert calls == [8, 4, 4]  # only what is missing is sampled again
    assert found["prompt_ids"].shape[0] == 8
    spread = torch.tensor([0.0, 1, 2, 3]) - 1.5
    expected = (spread / (spread.std() + 1e-4)).repeat(2)
    torch.testing.assert_close(found["advantages"], expected)
    assert found["num_items_in_batch"] == found["completion_mask"].sum()
    assert trainer._metrics["train"]["dynamic_sampling/rounds"] == [3.0]
    assert trainer._metrics["train"]["dynamic_sampling/varied_at_first"] == [0.5]
    # what the loss will compare with is of these very tokens
    ids = torch.cat([found["prompt_ids"], found["completion_ids"]], 1)
    mask = torch.cat([found["prompt_mask"], found["completion_mask"]], 1)
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    columns = found["completion_ids"].shape[1]
    logps = logits.gather(2, ids[:, 1:, None]).squeeze(2)[:, -columns:]
    torch.testing.assert_close(
        found["old_per_token_logps"] * found["completion_mask"], logps * found["completion_mask"], atol=1e-5, rtol=0
    )


def test_dynamic_sampling_ends_where_nothing_can_be_learnt(tiny_base: models.Base, tmp_path: Path) -> None:
    """All-equal rewards for ever: ROUNDS further rollouts, a whole batch, advantages 0 and not NaN."""
    job = make_job(tiny_base, tmp_path, "dapo", reward=alike)
    trainer = make_trainer(job, dynamic_sampling.DynamicTrainer, GRPOConfig)
    found = trainer._generate_and_score_completions(inputs(job, 2))
    assert found["advantages"].abs().max() < 1e-3
    assert found["advantages"].shape == (8,)
    assert trainer._metrics["train"]["dynamic_sampling/rounds"] == [1.0 + dynamic_sampling.ROUNDS]
    assert trainer.sampling_round == 0


def test_a_truncated_completion_has_no_part_in_dapos_loss(tiny_base: models.Base, tmp_path: Path) -> None:
    job = make_job(tiny_base, tmp_path, "dapo", rollout={"max_completion_length": 1})
    trainer = make_trainer(job, dynamic_sampling.DynamicTrainer, GRPOConfig)
    found = trainer._generate_and_score_completions(inputs(job, 2))
    ended = torch.isin(found["completion_ids"][:, 0], torch.tensor(job.stop_ids))
    assert found["completion_ids"].shape[1] == 1  # one token each
    assert found["completion_mask"][:, 0].bool().tolist() == ended.tolist()


def test_every_round_samples_from_a_stream_of_its_own(tiny_base: models.Base, tmp_path: Path) -> None:
    job = make_job(tiny_base, tmp_path, "dapo", rollout={"max_completion_length": 12})
    trainer = make_trainer(job, dynamic_sampling.DynamicTrainer, GRPOConfig)
    drawn = []
    for sampling_round in (0, 1, 0):
        trainer.sampling_round = sampling_round
        drawn.append(trainer.vllm_generation.generate([[3, 4]] * 4, None, 4)[1])
    assert drawn[0] == drawn[2] != drawn[1]
    others = [[row["id"] for row in trainer._others(3, r)] for r in (1, 2, 1)]
    assert others[0] == others[2] != others[1]
    assert len(set(others[0])) == 3


def test_overlong_reward_is_eq_13_of_dapo_as_trl_has_it() -> None:
    (built,) = rewards.build((config.Reward(name="overlong", options={"limit": 10, "cache": 4}),))
    ids = [[1] * n for n in range(14)]
    theirs = get_soft_overlong_punishment(10, 4)(ids)
    ours = built([""] * 14, [""] * 14, completion_ids=ids)
    assert ours == pytest.approx(theirs)
    assert ours[6:12] == [0, -0.25, -0.5, -0.75, -1, -1]


# --- configs


def test_a_recipe_is_resolved_into_the_config_and_what_names_it_is_fixed(tmp_path: Path) -> None:
    text = GRPO.replace('algorithm = "grpo"', 'algorithm = "dapo"\nepsilon_high = 0.3')
    loaded = config.load(write(tmp_path, text))
    assert loaded.trainer.args["epsilon_high"] == 0.3  # the file's own wins
    assert loaded.trainer.args["mask_truncated_completions"] is True
    assert config.resolved(loaded)["trainer"]["loss_type"] == "dapo"
    line = error_of(tmp_path, text, "trainer.loss_type=grpo")
    assert line == (
        "--set: [trainer] loss_type: found 'grpo', valid: 'dapo', which is what 'dapo' means; "
        "algorithm = 'grpo' takes any"
    )
    gspo = GRPO.replace('"grpo"', '"gspo"')
    assert "importance_sampling_level: found 'token'" in error_of(
        tmp_path, gspo, "trainer.importance_sampling_level=token"
    )
    assert "found 'x', valid: " in error_of(tmp_path, gspo, "trainer.loss_type=x")
    assert "'gspo' needs a reward" in error_of(tmp_path, gspo.replace(GRPO[GRPO.index("[[") : GRPO.index("[tr")], ""))


def test_cispo_without_a_bound_of_its_own_would_shrink_every_weight_to_a_fifth(tmp_path: Path) -> None:
    line = error_of(tmp_path, GRPO, "trainer.loss_type=cispo")
    assert "epsilon_high: found 0.2 (unset, so epsilon), valid: ≥ 1, with loss_type 'cispo'" in line
    assert config.load(write(tmp_path, GRPO.replace('"grpo"', '"cispo"'))).trainer.args["epsilon_high"] == 5.0


def test_an_overlong_reward_that_can_never_punish_is_refused(tmp_path: Path) -> None:
    text = GRPO + '[[reward]]\nname = "overlong"\nlimit = 80\ncache = 16\n'
    assert "[[reward]] 1 limit: limit - cache = 64, valid: < [rollout] max_completion_length 64" in error_of(
        tmp_path, text
    )
    config.load(write(tmp_path, text), ["rollout.max_completion_length=80"])
    assert "cache = 90, must be at most limit = 80" in error_of(tmp_path, text, "reward.1.cache=90")
    assert "needs 'limit'" in error_of(tmp_path, text.replace("limit = 80\n", ""))


@pytest.mark.parametrize("name", [*algorithms.RECIPES, "rloo"])
def test_the_tiny_config_is_the_sft_starts_and_of_as_many_samples_as_tiny_grpo(name: str) -> None:
    folder = Path(__file__).parents[1] / "configs" / "tiny"
    mine, base = config.load(folder / f"{name}.toml"), config.load(folder / "grpo.toml")
    assert (mine.trainer.algorithm, mine.model, mine.data, mine.eval) == (name, base.model, base.data, base.eval)

    def samples(loaded: config.Config) -> int:
        return loaded.trainer.args["max_steps"] * loaded.trainer.args["per_device_train_batch_size"]

    assert samples(mine) == samples(base)
    assert mine.trainer.args["num_generations"] == base.trainer.args["num_generations"]


def test_a_step_that_reuses_a_rollout_does_not_hide_a_collapse() -> None:
    """Trap: with two steps to a rollout every second one logs no reward, which once started the count again."""
    from transformers import TrainerControl

    from rl.algorithms.guard import COLLAPSED_STEPS, Guard

    guard = Guard(lambda text: None)
    for _ in range(COLLAPSED_STEPS):
        guard.watch_collapse({"reward": 0.0, "entropy": 1e-4}, True, TrainerControl())
        guard.watch_collapse({"entropy": 1e-4}, True, TrainerControl())
    assert "collapsed" in (guard.health.reason or "")
