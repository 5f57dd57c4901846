"""`python -m rl`: the commands behind `nox -s train -- ...` and its neighbours.

Exit codes: 0 done, 1 a run failed, 2 bad config or input (one line, nothing written), 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rl.arguments import count
from rl.errors import RunFailed, UserError

CONTROL = "DUET_CONTROL"  # rl.processes.CONTROL


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (argparse itself exits with 2)."""
    arguments = _parser().parse_args(argv)
    if CONTROL in os.environ:  # one of the processes that `train --accelerate` started
        from rl import processes

        processes.begin()
        return processes.end(*_outcome(arguments))
    code, line = _outcome(arguments)
    if line:
        print(line, file=sys.stderr)
    return code


def _outcome(arguments: argparse.Namespace) -> tuple[int, str | None]:
    """The exit code and the line about what went wrong."""
    try:
        return arguments.handler(arguments) or 0, None
    except UserError as error:
        return 2, f"error: {error}"
    except RunFailed as error:
        return 1, f"failed: {error}"
    except KeyboardInterrupt:
        return 130, "interrupted"


def _train(arguments: argparse.Namespace) -> int | None:
    from rl.config import load

    if arguments.seeds and any(override.partition("=")[0].strip() == "run.seed" for override in arguments.set):
        raise UserError("--seeds and --set run.seed=... are both given: give one")
    from rl import models, reporting

    config = load(arguments.config, arguments.set)  # before torch and trl, whose import takes seconds
    if not arguments.plan:
        reporting.require(config)
        models.require(config, Path())
    from rl.plan import command

    if arguments.plan:
        return command.main(arguments.config, arguments.set)
    if arguments.accelerate is not None:
        from rl import launch

        kept = {name: getattr(arguments, name) for name in ("resume", "restart", "force", "seeds")}
        return launch.main(arguments.config, arguments.set, arguments.accelerate, **kept)
    if not arguments.force:
        command.refuse(arguments.config, arguments.set)
    import rl.train

    return rl.train.main(
        arguments.config, arguments.set, resume=arguments.resume, restart=arguments.restart, seeds=arguments.seeds
    )


def _plan(arguments: argparse.Namespace) -> int | None:
    from rl.plan import command

    overrides = list(arguments.set)
    if arguments.batch is not None:
        overrides.append(f"trainer.per_device_train_batch_size={arguments.batch}")
    if arguments.table:
        from rl.plan import table

        return table.main()
    if arguments.measure is not None:
        from rl.plan import measure

        return measure.main(arguments.measure, arguments.out, arguments.budget)
    if arguments.config is None:
        raise UserError("plan: no config given, e.g. `python -m rl plan configs/grpo.toml`, or --table, or --measure")
    return command.main(
        arguments.config, overrides, memory=arguments.memory, chip=arguments.chip, prompt=arguments.prompt
    )


def _check(arguments: argparse.Namespace) -> None:
    from rl.config import describe, load, resolved
    from rl.config.text import to_toml

    if arguments.keys:
        print(describe(), end="")
    elif arguments.config is None:
        raise UserError("check: no config given, e.g. `python -m rl check configs/grpo.toml`, or --keys for every key")
    else:
        print(to_toml(resolved(load(arguments.config, arguments.set))), end="")


def _pairs(arguments: argparse.Namespace) -> int | None:
    from rl.config import load

    load(arguments.config, arguments.set)  # before torch, whose import takes seconds
    import rl.pairs

    return rl.pairs.main(arguments.config, arguments.set, arguments.out)


def _reward_report(arguments: argparse.Namespace) -> int | None:
    import rl.reward_report

    return rl.reward_report.main(arguments.run, arguments.against)


def _doctor(arguments: argparse.Namespace) -> int | None:
    import rl.doctor

    return rl.doctor.main()


def _smoke(arguments: argparse.Namespace) -> int | None:
    from rl.smoke import command

    return command.main()


def _audit(arguments: argparse.Namespace) -> int | None:
    from rl.audit import command

    return command.main(arguments.algorithm, write=arguments.write)


def _bench(arguments: argparse.Namespace) -> int | None:
    from rl.bench import command

    parts = [part for part in arguments.part or command.PARTS if part != "peers"]
    if parts:
        command.main(
            arguments.shape or ["tiny"],
            quick=arguments.quick,
            repeats=arguments.repeats,
            dtype=arguments.dtype,
            parts=parts,
            budget=arguments.budget,
            out=arguments.out,
        )
    if "peers" in (arguments.part or ()):
        from rl.bench import peers

        peers.main(peers=arguments.peers_path, budget=arguments.budget, out=arguments.out, quick=arguments.quick)
    return 0


def _export(arguments: argparse.Namespace) -> int | None:
    from rl.export import command

    asked = command.Asked(arguments.to, arguments.dtype, arguments.quantize)
    return command.main(
        arguments.run,
        asked,
        arguments.out,
        repo=arguments.repo,
        private=arguments.private,
        dry_run=arguments.dry_run,
    )


