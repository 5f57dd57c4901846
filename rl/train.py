"""`python -m rl train`: what a config builds on, then its own run, from the base to models/final."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rl import config as configs
from rl import processes, record, report, reporting, run
from rl.config import Config
from rl.display import Display, terminal
from rl.errors import UserError
from rl.prepared import ROOT, Prepared

STAGES = 5
ENCODED = ("prompt", "completion", "chosen", "rejected")  # columns that training or sampling turns into tokens


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
    from rl import data, device, models, policy_run, reward_run, rewards, start
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
    functions = rewards.build(config.rewards)
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
    ready = Prepared(
        config=config,
        opened=opened,
        dataset=dataset,
        device=where,
        begin=begin,
        tokenizer=tokenizer,
        display=display,
        rewards=functions,
        grade=rewards.grader(config.rewards),
        folders=made | {role: base.path for role, base in served.items()},
        toolbox=toolbox,
    )
    with run.recording(opened) if processes.is_main() else nullcontext():
        (reward_run if config.trainer.algorithm == "reward" else policy_run).work(ready)
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
    from rl import data, models, tiny

    text = next((row for row in (*dataset.train, *dataset.heldout) if isinstance(row["prompt"], str)), None)
    if toolbox is not None and text is not None:
        raise UserError(
            f"{config.path}: [rollout] tools: row '{text['id']}' has a text as its prompt, valid: chat messages "
            "([data] form = 'chat', or lists of messages in the file), since calls and results are turns"
        )
    if tiny.is_character_level(tokenizer):
        tiny.check_text(tokenizer, _texts([*dataset.train, *dataset.heldout]), str(config.path))
    if config.data.form == "chat" or isinstance(dataset.heldout[0]["prompt"], list):
        models.require_chat_template(tokenizer, str(config.path))
    context = json.loads((begin.base.path / "config.json").read_text()).get("max_position_embeddings")
    if context:
        limit = context - config.rollout.max_completion_length
        described = None if toolbox is None else toolbox.callables()
        data.check_lengths([*dataset.train, *dataset.heldout], tokenizer, limit, str(config.path), described)


def _texts(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """All that a run may encode of its rows, chat messages left out: their templates have words of their own."""
    for row in rows:
        yield from (row[name] for name in ENCODED if isinstance(row.get(name), str))


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
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # of the guard's hooks, where it is meant
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch|peft|transformers|trl")
