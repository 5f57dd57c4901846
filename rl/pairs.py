"""On-policy preferences: completions of a start policy to the training questions, judged by the run's verifier.

To each question K completions are drawn as [rollout] says. Where at least one is right and one wrong, one of each is
kept, drawn by the seed: a pair, or two labelled completions for kto (the same ones, so that the algorithms compare).
What all K agree on teaches a preference nothing and is left out. For bon the best completions are kept instead: of
those that are right and ended by themselves, the ones of the highest reward, each once.
"""

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl import files, judge, rewards
from rl.data import preferences
from rl.errors import RunFailed, UserError
from rl.measure import prompt_ids
from rl.rollouts.result import Sampling

if TYPE_CHECKING:
    from rl.algorithms.base import Job
    from rl.config import Config
    from rl.display import Display

Row = dict[str, Any]

SAMPLES = 8  # completions to a question where [rollout] samples is unset
QUESTIONS = 64  # asked at once; fixed, since a completion's random stream is keyed by its place in the call
FILE = "pairs.jsonl"
HELDOUT = "heldout_pairs.jsonl"
HELDOUT_STEP = 1 << 20  # held-out questions draw from other random streams than training ones, whatever their number


@dataclass
class Drawn:
    """Preference rows and how they came about; `right` counts right completions, `cut` kept ones without an end."""

    rows: list[Row] = field(default_factory=list)
    questions: int = 0
    completions: int = 0
    mixed: int = 0
    right: int = 0
    cut: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: {"prompt": 0, "completion": 0})
    best: bool = False  # of each question the best completions, not a preference

    def told(self) -> str:
        """One line for people."""
        share = self.right / max(1, self.completions)
        if self.best:
            return (
                f"{self.mixed} of {self.questions} questions have a right completion among "
                f"{self.completions // max(1, self.questions)} ({share:.0%} are right); {len(self.rows)} are kept"
            )
        return (
            f"{self.mixed} of {self.questions} questions have a right and a wrong completion among "
            f"{self.completions // max(1, self.questions)} ({share:.0%} are right); "
            f"{self.cut} of {2 * self.mixed} kept were cut by [rollout] max_completion_length"
        )


@dataclass(frozen=True)
class _Candidate:
    text: str
    tokens: list[int]
    right: bool
    ended: bool
    reward: float = 0.0


def sample(
    config: "Config",
    questions: Sequence[Row],
    sampler: Any,
    tokenizer: Any,
    stop_ids: Sequence[int],
    origin: Mapping[str, Any],
    advance: Callable[[int], None] = lambda done: None,
    *,
    seed: int | None = None,
    first: int = 0,
    functions: Sequence[rewards.RewardFunction] = (),
) -> Drawn:
    """Preference rows of `questions` (rows with prompt and answer), in their order; the same for the same seed.

    For bon the rows are the best completions, by the sum of `functions`.
    `sampler` holds the start policy, `origin` names it in each row's `provenance`. Right means right by [eval] metric.
    `seed` is the run's unless given; `first` is the step that keys the random streams of the first call.
    Of a question's right (wrong) completions one that ended by itself is preferred: a file keeps the texts alone, and
    TRL closes each of those with EOS. The rows also hold the very tokens (`rl.data.preferences.IDS`).
    Raises RunFailed where logits were not finite or no question has both kinds.
    """
    rollout, seed = config.rollout, config.run.seed if seed is None else seed
    sampling = Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.min_p)
    grade, k = rewards.grader(config.rewards), rollout.samples or SAMPLES
    provenance = {**origin, **asdict(sampling), "seed": seed, "k": k}
    drawn = Drawn(best=config.trainer.algorithm == "bon")
    for number, start in enumerate(range(0, len(questions), QUESTIONS), first):
        part = questions[start : start + QUESTIONS]
        prompts = [ids for ids in prompt_ids(tokenizer, [row["prompt"] for row in part]) for _ in range(k)]
        completions = sampler.generate(
            prompts, sampling, max_tokens=rollout.max_completion_length, seed=seed, step=number
        )
        if bad := sum(not c.finite for c in completions):
            raise RunFailed(f"logits of the sampler were not finite in {bad} of {len(completions)} completions")
        drawn.tokens["prompt"] += sum(map(len, prompts))
        drawn.tokens["completion"] += sum(len(c.tokens) for c in completions)
        texts = [tokenizer.decode(c.tokens, skip_special_tokens=True) for c in completions]
        asked = [row for row in part for _ in range(k)]
        ids = [c.tokens for c in completions]
        sums = judge.totals(functions, asked, texts, ids) if drawn.best else [0.0] * len(ids)
        candidates = [
            _Candidate(text, tokens, getattr(grade(text, row), config.eval.metric), tokens[-1] in stop_ids, reward)
            for text, tokens, row, reward in zip(texts, ids, asked, sums, strict=True)
        ]
        for i, row in enumerate(part):
            own = candidates[i * k : (i + 1) * k]
            if drawn.best:
                _keep_best(drawn, row, prompts[i * k], own, provenance)
            else:
                _keep(drawn, row, prompts[i * k], own, config.trainer.algorithm, provenance)
        advance(len(part))
    if not drawn.rows:
        kind = "rows" if drawn.best else "pairs"
        raise RunFailed(
            f"{config.path}: no {kind}: {drawn.told()}; raise [rollout] samples or temperature, or take questions that "
            "the start gets right sometimes"
        )
    return drawn


