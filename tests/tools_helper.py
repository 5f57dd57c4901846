"""Episodes with tools on a tiny model: a sampler that says what a script tells it, with the policy's own logprobs."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rl import config, models, rewards, start
from rl.algorithms import base, grpo, seam, tool_turns
from rl.rollouts.result import Completion
from rl.tools import toolbox
from tests.online_helper import ARGS, make_trainer

ASCII = "\n" + "".join(map(chr, range(32, 127)))
# as rl.algorithms.grpo sets it from [rollout] correction
IMPORTANCE = {"vllm_importance_sampling_mode": "token_truncate"}
SHAPE = config.TinyModel(hidden=32, layers=2, heads=4, intermediate=64, alphabet=ASCII)

Script = Callable[[str, int], str]  # (the question, turn) -> what the policy says, "<eos>" to end


def slow_calculator(expression: str) -> str:
    """
    Work out a sum, and fail where it is told to.

    Args:
        expression: a sum, "raise", "exit" or "hang".
    """
    if expression == "raise":
        raise KeyError("no such sum")
    if expression == "exit":
        raise SystemExit(3)
    if expression == "hang":
        time.sleep(60)
    a, b = expression.split("+")
    return str(int(a) + int(b))


class Counter:
    """An environment that counts, and hangs where it is told to."""

    made = 0

    def __init__(self) -> None:
        Counter.made += 1
        self.total = 0
        self.seed = 0

    def rows(self, count: int, seed: int) -> list[dict[str, Any]]:
        """Numbers to count to."""
        return [{"prompt": [{"role": "user", "content": f"to {seed + i}"}], "answer": seed + i} for i in range(count)]

    def reset(self, seed: int, answer: str) -> str:
        """Begin at nought."""
        self.total, self.seed, self.wanted = 0, seed, int(answer)
        return f" (seed {seed % 100})"

    def add(self, number: int) -> int:
        """
        Add a number.

        Args:
            number: what to add.
        """
        if number == 13:
            time.sleep(60)
        self.total += number
        return self.total

    def get_reward(self) -> float:
        """1 at the wanted total."""
        return float(self.total == self.wanted)


class Scripted:
    """The sampler's interface; `calls` are (prompts as text, max_tokens, step) in order."""

    def __init__(self, policy: Any, tokenizer: Any, script: Script):
        self.policy, self.tokenizer, self.script = policy, tokenizer, script
        self.calls: list[tuple[list[str], int, int]] = []

    def sync(self, policy: Any) -> None:
        self.policy = policy

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Any, *, max_tokens: int, seed: int = 0, step: int = 0
    ) -> list[Completion]:
        texts = [self.tokenizer.decode(list(ids)) for ids in prompts]
        self.calls.append((texts, max_tokens, step))
        done = []
        for ids, text in zip(prompts, texts, strict=True):
            question = text.rpartition("user\n")[2].partition("<eos>")[0]
            said = self.script(question, text.rpartition("user\n")[2].count("assistant\n") - 1)
            tokens = self.tokenizer(said)["input_ids"][:max_tokens]
            done.append(Completion(tokens, self.logprobs(list(ids), tokens)))
        return done

    @torch.no_grad()
    def logprobs(self, prompt: list[int], tokens: list[int]) -> list[float]:
        """An independent forward, without padding."""
        logits = self.policy(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
        return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()


def resolve_ascii(folder: Path) -> models.Base:
    """A random model of printable characters in `folder`: what tools say may hold any."""
    settings = config.Config(
        path=Path("x.toml"),
        run=config.Run(name="test"),
        model=config.Model(base="tiny", tiny=SHAPE),
        data=config.Data(source="environment", train_size=8, form="chat"),
        trainer=config.Trainer(algorithm="grpo"),
    )
    return models.resolve_base(settings, folder)


def make_job(
    base_model: models.Base,
    folder: Path,
    script: Script,
    questions: Sequence[tuple[str, str]],
    *,
    reward: Callable[..., list] | None = None,
    rollout: dict[str, Any] | None = None,
    algorithm: str = "grpo",
    **args: Any,
) -> base.Job:
    """A job whose rows ask `questions` (question, answer) and whose sampler follows `script`."""
    chosen = {"engine": "mlx", "precision": "full", "max_completion_length": 60, "max_turns": 3} | (rollout or {})
    if "environment" not in chosen:
        chosen |= {"tools": ("tests.tools_helper:slow_calculator",)}
    settings = config.Config(
        path=folder / "x.toml",
        run=config.Run(name="test"),
        model=config.Model(base="tiny", tiny=SHAPE),
        data=config.Data(source="jsonl", form="chat", train_size=8),
        rollout=config.Rollout(**chosen),
        trainer=config.Trainer(algorithm=algorithm, args=ARGS | IMPORTANCE | args),
        rewards=(config.Reward(name="environment" if "environment" in chosen else "exact"),),
    )
    policy = start.load_policy(settings, start.Start(base_model, base_model.sha256), torch.device("cpu"))
    tokenizer = models.load_tokenizer(base_model)
    box = toolbox.build(settings)
    assert box is not None
    tool_turns.prepare(tokenizer, box, "x.toml")
    functions = rewards.build(settings.rewards)
    if reward is not None:
        functions = [rewards.functions.RewardFunction("own", 1.0, reward)]
    return base.Job(
        config=settings,
        folder=folder / "run",
        device=torch.device("cpu"),
        model=policy,
        tokenizer=tokenizer,
        train=[
            {"id": str(i), "prompt": [{"role": "user", "content": q}], "answer": a, "task": "t"}
            for i, (q, a) in enumerate(questions)
        ],
        rewards=functions,
        sampler=Scripted(policy, tokenizer, script),
        toolbox=box,
        stop_ids=seam.stop_ids(tokenizer, ()),
    )


def trainer_of(job: base.Job) -> grpo.DuetGRPOTrainer:
    """The job's trainer, in training mode, not started."""
    return make_trainer(job, grpo.DuetGRPOTrainer, grpo.GRPOConfig)
