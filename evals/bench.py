"""`python -m evals bench`: lm-eval's requests answered by its own `hf` model and by ours, in turns, on one device.

Both get the same requests, batch size and dtype, and are loaded as `nox -s eval` loads them. Nothing is timed before
both have scored the same texts alike. A repetition is hf, then ours, and ratios are taken within it. The table is made
from the JSON beside it alone: `python -m evals check` does so with those in evals/published/.
"""

import argparse
import gc
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evals import backends, runs
from rl import device as devices
from rl import files, measured, record
from rl.arguments import count
from rl.bench.models import prompt_texts, subject
from rl.bench.table import ratios, spread
from rl.errors import RunFailed, UserError

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ("tiny", "smollm2", "1.7b")  # the models of `nox -s bench`
TORCH_DEVICE = {"cpu": "cpu", "cuda": "cuda", "metal": "mps"}  # of MLX's backends
PACKAGES = ("lm-eval", "torch", "transformers", "peft", "mlx", "mlx-lm", "numpy")
STOP_TOKENS = 5  # of a prompt: a stop that rarely comes
CHOICES, CHOICE_TOKENS = 4, 6
BAR = 3.0  # ours over hf, for generation on a GPU


@dataclass(frozen=True)
class Sizes:
    """Of all work: prompts and their tokens, new tokens at most, sequences at once, repetitions."""

    prompts: int
    prompt_tokens: int
    new: int
    batch_size: int
    repeats: int


@dataclass(frozen=True)
class Work:
    """Requests of one kind; `what` for the table, `bar` when the goal is set for it."""

    what: str
    kind: str
    requests: list[tuple[Any, ...]]
    bar: bool = False


@dataclass
class Contest:
    """Seconds of each repetition, tokens of the answers (generation only), and how far the answers agree."""

    what: str
    kind: str
    requests: int
    bar: bool
    agreement: str
    tokens: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"hf": [], "mlx": []})


@dataclass(frozen=True)
class Report:
    """All contests on one model; `left_out` names the work for which no time was left."""

    model: str
    contests: list[Contest] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m evals bench", description=(__doc__ or "").partition("\n\n")[2])
    made.add_argument(
        "--model",
        action="append",
        metavar="MODEL",
        help=f"a run, a model folder, a hub id, or {', '.join(SHAPES)} (random but for smollm2); may be given again; "
        "default: smollm2",
    )
    made.add_argument("--prompts", type=count, default=256, metavar="N", help="prompts to complete (default: 256)")
    made.add_argument("--prompt-tokens", type=count, default=64, metavar="N", help="of each (default: 64)")
    made.add_argument("--new", type=count, default=64, metavar="N", help="new tokens of each (default: 64)")
    made.add_argument("--batch-size", type=count, default=64, metavar="N", help="of both (default: 64)")
    made.add_argument("--repeats", type=count, default=3, metavar="N", help="timed turns of each (default: 3)")
    made.add_argument(
        "--seconds",
        type=count,
        metavar="N",
        help="begin nothing new after so many seconds; what was begun ends with one timed turn of each at least",
    )
    made.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="of both (default: float32 on a CPU, float16 elsewhere)",
    )
    made.add_argument(
        "--out", type=Path, metavar="FILE.md", help="default: build/evalbench-<device>.md; JSON beside it"
    )
    return made


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> None:
    """Bench and write the table, also after each kind of work, so that a killed bench leaves what it had.

    Raises:
        UserError: lm-eval is not installed, a model that is not there or that MLX does not decode.
        RunFailed: the two disagree, or torch lacks the device that MLX runs on.
    """
    args = parser().parse_args(argv)
    deadline = time.monotonic() + args.seconds if args.seconds else None
    missing = [name for name in ("lm_eval", "mlx") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"bench: {' and '.join(missing)} not installed here, so there is nothing to compare: `uv sync`")
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars of others, inside what is timed
    import rl.rollouts.device as mlx_device

    kind = TORCH_DEVICE[mlx_device.backend()]
    if kind not in devices.available():
        raise RunFailed(
            f"bench: MLX runs on {mlx_device.backend()}, and torch has no such device here: they must share one"
        )
    device = devices.pick(kind)  # type: ignore[arg-type]  # one of the values above
    devices.prepare(device)
    dtype = args.dtype or ("float32" if kind == "cpu" else "float16")
    sizes = Sizes(args.prompts, args.prompt_tokens, args.new, args.batch_size, args.repeats)
    out = (args.out or root / "build" / f"evalbench-{kind}").with_suffix(".md")
    command = _command(sizes, dtype, args.model or ["smollm2"], args.seconds)
    about = measured.about(command, device, root, PACKAGES)
    (root / "build").mkdir(parents=True, exist_ok=True)
    reports: list[Report] = []

    def write() -> None:
        value = {"about": about, "sizes": asdict(sizes), "dtype": dtype, "device": kind, "bar": BAR}
        files.write_json(out.with_suffix(".json"), record.finite(value | {"reports": [asdict(r) for r in reports]}))
        files.write_text(out, table(out.with_suffix(".json")))

    with tempfile.TemporaryDirectory(prefix="evalbench-", dir=root / "build") as folder:
        for name in args.model or ["smollm2"]:
            reports.append(Report(name))
            bench(reports[-1], sizes, dtype, kind, Path(folder), root, deadline=deadline, done=write)
    print(f"{out.read_text()}\nwritten to {out} and {out.with_suffix('.json').name}")


