"""lm-eval itself: how a task is handed to it, and its result made plain. Imports it only when something is measured."""

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals import catalog, runs
from evals.catalog import Task
from rl.errors import UserError

HUB_SECONDS = 5.0  # how long to wait for the hub's first answer about a data set


@dataclass(frozen=True)
class Asked:
    """A task as lm-eval takes it. `rows` (jsonl) and `gen_kwargs` only where a run's own questions are asked."""

    task: Task
    spec: Any
    rows: str = ""
    rows_path: str | None = None
    gen_kwargs: dict[str, Any] | None = None
    chat: bool = False


def asked(task: Task) -> Asked:
    """A task that brings its own questions."""
    if task.samples > 1:
        return Asked(task, _sampling(task))
    if task.kind != "bigbench":
        return Asked(task, str(task.path))
    from lm_eval.tasks._yaml_loader import load_yaml

    return Asked(task, load_yaml(task.path) | {"task": task.name, "dataset_kwargs": {"file": str(task.data)}})


def _sampling(task: Task) -> dict[str, Any]:
    """The task's YAML, with as many draws a question from the model's own distribution (temperature 1, no filter)."""
    from lm_eval.tasks._yaml_loader import load_yaml

    from evals.tasks import heldout

    given = load_yaml(task.path)
    over = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in catalog.metrics(task)]
    return given | {
        "task": task.name,
        "repeats": task.samples,
        "filter_list": [{"name": "none", "filter": [{"function": "take_first_k", "k": task.samples}]}],
        "process_results": heldout.process_samples,
        "metric_list": over,
        "generation_kwargs": given["generation_kwargs"]
        | {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0},
    }


def own_rows(folder: Path, run: runs.Run, task: Task, tokenizer: Any, limit: int | None) -> Asked:
    """Task heldout on the rows that `run` kept, written to `folder` with the chat template applied.

    Raises UserError for chat rows and a tokenizer without a template.
    """
    rows = runs.heldout(run)[:limit]
    text = "".join(json.dumps(_document(row, tokenizer, run), ensure_ascii=False) + "\n" for row in rows)
    path = folder / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    chat = not isinstance(rows[0]["prompt"], str)
    spec = str(task.path) if task.samples == 1 else _sampling(task)
    return Asked(task, spec, text, str(path), runs.generation(run), chat)


def fits(lm: Any, where: str) -> Callable[[Any], None]:
    """A check of one request: UserError for a question that lm-eval would cut the front off without a word."""

    def check(request: Any) -> None:
        if request.request_type != "generate_until":
            return
        prompt, options = request.args
        tokens, new = len(lm.tok_encode(prompt)), int(options.get("max_gen_toks", getattr(lm, "max_gen_toks", 256)))
        if tokens + new > lm.max_length:
            raise UserError(
                f"{where} {request.doc['id']} has {tokens} tokens, with {new} new ones more than the {lm.max_length} "
                "of the context; shorten the prompt or the completion"
            )

    return check


def ensure_data(task: Task) -> None:
    """Raise UserError when the task's data is neither here nor to be had from the hub; decided within seconds."""
    lost = catalog.missing(task)
    if lost is None:
        return
    where = f"task {task.name}: {lost}"
    if lost.startswith("file ") or any(os.environ.get(f"HF_{name}_OFFLINE") for name in ("HUB", "DATASETS")):
        raise UserError(where)
    failed = ["no answer"]

    def ask() -> None:
        from huggingface_hub import HfApi

        try:
            HfApi().dataset_info(task.config["dataset_path"], timeout=HUB_SECONDS)
            failed.clear()
        except Exception as error:  # the client raises its transport's own types
            failed[:] = [type(error).__name__]

    # in a thread of its own: name resolution has no time limit on a network that swallows packets
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * HUB_SECONDS)
    if failed:
        raise UserError(f"{where} (the hub: {failed[0]})")


def evaluate(lm: Any, asked: Asked, limit: int | None, seed: int) -> dict[str, Any]:
    """lm-eval's own result object with its samples.

    Raises UserError, in one line, where lm-eval cannot build the task (mostly data it cannot read), and for tasks that
    run the model's code or ask about more than text.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bar is ours
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    metadata = {"rows": asked.rows_path} if asked.rows_path else None
    manager = TaskManager(include_path=str(catalog.TASKS), include_defaults=False, metadata=metadata)
    try:
        with _offline(asked.task):
            loaded = manager.load([asked.spec])
    except UserError:
        raise
    except Exception as error:  # data sets fail in their own many ways
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        raise UserError(f"task {asked.task.name}: lm-eval cannot build it ({reason})") from error
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"task {asked.task.name} runs code that the model writes, which is not done here")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"task {asked.task.name} asks about pictures or sound; both backends read text only")
    return lm_eval.simple_evaluate(
        model=lm,
        tasks=list(loaded["tasks"].values()),
        task_manager=manager,
        limit=None if asked.rows else limit,
        gen_kwargs=asked.gen_kwargs,
        # one question has no sample deviation, and lm-eval divides by n - 1
        bootstrap_iters=1000 if min(map(_questions, loaded["tasks"].values())) > 1 and limit != 1 else 0,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )


def plain(result: dict[str, Any], task: Task) -> tuple[dict[str, Any], str]:
    """(the result object without its samples, the samples as jsonl), both of plain JSON values."""
    from lm_eval.utils import handle_non_serializable

    # where they lie on this machine helps nobody
    metadata = result["configs"][task.name].setdefault("metadata", {})
    metadata["config_source"] = f"evals/tasks/{task.path.name}"
    if task.kind == "lm-eval":
        metadata["config_source"] = f"lm_eval/tasks/{task.path.relative_to(catalog.lm_eval_tasks()).as_posix()}"
    if "rows" in metadata:
        metadata["rows"] = f"{task.name}.rows.jsonl"
    samples = result.pop("samples")[task.name]
    lines = [json.dumps(sample, ensure_ascii=False, default=handle_non_serializable) + "\n" for sample in samples]
    return json.loads(json.dumps(result, default=handle_non_serializable)), "".join(lines)


def _questions(task: Any) -> int:
    return len(task.eval_docs)


@contextmanager
def _offline(task: Task) -> Iterator[None]:
    """Within it the hub is not asked when the task's data set is in the cache: no waiting, the same data each time."""
    source = task.config.get("dataset_path") if task.kind == "lm-eval" else None
    if not isinstance(source, str) or not catalog.cached(source, task.config.get("dataset_name")):
        yield
        return
    import datasets
    import huggingface_hub.constants as hub

    before = datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE = before


def _document(row: dict[str, Any], tokenizer: Any, run: runs.Run) -> dict[str, str]:
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
        "rewards": json.dumps(runs.grading(run)),
    }
