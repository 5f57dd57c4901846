"""`python -m rl train`: what a config builds on, then its own run, from the base to models/final."""

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rl import completions, files, processes, record, report, reporting, run
from rl import config as configs
from rl.algorithms import ONLINE
from rl.checkpoints import disk_guard
from rl.config import Config
from rl.display import Display, Sample, terminal
from rl.errors import RunFailed, UserError
from rl.rewards import Score

ROOT = Path()  # commands run in the repository's root; relative paths keep result folders movable
STAGES = 5


def main(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    restart: bool = False,
    seeds: Sequence[int] | None = None,
) -> int:
    """Train `path` (once per seed, then one table over the seeds). Returns the exit code.

    Raises UserError (2) for bad input, RunFailed (1) for a run that cannot go on, KeyboardInterrupt (130).
    """
    quiet()
    display = terminal(STAGES)
    command = os.environ.get(processes.COMMAND) or " ".join(["nox -s train --", *_shown(sys.argv)])
    if seeds is None:
        train_run(path, overrides, display, command, resume=resume, restart=restart)
        return 0
    names = []
    for seed in seeds:
        own = terminal(STAGES)
        names.append(
            train_run(path, [*overrides, f"run.seed={seed}"], own, command, resume=resume, restart=restart, many=True)
        )
    if not processes.is_main():
        return 0
    name = configs.load(path, overrides).run.name
    display.seeds(report.write_seeds(ROOT, name, names))
    display.note(f"written to models/final/{name}-seeds.md and .json")
    return 0


def train_run(
    path: Path,
    overrides: Sequence[str],
    display: Display,
    command: str | None = None,
    *,
    resume: bool = False,
    restart: bool = False,
    many: bool = False,
    remake: bool = False,
) -> str:
    """Train one config with one seed, and first the runs it builds on; returns the run's name.

    A run that is finished with the same inputs is reused, one that is unfinished or differs raises UserError
    (`resume` continues, `restart` replaces). With `many`, unfinished runs of a list of seeds are simply continued.
    With `remake` (a run that another builds on), one made from other inputs is made again.
    """
    config = configs.load(path, overrides)
    reporting.require(config)
    seeded = any(o.partition("=")[0].strip() == "run.seed" for o in overrides)
    name = run.run_name(config.run.name, config.run.seed, seeded)
    built = parents(config, display, resume)
    made = {role: run.folders(ROOT, parent.name)[1] for role, parent in built.items()}

    display.done = 0  # a run that another builds on has stages of its own
    display.stage(f"{name}: data and base model")
    from rl import data, device, models, start
    from rl.tools import toolbox as tools

    where = device.pick(config.run.device)
    processes.join(where)
    device.prepare(where)
    with processes.main_first():
        dataset = data.build(config, made.get("data.from"))
        begin = start.find(config, ROOT, made.get("model.from"))
        served = start.reward_models(config, ROOT)
    display.note(f"{len(dataset.train)} training and {len(dataset.heldout)} held-out rows from {dataset.source}")
    tokenizer = models.load_tokenizer(begin.base)
    toolbox = tools.build(config)
    if toolbox is not None:
        from rl.algorithms import tool_turns

        tool_turns.prepare(tokenizer, toolbox, str(config.path))
    check_prompts(config, dataset, tokenizer, begin, toolbox)
    fresh = record.new(
        ROOT,
        name=name,
        config=configs.resolved(config) | processes.inputs(),
        seed=config.run.seed,
        device=device.describe(where),
        base={"id": begin.base.id, "sha256": begin.sha256},
        data={
            "source": dataset.source,
            "fingerprint": dataset.fingerprint,
            "rows": {"train": len(dataset.train), "heldout": len(dataset.heldout)},
        },
        parents=[
            *({"role": role, "name": p.name, "inputs_sha256": p.inputs_sha256} for role, p in built.items()),
            *({"role": role, "name": base.id, "inputs_sha256": base.sha256} for role, base in served.items()),
        ],
        command=command,
    )
    if remake and processes.is_main() and (changed := _outdated(name, fresh)):
        display.note(f"{name} was made from other inputs ({'; '.join(changed[:3])}): it is made again")
        resume, restart = False, True
    unfinished = bool(run.last_checkpoint(run.folders(ROOT, name)[0])) if many and processes.is_main() else False
    opened = run.start_together(ROOT, fresh, resume or (many and not restart and unfinished), restart)
    if opened.state == "finished":
        display.note(f"{name} is finished with these very inputs: {opened.final} (--restart trains it again)")
        return name
    with run.recording(opened) if processes.is_main() else nullcontext():
        folders = made | {role: base.path for role, base in served.items()}
        _work(config, opened, dataset, where, begin, tokenizer, display, folders, toolbox)
    processes.wait()
    return name


