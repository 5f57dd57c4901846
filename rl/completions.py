"""`completions.parquet`: what the policy said while it trained, what each reward gave for it and what came of that.

While a run goes on each logged rollout is a small file of its own in `completions.parts/` of the run's folder, written
whole or not at all; nothing is rewritten. A resume removes those of rollouts after its checkpoint. When the run
finishes they become one `completions.parquet` in its result, a row group for each some thousand rows.

Columns: `step` (the optimizer step that first trains on it), `round` (of dynamic sampling, else 0), `group`
(completions of one prompt have one number), `id` and `answer` of the data's row, `prompt`, `completion`, `reward`
(weighted sum), one `rewards/<name>` for each function, `advantage` (of tokens: their mean; null where there is none),
`length` in tokens, `ended` (by a stop token, not by length), `pair` ("chosen" or "rejected", online DPO).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl import files
from rl.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

FILE = "completions.parquet"
PARTS = "completions.parts"  # not "completions": there TRL's own `log_completions` writes
ROWS_A_GROUP = 4096
FIXED = {
    "step": "int64",
    "round": "int32",
    "group": "int32",
    "id": "string",
    "prompt": "string",
    "completion": "string",
    "answer": "string",
    "reward": "float64",
    "advantage": "float64",
    "length": "int32",
    "ended": "bool_",
    "pair": "string",
}
REWARD = "rewards/"


def due(every: int, step: int, period: int = 1) -> bool:
    """Whether the rollout made after `step` optimizer steps is logged: the first, and each first after a multiple of
    `every`. `period` is the number of steps between rollouts. A function of nothing else, so that a resume agrees."""
    return every > 0 and (step == 0 or step // every > (step - period) // every)


def text_of(prompt: Any) -> str:
    """A prompt as one text: messages as `role: content` paragraphs."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message.get('role', '?')}: {_said(message.get('content'))}" for message in prompt)


def _said(content: Any) -> str:
    if isinstance(content, list):  # the multimodal form: parts of text
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return "" if content is None else str(content)


def write(folder: Path, step: int, sampling_round: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one rollout's rows into the run's `folder`; a rollout written again (after a resume) replaces itself."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = _table([{"step": step, "round": sampling_round, **row} for row in rows])
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    files.write_bytes(folder / PARTS / f"{step:09d}-{sampling_round}.parquet", sink.getvalue().to_pybytes())


def cut(folder: Path, step: int) -> None:
    """Remove the rollouts first trained on after `step`, and what a kill left of a file."""
    for path in (folder / PARTS).glob("*"):
        if path.suffix != ".parquet" or _step(path) > step:
            path.unlink()


def merge(folder: Path, target: Path) -> bool:
    """Write all rollouts in the run's `folder` to the file `target`, in order; False when there are none.

    One pass, holding about ROWS_A_GROUP rows. Not renamed into place: `target` is in a folder that is moved whole.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = sorted((folder / PARTS).glob("*.parquet"))
    if not parts:
        return False
    schema = pa.unify_schemas([pq.read_schema(path) for path in parts])
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        held: list[pa.Table] = []
        for path in parts:
            held.append(_like(_read(path), schema))
            if sum(len(table) for table in held) >= ROWS_A_GROUP:
                writer.write_table(pa.concat_tables(held))
                held = []
        if held:
            writer.write_table(pa.concat_tables(held))
    return True


def read(folder: Path) -> "pa.Table":
    """All logged completions of a run, finished or going on; raises UserError when it has none."""
    import pyarrow as pa

    merged = folder / FILE
    if merged.is_file():
        return _read(merged)
    tables = []
    for path in sorted((folder / PARTS).glob("*.parquet")):
        try:
            tables.append(_read(path))
        except FileNotFoundError:  # the run has just finished, or was resumed
            continue
    if not tables:
        raise UserError(
            f"{folder}: holds no {FILE}: runs that sample while they train write it every [run] completions_every "
            "steps, and a new one has written none yet"
        )
    return pa.concat_tables(tables, promote_options="default")


def reward_names(columns: Iterable[str]) -> list[str]:
    """Names of the reward functions among a table's columns."""
    return [name.removeprefix(REWARD) for name in columns if name.startswith(REWARD)]


def rows_of(
    prompts: Sequence[Any],
    texts: Sequence[str],
    rewards: Mapping[str, Sequence[float | None]],
    weights: Mapping[str, float],
    data: Sequence[Mapping[str, Any]],
    lengths: Sequence[int],
    ended: Sequence[bool],
    *,
    group: int = 1,
    advantages: Sequence[float] | None = None,
    pair: Sequence[str | None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of one rollout of B completions, `group` to each prompt in neighbouring places.

    `rewards` are those of each function, None or NaN where it gave none; `data` the rows asked.
    """
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        given = {name: _number(values[i]) for name, values in rewards.items()}
        known = [weights[name] * value for name, value in given.items() if value is not None]
        answer, identity = data[i].get("answer"), data[i].get("id")
        yield {
            "group": i // group,
            "id": None if identity is None else str(identity),
            "prompt": text_of(prompt),
            "completion": text,
            "answer": None if answer is None else str(answer),
            "reward": math.fsum(known) if known else None,
            **{f"{REWARD}{name}": value for name, value in given.items()},
            "advantage": None if advantages is None else _number(advantages[i]),
            "length": int(lengths[i]),
            "ended": bool(ended[i]),
            "pair": None if pair is None else pair[i],
        }


def _number(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _table(rows: Sequence[Mapping[str, Any]]) -> "pa.Table":
    import pyarrow as pa

    names = [name for name in rows[0] if name.startswith(REWARD)]
    schema = pa.schema(
        [(name, getattr(pa, kind)()) for name, kind in FIXED.items()] + [(name, pa.float64()) for name in names]
    )
    return pa.Table.from_pylist([dict(row) for row in rows], schema=schema)


def _read(path: Path) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not whole Parquet ({str(error).splitlines()[0]:.120}); remove the file") from None


def _like(table: "pa.Table", schema: "pa.Schema") -> "pa.Table":
    import pyarrow as pa

    columns = [
        table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type) for field in schema
    ]
    return pa.table(columns, schema=schema)


def _step(path: Path) -> int:
    return int(path.stem.partition("-")[0])
