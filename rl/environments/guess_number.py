"""A game of several turns: find a number, told after each guess what is left."""

import itertools
import random
from typing import Any

from rl.data.prompts import Messages

SYSTEM = "Find the number. Guess in the middle of what is left."


class GuessNumber:
    """A number of `width` neighbours below `most` is to be found in `guesses` guesses; 1 for finding it, else 0.

    Halving finds each of 2^n - 1 numbers in n guesses; going through them in order finds n. The secret is a row's, so
    all completions of one prompt play the same game.
    """

    def __init__(self, width: int = 7, most: int = 99, guesses: int = 3, shots: int = 2):
        if not 2 <= width < most:
            raise ValueError(f"width = {width}, valid: 2 to {most - 1} (below most)")
        if guesses < 1 or shots < 0:
            raise ValueError(f"guesses = {guesses}, shots = {shots}, valid: guesses of at least 1, shots of at least 0")
        self.width, self.most, self.guesses, self.shots = width, most, guesses, shots
        self.secret = self.low = self.high = self.left = 0
        self.found = False

    def rows(self, count: int, seed: int) -> list[dict[str, Any]]:
        """At most `count` games, no two alike, in an order drawn from `seed`; worked examples are from below them."""
        starts = range(1, self.most - self.width + 2)
        games = list(itertools.product(starts, range(self.width)))
        random.Random(seed).shuffle(games)
        examples = self._examples()
        return [
            {
                "id": f"{low}+{offset}",
                "prompt": [*examples, {"role": "user", "content": self._asked(low)}],
                "answer": str(low + offset),
                "task": "guess-number",
                "low": low,
            }
            for low, offset in games[:count]
        ]

    def reset(self, answer: str, low: int) -> None:
        """Begin the game of a row."""
        self.secret, self.low, self.high = int(answer), low, low + self.width - 1
        self.left, self.found = self.guesses, False

    def guess(self, number: int) -> str:
        """
        Guess the number.

        Args:
            number: The guess.

        Returns:
            Whether it is right, else the numbers that are left.
        """
        if self.found:
            return "the game is over"
        if self.left == 0:
            return "no guess is left"
        self.left -= 1
        if number == self.secret:
            self.found = True
            return "right"
        if number < self.secret:
            self.low = max(self.low, number + 1)
            return f"higher, {self.low} to {self.high}"
        self.high = min(self.high, number - 1)
        return f"lower, {self.low} to {self.high}"

    def get_reward(self) -> float:
        """1 when the number was found, else 0."""
        return float(self.found)

    def _asked(self, low: int) -> str:
        return f"The number is one of {low} to {low + self.width - 1}."

    def _examples(self) -> Messages:
        """The system message and `shots` games played by halving, with numbers above all that are asked for."""
        messages: list[Any] = [{"role": "system", "content": SYSTEM}]
        shown = GuessNumber(self.width, self.most, self.guesses)
        for shot in range(self.shots):
            low = self.most + 1 + shot * (self.width + 4)
            secret = low + (self.width - 1 if shot % 2 else self.width // 4)
            shown.reset(str(secret), low)
            messages.append({"role": "user", "content": self._asked(low)})
            while not shown.found and shown.left:
                number = (shown.low + shown.high) // 2
                call = {"type": "function", "function": {"name": "guess", "arguments": {"number": number}}}
                messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
                messages.append({"role": "tool", "name": "guess", "content": shown.guess(number)})
            messages.append({"role": "assistant", "content": "Found." if shown.found else "Not found."})
        return messages