def parents(
    config: Config, display: Display, resume: bool, roles: Sequence[str] | None = None
) -> dict[str, record.Record]:
    """The finished runs that `config` builds on (in `roles`, or all), trained first where they are missing."""
    found = {}
    for role, path in configs.builds_on(config).items():
        if roles is not None and role not in roles:
            continue
        other = configs.load(path)
        final = run.folders(ROOT, other.run.name)[1]
        unfinished = processes.is_main() and run.last_checkpoint(run.folders(ROOT, other.run.name)[0]) is not None
        train_run(path, [], display, f"nox -s train -- {path}", resume=resume or unfinished, remake=True)
        found[role] = record.read(final)
    return found


def _outdated(name: str, fresh: record.Record) -> list[str]:
    """What differs between the run's inputs now and those it was made from, finished or not; nothing when it is new."""
    made = [record.read(folder) for folder in run.folders(ROOT, name) if (folder / "run.json").exists()]
    return next((changed for old in made if (changed := record.differences(old, fresh))), [])


def check_prompts(config: Config, dataset: Any, tokenizer: Any, begin: Any, toolbox: Any = None) -> None:
    """Every prompt fits the context with room for its completion; chat prompts find a template."""
    from rl import data, models

    text = next((row for row in (*dataset.train, *dataset.heldout) if isinstance(row["prompt"], str)), None)
    if toolbox is not None and text is not None:
        raise UserError(
            f"{config.path}: [rollout] tools: row '{text['id']}' has a text as its prompt, valid: chat messages "
            "([data] form = 'chat', or lists of messages in the file), since calls and results are turns"
        )
    if config.data.form == "chat" or isinstance(dataset.heldout[0]["prompt"], list):
        models.require_chat_template(tokenizer, str(config.path))
    context = json.loads((begin.base.path / "config.json").read_text()).get("max_position_embeddings")
    if context:
        limit = context - config.rollout.max_completion_length
        described = None if toolbox is None else toolbox.callables()
        data.check_lengths([*dataset.train, *dataset.heldout], tokenizer, limit, str(config.path), described)


def _work(
    config: Config,
    opened: run.OpenRun,
    dataset: Any,
    where: Any,
    begin: Any,
    tokenizer: Any,
    display: Display,
    made: Mapping[str, Path],
    toolbox: Any = None,
) -> None:
    """From a loaded base to a finished run folder; `made` are the folders of what the run builds on, by role."""
    from rl import curriculum, finish, measure, pairs, rewards, start
    from rl.algorithms import base as algorithms
    from rl.algorithms import seam

    functions, grade = rewards.build(config.rewards), rewards.grader(config.rewards)

    def fit(job: algorithms.Job) -> None:
        _fit(config, opened, job, functions, display)

    if config.trainer.algorithm == "reward":
        from rl import reward_run

        return reward_run.work(config, opened, dataset, where, begin, tokenizer, display, fit)
    display.stage(f"policy on {where.type}, sampler: {config.rollout.engine}, {config.rollout.precision} precision")
    if processes.count() > 1:
        display.note(f"{processes.count()} processes, each with {processes.each(config.trainer.args)}")
    alone = processes.is_main()
    policy = start.load_policy(config, begin, processes.loading_place(where))
    stop_ids = seam.stop_ids(tokenizer, config.rollout.stop)
    needed = alone or config.trainer.algorithm in ONLINE  # the main process measures
    sampler = start.load_sampler(config, begin, policy, tokenizer, stop_ids) if needed else None
    if alone:
        start.check_parity(config, policy, sampler, len(tokenizer), display)

    def held_out(title: str) -> measure.Measurement:
        with display.eval_progress(len(dataset.heldout), title=title) as bar:
            return measure.measure(
                sampler,
                tokenizer,
                dataset.heldout,
                grade,
                config.rollout.max_completion_length,
                lambda more: bar.update(bar.step + more),
                toolbox,
                policy.config.max_position_embeddings,
            )

    display.stage(f"before: {len(dataset.heldout)} held-out questions, greedy")
    if alone:
        before = _remembered(opened.folder / "before.json") or held_out("before")
        _remember(opened.folder / "before.json", before)

    display.stage(f"{config.trainer.algorithm}: training")
    start.open_rewards(functions, made, tokenizer, where)
    job = algorithms.Job(
        config=config,
        folder=opened.folder,
        device=where,
        model=policy,
        tokenizer=tokenizer,
        train=dataset.train,
        rewards=functions,
        sampler=sampler if config.rollout.engine == "mlx" else None,
        stop_ids=stop_ids,
        toolbox=toolbox,
        resume=opened.checkpoint.path if opened.checkpoint else None,
        fresh_adapter=config.model.lora is not None and begin.adapter is None,
        reference=start.load_reference(config, ROOT, made.get("model.reference"), tokenizer, where),
        tokens=opened.record.tokens,
    )
    if pairs.wanted(config, job.train):
        parent = next((p["name"] for p in opened.record.parents if p["role"] == "model.from"), None)
        origin = {"run": parent, **opened.record.base}
        job.train = processes.share(lambda: pairs.for_job(job, sampler, origin, display))
    if config.data.curriculum is not None:
        job.train = processes.share(lambda: curriculum.for_job(job, sampler, begin.sha256, ROOT, display))
    if processes.sharded():
        sampler = job.sampler = None  # its room on the card is the shards', and their weights get another
    fit(job)
    weights = processes.whole_weights(policy)
    if not alone:
        return None
    if weights is not None:
        policy, sampler = start.load_whole(config, begin, weights, tokenizer, stop_ids, where)
    display.stage(f"after: {len(dataset.heldout)} held-out questions, greedy")
    if config.rollout.engine == "mlx":
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
        rollout=finish.rollout_record(config, opened.folder, finish.held(sampler)),
        heldout=dataset.heldout,
        samples=samples,
        shown=shown,
    )
    finish.finish(opened, results, lambda stage: _save(config, policy, tokenizer, stage), where, display)


