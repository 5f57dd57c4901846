"""PPO's runs that break, stop and go on."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from config_helper import tiny_run
from online_helper import logged
from ppo_helper import build, off_policy, ppo_job, weights
from run_helper import train_until_ctrl_c
from safetensors.numpy import load_file

from rl import models, train
from rl.algorithms import ppo
from rl.errors import RunFailed
from rl.rollouts.result import Completion

# --- what goes wrong


def test_a_nan_gradient_is_skipped_for_policy_and_value_alike(tiny_base: models.Base, tmp_path: Path) -> None:
    """Poisoned in the value head alone: the guard looks at both models, and neither moves."""
    job = ppo_job(tiny_base, tmp_path, max_steps=3)
    seen: list[dict[str, torch.Tensor]] = []
    job.hooks.metrics = lambda step, values: seen.append(weights(job.model))
    forward, calls = ppo.value.ActorCritic.forward, [0]

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        calls[0] += torch.is_grad_enabled()
        if calls[0] in (2, 3) and torch.is_grad_enabled():  # step 2, and the guard's own look at it
            out.values_B_T.register_hook(lambda gradient: gradient * torch.nan)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo.value.ActorCritic, "forward", poisoned)
        outcome = ppo.train(job)
    assert (outcome.steps, outcome.skipped, outcome.failure) == (3, 1, None)
    assert outcome.causes[0].startswith("step 2: gradient")
    assert all(torch.equal(w, seen[0][n]) for n, w in seen[1].items())
    assert any(not torch.equal(w, seen[1][n]) for n, w in seen[2].items())


def test_completions_of_a_broken_sampler_teach_nothing(tiny_base: models.Base, tmp_path: Path) -> None:
    """One row without finite logits: its rollout's first step is skipped, the others learn from the rest."""
    job = ppo_job(tiny_base, tmp_path, max_steps=4, num_ppo_epochs=2)
    seen: list[dict[str, torch.Tensor]] = []
    job.hooks.metrics = lambda step, values: seen.append(weights(job.model))
    generate, calls = job.sampler.generate, [0]

    def broken(*args: Any, **kwargs: Any) -> list[Completion]:
        out = generate(*args, **kwargs)
        calls[0] += 1
        if calls[0] == 2:
            out[3] = Completion([job.stop_ids[0]], [math.nan], finite=False)
        return out

    job.sampler.generate = broken
    outcome = ppo.train(job)
    assert outcome.causes == ["step 3: logits of the sampler in 1 of 8 completions"]
    assert all(torch.equal(w, seen[1][n]) for n, w in seen[2].items())
    assert any(not torch.equal(w, seen[2][n]) for n, w in seen[3].items())
    assert all(torch.isfinite(w).all() for w in seen[3].values())

    job = ppo_job(tiny_base, tmp_path)
    job.sampler.generate = lambda prompts, *a, **k: [Completion([job.stop_ids[0]], [math.nan], finite=False)] * 8
    with pytest.raises(RunFailed, match="not finite in every completion"):
        ppo.train(job)


def test_a_checkpoint_of_other_models_is_refused(tiny_base: models.Base, tmp_path: Path) -> None:
    job = ppo_job(tiny_base, tmp_path, value_model="separate")
    trainer = build(job)
    off_policy(trainer)
    trainer._save(str(tmp_path / "saved"))
    wanted = {n: p.clone() for n, p in trainer.model.trained().items()}
    off_policy(trainer)
    trainer._load_from_checkpoint(str(tmp_path / "saved"))
    assert all(torch.equal(p, wanted[n]) for n, p in trainer.model.trained().items())
    other = build(ppo_job(tiny_base, tmp_path, value_model="shared"))
    with pytest.raises(RunFailed, match=r"critic\."):
        other._load_from_checkpoint(str(tmp_path / "saved"))


# --- resume

RUN = tiny_run(
    "ppo",
    most=5,
    train_size=16,
    size=4,
    rewards='[[reward]]\nname = "length"\ntarget = 1\nper_token = 0.5',
    trainer="per_device_train_batch_size = 2\ngradient_accumulation_steps = 2\nnum_mini_batches = 2\n"
    "num_ppo_epochs = 2\nlearning_rate = 5e-3\nmax_steps = 12\nsave_steps = 4",
)


def test_interrupted_and_resumed_is_bit_for_bit_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ctrl-C in the middle of a rollout's four steps waits for its end; the value model goes on too. Two rollouts
    make an epoch, so what is resumed crosses into the second one."""
    monkeypatch.chdir(tmp_path)
    for name in ("whole", "broken"):
        Path(f"{name}.toml").write_text(RUN.format(name=name))
    assert train.main(Path("whole.toml")) == 0
    train_until_ctrl_c(monkeypatch, Path("broken.toml"), 2)
    folder = Path("models/checkpoints/broken")
    assert json.loads((folder / "run.json").read_text())["steps"] == 4
    saved = load_file(folder / "checkpoint-4" / ppo.WEIGHTS)
    assert np.abs(saved["head.weight"]).max() > 0
    assert {name.split(".")[0] for name in saved} == {"policy", "critic", "head"}
    assert train.main(Path("broken.toml"), resume=True) == 0
    whole, broken = (load_file(f"models/final/{name}/model.safetensors") for name in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    assert not any("critic" in name or name == "head.weight" for name in whole)  # the result is the policy
    for name, weight in whole.items():
        np.testing.assert_array_equal(broken[name], weight, err_msg=name)
    logs = [Path(f"models/final/{name}/metrics.jsonl").read_text().splitlines() for name in ("whole", "broken")]
    told = ("step", "loss", "value/loss", "reward", "kl", "value/explained_variance")
    assert [[json.loads(line).get(k) for k in told] for line in logs[0]] == [
        [json.loads(line).get(k) for k in told] for line in logs[1]
    ]


@pytest.mark.parametrize("value_model", ["separate", "shared"])
def test_a_lora_run_goes_on_from_its_adapters_and_head(
    tiny_base: models.Base, tmp_path: Path, value_model: str
) -> None:
    """The frozen base is not in the checkpoint; adapters, head, optimizer and the KL's reference are all back."""
    results = []
    for resume in (None, tmp_path / "run" / "checkpoint-2"):
        job = ppo_job(
            tiny_base,
            tmp_path,
            lora=True,
            value_model=value_model,
            max_steps=6,
            save_steps=2,
            num_ppo_epochs=2,
            lr_scheduler_type="constant",
        )
        job.resume = resume
        rows = logged(job)
        assert ppo.train(job).steps == 6
        results.append((weights(job.model), [(row["loss"], row.get("kl"), row["value/loss"]) for row in rows]))
    assert results[1][1] == results[0][1][2:]
    for name, weight in results[0][0].items():
        assert torch.equal(results[1][0][name], weight), name
