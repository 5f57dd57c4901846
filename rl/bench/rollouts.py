"""Rollouts of `nox -s bench`: who agrees with the trainer, then who is how fast, in turns and within a budget."""

import gc
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.bench import table as tables
from rl.bench.models import Subject
from rl.bench.table import BATCH, ENGINE, HF, PAGED, Contest, Sizes, Work
from rl.device import give_back
from rl.errors import RunFailed

if TYPE_CHECKING:
    import torch

    from rl.rollouts.bench import Batch
    from rl.rollouts.engine import Engine

SEED = 0
GREEDY_TOKENS = 16  # a row, for the agreement
WARM_TOKENS = 8  # a row, of a contestant's warm-up where that is enough
TAIL = 4  # completions of the long-tailed work end, on average, at about 1/TAIL of the longest


@dataclass(frozen=True)
class Setting:
    """What holds for the whole bench. `prompt` and `new` in tokens."""

    device: "torch.device"
    dtype: str
    quick: bool
    repeats: int
    folder: Path
    say: Callable[[str], None]

    @property
    def prompt(self) -> int:
        return 32 if self.quick else 256

    @property
    def new(self) -> int:
        return 16 if self.quick else 128


class Budget:
    """Seconds that may still be spent; None is no bound. A turn that has begun is finished."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic):
        self.clock, self.end = clock, None if seconds is None else clock() + seconds

    def left(self) -> float:
        """Negative once it is spent."""
        return float("inf") if self.end is None else self.end - self.clock()

    def part(self, share: float) -> "Budget":
        """A budget of `share` of what is left."""
        return Budget(None if self.end is None else max(0.0, self.left() * share), self.clock)


def works(setting: Setting) -> list[Work]:
    """GRPO-shaped rollouts, and prompts that no two rows share, where an engine for groups must not lose."""
    sizes = (setting.prompt, setting.new)
    return [
        Work("8 × 8", 8, 8, *sizes),
        Work("1 × 16", 1, 16, *sizes),
        Work("8 × 8, long tail", 8, 8, *sizes, long_tail=True),
        Work("16 × 1", 16, 1, *sizes),
    ]


def agree(
    subject: Subject, setting: Setting, reference: Any, policy: Any, engine: "Engine", batch: "Batch", never: int
) -> tuple[list[tables.Agreement], dict[str, str]]:
    """Greedy completions of every contestant on 4 prompts, each twice, judged by the trainer's logits in float32.

    Returns with them who does not take part and why: continuous batching may not run here, or not be this policy.
    Raises RunFailed where another falls short of the best tokens, or gives other logprobs, by more than its dtype
    explains.
    """
    from rl.rollouts import bench as contestants
    from rl.rollouts.parity import TOLERANCE

    prompts = [p for p in subject.prompts[:4] for _ in range(2)]
    new = min(GREEDY_TOKENS, setting.new)
    ours = contestants.engine(engine, prompts, new, ending=[never], temperature=0.0)
    theirs, _ = batch(prompts, [new] * 8, temperature=0.0, logprobs=True)
    hf = contestants.hf_generate(policy, prompts, [new] * 8, temperature=0.0)
    answers = {
        ENGINE: ([c.tokens for c in ours], [c.logprobs for c in ours]),
        BATCH: ([c.tokens for c in theirs], [c.logprobs for c in theirs]),
        HF: (hf, None),
    }
    absent: dict[str, str] = {}
    try:
        with contestants.continuous(policy, 8, setting.prompt, new, temperature=0.0) as paged:
            answers[PAGED] = (paged(prompts, [new] * 8), None)
    except Exception as error:  # its own thread, kernels and graphs: whatever stops it, the others can be timed
        absent[PAGED] = said(error)
    found = []
    for name, (tokens, logprobs) in answers.items():
        one = judge(name, reference, prompts, tokens, logprobs)
        limit = TOLERANCE[setting.dtype]
        if one.regret <= limit and (one.dlogp is None or one.dlogp <= limit):
            found.append(one)
            continue
        told = (
            f"not the same policy: its greedy tokens are {one.regret:.2g} below the best, its logprobs {one.dlogp} off "
            f"(at most {limit} in {setting.dtype})"
        )
        if name != PAGED:
            raise RunFailed(f"bench: {name} is {told}")
        absent[PAGED] = told
    return found, absent


def said(error: Exception) -> str:
    """An error's first line, without what a path of this machine would tell."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {re.sub(r'/[^ ]*/', '', text)[:160]}"


def judge(
    name: str,
    reference: Any,
    prompts: list[list[int]],
    tokens: list[list[int]],
    logprobs: list[list[float]] | None,
) -> tables.Agreement:
    """Completions of one length against the logits of `reference` on the same text."""
    import torch

    new = len(tokens[0])
    device = next(reference.parameters()).device
    ids = torch.tensor([p + t for p, t in zip(prompts, tokens, strict=True)], device=device)
    with torch.no_grad():
        logits = reference(input_ids=ids, logits_to_keep=new + 1, use_cache=False).logits[:, :-1].float()
    exact = logits.log_softmax(-1)
    chosen = exact.gather(-1, ids[:, -new:, None])[..., 0]
    short = exact.max(-1).values - chosen
    off = None
    if logprobs is not None:
        off = (torch.tensor(logprobs, device=device) - chosen).abs().mean().item()
    return tables.Agreement(name, ids.shape[0] * new, short.mean().item(), off, (short == 0).float().mean().item())


