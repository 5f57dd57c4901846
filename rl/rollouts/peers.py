"""GRPO loops of other MLX trainers, driven through their own functions: contestants of `nox -s bench -- --part peers`.

They are no dependencies of this project: a user installs them into a folder of their own, and only the process that
times one imports it. Each gets the same weights, prompts, group, lengths and reward, LoRA on the same seven products,
AdamW without decay and with bias correction, no KL term, temperature 1 without filters. What a peer fixes stays fixed:
- mlx-lm-lora decodes at most as many rows at once as a step has prompts, and goes backward on as many at a time;
- mlxrl scores every completion once more before the step, and decodes and goes backward on all rows at once.
Both import this package's BLAS binding with it: without that, matrix products on Linux CPU are some 40 times slower.
"""

import importlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model, load_tokenizer

Reward = Callable[[list[str], list[str]], list[float]]


@dataclass(frozen=True)
class Work:
    """`steps` steps of `prompts_a_step` prompts, each completed `group` times by at most `max_tokens` tokens."""

    model: Path
    tokenizer: Path
    texts: list[str]
    prompts: list[list[int]]
    prompts_a_step: int
    group: int
    max_tokens: int
    stop: list[int]
    steps: int
    learning_rate: float
    rank: int
    alpha: float
    targets: list[str]
    seed: int


def policy(work: Work) -> tuple[nn.Module, Any]:
    """The model with fresh adapters on `targets` of every layer, and mlx-lm's tokenizer."""
    model, _ = load_model(work.model)
    model.freeze()
    mx.random.seed(work.seed)
    names = {name for name, _ in model.layers[0].named_modules() if name.rpartition(".")[2] in work.targets}
    shape = {"rank": work.rank, "scale": work.alpha / work.rank, "dropout": 0.0, "keys": sorted(names)}
    linear_to_lora_layers(model, len(model.layers), shape)
    return model, load_tokenizer(work.tokenizer)


def optimizer(work: Work) -> optim.Optimizer:
    """AdamW as torch's is by default, without decay."""
    return optim.AdamW(learning_rate=work.learning_rate, weight_decay=0.0, bias_correction=True)


def mlx_lm_lora(work: Work, reward: Reward, done: Callable[[float, int], None], folder: Path) -> None:
    """`train_grpo` of mlx-lm-lora; `done(mean reward, new tokens)` after every step."""
    trainer = importlib.import_module("mlx_lm_lora.trainer.grpo_trainer")
    model, tokenizer = policy(work)
    rows = work.prompts_a_step * work.group

    class Heard:
        def on_train_loss_report(self, told: dict[str, Any]) -> None:
            done(told["train_total_rewards_mean"], round(told["train_average_generated_tokens"] * rows))

        def on_val_loss_report(self, told: dict[str, Any]) -> None:
            """Nothing is validated."""

    def graded(prompts: Sequence[str], completions: Sequence[str], answer: Any, types: Any) -> list[float]:
        return reward(list(prompts), list(completions))

    np.random.seed(work.seed)
    tokenizer.eos_token_ids = set(work.stop)
    trainer.train_grpo(
        model=model,
        ref_model=None,
        tokenizer=tokenizer,
        optimizer=optimizer(work),
        train_dataset=[(ids, [], text, "") for ids, text in zip(work.prompts, work.texts, strict=True)],
        reward_funcs=[graded],
        args=trainer.GRPOTrainingArgs(
            batch_size=work.prompts_a_step,
            iters=work.steps,
            steps_per_report=1,
            steps_per_save=work.steps + 1,
            max_seq_length=max(map(len, work.prompts)),
            adapter_file=str(folder / "adapters.safetensors"),
            group_size=work.group,
            beta=0.0,
            epsilon=0.2,
            max_completion_length=work.max_tokens,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            grpo_loss_type="bnpo",
        ),
        training_callback=Heard(),
        end_answer_token="",
    )


def mlxrl(work: Work, reward: Reward, done: Callable[[float, int], None], folder: Path) -> None:
    """A step of mlxrl as its own training command takes it, with its batched and compiled rollout."""
    rollout = importlib.import_module("mlxrl.rollout")
    train = importlib.import_module("mlxrl.train.grpo")
    algorithm = importlib.import_module("mlxrl.algo.grpo").algorithm_by_name("grpo")
    model, tokenizer = policy(work)
    chosen, order = random.Random(work.seed), optimizer(work)
    sampling = rollout.SamplingConfig(max_tokens=work.max_tokens, temperature=1.0, top_p=1.0)
    for _ in range(work.steps):
        picked = chosen.sample(range(len(work.prompts)), work.prompts_a_step)
        model.eval()
        outputs = rollout.generate_prompt_set_from_prefix_caches(
            model=model,
            tokenizer=tokenizer,
            prefixes=[rollout.prefill_prompt_once(model, work.prompts[i]) for i in picked],
            group_size=work.group,
            config=sampling,
            eos_token_ids=frozenset(work.stop),
            compile_decode_step=True,
        )
        rows = [i for i in picked for _ in range(work.group)]
        completions = [
            rollout.Completion(i, number % work.group, tuple(work.prompts[i]), tokens, logprobs, text)
            for number, (i, (tokens, logprobs, text)) in enumerate(zip(rows, outputs, strict=True))
        ]
        rewards = reward(
            [work.texts[i] for i in rows], [tokenizer.decode(list(c.completion_tokens)) for c in completions]
        )
        batch = train.batch_from_rollouts(
            model, completions, rewards, work.group, work.stop[0], algorithm, compute_reference=False
        )
        train.optimizer_step(model, order, batch, 0.0, work.stop[0], algorithm)
        done(sum(rewards) / len(rewards), sum(len(c.completion_tokens) for c in completions))


PEERS = {"mlx-lm-lora": mlx_lm_lora, "mlxrl": mlxrl}
