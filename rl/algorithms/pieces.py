"""Which pieces the learner's forward makes of a batch, decided from sizes alone.

The learner asks with a batch in hand and the planner with the sizes of one, so nothing here imports torch.
"""

from dataclasses import dataclass
from typing import Literal

from rl.device import padded

Way = Literal["whole", "prefix", "prompts"]

# below this many shared tokens a piece of their own costs more than it saves
SHORTEST_PREFIX = 8
# what attention over a further piece costs a layer, in tokens, on a CPU
PIECE_TOKENS = 4
# and off it, in tokens x weights of a layer: about 16 launches there and back whatever its size. Guesses, not fitted to
# any machine: 20 us a launch, beside 40 TFLOP/s in float32 (CUDA) or 10 (MPS)
PIECE_WEIGHTS = {"cuda": 2e9, "mps": 5e8}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A batch in tokens. `prompt` and `completion` are the widest of its rows, `prompts` counts distinct ones (0 where
    each row reads its own), `prefix` is what all of them share.
    """

    rows: int
    prompt: int
    completion: int
    prompts: int
    prefix: int
    total: int | None = None  # columns of a row, padding included; unset = prompt + completion


def piece_tokens(device: str, layer_weights: int) -> int:
    """How many tokens take as long as a further piece in a layer of `layer_weights` numbers on a `device` type."""
    return round(PIECE_WEIGHTS[device] / layer_weights) if device in PIECE_WEIGHTS else PIECE_TOKENS


def shared(prefix: int, device: str) -> int:
    """How many of `prefix` tokens that all prompts begin with are worth a piece of their own."""
    if device == "mps":  # few different shapes
        prefix -= prefix % SHORTEST_PREFIX
    return 0 if prefix < SHORTEST_PREFIX else prefix


def on_device(prompts: int, device: str) -> int:
    """How many prompts are read for so many distinct ones: on MPS a power of two, for few different shapes."""
    return 1 << (prompts - 1).bit_length() if device == "mps" and prompts else prompts


def ways(sizes: Sizes, device: str) -> dict[Way, tuple[int, ...]]:
    """Tokens of each piece, in each way that goes: all rows whole; the prefix once, then the rows; the prefix, then the
    rest of each distinct prompt but its last token, then the completions."""
    rows, longest = sizes.rows, sizes.prompt
    prefix = shared(sizes.prefix, device)
    found: dict[Way, tuple[int, ...]] = {"whole": (rows * (sizes.total or longest + sizes.completion),)}
    first = (prefix,) if prefix else ()
    if prefix:
        found["prefix"] = (*first, rows * padded(longest - prefix + sizes.completion - 1, device))
    if sizes.prompts and longest - 1 > prefix:
        rest, own = padded(longest - 1 - prefix, device), padded(sizes.completion, device)
        found["prompts"] = (*first, on_device(sizes.prompts, device) * rest, rows * own)
    return found


def choose(sizes: Sizes, device: str, cost: int) -> Way:
    """The way with the fewest tokens, each further piece counted as `cost` of them."""
    found = ways(sizes, device)
    return min(found, key=lambda way: sum(found[way]) + cost * (len(found[way]) - 1))
