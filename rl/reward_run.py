"""The work of a run of algorithm "reward": pairs from the start policy, a reward model on them, its held-out accuracy.

The result is the share of held-out pairs that the model ranks right, before (an untrained head: about half) and after.
The final folder is a whole sequence classifier that transformers loads, an adapter merged in: what serves it needs no
second folder. Beside it lie `samples.jsonl` with each pair's scores and `reward_model.json` with their mean and spread.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl import files, finish, pairs, prepared, report, start
from rl.display import Sample
from rl.errors import RunFailed
from rl.prepared import Prepared
from rl.rewards import Score, learned
from rl.rewards.answers import text_of

if TYPE_CHECKING:
    from rl.algorithms.base import Job

Row = dict[str, Any]
PairScores = list[tuple[float, float]]  # (chosen, rejected) of each pair


def work(run: Prepared) -> None:
    """From a base and rows to a finished run folder."""
    config, opened, display = run.config, run.opened, run.display
    job = prepared.job(run, model=None)
    job.train, heldout, sampler = _rows(job, run)

    display.stage(f"before: {len(heldout)} held-out pairs, an untrained head")
    job.tokenizer = learned.with_own_pad(run.tokenizer)
    job.model = start.load_scorer(config, run.begin, job.tokenizer, run.device)
    memory = opened.folder / "before.json"
    before = _remembered(memory) or ranked(job.model, job.tokenizer, heldout)
    files.write_json(memory, before)

    display.stage("reward: training")
    prepared.fit(run, job)

    display.stage(f"after: {len(heldout)} held-out pairs")
    after = ranked(job.model, job.tokenizer, heldout)
    result = report.result(config.eval.metric, _right(before), _right(after))
    samples = [_sample(row, b, a, job.tokenizer) for row, b, a in zip(heldout, before, after, strict=True)]

    def save(stage: Path) -> None:
        whole = job.model.merge_and_unload() if config.model.lora is not None else job.model
        whole.save_pretrained(stage, safe_serialization=True)
        job.tokenizer.save_pretrained(stage)
        files.write_json(stage / learned.FILE, asdict(statistics(after)))

    finish.finish(
        opened,
        finish.Results(
            result=result,
            rollout=finish.rollout_record(config, opened.folder, sampler),
            heldout=heldout,
            samples=samples,
            shown=[_shown(row, sample) for row, sample in zip(heldout, samples, strict=True)],
            what="pairs of completions",
        ),
        save,
        run.device,
        display,
    )


def ranked(model: Any, tokenizer: Any, rows: Sequence[Row]) -> PairScores:
    """Raw scores (chosen, rejected) of each preference row. Raises RunFailed where one is not finite."""
    both = [learned.pair_ids(tokenizer, row) for row in rows]
    flat = learned.scores(model, [ids for pair in both for ids in pair])
    if bad := sum(not math.isfinite(score) for score in flat):
        raise RunFailed(f"{bad} of {len(flat)} scores of the reward model are not finite")
    return list(zip(flat[::2], flat[1::2], strict=True))


def statistics(pair_scores: PairScores) -> learned.Statistics:
    """Mean and standard deviation (n - 1) of all scores of the pairs, right and wrong completions alike."""
    flat = [score for pair in pair_scores for score in pair]
    mean = math.fsum(flat) / len(flat)
    spread = math.sqrt(math.fsum((score - mean) ** 2 for score in flat) / (len(flat) - 1))
    return learned.Statistics(mean, spread, len(flat))


def _rows(job: "Job", run: Prepared) -> tuple[list[Row], list[Row], dict[str, Any]]:
    """(training pairs, held-out pairs, how the sampler held its weights): given, kept, or sampled now."""
    config, dataset, display, folder = run.config, run.dataset, run.display, run.opened.folder
    ask = {name: pairs.wanted(config, rows) for name, rows in (("train", dataset.train), ("heldout", dataset.heldout))}
    train = pairs.read(folder) if ask["train"] else dataset.train
    heldout = pairs.read(folder, pairs.HELDOUT) if ask["heldout"] else dataset.heldout
    if train and heldout:
        return train, heldout, {}
    display.stage(f"policy on {job.device.type}, sampler: {config.rollout.engine}")
    policy = start.load_policy(config, run.begin, run.device)
    sampler = start.load_sampler(config, run.begin, policy, job.tokenizer, job.stop_ids)
    start.check_parity(config, policy, sampler, len(job.tokenizer), display)
    train = train or pairs.for_job(job, sampler, run.origin, display)
    heldout = heldout or pairs.heldout_for_job(job, dataset.heldout, sampler, run.origin, display)
    return train, heldout, finish.held(sampler)


def _right(pair_scores: PairScores) -> list[Score]:
    """A tie is not right."""
    return [Score(chosen > rejected, chosen > rejected, True) for chosen, rejected in pair_scores]


def _sample(row: Row, before: tuple[float, float], after: tuple[float, float], tokenizer: Any) -> Row:
    chosen, rejected = (text_of(row[column]) for column in ("chosen", "rejected"))
    said = {"chosen_ids": row.get("chosen_ids"), "rejected_ids": row.get("rejected_ids")}
    lengths = [
        len(said[f"{name}_ids"] or learned.answer_ids(tokenizer, text))
        for name, text in (("chosen", chosen), ("rejected", rejected))
    ]
    return {
        "id": row["id"],
        "answer": chosen,
        "chosen": chosen,
        "rejected": rejected,
        "tokens": lengths,
        "before": list(before),
        "after": list(after),
        "right": [before[0] > before[1], after[0] > after[1]],
    }


def _shown(row: Row, sample: Row) -> Sample:
    def said(scores: Sequence[float]) -> str:
        return f"{scores[0]:+.2f} {sample['chosen'].strip()}\n{scores[1]:+.2f} {sample['rejected'].strip()}"

    prompt = finish.last(row["prompt"])
    return Sample(prompt, said(sample["before"]), said(sample["after"]), sample["chosen"].strip(), *sample["right"])


def _remembered(path: Path) -> PairScores | None:
    """The scores before training, when an earlier part of this run has made them."""
    return [(float(c), float(r)) for c, r in json.loads(path.read_text())] if path.exists() else None
