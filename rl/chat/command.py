"""`python -m rl chat RUN`: lines in, answers out; on a terminal token by token.

Lines that are no terminal's (a pipe) are questions, one each, and each answer is one line: line breaks in it are shown
as `\\n`. A model's output is never allowed to move the cursor or to colour the screen.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rl import finished, record
from rl.display import visible
from rl.errors import UserError

if TYPE_CHECKING:
    pass

HELP = """\
/base     the model the run came from answers; again: the run      /both     both answer; again: one
/system X a system message (chat models); alone: none              /history  what was said
/try N    held-out question N of the run, and its answer           /clear    forget what was said
/help     this                                                     /quit     end (also Ctrl-D)"""

SPEAKERS = ("run", "base")


@dataclass
class Chat:
    """One conversation. `answer(who, prompt ids, heard)` gives the tokens; `who` is "run" or "base"."""

    tokenizer: Any
    answer: Callable[[str, list[int], Callable[[list[int]], None]], list[int]]
    out: IO[str]
    live: bool
    chat: bool  # messages through the chat template; else plain continuation of the line alone
    heldout: list[dict[str, Any]] = field(default_factory=list)
    who: str = "run"
    both: bool = False
    system: str | None = None
    history: list[dict[str, str]] = field(default_factory=list)

    def hear(self, line: str) -> bool:
        """Answer a line or do what its command says; False when the chat is over."""
        line = line.rstrip("\r\n")
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/exit"):
            return False
        if word.startswith("/") and word[1:].isalpha():
            self._command(word, rest.strip())
        elif line.strip():
            self.ask(line)
        return True

    def _command(self, word: str, rest: str) -> None:
        if word == "/help":
            self._say(HELP)
        elif word == "/base":
            self.who, self.both = ("run" if self.who == "base" else "base"), False
            self._say(f"({self.who} answers)")
        elif word == "/both":
            self.both = not self.both
            self._say(f"({'both answer' if self.both else self.who + ' answers'})")
        elif word == "/clear":
            self.history.clear()
            self._say("(forgotten)")
        elif word == "/system":
            if not self.chat:
                return self._say("(no chat template in use here, so there is no system message)")
            self.system = rest or None
            self._say("(system message set)" if rest else "(no system message)")
        elif word == "/history":
            for message in self.history:
                self._say(f"{message['role']}: {visible(message['content'])}")
        elif word == "/try":
            if not (rest.isdecimal() and int(rest) < len(self.heldout)):
                return self._say(
                    f"(/try N with N from 0 to {len(self.heldout) - 1})" if self.heldout else "(none kept)"
                )
            row = self.heldout[int(rest)]
            self.ask(row["prompt"])
            self._say(f"(the answer is {visible(str(row.get('answer')))})")
        else:
            self._say(f"(no command {word}; /help lists them)")

    def ask(self, question: str | list[dict[str, str]]) -> None:
        """Answer a question with whoever is speaking; what the run says (or who speaks alone) stays in the history."""
        if isinstance(question, str):
            self.history.append({"role": "user", "content": question})
        else:
            self.history = [m for m in question if m["role"] != "system"]
            self.system = next((m["content"] for m in question if m["role"] == "system"), self.system)
        ids = self._ids(question)
        if self.both and self.live:
            kept = self._beside(ids)
        elif self.both:
            kept, _ = [self._stream(who, ids, f"{who}: ") for who in SPEAKERS]
        else:
            kept = self._stream(self.who, ids, f"{self.who}: " if self.live else "")
        self.history.append({"role": "assistant", "content": kept})

    def _ids(self, question: str | list[dict[str, str]]) -> list[int]:
        from rl.measure import prompt_ids

        if not self.chat and isinstance(question, str):
            return prompt_ids(self.tokenizer, [question])[0]
        system = [{"role": "system", "content": self.system}] if self.system else []
        return prompt_ids(self.tokenizer, [[*system, *self.history]])[0]

    def _beside(self, ids: list[int]) -> str:
        """Both answers in two columns that fill while they come; returns the run's."""
        from rich.console import Console
        from rich.live import Live
        from rich.table import Table
        from rich.text import Text

        texts = dict.fromkeys(SPEAKERS, "")

        def table() -> Table:
            drawn = Table(expand=True)
            for who in SPEAKERS:
                drawn.add_column(who, ratio=1, overflow="fold")
            drawn.add_row(*(Text(self._safe(text)) for text in texts.values()))
            return drawn

        with Live(table(), console=Console(file=self.out), refresh_per_second=12) as live:
            for who in SPEAKERS:

                def heard(tokens: list[int], who: str = who) -> None:
                    texts[who] = self.tokenizer.decode(tokens, skip_special_tokens=True)
                    live.update(table())

                heard(self.answer(who, ids, heard))
        return texts["run"]

    def _stream(self, who: str, ids: list[int], label: str) -> str:
        shown = ""
        self.out.write(label)

        def heard(tokens: list[int]) -> None:
            nonlocal shown
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            # a character whose bytes are not all there yet decodes to U+FFFD: wait for the rest
            if self.live and not text.endswith("\ufffd") and text.startswith(shown):
                self.out.write(self._safe(text[len(shown) :]))
                self.out.flush()
                shown = text

        try:
            tokens = self.answer(who, ids, heard)
        except KeyboardInterrupt:  # this answer alone
            if not self.live:
                raise
            self._say(" (stopped)")
            return shown
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        self._say(self._safe(text[len(shown) :] if text.startswith(shown) else text))
        return text

    def _safe(self, text: str) -> str:
        """The text without control characters; on a terminal its line breaks stay."""
        return "\n".join(visible(line) for line in text.split("\n")) if self.live else visible(text)

    def _say(self, text: str) -> None:
        self.out.write(text + "\n")
        self.out.flush()


