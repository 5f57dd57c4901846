"""The run's own held-out check: greedy completions by the rollout engine, graded by the run's verifier."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rl.rewards import Score

if TYPE_CHECKING:
    from rl.tools.toolbox import Toolbox

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


def _earned(seat: Any) -> float | None:
    """What the environment gives for an episode; None without one, and where it was lost."""
    try:
        return None if seat is None else seat._reward()
    except Exception:
        return None  # counted by the runner of its calls


def measure(
    sampler: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    grade: Callable[[Any, dict[str, Any]], Score],
    max_tokens: int,
    advance: Callable[[int], None] = lambda done: None,
    toolbox: "Toolbox | None" = None,
    context: int | None = None,
) -> Measurement:
    """Decode every row's prompt greedily with `sampler` and grade it; `advance` hears how many more are done.

    With a `toolbox` each row is an episode of several turns within `context` tokens, and `grade` gets its messages and
    the row with the environment's reward as `environment_reward`.
    """
    from rl.rollouts.result import GREEDY

    scores: list[Score] = []
    completions: list[str] = []
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        if toolbox is not None:
            from rl.tools import play

            played = play.play(sampler, tokenizer, toolbox, part, GREEDY, max_tokens=max_tokens, context=context)
            for row, episode in zip(part, played, strict=True):
                completions.append(tokenizer.decode(episode.completion, skip_special_tokens=True))
                scores.append(grade(episode.messages, row | {"environment_reward": _earned(episode.seat)}))
            toolbox.runner.check()
            advance(len(part))
            continue
        ids = prompt_ids(tokenizer, [row["prompt"] for row in part])
        for row, completion in zip(part, sampler.generate(ids, GREEDY, max_tokens=max_tokens), strict=True):
            text = tokenizer.decode(completion.tokens, skip_special_tokens=True)
            completions.append(text)
            scores.append(grade(text, row))
        advance(len(part))
    return Measurement(scores, completions)
