"""One model on one task through lm-eval; results go to evals/results/<run>/[base/]<task>.json, samples beside them."""

import functools
import hashlib
import json
import logging
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evals import runs
from rl.errors import UserError
from rl.files import sha256_json, write_text

TASKS = Path(__file__).parent / "tasks"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to measure; `limit` rows at most, `batch_size` sequences at once."""

    device: str = "auto"
    dtype: str = "float32"
    batch_size: int = 32
    limit: int | None = None
    again: bool = False


def tasks() -> list[str]:
    """Names of the tasks in evals/tasks/."""
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


def result_path(root: Path, run: str, role: str, task: str) -> Path:
    """Where a result lies; the samples are beside it as <task>.samples.jsonl, the questions as <task>.rows.jsonl."""
    folder = root / "evals" / "results" / run
    return (folder / "base" if role == "base" else folder) / f"{task}.json"


def measure(root: Path, run: runs.Run, subject: runs.Subject, task: str, settings: Settings) -> tuple[Path, bool]:
    """Measure a subject of a run; the result's path, and whether it was made now or found to be up to date.

    Raises UserError for rows that do not fit the context and for a tokenizer that cannot serve; nothing is written
    then.
    """
    rows = runs.heldout(run)[: settings.limit]
    path = result_path(root, run.name, subject.role, task)
    inputs = {
        "run": run.name,
        "role": subject.role,
        "weights_sha256": runs.weights_sha256(subject),
        "rows_sha256": sha256_json(rows),
        "grading": grading(run),
        "generation": generation(run),
        "dtype": settings.dtype,
        "task_sha256": sha256_json([file.read_text(encoding="utf-8") for file in sorted(TASKS.glob(f"{task}.*"))]),
        "packages": {name: version(name) for name in ("lm-eval", "torch", "transformers", "peft")},
    }
    if not settings.again and _up_to_date(path, inputs):
        return path, False
    result, samples, asked = _evaluate(root, run, subject, task, rows, settings)
    result["duet"] = {**inputs, "samples_sha256": hashlib.sha256(samples.encode()).hexdigest()}
    # the result last: where it is, its samples are whole
    write_text(path.with_name(f"{task}.rows.jsonl"), asked)
    write_text(path.with_name(f"{task}.samples.jsonl"), samples)
    write_text(path, _portable(json.dumps(result, indent=2, ensure_ascii=False), root) + "\n")
    return path, True


def grading(run: runs.Run) -> list[dict[str, Any]]:
    """The run's rewards as {"name", "weight", "options"}: the first verifying one says what a right answer is."""
    rewards = run.record["config"].get("reward") or []
    own = ("name", "weight")
    return [
        {
            **{key: reward[key] for key in own if key in reward},
            "options": {k: reward[k] for k in reward if k not in own},
        }
        for reward in rewards
    ]


def generation(run: runs.Run) -> dict[str, Any]:
    """Length (tokens) and stop strings the run generated with, as lm-eval names them."""
    rollout = run.record["config"].get("rollout", {})
    return {"max_gen_toks": int(rollout.get("max_completion_length", 64)), "until": list(rollout.get("stop") or [])}