def _keep(
    drawn: Drawn,
    row: Row,
    prompt: list[int],
    candidates: Sequence[_Candidate],
    algorithm: str,
    provenance: Mapping[str, Any],
) -> None:
    """Add the rows of one question to `drawn`, if its candidates are of both kinds."""
    right = [c for c in candidates if c.right]
    wrong = [c for c in candidates if not c.right]
    drawn.questions += 1
    drawn.completions += len(candidates)
    drawn.right += len(right)
    if not right or not wrong:
        return
    # keyed by the question too, so that its draw does not depend on the questions before it
    rng = random.Random(f"{provenance['seed']}/{row['id']}")
    good, bad = (rng.choice([c for c in kind if c.ended] or kind) for kind in (right, wrong))
    drawn.mixed += 1
    drawn.cut += (not good.ended) + (not bad.ended)
    same = {"prompt": row["prompt"], "answer": row["answer"], "task": row["task"]}
    same |= {"provenance": {**provenance, "right": len(right)}, "prompt_ids": prompt}
    if algorithm == "kto":
        rows = [
            {"id": f"{row['id']}/{name}", **same, "completion": c.text, "label": c.right, "completion_ids": c.tokens}
            for name, c in (("right", good), ("wrong", bad))
        ]
    else:
        ids = {"chosen_ids": good.tokens, "rejected_ids": bad.tokens}
        rows = [{"id": row["id"], **same, "chosen": good.text, "rejected": bad.text, **ids}]
    drawn.rows += [preferences.spoken(made) for made in rows]


def _keep_best(
    drawn: Drawn, row: Row, prompt: list[int], candidates: Sequence[_Candidate], provenance: Mapping[str, Any]
) -> None:
    """Add the right completions of the highest reward to `drawn`, each once: the order of drawing stays."""
    right = [c for c in candidates if c.right]
    drawn.questions += 1
    drawn.completions += len(candidates)
    drawn.right += len(right)
    able = [c for c in right if c.ended and not math.isnan(c.reward)]
    if not able:
        return
    drawn.mixed += 1
    highest = max(c.reward for c in able)
    best = {tuple(c.tokens): c for c in able if c.reward == highest}
    same = {"prompt": row["prompt"], "answer": row["answer"], "task": row["task"]}
    same |= {"provenance": {**provenance, "right": len(right)}, "prompt_ids": prompt, "reward": highest}
    rows = [
        {"id": f"{row['id']}/{n}", **same, "completion": c.text, "completion_ids": c.tokens}
        for n, c in enumerate(best.values())
    ]
    drawn.rows += [preferences.spoken(made) for made in rows]


def wanted(config: "Config", rows: Sequence[Row]) -> bool:
    """Whether a run of `config` on `rows` has to sample what it learns from itself."""
    algorithm = config.trainer.algorithm
    if algorithm == "bon":
        return True
    return algorithm in preferences.COLUMNS and not preferences.ready(rows, algorithm, str(config.path))