def _clean(arguments: argparse.Namespace) -> int | None:
    import rl.clean

    return rl.clean.main(everything=arguments.all, dry_run=arguments.dry_run)


def _chat(arguments: argparse.Namespace) -> int | None:
    from rl.chat import command

    names = ("temperature", "top_p", "top_k", "min_p")
    return command.main(
        arguments.run,
        engine=arguments.engine,
        given={name: getattr(arguments, name) for name in names},
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
        plain=arguments.plain,
    )


def _samples(arguments: argparse.Namespace) -> int | None:
    from rl.viewer import samples

    return samples.main(arguments.run, arguments.out)


def _completions(arguments: argparse.Namespace) -> int | None:
    from rl.viewer import command

    return command.main(
        arguments.run,
        reward=arguments.reward,
        length=arguments.length,
        step=arguments.step,
        words=arguments.text,
        sort=arguments.sort,
        limit=arguments.limit,
        whole=arguments.whole,
        steps=arguments.steps,
        html=arguments.html,
        watch=arguments.watch,
        port=arguments.port,
    )


def _seeds(text: str) -> tuple[int, ...]:
    """ "0,1,2" -> (0, 1, 2)."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) < 2**32 for part in parts):
        raise argparse.ArgumentTypeError(f"found {text!r}, valid: whole numbers ≥ 0 and < 2^32, e.g. 0,1,2")
    seeds = tuple(int(part) for part in parts)
    if len(set(seeds)) != len(seeds):
        raise argparse.ArgumentTypeError(f"found {text!r}, valid: each seed once")
    return seeds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rl", description="Train language models with RL: PyTorch trains, MLX plays."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, handler: object, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        added.set_defaults(handler=handler)
        return added

    train = command("train", _train, "train what a config says, and what it builds on")
    check = command("check", _check, "check a config and print every setting it resolves to")
    pairs = command("pairs", _pairs, "sample a config's start policy, write right and wrong completions as jsonl")
    plan = command("plan", _plan, "predict memory and time of a config, here or on another machine")
    for added, many in ((train, None), (check, "?"), (pairs, None), (plan, "?")):
        added.add_argument(
            "config", metavar="CONFIG", type=Path, nargs=many, help="a TOML file, e.g. configs/grpo.toml"
        )
        added.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="TABLE.KEY=VALUE",
            help="override a setting, e.g. --set trainer.learning_rate=1e-4 or reward.0.weight=0.5; may be repeated",
        )
    train.add_argument("--resume", action="store_true", help="continue an unfinished run from its last checkpoint")
    train.add_argument("--restart", action="store_true", help="throw away an unfinished run of that name, start anew")
    train.add_argument(
        "--seeds", type=_seeds, default=None, metavar="0,1,2", help="train these seeds in turn, one table"
    )
    train.add_argument("--plan", action="store_true", help="print what the run would need and take, train nothing")
    train.add_argument(
        "--accelerate",
        type=Path,
        metavar="FILE",
        help="start the run through accelerate, e.g. configs/accelerate/mps.yaml",
    )
    train.add_argument("--force", action="store_true", help="train even where the plan says that it does not fit")
    plan.add_argument("--memory", metavar="64GB", help="memory of the machine; this one's if not given")
    plan.add_argument("--chip", metavar="m4-max", help="Apple's or NVIDIA's chip; this machine's if not given")
    plan.add_argument("--batch", type=count, metavar="N", help="rows of a micro-batch, in place of the config's")
    plan.add_argument("--prompt", type=count, metavar="N", help="tokens of the longest prompt, where you know them")
    plan.add_argument("--table", action="store_true", help="write docs/memory.md: what fits, and how right plans are")
    plan.add_argument("--measure", nargs="*", metavar="CASE", help="run cases of rl/plan/cases.py, all if none named")
    plan.add_argument("--budget", type=count, metavar="SECONDS", help="of --measure: begin none that would end later")
    plan.add_argument(
        "--out", type=Path, default=Path("evals/published/plan"), metavar="FOLDER", help="of --measure: its records"
    )
    pairs.add_argument("--out", type=Path, required=True, metavar="FILE", help="the jsonl file to write")
    check.add_argument("--keys", action="store_true", help="print every table and key with type, default and meaning")
    scored = command(
        "reward-report", _reward_report, "accuracy, calibration and length bias of a finished reward model"
    )
    scored.add_argument("run", metavar="RUN", help="a run of algorithm reward in models/final")
    scored.add_argument("--against", metavar="RUN", help="a run trained on it: learned reward beside the verifier")
    command("doctor", _doctor, "versions, device and memory of this machine")
    command("smoke", _smoke, "hold this machine's device against references: arithmetic, training steps, memory")
    audit = command("audit", _audit, "which operators training dispatches, and whether MPS has them; needs no Mac")
    audit.add_argument("algorithm", metavar="ALGORITHM", nargs="*", help="e.g. grpo; none = every algorithm")
    audit.add_argument("--write", action="store_true", help="make docs/operators.md anew")
    bench = command("bench", _bench, "time rollouts, sync and a GRPO step against what they replace")
    bench.add_argument(
        "--shape", action="append", choices=("tiny", "smollm2", "1.7b"), help="model, tiny if none; may be repeated"
    )
    bench.add_argument("--quick", action="store_true", help="scaled down, to see that it runs; judges nothing")
    bench.add_argument("--repeats", type=count, metavar="N", help="turns of each contestant, 5 (2 with --quick)")
    bench.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="of all contestants; float32 on a CPU, else float16"
    )
    bench.add_argument(
        "--part",
        action="append",
        choices=("rollouts", "sync", "step", "peers"),
        help="only this; may be repeated; peers, other MLX trainers on SmolLM2-135M, only when asked for",
    )
    bench.add_argument(
        "--budget", type=count, metavar="SECONDS", help="a shape's time; 240 on a GPU, no bound on a CPU if not given"
    )
    bench.add_argument(
        "--peers-path",
        type=Path,
        metavar="FOLDER",
        help="where peers are installed (pip install --target); build/peers",
    )
    bench.add_argument(
        "--out", type=Path, metavar="FOLDER", help="of the table; evals/published (build with --quick) if not given"
    )
    export = command("export", _export, "write a finished run as MLX, transformers, GGUF or the hub read it, checked")
    export.add_argument("run", metavar="RUN", help="a run in models/final")
    export.add_argument("--to", required=True, choices=("mlx", "safetensors", "gguf", "hub"), help="who is to open it")
    export.add_argument("--out", type=Path, metavar="DIR", help="folder to make; models/exports/RUN-TO if not given")
    export.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="of the weights; float16"
    )
    export.add_argument("--quantize", type=int, choices=(4, 8), help="bits: 4 or 8 for mlx, 8 (Q8_0) for gguf")
    export.add_argument("--repo", metavar="USER/NAME", help="of --to hub: the model's id there")
    export.add_argument("--private", action="store_true", help="of --to hub: a private repository, where it is new")
    export.add_argument("--dry-run", action="store_true", help="of --to hub: write the folder, upload nothing")
    chat = command("chat", _chat, "talk to a finished run and to the model it came from")
    chat.add_argument("run", metavar="RUN", help="a run in models/final, or its folder")
    chat.add_argument("--engine", choices=("mlx", "torch"), default="mlx", help="who decodes; mlx if not given")
    for option, kind in (("temperature", float), ("top-p", float), ("top-k", int), ("min-p", float)):
        chat.add_argument(f"--{option}", type=kind, metavar="X", help="in place of the run's own setting")
    chat.add_argument("--max-tokens", type=count, metavar="N", help="of an answer; the run's own if not given")
    chat.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn")
    chat.add_argument("--plain", action="store_true", help="continue each line as it is, without the chat template")
    samples = command("samples", _samples, "held-out answers before and after training, as a page and as Markdown")
    samples.add_argument("run", metavar="RUN", help="a run in models/final, or its folder")
    samples.add_argument("--out", type=Path, metavar="FOLDER", help="where to; the run's folder if not given")
    look = command("completions", _completions, "what a run said while it trained: terminal, page, or live page")
    look.add_argument("run", metavar="RUN", help="a run, finished or going on, or its folder")
    for option, example in (("reward", "'>0.5' or 'exact=1'"), ("length", "'10..20'"), ("step", "'>=100'")):
        look.add_argument(
            f"--{option}", action="append", default=[], metavar="CONDITION", help=f"e.g. {example}; may be repeated"
        )
    look.add_argument("--text", metavar="WORDS", help="in the prompt or the completion, whatever the case")
    look.add_argument(
        "--sort", metavar="COLUMN", help="step, reward, advantage or length; --sort=-reward: highest first"
    )
    look.add_argument("--limit", type=count, metavar="N", help="at most so many; in the terminal 20 if not given")
    look.add_argument("--whole", action="store_true", help="whole prompts and completions")
    look.add_argument("--steps", action="store_true", help="one line a step in place of the completions")
    look.add_argument("--html", type=Path, metavar="FILE", help="write one page that needs no network")
    look.add_argument("--watch", action="store_true", help="serve that page on 127.0.0.1, fresh while a run goes on")
    look.add_argument("--port", type=int, default=0, metavar="N", help="of --watch; a free one if not given")
    clean = command("clean", _clean, "remove caches and generated tables; runs, finished or not, stay unless --all")
    clean.add_argument("--all", action="store_true", help="also base models, runs and results; data/raw stays")
    clean.add_argument("--dry-run", action="store_true", help="say what would go, remove nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
