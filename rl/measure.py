"""The run's own held-out check: greedy completions by the rollout engine, graded by the run's verifier."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rl.rewards import Score

# questions decoded between two updates of the progress bar
CHUNK = 64


@dataclass(frozen=True)
class Measurement:
    """One score and one completion a question, in the order of the rows."""

    scores: list[Score]
    completions: list[str]


def prompt_ids(tokenizer: Any, prompts: Sequence[str | list[dict[str, str]]]) -> list[list[int]]:
    """Token ids of each prompt, as TRL makes them: text as it is, messages through the chat template."""
    if prompts and isinstance(prompts[0], list):
        rendered = tokenizer.apply_chat_template(
            list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return rendered["input_ids"]
    return tokenizer(text=list(prompts))["input_ids"]


def measure(
    sampler: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    grade: Callable[[str, dict[str, Any]], Score],
    max_tokens: int,
    advance: Callable[[int], None] = lambda done: None,
) -> Measurement:
    """Decode every row's prompt greedily with `sampler` and grade it; `advance` hears how many more are done."""
    from rl.rollouts.result import GREEDY

    scores: list[Score] = []
    completions: list[str] = []
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        ids = prompt_ids(tokenizer, [row["prompt"] for row in part])
        for row, completion in zip(part, sampler.generate(ids, GREEDY, max_tokens=max_tokens), strict=True):
            text = tokenizer.decode(completion.tokens, skip_special_tokens=True)
            completions.append(text)
            scores.append(grade(text, row))
        advance(len(part))
    return Measurement(scores, completions)
