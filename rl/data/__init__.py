"""Rows to train on and held-out rows to measure on: the same rows on every machine, none on both sides.

A row: `id` (unique), `prompt` (text, or chat messages), `answer` (text), `task`, and `completion` where the gold
completion is known (text, or an assistant message where the prompt is chat, as TRL's SFTTrainer wants it).
reasoning-gym rows add `metadata` (JSON text), which its scorers need.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.data import arithmetic, environments, gym, mix, tables
from rl.errors import UserError
from rl.files import sha256_json, write_text

if TYPE_CHECKING:
    from rl.config import Config

Row = dict[str, Any]


@dataclass(frozen=True)
class Dataset:
    """`fingerprint`: sha256 over all rows, so that two machines can tell whether they train on the same."""

    source: str
    fingerprint: str
    train: list[Row]
    heldout: list[Row]


def build(config: "Config", sampled: Path | None = None) -> Dataset:
    """The rows that `[data]` and `[eval] size` describe; a pure function of them (and of the files they name).

    `sampled` is the folder of the finished run that [data] from names: its pairs are `train`. `heldout` has exactly
    `eval.size` rows, `train` at most `data.train_size`, never one twice.
    Raises UserError (one line) for a pool that is too small, an impossible combination, or rows that cannot be had.
    """
    data, where = config.data, f"{config.path}: [data]"
    if data.from_ is not None and sampled is None:
        raise UserError(f"{where} from = '{data.from_}': its run is not made here; `python -m rl train` makes it first")
    if data.system is not None and data.form != "chat":
        raise UserError(f"{where} system needs form = 'chat', found form = '{data.form}'")
    if data.shots and data.source in ("jsonl", "hub"):
        raise UserError(
            f"{where} shots = {data.shots}: source '{data.source}' takes its prompts as they are; remove it"
        )
    if data.tasks and data.source != "reasoning-gym":
        raise UserError(f"{where} task: only source 'reasoning-gym' has tasks, found source = '{data.source}'")
    readers: dict[str, mix.Reader] = {
        "arithmetic": arithmetic.rows,
        "reasoning-gym": gym.rows,
        "jsonl": tables.jsonl_rows,
        "hub": tables.hub_rows,
        "environment": environments.rows,
        "mix": lambda config: mix.rows(config, readers),
    }
    train, heldout = readers[data.source](config)
    if sampled is not None:
        train = tables.of_run(sampled, config, heldout)
    source = _named(data) if sampled is None else f"pairs of {sampled.name}"
    return Dataset(source, sha256_json({"train": train, "heldout": heldout}), train, heldout)


def _named(data: Any) -> str:
    """A source with its file or id, as the record names it."""
    if data.source == "mix":
        return "mix of " + ", ".join(_named(part) for part in data.mix)
    named = {"jsonl": f"jsonl:{data.path}", "hub": f"hub:{data.name}"}
    return named.get(data.source, data.source)


def export(dataset: Dataset, folder: Path) -> tuple[Path, Path]:
    """Write `train.jsonl` and `heldout.jsonl`, which source "jsonl" reads back as the same rows."""
    paths = folder / "train.jsonl", folder / "heldout.jsonl"
    for path, rows in zip(paths, (dataset.train, dataset.heldout), strict=True):
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return paths


def check_lengths(
    rows: Sequence[Row], tokenizer: Any, limit: int, source: str, tools: Sequence[Any] | None = None
) -> None:
    """Raise UserError for the longest prompt over `limit` tokens (chat template and `tools` included), by its row."""
    longest, tokens = max(((row, prompt_tokens(row, tokenizer, source, tools)) for row in rows), key=lambda x: x[1])
    if tokens > limit:
        raise UserError(
            f"{source}: row '{longest['id']}' has a prompt of {tokens} tokens, and {limit} fit (context less new "
            "tokens): shorten or remove it, or lower [rollout] max_completion_length or [data] shots"
        )


def prompt_tokens(row: Row, tokenizer: Any, source: str, tools: Sequence[Any] | None) -> int:
    """Tokens of the row's prompt, chat template and `tools` included; UserError for a chat without a template."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return len(tokenizer(prompt)["input_ids"])
    if not tokenizer.chat_template:
        raise UserError(
            f"{source}: row '{row['id']}' is a chat prompt, and the model's tokenizer has no chat template: "
            "use [data] form = 'plain', or a model with one"
        )
    said = tokenizer.apply_chat_template(prompt, tools=tools, add_generation_prompt=True, return_dict=False)
    return len(said)
