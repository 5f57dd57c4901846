"""How a question, its worked examples and its gold answer become a prompt and a completion."""

from collections.abc import Sequence

Messages = list[dict[str, str]]
# asks for the form that rl.rewards.answers calls "answer_line"
ANSWER_LINE_SYSTEM = 'Answer the question. End with a line of its own of the form "Answer: <value>".'


def chat(question: str, shots: Sequence[tuple[str, str]], system: str | None) -> Messages:
    """Chat messages: the system message, each shot (question, reply) as a turn, then the question."""
    messages = [{"role": "system", "content": system}] if system else []
    for asked, reply in shots:
        messages += [{"role": "user", "content": asked}, *says(reply)]
    return [*messages, {"role": "user", "content": question}]


def says(text: str) -> Messages:
    """An assistant's message, the completion of a chat prompt."""
    return [{"role": "assistant", "content": text}]