def main(
    text: str,
    *,
    engine: str,
    given: dict[str, Any],
    max_tokens: int | None,
    seed: int,
    plain: bool = False,
    root: Path = Path(),
) -> int:
    """Talk until /quit or the end of the input. `given` are sampling settings in place of the run's own.

    Raises UserError for an unknown run, one that does not talk, or settings that are out of range.
    """
    folder = finished.folder(text, root)
    run = record.read(folder)
    if run.status != "finished":
        raise UserError(f"{text}: {run.status}; a run can be talked to when it has finished: --resume goes on with it")
    if run.config.get("trainer", {}).get("algorithm") == "reward":
        raise UserError(f"{text}: a reward model gives scores and no text; `reward-report {text}` shows them")
    given = {name: value for name, value in given.items() if value is not None}
    _check(given)
    rollout = run.config.get("rollout", {})
    if named := ", ".join([*(rollout.get("tools") or ()), *filter(None, [rollout.get("environment")])]):
        said = (
            f"{run.name} was trained with {named}: chat has no tools, `samples {run.name}` shows what it does with them"
        )
        print(f"note: {said}", file=sys.stderr)
    from rl.rollouts.result import Sampling  # here: torch comes with its package, and takes seconds

    sampling = replace(
        Sampling(**{name: rollout[name] for name in ("temperature", "top_p", "top_k", "min_p") if name in rollout}),
        **given,
    )
    from rl import train
    from rl.chat import voices

    train.quiet()
    from rl import models
    from rl.algorithms.seam import stop_ids

    sources = {"run": voices.made(root, folder)}
    tokenizer = models.load_tokenizer(models.Base(run.name, folder, ""))
    kind = voices.MLXVoices if engine == "mlx" else voices.TorchVoices
    speaker = kind(run, stop_ids(tokenizer, tuple(rollout.get("stop") or ())), tokenizer)
    most = max_tokens or int(rollout.get("max_completion_length", 64))
    asked = 0

    def answer(who: str, ids: list[int], heard: Callable[[list[int]], None]) -> list[int]:
        nonlocal asked
        if who not in sources:
            sources[who] = voices.start(root, folder, run)
        asked += 1
        try:
            return speaker.answer(sources[who], ids, sampling, most, seed + asked - 1, heard).tokens
        except ValueError as error:  # a history that has outgrown the context
            raise UserError(f"{error}; /clear forgets what was said, --max-tokens asks for less") from None

    heldout = folder / "heldout.jsonl"
    rows = [json.loads(line) for line in heldout.read_text("utf-8").splitlines()] if heldout.is_file() else []
    live = sys.stdin.isatty() and sys.stdout.isatty()
    templated = bool(tokenizer.chat_template) and not plain
    chat = Chat(tokenizer, answer, sys.stdout, live, templated, rows)
    if live:
        told = "chat template" if chat.chat else "plain continuation of each line"
        print(f"{run.name} by {engine}, {told}, {most} tokens at most, {sampling}; /help lists the commands")
    return _loop(chat, live)


def _loop(chat: Chat, live: bool) -> int:
    if live:
        import readline  # noqa: F401  arrow keys and history at the prompt
    while True:
        try:
            line = input("> ") if live else sys.stdin.readline()
        except EOFError:
            print()
            return 0
        if not live and not line:
            return 0
        try:
            if not chat.hear(line):
                return 0
        except UserError as error:
            if not live:
                raise
            print(f"({error})")


def _check(given: dict[str, float]) -> None:
    """What argparse took as numbers; the run's own were checked when it was made."""
    for name, good, valid in (
        ("temperature", lambda value: 0 <= value < math.inf, "≥ 0 (0 = greedy)"),
        ("top_p", lambda value: 0 < value <= 1, "> 0 and ≤ 1"),
        ("top_k", lambda value: value >= 0, "≥ 0 (0 = off)"),
        ("min_p", lambda value: 0 <= value <= 1, "≥ 0 and ≤ 1"),
    ):
        if name in given and not good(given[name]):
            raise UserError(f"--{name.replace('_', '-')}: found {given[name]}, valid: {valid}")