def _fit(config: Config, opened: run.OpenRun, job: Any, functions: Sequence[Any], display: Display) -> None:
    """Train to the end; raises RunFailed where the run had to stop, KeyboardInterrupt where it was interrupted."""
    outcome = _train(config, opened, job, display)
    _note_rewards(functions, display)
    _note_tools(job.toolbox, display)
    if outcome.failure:
        kept = run.last_checkpoint(opened.folder)
        raise RunFailed(
            f"{outcome.failure}; last good checkpoint: {kept.path if kept else 'none yet'} (--resume goes on from it)"
        )
    if outcome.interrupted:
        display.note(f"stopped after step {outcome.steps}, saved in {opened.folder}; --resume goes on from there")
        raise KeyboardInterrupt


def _save(config: Config, policy: Any, tokenizer: Any, stage: Path) -> None:
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


def _train(config: Config, opened: run.OpenRun, job: Any, display: Display) -> Any:
    """Train with a live bar; every logged step and every whole checkpoint goes into the run's folder."""
    import importlib

    from rl.algorithms.base import Hooks

    algorithm = importlib.import_module(f"rl.algorithms.{config.trainer.algorithm}")
    done = opened.checkpoint.step if opened.checkpoint else 0
    with display.train_progress(1, start=done, title=config.trainer.algorithm) as bar:

        def metrics(step: int, values: dict[str, Any]) -> None:
            run.log(opened, step, values)
            bar.update(step, values)

        def saved(step: int, folder: Path, good: bool) -> None:
            if good:
                run.mark_complete(opened, folder, step)
            else:
                shutil.rmtree(folder)  # nothing to go back to

        def total(steps: int) -> None:
            bar.total = steps

        def kept(step: int, sampling_round: int, rows: list[dict[str, Any]]) -> None:
            with disk_guard(opened.folder):
                completions.write(opened.folder, step, sampling_round, rows)

        if processes.is_main():
            job.hooks = Hooks(metrics=metrics, saved=saved, total=total, warn=display.warn, completions=kept)
        return algorithm.train(job)


def _note_rewards(functions: Sequence[Any], display: Display) -> None:
    for function in functions:
        if function.stats.errors:
            display.warn(
                f"reward '{function.name}' failed on {function.stats.errors} of {function.stats.samples} samples, "
                f"which were left out; the first: {function.stats.first_error}"
            )


def _note_tools(toolbox: Any, display: Display) -> None:
    if toolbox is not None and toolbox.runner.stats.errors:
        stats = toolbox.runner.stats
        display.warn(
            f"{stats.errors} of {stats.calls} tool calls failed, {stats.timeouts} of them by time, and cost their "
            f"samples only; the first: {stats.first_error}"
        )


def _remember(path: Path, measurement: Any) -> None:
    scores = [asdict(score) for score in measurement.scores]
    files.write_json(path, {"scores": scores, "completions": measurement.completions})


def _remembered(path: Path) -> Any:
    """The measurement before training, when an earlier part of this run has made it."""
    from rl.measure import Measurement

    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    return Measurement([Score(**score) for score in kept["scores"]], kept["completions"])


def _shown(argv: Sequence[str]) -> list[str]:
    """The arguments after `train`, for the record."""
    return list(argv[argv.index("train") + 1 :]) if "train" in argv else []


def quiet() -> None:
    """Keep the libraries' own bars and hints off the terminal: the run's display shows what matters."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # it warns of environments at every start
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL's trainers report to the hub from a thread
    import warnings

    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch|peft|transformers|trl")
