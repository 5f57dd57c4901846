"""What the host knows of the requests of a rollout: their tokens so far, and which of them have ended, and how."""

from collections.abc import Callable, Sequence

import numpy as np

from rl.rollouts.result import Completion
from rl.rollouts.stops import stopped_at

# what a step drew for each row: tokens, logprobs, and whether the logits were finite
Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]


class Sight:
    """One entry a request. `done` are the completions of those that have ended."""

    def __init__(
        self,
        stops: Sequence[tuple[str, ...]],
        decode: Callable[[list[int]], str] | None,
        eos_ids: Sequence[int],
        vocabulary: int,
        max_tokens: int,
    ):
        self.stops, self.decode, self.eos_ids, self.max_tokens = stops, decode, eos_ids, max_tokens
        self.tokens = np.zeros((len(stops), max_tokens), np.int64)
        self.logprobs = np.zeros((len(stops), max_tokens), np.float32)
        self.count = np.zeros(len(stops), np.int64)  # tokens drawn for each request
        self.done: list[Completion | None] = [None] * len(stops)
        self.ending = np.zeros(max(vocabulary, *eos_ids) + 1, bool)
        self.ending[list(eos_ids)] = True
        self.heeds = np.array([bool(texts) for texts in stops], bool)

    def note(self, requests: np.ndarray, pending: Sequence[Drawn]) -> np.ndarray:
        """Write down what was drawn for `requests`, step by step, and end those that are at their end: the places among
        `requests` of these are returned."""
        before = self.count[requests]
        finite, ends = np.ones(len(requests), bool), np.zeros(len(requests), bool)
        for t, (token, logprob, fine) in enumerate(pending):
            going = slice(None) if not t else np.flatnonzero(self.count[requests] < self.max_tokens)
            into = requests[going]
            at = self.count[into]
            self.tokens[into, at], self.logprobs[into, at] = token[going], logprob[going]
            # what is not finite after a row's end is not its own
            finite[going] &= fine[going] | ends[going]
            ends[going] |= self.ending[token[going]]
            self.count[into] = at + 1
        # of most rows nothing is to be said at most steps
        over = ends | ~finite | (self.count[requests] == self.max_tokens) | self.heeds[requests]
        ended = np.flatnonzero(over)
        if not len(ended):
            return ended
        for i in ended:
            request = requests[i]
            length = self._length(request, before[i])
            if not finite[i]:
                self.done[request] = Completion([self.eos_ids[0]], [float("nan")], finite=False)
            elif length is not None:
                tokens, logprobs = self.tokens[request, :length].tolist(), self.logprobs[request, :length].tolist()
                self.done[request] = Completion(tokens, logprobs)
        return np.array([i for i in ended if self.done[requests[i]] is not None], np.int64)

    def _length(self, request: int, before: int) -> int | None:
        """Tokens of a completion that has ended since it had `before` of them; None when it goes on."""
        count = int(self.count[request])
        ends = np.flatnonzero(self.ending[self.tokens[request, before:count]])
        length = int(before + ends[0]) + 1 if len(ends) else None
        if self.stops[request]:
            until = self.tokens[request, : length or count].tolist()
            stopped = stopped_at(until, len(until) - before, self.stops[request], self.decode)
            length = length if stopped is None else stopped
        return count if length is None and count == self.max_tokens else length


class Teller:
    """Tells `heard` what is new in each row: of one that has ended no more than its completion."""

    def __init__(self, heard: Callable[[int, list[int]], None], rows: int):
        self.heard, self.told = heard, [0] * rows

    def __call__(self, sight: Sight) -> None:
        for row, before in enumerate(self.told):
            done = sight.done[row]
            tokens = sight.tokens[row, : sight.count[row]].tolist() if done is None else done.tokens
            if len(tokens) > before:
                self.told[row] = len(tokens)
                self.heard(row, tokens)