def for_job(job: "Job", sampler: Any, origin: Mapping[str, Any], display: "Display") -> list[Row]:
    """The preference rows of a run on questions: sampled once, kept in its folder, so that a resume trains on the same.

    Counts the sampled tokens in `job.tokens`.
    """
    return read(job.folder) or _sampled(job, job.train, sampler, origin, display, FILE)


def heldout_for_job(
    job: "Job", questions: Sequence[Row], sampler: Any, origin: Mapping[str, Any], display: "Display"
) -> list[Row]:
    """As `for_job` of the held-out questions, by [data] seed: the same pairs whatever the seed of the run."""
    kept = read(job.folder, HELDOUT)
    return kept or _sampled(
        job, questions, sampler, origin, display, HELDOUT, seed=job.config.data.seed, first=HELDOUT_STEP
    )


def read(folder: Path, file: str = FILE) -> list[Row]:
    """The rows that a run has sampled into its folder, none where it has not (yet)."""
    path = folder / file
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _sampled(
    job: "Job",
    questions: Sequence[Row],
    sampler: Any,
    origin: Mapping[str, Any],
    display: "Display",
    file: str,
    **streams: int,
) -> list[Row]:
    with display.eval_progress(len(questions), title=file.removesuffix(".jsonl").replace("_", " ")) as bar:
        drawn = sample(
            job.config,
            questions,
            sampler,
            job.tokenizer,
            job.stop_ids,
            origin,
            lambda more: bar.update(bar.step + more),
            functions=job.rewards,
            **streams,
        )
    display.note(drawn.told())
    write(job.folder / file, drawn.rows)
    for kind, count in drawn.tokens.items():
        job.tokens[kind] += count
    return drawn.rows


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write `rows` as jsonl, which source "jsonl" reads back as the same rows (but for their token ids)."""
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def main(path: Path, overrides: Sequence[str], out: Path) -> int:
    """`python -m rl pairs`: sample the start policy of a config, write preference rows to `out`. Returns the exit code.

    The run that [model] from names is trained first where it is missing. A kto config gives rows for kto, every
    other one rows for dpo.
    """
    from rl import config as configs
    from rl import data, device, models, start, train
    from rl.algorithms import seam
    from rl.display import Display

    if out.is_dir() or not out.name:
        raise UserError(f"--out {out}: is a folder, valid: a file, e.g. {out / FILE}")
    train.quiet()
    display = Display(stages=2)
    config = configs.load(path, overrides)
    if config.data.from_ is not None:
        raise UserError(f"{path}: [data] from: its run holds pairs already; they are sampled from questions")
    parents = train.parents(config, display, resume=False, roles=("model.from",))
    display.done = 0
    display.stage(f"{config.run.name}: data and start policy")
    dataset = data.build(config)
    if any(row.get("answer") is None for row in dataset.train):
        raise UserError(f"{path}: [data] holds preferences already; pairs are sampled from questions with an answer")
    where = device.pick(config.run.device)
    device.prepare(where)
    parent = train.ROOT / "models" / "final" / parents["model.from"].name if "model.from" in parents else None
    begin = start.find(config, train.ROOT, parent)
    tokenizer = models.load_tokenizer(begin.base)
    train.check_prompts(config, dataset, tokenizer, begin)
    policy = start.load_policy(config, begin, where)
    stop_ids = seam.stop_ids(tokenizer, config.rollout.stop)
    sampler = start.load_sampler(config, begin, policy, tokenizer, stop_ids)
    start.check_parity(config, policy, sampler, len(tokenizer), display)
    display.stage(f"{config.rollout.samples or SAMPLES} completions to each of {len(dataset.train)} questions")
    origin = {"run": parent.name if parent else None, "id": begin.base.id, "sha256": begin.sha256}
    with display.eval_progress(len(dataset.train), title="pairs") as bar:
        drawn = sample(
            config,
            dataset.train,
            sampler,
            tokenizer,
            stop_ids,
            origin,
            lambda more: bar.update(bar.step + more),
        )
    display.note(drawn.told())
    write(out, [preferences.portable(row) for row in drawn.rows])
    display.note(f"{len(drawn.rows)} rows written to {out}")
    return 0
