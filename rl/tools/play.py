"""Episodes with tools, played as TRL 1.16's `GRPOTrainer._tool_call_loop` plays them: the run's held-out check.

Token by token the same (tests/test_tool_turns.py compares): a turn's tokens follow what was sampled before, never a
tokenization of its text; a result that leaves no room in `max_tokens` ends the episode; the last turn's call is not
made. Departure: a turn is not sampled past what is left of `max_tokens`, where TRL samples and cuts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rl.rollouts.result import Sampling
from rl.tools.calls import Seat
from rl.tools.toolbox import Toolbox, episode_seed


@dataclass
class Episode:
    """`completion` holds all that follows the prompt; `mask` is 1 on sampled tokens and 0 on a tool's."""

    prompt: list[int]
    seat: Seat | None
    tools: dict[str, Any]
    completion: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    going: bool = True


def play(
    sampler: Any,
    tokenizer: Any,
    box: Toolbox,
    rows: Sequence[dict[str, Any]],
    sampling: Sampling,
    *,
    max_tokens: int,
    seed: int = 0,
    context: int | None = None,
) -> list[Episode]:
    """One episode of each row, in order; an environment's `reset` hears the row and a seed keyed by the row's id."""
    described = box.callables()
    episodes = [_begin(tokenizer, box, described, row, seed) for row in rows]
    for turn in range(box.max_turns):
        going = [episode for episode in episodes if episode.going]
        if not going:
            break
        if turn:
            for episode in going:
                _answer(tokenizer, episode, max_tokens, context)
            going = [episode for episode in going if episode.going]
            if not going:
                break
        room = box.room(max(max_tokens - len(e.completion) for e in going), max_tokens)
        prompts = [e.prompt + e.completion for e in going]
        if context is not None:
            room = max(1, min(room, context - max(map(len, prompts))))
        said = sampler.generate(prompts, sampling, max_tokens=room, seed=seed, step=turn)
        for episode, completion in zip(going, said, strict=True):
            _hear(tokenizer, episode, completion.tokens[: max_tokens - len(episode.completion)], described)
    return episodes


def prompt_with_tools(tokenizer: Any, prompt: list[dict[str, Any]], described: Sequence[Any]) -> list[int]:
    """Token ids of a chat prompt with its tools described."""
    rendered = tokenizer.apply_chat_template(
        [prompt], tools=list(described), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return rendered["input_ids"][0]


def parse(tokenizer: Any, ids: list[int], prefix: list[int], described: Sequence[Any]) -> dict[str, Any]:
    """The assistant's message in `ids`, with `tool_calls` where it made any; plain text where it cannot be read."""
    try:
        message = tokenizer.parse_response(ids, prefix=prefix, tools=list(described))
        message["content"] = (message.get("content") or "").removesuffix(tokenizer.eos_token)
        for call in message.get("tool_calls") or []:
            function = call["function"]
            if not isinstance(function["name"], str):
                raise ValueError("a tool's name is a text")
            function["arguments"] = function.get("arguments") or {}
    except (ValueError, TypeError, KeyError):
        return {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}
    return message


def result_ids(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    """The tokens that stand between a turn's EOS and the next turn: the results and the assistant's head."""
    call = {"type": "function", "function": {"name": messages[0]["name"], "arguments": {}}}
    before = [{"role": "user", "content": "dummy"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    prefix = tokenizer.apply_chat_template(before, tokenize=True, return_dict=False)
    whole = tokenizer.apply_chat_template(
        before + messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    if tokenizer.eos_token_id in prefix:
        prefix = prefix[: len(prefix) - prefix[::-1].index(tokenizer.eos_token_id)]
    return whole[len(prefix) :]


def _begin(tokenizer: Any, box: Toolbox, described: Sequence[Any], row: dict[str, Any], seed: int) -> Episode:
    prompt, seat = list(row["prompt"]), None
    if box.seat is not None:
        seat = box.seat()
        said = seat.reset(**{"seed": episode_seed(seed, "heldout", str(row["id"]))} | row)
        if said is not None:
            prompt[-1] = prompt[-1] | {"content": prompt[-1]["content"] + said}
    return Episode(prompt_with_tools(tokenizer, prompt, described), seat, box.table(seat))


def _answer(tokenizer: Any, episode: Episode, max_tokens: int, context: int | None) -> None:
    """Make the calls of the last turn and append their results; ends the episode where these leave no room."""
    results = []
    for call in episode.messages[-1]["tool_calls"]:
        name = call["function"]["name"]
        try:
            if name not in episode.tools:
                raise ValueError(f"Tool {name} not found.")
            content = episode.tools[name](**call["function"]["arguments"])
        except Exception as error:
            content = str({"error": str(error)})
        results.append({"role": "tool", "name": name, "content": content})
    ids = result_ids(tokenizer, results)
    total = len(episode.completion) + len(ids)
    if total > max_tokens or (context is not None and len(episode.prompt) + total >= context):
        episode.going = False
        return
    episode.messages += results
    episode.completion += ids
    episode.mask += [0] * len(ids)


def _hear(tokenizer: Any, episode: Episode, ids: list[int], described: Sequence[Any]) -> None:
    message = parse(tokenizer, ids, episode.prompt + episode.completion, described) if ids else {}
    episode.completion += ids
    episode.mask += [1] * len(ids)
    if message:
        episode.messages.append(message)
    episode.going = bool(message.get("tool_calls"))
