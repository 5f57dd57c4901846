"""Jobs on the tiny model for the tests of preference algorithms, and their logprobs computed another way."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from rl import config, models, start
from rl.algorithms import base, offline, seam

ARGS = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 100}
# lengths differ within and between rows, one completion is nothing but its EOS
PAIRS = [
    {"id": "a", "prompt": "1+2=", "chosen": "3", "rejected": "12"},
    {"id": "b", "prompt": "12+30=", "chosen": "42", "rejected": ""},
    {"id": "c", "prompt": "7+7=", "chosen": "14", "rejected": "7"},
    {"id": "d", "prompt": "9+99=", "chosen": "108", "rejected": "99"},
]
LABELLED = [
    {"id": f"{row['id']}/{label}", "prompt": row["prompt"], "completion": row[column], "label": label}
    for row in PAIRS
    for column, label in (("chosen", True), ("rejected", False))
]


def make_config(path: Path, algorithm: str, *, lora: bool = False, **given: Any) -> config.Config:
    """A config on the tiny model; `given` are its tables, `trainer` the arguments of TRL."""
    tables: dict[str, Any] = {
        "data": config.Data(source="arithmetic", form="char", train_size=24, max_a=9),
        "rollout": config.Rollout(precision="full", max_completion_length=3, samples=32),
        "rewards": (config.Reward(name="exact"),),
        "eval": config.Eval(size=8, metric="lenient"),  # random weights get a number right, hardly ever its end
    }
    args = ARGS | given.pop("trainer", {})
    return config.Config(
        path=path,
        run=config.Run(name="test", seed=given.pop("seed", 0)),
        model=config.Model(base="tiny", lora=config.Lora(rank=4, alpha=8.0) if lora else None),
        trainer=config.Trainer(algorithm=algorithm, args=args),
        **(tables | given),
    )


def make_job(tiny: models.Base, settings: config.Config, rows: list[dict[str, Any]], folder: Path) -> base.Job:
    """A job of `settings` on random weights and `rows`."""
    policy = start.load_policy(settings, start.Start(tiny, tiny.sha256), torch.device("cpu"))
    tokenizer = models.load_tokenizer(tiny)
    return base.Job(
        config=settings,
        folder=folder,
        device=torch.device("cpu"),
        model=policy,
        tokenizer=tokenizer,
        train=rows,
        stop_ids=seam.stop_ids(tokenizer, ()),
    )


def built(monkeypatch: pytest.MonkeyPatch, algorithm: Any, job: base.Job) -> Any:
    """The trainer that `algorithm.train` makes, before its first step."""
    with monkeypatch.context() as patched:
        patched.setattr(offline, "run_trainer", lambda job, trainer, guard, recorder: trainer)
        return algorithm.train(job)


def loss_of(trainer: Any, rows: int) -> float:
    """The loss of the first rows as one batch."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(rows)])
    trainer.model.train()
    return float(trainer.compute_loss(trainer.model, batch).detach())


def disturb(model: Any, seed: int, size: float = 0.05) -> None:
    """Add noise to what is trained, as steps would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn(parameter.shape, generator=generator)


def plain(model: Any) -> Any:
    """A float64 copy of the policy in transformers' own class, its adapter merged, TRL's patches gone."""
    merged = copy.deepcopy(model)
    if hasattr(merged, "peft_config"):
        if "ref" in merged.peft_config:
            merged.delete_adapter("ref")
        merged = merged.merge_and_unload()
    fresh = type(merged)(merged.config)
    fresh.load_state_dict(merged.state_dict())
    return fresh.double().eval()


@torch.no_grad()
def logp(model: Any, tokenizer: Any, prompt: str, completion: str) -> float:
    """log p(completion and EOS | prompt) in float64, one row at a time and so without padding."""
    given = tokenizer(prompt)["input_ids"]
    said = [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id] if completion else [tokenizer.eos_token_id]
    logits = model(torch.tensor([given + said])).logits[0, len(given) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(said)[:, None]).sum())
