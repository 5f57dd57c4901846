"""The work of a run that trains a policy: loaded, measured, trained, measured again, saved."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rl import curriculum, files, finish, measure, pairs, prepared, processes, report, start
from rl.algorithms import ONLINE
from rl.config import Config
from rl.display import Sample
from rl.prepared import ROOT, Prepared
from rl.rewards import Score


def work(run: Prepared) -> None:
    """From a loaded base to a finished run folder."""
    config, dataset, display = run.config, run.dataset, run.display
    engine, begin = config.rollout.engine, run.begin
    display.stage(f"policy on {run.device.type}, sampler: {engine}, {config.rollout.precision} precision")
    if processes.count() > 1:
        display.note(f"{processes.count()} processes, each with {processes.each(config.trainer.args)}")
    alone = processes.is_main()
    policy = start.load_policy(config, begin, processes.loading_place(run.device))
    job = prepared.job(
        run,
        model=policy,
        rewards=run.rewards,
        toolbox=run.toolbox,
        fresh_adapter=config.model.lora is not None and begin.adapter is None,
    )
    needed = alone or config.trainer.algorithm in ONLINE  # the main process measures
    sampler = start.load_sampler(config, begin, policy, run.tokenizer, job.stop_ids) if needed else None
    if alone:
        start.check_parity(config, policy, sampler, len(run.tokenizer), display)

    def held_out(title: str) -> measure.Measurement:
        with display.eval_progress(len(dataset.heldout), title=title) as bar:
            return measure.measure(
                sampler,
                run.tokenizer,
                dataset.heldout,
                run.grade,
                config.rollout.max_completion_length,
                lambda more: bar.update(bar.step + more),
                run.toolbox,
                policy.config.max_position_embeddings,
            )

    display.stage(f"before: {len(dataset.heldout)} held-out questions, greedy")
    if alone:
        before = _before(run.opened.folder / "before.json", lambda: held_out("before"))

    display.stage(f"{config.trainer.algorithm}: training")
    start.open_rewards(run.rewards, run.folders, run.tokenizer, run.device)
    job.sampler = sampler if engine == "mlx" else None
    job.reference = start.load_reference(config, ROOT, run.folders.get("model.reference"), run.tokenizer, run.device)
    if pairs.wanted(config, job.train):
        job.train = processes.share(lambda: pairs.for_job(job, sampler, run.origin, display))
    if config.data.curriculum is not None:
        job.train = processes.share(lambda: curriculum.for_job(job, sampler, begin.sha256, ROOT, display))
    if processes.sharded():
        sampler = job.sampler = None  # its room on the card is the shards', and their weights get another
    prepared.fit(run, job)
    weights = processes.whole_weights(policy)
    if not alone:
        return
    if weights is not None:
        policy, sampler = start.load_whole(config, begin, weights, run.tokenizer, job.stop_ids, run.device)
    display.stage(f"after: {len(dataset.heldout)} held-out questions, greedy")
    if engine == "mlx":
        sampler.sync(policy)
    after = held_out("after")
    samples = [
        {"id": row["id"], "answer": row["answer"], "before": b, "after": a, "right": [s.strict, t.strict]}
        for row, b, a, s, t in zip(
            dataset.heldout, before.completions, after.completions, before.scores, after.scores, strict=True
        )
    ]
    shown = [
        Sample(finish.last(row["prompt"]), s["before"], s["after"], row["answer"], *s["right"])
        for row, s in zip(dataset.heldout, samples, strict=True)
    ]
    results = finish.Results(
        result=report.result(config.eval.metric, before.scores, after.scores),
        rollout=finish.rollout_record(config, run.opened.folder, finish.held(sampler)),
        heldout=dataset.heldout,
        samples=samples,
        shown=shown,
    )
    finish.finish(run.opened, results, lambda stage: save(config, policy, run.tokenizer, stage), run.device, display)


def save(config: Config, policy: Any, tokenizer: Any, stage: Path) -> None:
    """Write the policy (of adapters only the trained one: TRL keeps the start's in a second, "ref") and tokenizer."""
    from rl.hf_folder import top_level_rope

    only = {"selected_adapters": ["default"]} if config.model.lora is not None else {}
    policy.save_pretrained(stage, safe_serialization=True, **only)
    tokenizer.save_pretrained(stage)
    if (stage / "config.json").exists():  # mlx-lm reads RoPE's settings at the top level only
        files.write_json(stage / "config.json", top_level_rope(json.loads((stage / "config.json").read_text())))
    if config.model.lora is not None:
        from rl.rollouts.export import write_adapter

        write_adapter(policy, stage / "mlx")


def _before(path: Path, make: Callable[[], measure.Measurement]) -> measure.Measurement:
    """The measurement before training, kept for when the run is resumed."""
    if path.exists():
        kept = json.loads(path.read_text())
        return measure.Measurement([Score(**score) for score in kept["scores"]], kept["completions"])
    made = make()
    files.write_json(path, {"scores": [asdict(score) for score in made.scores], "completions": made.completions})
    return made