def table(path: Path) -> str:
    """The table that a bench's JSON gives. Raises UserError for a file that is not one."""
    value = runs.read_json(path, "bench again: python -m evals bench")
    try:
        reports = [Report(**one | {"contests": [Contest(**c) for c in one["contests"]]}) for one in value["reports"]]
        return markdown(reports, value["about"], value["device"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: not what this bench writes ({error!r}); bench again: python -m evals bench") from None


def bench(
    report: Report,
    sizes: Sizes,
    dtype: str,
    kind: str,
    folder: Path,
    root: Path,
    *,
    deadline: float | None,
    done: Callable[[], None],
) -> None:
    """All work on the report's model, put into it, as far as time allows; `done` is called after each piece.

    Raises RunFailed where the two score the same texts differently.
    """
    name = report.model
    if name in SHAPES:
        one = runs.Subject("run", subject(name, 8, folder, root).base.path)
    else:
        one = runs.target(root, name).subjects[0]
    from evals import mlx_model

    mlx = mlx_model.build(one.model, adapter=one.adapter, dtype=dtype, batch_size=sizes.batch_size)
    tokenizer = mlx.tokenizer
    hf = backends.load(one, tokenizer, "hf", device=kind, dtype=dtype, batch_size=sizes.batch_size).lm
    lms = {"hf": hf, "mlx": mlx}
    _check_agreement(lms, tokenizer, dtype)
    for work in works(mlx, tokenizer, sizes):
        if _late(deadline):
            report.left_out.append(work.what)
        else:
            print(f"{name}: {work.what}, {len(work.requests)} requests", file=sys.stderr)
            report.contests.append(contest(work, lms, sizes.repeats, deadline))
        done()
    del lms, hf, mlx
    devices.give_back(devices.pick(kind))  # type: ignore[arg-type]  # one of TORCH_DEVICE's


def works(mlx: Any, tokenizer: Any, sizes: Sizes) -> list[Work]:
    """Answers of full length, answers that end early, choices, and texts as long as four prompts with their answers."""
    texts = prompt_texts(tokenizer, sizes.prompts, sizes.prompt_tokens)
    rare = tokenizer.decode(tokenizer.encode(texts[0], add_special_tokens=False)[:STOP_TOKENS])
    full = {"until": [rare], "max_gen_toks": sizes.new, "do_sample": False}
    stop = _stop(answer(mlx, "generate_until", [(text, full) for text in texts[: sizes.batch_size]]), sizes.new)
    questions = texts[: -(-len(texts) // CHOICES)]
    choices = prompt_texts(tokenizer, CHOICES, CHOICE_TOKENS)
    long = prompt_texts(tokenizer, max(1, sizes.prompts // 16), 4 * (sizes.prompt_tokens + sizes.new))
    asked = f"{sizes.prompts} prompts of {sizes.prompt_tokens} tokens"
    early = [(text, full | {"until": [stop]}) for text in texts]
    return [
        Work(f"{asked}, up to {sizes.new} new", "generate_until", [(text, full) for text in texts], bar=True),
        Work(f"{asked}, up to {sizes.new} new or {stop!r}", "generate_until", early),
        Work(
            f"{len(questions)} questions × {CHOICES} choices of {CHOICE_TOKENS} tokens",
            "loglikelihood",
            [(text, choice) for text in questions for choice in choices],
        ),
        Work(
            f"{len(long)} texts of {4 * (sizes.prompt_tokens + sizes.new)} tokens",
            "loglikelihood_rolling",
            [(text,) for text in long],
        ),
    ]


def contest(work: Work, lms: dict[str, Any], repeats: int, deadline: float | None = None) -> Contest:
    """Both on `work` in turns, after each has done all of it once: a shape's first sight compiles kernels."""
    answers = {who: answer(lm, work.kind, work.requests) for who, lm in lms.items()}
    found = Contest(work.what, work.kind, len(work.requests), work.bar, _agreement(work.kind, answers))
    if work.kind == "generate_until":
        encode = lms["hf"].tok_encode
        found.tokens = {who: sum(len(encode(t, add_special_tokens=False)) for t in a) for who, a in answers.items()}
    for turn in range(repeats):
        if turn and _late(deadline):
            break
        for who, lm in lms.items():
            gc.collect()
            started = time.perf_counter()
            answer(lm, work.kind, work.requests)
            found.seconds[who].append(time.perf_counter() - started)
    return found


def answer(lm: Any, kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """A model's answers to requests of one kind, asked as lm-eval asks. They are plain Python: the device has ended."""
    from lm_eval.api.instance import Instance

    requests = [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]  # type: ignore[arg-type]
    return getattr(lm, kind)(requests, disable_tqdm=True)


def markdown(reports: Sequence[Report], about: dict[str, str], kind: str) -> str:
    """The table of all reports, and under it what it was measured with."""
    lines = [
        "# lm-eval: `hf` against MLX",
        "",
        "| model | requests | hf s | MLX s | hf ÷ MLX | new tokens hf, MLX | answers |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for report in reports:
        for one in report.contests:
            ratio = ratios(one.seconds["mlx"], one.seconds["hf"])
            tokens = f"{one.tokens['hf']:,}, {one.tokens['mlx']:,}" if one.tokens else ""
            seconds = [spread(one.seconds[who]).text(".3g") for who in ("hf", "mlx")]
            lines.append(
                f"| {report.model} | {one.what} | {' | '.join(seconds)} | {spread(ratio).text('.2f')} | {tokens} "
                f"| {one.agreement} |"
            )
    lines += ["", "Median (least–most) of the repetitions; ratios within a repetition.", ""]
    lines += [f"- no time was left for {report.model}: {what}" for report in reports for what in report.left_out]
    for report in reports:
        for one in report.contests:
            if one.bar and kind != "cpu":
                ratio_of = statistics.median(ratios(one.seconds["mlx"], one.seconds["hf"]))
                met = "met" if ratio_of >= BAR else "missed"
                lines.append(f"- bar, {report.model}: generation at least {BAR:g} × hf: {ratio_of:.2f} ×, {met}")
    lines += [f"- {key}: {value}" for key, value in about.items()]
    return "\n".join(lines) + "\n"


def _late(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


def _stop(answers: Sequence[str], new: int) -> str:
    """The character whose first place in the answers is, in the mean, nearest to a quarter of their length."""
    quarter = sum(map(len, answers)) / max(1, len(answers)) / 4
    seen = sorted(set("".join(answers)) - {" ", "\n"}) or ["."]

    def off(char: str) -> float:
        places = [text.find(char) if char in text else len(text) for text in answers]
        return abs(sum(places) / len(places) - quarter)

    return min(seen, key=off)


def _check_agreement(lms: dict[str, Any], tokenizer: Any, dtype: str) -> None:
    """Mean difference of log-likelihoods a token, against what the dtype explains."""
    from rl.rollouts.parity import TOLERANCE

    length = 16
    texts = [(text,) for text in prompt_texts(tokenizer, 8, length)]
    theirs, mine = (answer(lms[who], "loglikelihood_rolling", texts) for who in ("hf", "mlx"))
    off = statistics.mean(abs(a - b) / length for a, b in zip(theirs, mine, strict=True))
    if not off <= TOLERANCE[dtype]:  # also true for NaN
        raise RunFailed(
            f"bench: the two score the same texts {off:.2g} a token apart (at most {TOLERANCE[dtype]} in {dtype})"
        )


def _agreement(kind: str, answers: dict[str, list[Any]]) -> str:
    pairs = list(zip(answers["hf"], answers["mlx"], strict=True))
    if kind == "generate_until":
        return f"{sum(a == b for a, b in pairs)} of {len(pairs)} equal"
    values = [(a[0], b[0]) if kind == "loglikelihood" else (a, b) for a, b in pairs]
    return f"≤ {max(abs(a - b) for a, b in values):.2g} apart"


def _command(sizes: Sizes, dtype: str, names: Sequence[str], seconds: int | None) -> str:
    told = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in asdict(sizes).items())
    told += f" --seconds {seconds}" if seconds else ""
    return f"python -m evals bench {' '.join(f'--model {name}' for name in names)} {told} --dtype {dtype}"
