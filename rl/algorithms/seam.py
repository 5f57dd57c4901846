"""Where the MLX sampler plugs into TRL's trainers, and how their batches stay resumable.

Leans on trl 1.16.0 internals, each held by a test of its contract (tests/test_grpo.py, tests/test_rloo.py):
- with `use_vllm` True after construction, `GRPOTrainer` calls `vllm_generation.sync_weights()` when the step changed
  (`_last_loaded_step`) and `vllm_generation.generate(prompts, images, num_generations, profiler)`, and takes
  `(prompt_ids, completion_ids, logprobs[B][T][1], extra)`;
- `vllm_mode` is compared with "colocate" and "server" only;
- `RepeatSampler` orders its epoch by a generator that is never reseeded;
- `eos_token_ids` decides which completions count as truncated.
"""

from collections.abc import Callable, Iterator
from typing import Any

from trl.trainer.utils import RepeatSampler

from rl.rollouts.result import Sampling
from rl.rollouts.sampler import MLXSampler


class MLXGeneration:
    """Has the two methods of TRL's `VLLMGeneration` that the trainers call."""

    def __init__(
        self,
        sampler: MLXSampler,
        policy: Callable[[], Any],
        sampling: Sampling,
        *,
        max_tokens: int,
        seed: int,
        step: Callable[[], int],
    ):
        self.sampler, self.policy, self.sampling = sampler, policy, sampling
        self.max_tokens, self.seed, self.step = max_tokens, seed, step
        self.broken: str | None = None  # what was not finite in the last rollout; read and cleared by the guard
        self.logprobs: list[list[float]] = []  # of the last rollout: RLOO's trainer asks for none

    def sync_weights(self) -> None:
        """Copy the trainer's weights into the sampler."""
        self.sampler.sync(self.policy())

    def generate(
        self, prompts: list[list[int]], images: Any, num_generations: int, profiler: Any = None
    ) -> tuple[None, list[list[int]], list[list[list[float]]], None]:
        """Completions of `prompts` (each already repeated by TRL) with one logprob a token.

        A row whose logits were not finite comes back as a lone EOS, and the step is marked to be skipped: TRL would
        turn its NaN logprob into a ratio of exactly 1 and call the sampler perfect.
        """
        completions = self.sampler.generate(
            prompts, self.sampling, max_tokens=self.max_tokens, seed=self.seed, step=self.step()
        )
        bad = sum(not c.finite for c in completions)
        if bad:
            self.broken = f"logits of the sampler in {bad} of {len(completions)} completions"
        self.logprobs = [c.logprobs for c in completions]
        return None, [c.tokens for c in completions], [[[p] for p in c.logprobs] for c in completions], None


class EpochSampler(RepeatSampler):
    """TRL's order of prompts, reseeded each epoch, so that an epoch's order does not depend on the epochs before it."""

    def __init__(self, *args: Any, seed: int, **kwargs: Any):
        super().__init__(*args, seed=seed, **kwargs)
        self.first_seed = seed

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's loader at each epoch, also after a resume."""
        if self.shuffle:
            self.generator.manual_seed(self.first_seed + 1_000_003 * epoch)

    def __iter__(self) -> Iterator[int]:
        return super().__iter__()


def stop_ids(tokenizer: Any, stop: tuple[str, ...]) -> list[int]:
    """Ids that end a completion: EOS first, then every token whose text contains one of the stop characters."""
    ids = [tokenizer.eos_token_id]
    if stop:
        for token_id in range(len(tokenizer)):
            text = tokenizer.decode([token_id])
            if token_id != ids[0] and any(s in text for s in stop):
                ids.append(token_id)
    return ids
