"""The reference engine: transformers' own `generate` on the trainer's model, behind the MLX sampler's interface.

Slow and simple. It exists to compare with, and for models the MLX engine refuses.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rl.rollouts.result import Completion, Sampling, Totals
from rl.rollouts.stops import stopped_at


class TorchSampler:
    """Samples from the policy itself, so there is nothing to sync and no parity to check."""

    name = "torch"
    precision = "full"

    def __init__(
        self,
        policy: Any,
        eos_ids: Sequence[int],
        pad_id: int,
        max_batch: int = 64,
        stop: Sequence[str] = (),
        decode: Callable[[list[int]], str] | None = None,
    ):
        self.policy, self.eos_ids, self.pad_id, self.max_batch = policy, list(eos_ids), pad_id, max_batch
        self.stop, self.decode = tuple(stop), decode
        self.totals = Totals()
        self.listener: _Listener | None = None

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, max_tokens: int, seed: int = 0, step: int = 0
    ) -> list[Completion]:
        """One completion per prompt, in order, as `Engine.generate` gives them; a batch draws from (seed, step)."""
        started = time.perf_counter()
        training = self.policy.training
        self.policy.eval()
        done: list[Completion] = []
        try:
            with torch.random.fork_rng():
                torch.manual_seed((seed * 1_000_003 + step) % 2**63)
                for start in range(0, len(prompts), self.max_batch):
                    done += self._batch(prompts[start : start + self.max_batch], sampling, max_tokens)
        finally:
            self.policy.train(training)
        new = sum(len(c.tokens) for c in done)
        self.totals.add(sum(len(p) for p in prompts), new, time.perf_counter() - started)
        return done

    def _batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_tokens: int) -> list[Completion]:
        device = next(self.policy.parameters()).device
        longest = max(len(p) for p in prompts)
        ids = torch.tensor([[self.pad_id] * (longest - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        greedy = sampling.temperature == 0.0
        drawn = (
            {} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        )
        if not greedy and sampling.min_p > 0:
            drawn["min_p"] = sampling.min_p
        out = self.policy.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_tokens,
            do_sample=not greedy,
            eos_token_id=self.eos_ids,
            pad_token_id=self.pad_id,
            output_logits=greedy,
            output_scores=not greedy,
            return_dict_in_generate=True,
            streamer=self.listener,
            **drawn,
        )
        tokens = out.sequences[:, longest:]
        # a step at a time: all steps' logits are held as they are, and no second copy of them
        steps = [
            step_B_V.float().log_softmax(-1).gather(-1, tokens[:, i : i + 1])
            for i, step_B_V in enumerate(out.logits if greedy else out.scores)
        ]
        logprobs = torch.cat(steps, dim=1).cpu()
        return [self._cut(t, p) for t, p in zip(tokens.cpu().tolist(), logprobs.tolist(), strict=True)]

    def _cut(self, tokens: list[int], logprobs: list[float]) -> Completion:
        length = next((i + 1 for i, t in enumerate(tokens) if t in self.eos_ids), len(tokens))
        if self.stop:
            length = stopped_at(tokens[:length], length, self.stop, self.decode) or length
        return Completion(tokens[:length], logprobs[:length])

    @torch.no_grad()
    def tell(
        self, prompt: Sequence[int], sampling: Sampling, max_tokens: int, seed: int, heard: Callable[[list[int]], None]
    ) -> Completion:
        """One completion, as `generate` gives it alone; `heard(tokens)` is told of each token as it comes."""
        self.listener = _Listener(len(prompt), heard)
        try:
            return self.generate([prompt], sampling, max_tokens=max_tokens, seed=seed)[0]
        finally:
            self.listener = None

    def release(self) -> None:
        """Nothing is held."""


class _Listener:
    """A streamer for transformers' `generate`: it puts the prompt first, then each token."""

    def __init__(self, prompt: int, heard: Callable[[list[int]], None]):
        self.left, self.heard, self.tokens = prompt, heard, []

    def put(self, value: torch.Tensor) -> None:
        """One more token, or the prompt."""
        if self.left:
            self.left = 0
            return
        self.tokens += value.flatten().tolist()
        self.heard(list(self.tokens))

    def end(self) -> None:
        """Nothing to close."""
