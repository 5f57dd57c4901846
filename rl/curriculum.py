"""[data.curriculum]: how often the start policy is right on each training question, and training on those in between.

A question that is always or never answered right gives every completion of a group the same reward, so an advantage of
0 throughout (the case that DAPO's dynamic sampling replaces at each step; Yu et al. 2025, section 3.2). Here K answers
are drawn once, before the first step. The rates lie in the run's folder, so that a resume trains on the same rows, and
under data/processed, for other runs of the same policy, rows, verifier and sampling.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl import files, record, rewards
from rl.algorithms import GROUPED
from rl.config.checks import rollout_size
from rl.config.reading import plain
from rl.errors import RunFailed
from rl.measure import prompt_ids
from rl.rollouts.result import Sampling
from rl.trl_fields import value

if TYPE_CHECKING:
    from rl.algorithms.base import Job
    from rl.config import Config
    from rl.display import Display

Row = dict[str, Any]
FILE = "pass_rates.json"
QUESTIONS = 64  # asked at once; fixed, since a completion's random stream is keyed by its place in the call
FIRST_STEP = 1 << 24  # keys other random streams than those of training


def for_job(job: "Job", sampler: Any, policy: str, root: Path, display: "Display") -> list[Row]:
    """The rows of `job.train` to train on; `policy` is the sha256 of the start. Counts sampled tokens in `job.tokens`.

    Raises RunFailed where logits were not finite or fewer questions are left than a rollout asks.
    """
    wanted, rows = job.config.data.curriculum, job.train
    if wanted is None:
        return rows
    key = cache_key(job.config, rows, policy)
    cached = root / "data" / "processed" / "pass_rates" / f"{files.sha256_json(key)[:16]}.json"
    own = job.folder / FILE
    right = _read(own, key) or _read(cached, key)
    if right is None:
        with display.eval_progress(len({_asked(row) for row in rows}), title="pass rates") as bar:
            right = count(job, sampler, lambda more: bar.update(bar.step + more))
        files.write_json(cached, {"key": key, "right": right})
    elif not own.exists():
        display.note(f"pass rates as they were sampled before: {cached}")
    files.write_json(own, {"key": key, "right": right})
    kept, told = keep(rows, right, wanted.samples, wanted.min_pass, wanted.max_pass)
    display.note(told)
    least = _prompts(job.config)
    if len(kept) < least:
        raise RunFailed(
            f"{job.config.path}: [data.curriculum]: {told}, and a rollout asks {least}: widen min_pass and max_pass, "
            "raise samples or [data] train_size, or take easier or harder questions"
        )
    return kept


def cache_key(config: "Config", rows: Sequence[Row], policy: str) -> dict[str, Any]:
    """Everything that decides the rates."""
    rollout = plain(config.rollout)
    names = ("engine", "precision", "bits", "group_size", "dtype", "temperature", "top_p", "top_k", "min_p", "stop")
    return {
        "policy": policy,
        "rows": files.sha256_json(list(rows)),
        "sampling": {name: rollout.get(name) for name in (*names, "max_completion_length")},
        "samples": config.data.curriculum.samples if config.data.curriculum else None,
        "seed": config.run.seed,
        "metric": config.eval.metric,
        "rewards": [plain(reward) for reward in config.rewards],
        "packages": record.versions(("mlx", "mlx-lm", "torch", "transformers")),
    }


def count(job: "Job", sampler: Any, advance: Callable[[int], None] = lambda done: None) -> dict[str, int]:
    """Row id -> how many of the answers drawn to its question are right; each different question is asked once."""
    config, rollout = job.config, job.config.rollout
    samples = config.data.curriculum.samples if config.data.curriculum else 0
    sampling = Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.min_p)
    grade = rewards.grader(config.rewards)
    first: dict[str, Row] = {}
    for row in job.train:
        first.setdefault(_asked(row), row)
    found: dict[str, int] = {}
    asked = list(first)
    for number, start in enumerate(range(0, len(asked), QUESTIONS), FIRST_STEP):
        part = [first[name] for name in asked[start : start + QUESTIONS]]
        ids = prompt_ids(job.tokenizer, [row["prompt"] for row in part])
        prompts = [own for own in ids for _ in range(samples)]
        drawn = sampler.generate(
            prompts, sampling, max_tokens=rollout.max_completion_length, seed=config.run.seed, step=number
        )
        if bad := sum(not c.finite for c in drawn):
            raise RunFailed(f"logits of the sampler were not finite in {bad} of {len(drawn)} completions")
        job.tokens["prompt"] += sum(map(len, prompts))
        job.tokens["completion"] += sum(len(c.tokens) for c in drawn)
        for i, row in enumerate(part):
            texts = [
                job.tokenizer.decode(c.tokens, skip_special_tokens=True) for c in drawn[i * samples : (i + 1) * samples]
            ]
            found[_asked(row)] = sum(getattr(grade(text, row), config.eval.metric) for text in texts)
        advance(len(part))
    return {row["id"]: found[_asked(row)] for row in job.train}


def keep(
    rows: Sequence[Row], right: Mapping[str, int], samples: int, least: float, most: float
) -> tuple[list[Row], str]:
    """The rows whose share of right answers lies in [least, most], in their order, and a line for people."""
    rates = [right[row["id"]] / samples for row in rows]
    kept = [row for row, rate in zip(rows, rates, strict=True) if least <= rate <= most]
    never, always = rates.count(0.0), rates.count(1.0)
    told = (
        f"{len(kept)} of {len(rows)} questions are right in {least:.0%} to {most:.0%} of {samples} answers "
        f"({never} never, {always} always)"
    )
    return kept, told


def _prompts(config: "Config") -> int:
    """Different prompts that one rollout asks."""
    args, algorithm = config.trainer.args, config.trainer.algorithm
    return rollout_size(args) // value(algorithm, args, "num_generations") if algorithm in GROUPED else 1


def _read(path: Path, key: Mapping[str, Any]) -> dict[str, int] | None:
    """The rates in a file that was made for `key`, None where there is none."""
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
        return made["right"] if made["key"] == json.loads(json.dumps(key)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _asked(row: Row) -> str:
    return json.dumps([row["prompt"], row.get("answer")], sort_keys=True)