def _up_to_date(path: Path, inputs: dict[str, Any]) -> bool:
    """Whether a result made from just these inputs is there, with its samples; a broken one is made again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["duet"]
        samples = path.with_name(f"{path.stem}.samples.jsonl").read_bytes()
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return found == {**inputs, "samples_sha256": hashlib.sha256(samples).hexdigest()}


def _evaluate(
    root: Path, run: runs.Run, subject: runs.Subject, task: str, rows: list[dict[str, Any]], settings: Settings
) -> tuple[dict[str, Any], str, str]:
    """lm-eval's result object, its samples as jsonl, and the questions asked as jsonl."""
    import tempfile

    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable
    from transformers.utils.logging import disable_progress_bar

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tokenizer = _tokenizer(run, subject)
    quiet = not sys.stderr.isatty()  # a log file wants no progress bars
    if quiet:
        disable_progress_bar()
    lm = _model(subject, tokenizer, chat=not isinstance(rows[0]["prompt"], str), settings=settings)
    docs = [_document(row, tokenizer, grading(run), run) for row in rows]
    if quiet:
        lm.generate_until = functools.partial(lm.generate_until, disable_tqdm=True)
    length = generation(run)
    for doc in docs:
        # lm-eval would cut the front of the question off without a word
        tokens = len(lm.tok_encode(doc["prompt"]))
        if tokens + length["max_gen_toks"] > lm.max_length:
            raise UserError(
                f"{run.folder / 'heldout.jsonl'}: row {doc['id']} has {tokens} tokens, with {length['max_gen_toks']} "
                f"new ones more than the {lm.max_length} of the context; shorten the prompt or the completion"
            )
    asked = "".join(json.dumps(doc, ensure_ascii=False) + "\n" for doc in docs)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rows.jsonl").write_text(asked, encoding="utf-8")
        result = lm_eval.simple_evaluate(
            model=lm,
            tasks=[task],
            task_manager=TaskManager(
                include_path=str(TASKS), include_defaults=False, metadata={"rows": f"{folder}/rows.jsonl"}
            ),
            gen_kwargs=length,
            # one question has no sample deviation, and lm-eval divides by n - 1
            bootstrap_iters=1000 if len(docs) > 1 else 0,
            random_seed=0,
            numpy_random_seed=0,
            torch_random_seed=0,
            fewshot_random_seed=0,
        )
    result["wall_s"] = round(time.monotonic() - started, 3)
    # where they lie on this machine helps nobody
    result["configs"][task]["metadata"] |= {"rows": f"{task}.rows.jsonl", "config_source": f"evals/tasks/{task}.yaml"}
    samples = result.pop("samples")[task]
    plain = json.loads(json.dumps(result, default=handle_non_serializable))
    lines = [json.dumps(sample, ensure_ascii=False, default=handle_non_serializable) for sample in samples]
    return plain, _portable("".join(line + "\n" for line in lines), root), asked


def _tokenizer(run: runs.Run, subject: runs.Subject) -> Any:
    """The run's tokenizer (the base's where the run's folder has none). Raises UserError when it has no EOS."""
    from transformers import AutoTokenizer

    folder = run.folder if (run.folder / "tokenizer.json").is_file() else subject.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no tokenizer can be read ({str(error).splitlines()[0]})") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no EOS token, so no completion would end; set eos_token there")
    return tokenizer


def _model(subject: runs.Subject, tokenizer: Any, chat: bool, settings: Settings) -> Any:
    """lm-eval's `hf` model for a subject, with every token of the run's and the model's own EOS as the end."""
    from lm_eval.models.huggingface import HFLM
    from transformers import GenerationConfig

    from rl.device import pick

    lm = HFLM(
        pretrained=str(subject.model),
        tokenizer=tokenizer,
        peft=str(subject.adapter) if subject.adapter else None,
        device=pick(settings.device).type,
        dtype=settings.dtype,
        batch_size=settings.batch_size,
        # a chat template writes BOS itself where the model wants one
        add_bos_token=False if chat else None,
    )
    own = lm.model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [] if own is None else [own])}
    # Plain greedy decoding: a folder may ship sampling settings or a repetition penalty. And rows that end early in a
    # batch must stop there: lm-eval drops EOS when it decodes, so text after it would look like the answer's.
    lm.model.generation_config = GenerationConfig(
        eos_token_id=sorted(ends), pad_token_id=lm.tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
    )
    return lm


def _document(row: dict[str, Any], tokenizer: Any, rewards: list[dict[str, Any]], run: runs.Run) -> dict[str, str]:
    """A row as the task reads it: the prompt as text, the row and the run's rewards as JSON."""
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        if not tokenizer.chat_template:
            raise UserError(
                f"{run.folder}: heldout.jsonl holds chat messages and the tokenizer has no chat template; "
                'add chat_template.jinja to the folder, or train with [data] form = "plain"'
            )
        prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return {
        "id": str(row["id"]),
        "prompt": prompt,
        "answer": str(row["answer"]),
        "task": str(row.get("task", "")),
        "row": json.dumps(row, ensure_ascii=False),
        "rewards": json.dumps(rewards),
    }


def _portable(text: str, root: Path) -> str:
    """Text without the checkout's place on this machine: results get published."""
    return text.replace(f"{root.resolve()}/", "")
