"""What goes into a rollout and what comes out, free of mlx and torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy; `top_p` 1, `top_k` 0 and `min_p` 0 switch a filter off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    @property
    def filtered(self) -> bool:
        """Whether any filter cuts the vocabulary."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class Completion:
    """`tokens` end with EOS unless cut by length; `logprobs` are one a token.

    `finite` is False when the model's logits were not: then the completion is a lone EOS with logprob NaN.
    """

    tokens: list[int]
    logprobs: list[float]
    finite: bool = True


@dataclass
class Totals:
    """What an engine has done so far; seconds are wall time. The `last_` fields are of the latest call."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    last_tokens: int = 0
    last_seconds: float = 0.0

    def add(self, prompt_tokens: int, completion_tokens: int, seconds: float) -> None:
        """Count one call."""
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        self.seconds += seconds
        self.last_tokens, self.last_seconds = completion_tokens, seconds

    def speed(self) -> float:
        """New tokens a second in the latest call."""
        return self.last_tokens / self.last_seconds if self.last_seconds else 0.0