def ending_ids(tokens: Sequence[int], share: float) -> list[int]:
    """Ids that together make up at least `share` of `tokens`: whoever ends there has completions with a long tail."""
    import numpy as np

    ids, counts = np.unique(np.asarray(tokens), return_counts=True)
    order = np.random.default_rng(SEED).permutation(len(ids))
    needed = int(np.searchsorted(np.cumsum(counts[order]), share * len(tokens))) + 1
    return sorted(int(i) for i in ids[order[:needed]])


def contest(
    work: Work,
    subject: Subject,
    setting: Setting,
    policy: Any,
    engine: "Engine",
    batch: "Batch",
    never: int,
    sizes: Sizes,
    machine: tables.Machine,
    absent: dict[str, str],
    share: Budget,
    whole: Budget,
) -> Contest | None:
    """Rollouts of `work` in turns. The engine goes first; its lengths are the others' limits, row by row.

    One repetition is finished while `whole` lasts, others while `share` does; as it runs short the slowest contestants
    stay out of further repetitions. None where not even one repetition was finished in time. `absent`: who does not
    take part and why; continuous batching is added to it when it fails here.
    """
    from rl.rollouts import bench as contestants

    prompts = [p for p in subject.prompts[: work.prompts] for _ in range(work.group)]
    ending = [never]
    if work.long_tail:
        probe = contestants.engine(engine, prompts, min(32, work.max_tokens), ending=[never], seed=SEED)
        ending = ending_ids([t for c in probe for t in c.tokens], TAIL / work.max_tokens)
    players = [name for name in (ENGINE, BATCH, HF, PAGED) if name not in absent]
    found = Contest(work, [], [], {name: [] for name in players}, [])
    last: dict[str, float] = {}
    for repeat in range(-1, setting.repeats):
        if repeat > 0:
            players = _affordable(players, last, share.left())
        if not players:
            break
        warm = repeat < 0
        # MLX compiles at the first sight of a kind of batch, on a CPU one of a single row too: the tail has all
        short = warm and setting.device.type == "cpu" and not work.long_tail
        most = min(WARM_TOKENS, work.max_tokens) if short else work.max_tokens
        limits: list[int] = []
        turns: dict[str, float] = {}
        for name in list(players):
            if whole.left() <= 0:
                return found if found.tokens else None
            turn = "warm-up" if warm else f"{repeat + 1} of {setting.repeats}"
            setting.say(f"{subject.shape}: rollout {work.name}, {name}, {turn}")
            # torch compiles nothing here: a few tokens of its contestants warm up as much as all would
            asked = [min(WARM_TOKENS, n) for n in limits] if warm and name in (HF, PAGED) else limits
            gc.collect()
            seed, started = SEED + 1 + repeat, time.perf_counter()
            if name == ENGINE:
                done = [c.tokens for c in contestants.engine(engine, prompts, most, ending=ending, seed=seed)]
            elif name == BATCH:
                theirs, seconds = batch(prompts, limits, seed=seed)
                done = [c.tokens for c in theirs]
            elif name == HF:
                done = contestants.hf_generate(policy, prompts, asked, seed=seed)
            else:
                try:
                    done, seconds = _paged(policy, work, prompts, asked)
                except Exception as error:
                    absent[PAGED] = said(error)
                    players.remove(PAGED)
                    found.seconds.pop(PAGED)
                    continue
            turns[name] = seconds if name in (BATCH, PAGED) else time.perf_counter() - started
            if name in (HF, PAGED):
                give_back(setting.device)  # what torch keeps for itself MLX cannot have: 1.7B ran out of memory
            lengths = [len(tokens) for tokens in done]
            limits, asked = limits or lengths, asked or lengths
            if lengths != asked or (name == ENGINE and not work.long_tail and set(lengths) != {most}):
                raise RunFailed(f"bench: {name} gave {sum(lengths)} new tokens in {work.name}, not {sum(asked)}")
        if warm:
            continue
        last = turns
        for name in players:
            found.seconds[name].append(turns[name])
        found.tokens.append(sum(limits))
        found.longest.append(max(limits))
        found.floors.append(tables.floor(sizes, machine, work.prompts, work.prompt_tokens, limits))
    return found if found.tokens else None


def _affordable(players: Sequence[str], last: dict[str, float], left: float) -> list[str]:
    """Those whose next turns fit into `left` seconds, the slowest staying out first; none without anyone beside us."""
    kept = list(players)
    while kept and sum(last[name] for name in kept) > left:
        kept.remove(max(kept, key=lambda name: (name != ENGINE, last[name])))
    return kept if len(kept) > 1 else []


def _paged(policy: Any, work: Work, prompts: list[list[int]], asked: list[int]) -> tuple[list[list[int]], float]:
    """Continuous batching's completions and seconds. Its thread is ready before they count, and gone afterwards, so
    that it takes nothing from the others while it waits for requests."""
    from rl.rollouts import bench as contestants

    rows = work.prompts * work.group
    with contestants.continuous(policy, rows, work.prompt_tokens, work.max_tokens) as paged:
        paged(prompts[:1], [1])
        started = time.perf_counter()
        done = paged(prompts, asked)
        return done, time.perf_counter() - started
