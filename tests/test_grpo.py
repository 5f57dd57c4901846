"""GRPO through the seam: what TRL gets from us, what may not reach the weights, and when a run has to stop."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from rl import config, data, models, rewards, start
from rl.algorithms import base, grpo, online, seam
from rl.algorithms.guard import COLLAPSED_STEPS, Guard, trace
from rl.rollouts.result import Completion

ARGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "steps_per_generation": 1,
    "learning_rate": 1e-2,
    "save_steps": 100,
}


@pytest.fixture
def make_job(tiny_base: models.Base, tmp_path: Path) -> Callable[..., base.Job]:
    """A GRPO job on the tiny model: random weights, a reward that pays for the digit 7."""

    def make(lora: bool = False, engine: str = "mlx", rollout: dict | None = None, **args: Any) -> base.Job:
        settings = config.Config(
            path=tmp_path / "grpo.toml",
            run=config.Run(name="test"),
            model=config.Model(base="tiny", lora=config.Lora(rank=4, alpha=8.0) if lora else None),
            data=config.Data(source="arithmetic", form="char", train_size=32, max_a=9),
            rollout=config.Rollout(engine=engine, precision="full", max_completion_length=3, **(rollout or {})),
            trainer=config.Trainer(algorithm="grpo", args=ARGS | args),
            eval=config.Eval(size=8),
        )
        begin = start.Start(tiny_base, tiny_base.sha256)
        policy = start.load_policy(settings, begin, torch.device("cpu"))
        tokenizer = models.load_tokenizer(tiny_base)
        stop = seam.stop_ids(tokenizer, ())

        def sevens(prompts: list, completions: list, **columns: Any) -> list[float]:
            return [float(c.count("7")) for c in completions]

        return base.Job(
            config=settings,
            folder=tmp_path / "run",
            device=torch.device("cpu"),
            model=policy,
            tokenizer=tokenizer,
            train=data.build(settings).train,
            rewards=[rewards.functions.RewardFunction("sevens", 1.0, sevens)],
            sampler=start.load_sampler(settings, begin, policy, tokenizer, stop) if engine == "mlx" else None,
            fresh_adapter=lora,
            stop_ids=stop,
        )

    return make


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def logged(job: base.Job) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    job.hooks = base.Hooks(metrics=lambda step, values: rows.append(values))
    return rows


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_sampler_and_trainer_agree_at_every_step(make_job: Callable[..., base.Job], lora: bool) -> None:
    """Every optimizer step is synced: with a frozen sampler |dlogp| grows to 0.1 in two steps of this size."""
    job = make_job(lora, max_steps=4)
    rows = logged(job)
    before = weights(job.model)
    outcome = grpo.train(job)
    assert (outcome.steps, outcome.failure, outcome.interrupted, outcome.skipped) == (4, None, False, 0)
    assert any(not torch.equal(before[n], w) for n, w in weights(job.model).items())
    for row in rows:
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
        assert row["sampling/ess"] == pytest.approx(1.0, abs=1e-4)
        assert row["rollout/tokens_per_s"] > 0
    assert job.tokens["completion"] >= 4 * 8
    assert job.sampler.syncs.count == 1 + 4  # at start-up, then before each rollout
    if lora:
        assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6)
        assert rows[-1]["kl"] > 1e-5


def test_reusing_the_forward_changes_no_weight(
    make_job: Callable[..., base.Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against TRL's own two forwards: the same metrics and, to rounding, the same weights."""
    results = []
    for reuse in (True, False):
        job = make_job(max_steps=3, optim="sgd")
        if not reuse:
            monkeypatch.setattr(grpo.DuetGRPOTrainer, "_on_policy", lambda self: False)
            monkeypatch.setattr(online, "share", lambda *args: None)
        rows = logged(job)
        grpo.train(job)
        results.append((weights(job.model), rows))
    (ours, ours_rows), (theirs, theirs_rows) = results
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(ours_rows, theirs_rows, strict=True):
        assert a["reward"] == b["reward"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["entropy"] == pytest.approx(b["entropy"], rel=1e-5)


def test_loss_is_the_papers_on_a_hand_made_batch(make_job: Callable[..., base.Job]) -> None:
    """Shao et al. 2024, section 4.1: group-normalised advantages, clipped ratio; dapo's mean over tokens."""
    job = make_job()
    trainer = build(job)
    torch.manual_seed(0)
    logps = torch.randn(4, 3, dtype=torch.float64) - 2
    old = logps + 0.3 * torch.randn(4, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
    rewards_ = torch.tensor([1.0, 0.0, 0.0, 2.0], dtype=torch.float64)
    advantages = (rewards_ - rewards_.mean()) / (rewards_.std() + 1e-4)
    ratio = (logps - old).exp()
    terms = torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
    expected = -(terms * mask).sum() / mask.sum()
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (logps.float(), torch.zeros(4, 3), None)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(
        trainer.model,
        {
            "prompt_ids": torch.zeros(4, 2, dtype=torch.long),
            "prompt_mask": torch.ones(4, 2, dtype=torch.long),
            "completion_ids": torch.zeros(4, 3, dtype=torch.long),
            "completion_mask": mask,
            "advantages": advantages.float(),
            "old_per_token_logps": old.float(),
            "importance_sampling_ratio": torch.ones(4, 3),
            "num_items_in_batch": mask.sum(),
        },
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def build(job: base.Job) -> grpo.DuetGRPOTrainer:
    """The trainer of `job`, not started."""
    import datasets

    args = base.arguments(job, set(GRPOConfig.__dataclass_fields__)) | {"max_completion_length": 3}
    return grpo.DuetGRPOTrainer(
        job,
        Guard(lambda text: None),
        base.Timer(),
        model=job.model,
        reward_funcs=list(job.rewards),
        args=GRPOConfig(**args),
        train_dataset=datasets.Dataset.from_list(job.train),
        processing_class=job.tokenizer,
    )


def poison(model: Any, at_step: list[int], part: str = "layers.1.mlp.down_proj") -> None:
    """Make the gradient through `part` NaN in the backward passes numbered in `at_step` (the first is 0)."""
    module = next(m for n, m in model.named_modules() if n.endswith(part))
    count = [0]

    def hook(_module: Any, into: Any, out_of: Any) -> Any:
        count[0] += 1
        if count[0] - 1 in at_step:
            return tuple(None if g is None else g * float("nan") for g in into)
        return None

    module.register_full_backward_hook(hook)


def test_stock_trainer_steps_a_nan_into_every_weight(make_job: Callable[..., base.Job], tmp_path: Path) -> None:
    """The trap itself, in TRL without us: loss finite, one NaN gradient, all weights NaN."""
    import datasets

    job = make_job(engine="torch")
    args = base.arguments(job, set(GRPOConfig.__dataclass_fields__)) | {"max_completion_length": 3, "max_steps": 1}
    trainer = GRPOTrainer(
        model=job.model,
        reward_funcs=list(job.rewards),
        args=GRPOConfig(**args),
        train_dataset=datasets.Dataset.from_list(job.train),
        processing_class=job.tokenizer,
    )
    poison(job.model, [0])
    trainer.train()
    assert not any(torch.isfinite(w).all() for n, w in weights(job.model).items() if "layers" in n)


def test_a_nan_gradient_is_skipped_counted_and_named(make_job: Callable[..., base.Job]) -> None:
    job = make_job(max_steps=3)
    rows = logged(job)
    said: list[str] = []
    job.hooks.warn = said.append
    seen: list[dict[str, torch.Tensor]] = []
    job.hooks.metrics = lambda step, values: (rows.append(values), seen.append(weights(job.model)))
    poison(job.model, [1, 2])  # backward 0 is step 1, 1 is step 2, 2 is the guard's own look at step 2
    outcome = grpo.train(job)
    assert (outcome.steps, outcome.skipped, outcome.failure) == (3, 1, None)
    assert "layers.1.mlp.down_proj" in outcome.causes[0]
    assert outcome.causes[0].startswith("step 2: gradient through")
    assert said == [f"step 2 skipped, the weights are as before: not finite: {outcome.causes[0][8:]}"]
    for name, weight in seen[1].items():
        assert torch.equal(weight, seen[0][name]), name  # step 2 changed nothing
    assert any(not torch.equal(w, seen[1][n]) for n, w in seen[2].items())  # step 3 did
    assert all(torch.isfinite(w).all() for w in seen[2].values())
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1]


def test_a_nan_that_recurs_stops_the_run_with_good_weights(make_job: Callable[..., base.Job]) -> None:
    job = make_job(max_steps=12, learning_rate=1e-3)
    poison(job.model, list(range(1, 100)))
    outcome = grpo.train(job)
    assert outcome.failure is not None
    assert outcome.failure.startswith("3 of the last 4 steps were not finite")
    assert outcome.steps == 4
    assert all(torch.isfinite(w).all() for w in weights(job.model).values())


def test_sampler_logits_that_are_not_finite_skip_the_step(make_job: Callable[..., base.Job]) -> None:
    """Trap: TRL maps the NaN logprob to ratio 1; |dlogp| reads 0 and the step would count."""
    job = make_job(max_steps=3)
    before: list[dict[str, torch.Tensor]] = []
    job.hooks.metrics = lambda step, values: before.append(weights(job.model))
    generate, calls = job.sampler.generate, [0]

    def broken(prompts: Any, *args: Any, **kwargs: Any) -> list[Completion]:
        out = generate(prompts, *args, **kwargs)
        calls[0] += 1
        if calls[0] == 2:
            out[3] = Completion([job.stop_ids[0]], [math.nan], finite=False)
        return out

    job.sampler.generate = broken
    outcome = grpo.train(job)
    assert outcome.causes == ["step 2: logits of the sampler in 1 of 8 completions"]
    assert all(torch.equal(w, before[0][n]) for n, w in before[1].items())


def test_the_trace_names_a_forward_and_a_batch_tensor(make_job: Callable[..., base.Job]) -> None:
    job = make_job()
    trainer = build(job)
    guard = trainer.guard
    guard.trainer = trainer
    guard.batch = {"advantages": torch.tensor([1.0, math.inf])}
    assert guard._name_the_term() == "advantages of the batch"
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    ones = torch.ones_like(ids)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ones,
        "completion_ids": ids[:, :3],
        "completion_mask": ones[:, :3],
        "advantages": torch.ones(1),
        "importance_sampling_ratio": torch.ones(1, 3),
        "num_items_in_batch": torch.tensor(3),
    }
    trainer.current_gradient_accumulation_steps = 1
    with torch.no_grad():
        job.model.model.layers[1].self_attn.v_proj.weight[0, 0] = math.inf
    assert trace(trainer, inputs).startswith("output of model.layers.1.self_attn.v_proj")


def test_a_collapsed_policy_stops_the_run() -> None:
    """Reward and entropy at zero, every completion alike, so many steps in a row: and only then."""
    from transformers import TrainerControl

    guard, control = Guard(lambda text: None), TrainerControl()
    dead = {"reward": 0.0, "entropy": 1e-4}
    for alike, metrics in [(True, dead)] * (COLLAPSED_STEPS - 1) + [(True, dead | {"reward": 0.5})]:
        guard.watch_collapse(metrics, alike, control)
    assert guard.health.reason is None
    assert guard.health.good
    for i in range(COLLAPSED_STEPS):
        guard.watch_collapse(dead, True, control)
        assert control.should_training_stop == (i == COLLAPSED_STEPS - 1)
    assert "collapsed" in guard.health.reason
    assert not guard.health.good


def test_torch_engine_runs_the_same_config(make_job: Callable[..., base.Job]) -> None:
    job = make_job(engine="torch", max_steps=2)
    rows = logged(job)
    assert grpo.train(job).steps == 2
    assert "sampling/ess" not in rows[0]
    assert rows[0]["completions/mean_length"] >= 1


def test_torch_and_mlx_samplers_give_the_same_greedy_completions_and_logprobs(
    make_job: Callable[..., base.Job],
) -> None:
    from rl.rollouts.result import GREEDY
    from rl.rollouts.torch_sampler import TorchSampler

    job = make_job()
    prompts = [job.tokenizer(row["prompt"])["input_ids"] for row in job.train[:6]]
    torch_side = TorchSampler(job.model, job.stop_ids, 0).generate(prompts, GREEDY, max_tokens=4)
    mlx_side = job.sampler.generate(prompts, GREEDY, max_tokens=4)
    for a, b in zip(torch_side, mlx_side, strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_stop_ids_hold_eos_first_and_every_token_with_the_character(smollm2: models.Base) -> None:
    tokenizer = models.load_tokenizer(smollm2)
    ids = seam.stop_ids(tokenizer, ("\n",))
    assert ids[0] == tokenizer.eos_token_id
    assert tokenizer("\n")["input_ids"][0] in ids
    assert tokenizer("\n\n")["input_ids"][0] in ids
    assert all("\n" in tokenizer.decode([i]) for i in ids[1:])
    assert seam.stop_ids(tokenizer, ()) == [tokenizer.eos_token_id]


def test_contract_with_trl_1_16(make_job: Callable[..., base.Job]) -> None:
    """The names the seam leans on; a TRL that moves one fails here first."""
    trainer = build(make_job())
    assert trainer.use_vllm is True
    assert trainer._last_loaded_step == -1
    assert trainer.eos_token_ids == trainer.job.stop_ids
    out = trainer.vllm_generation.generate([[3, 4]] * 4, None, 4)
    assert len(out) == 4
    assert len(out[1]) == len(out[2]) == 4
    assert isinstance(out[2][0][0], list)
    assert isinstance(trainer._get_train_sampler(), seam.EpochSampler)
