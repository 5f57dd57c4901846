"""`python -m rl samples RUN`: held-out answers before and after training, from what the run has recorded."""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rl import completions, files, finished, record, report
from rl.display import visible
from rl.errors import UserError

KINDS = {  # (right before, right after) -> what happened
    (False, True): "learned",
    (True, False): "lost",
    (False, False): "still wrong",
    (True, True): "right before and after",
}
MARKDOWN_ROWS = 20  # of each kind: Markdown is read whole, the page has them all
STYLE = """
body{margin:0 auto;max-width:1100px;padding:28px 20px;font:15px/1.5 system-ui,sans-serif;
color:#1d2127;background:#fbfaf8}
h1{font-size:24px;margin:0}h2{font-size:17px;margin:28px 0 8px}p{color:#69707b;margin:4px 0}
summary{cursor:pointer;font-weight:600;font-size:17px;margin:18px 0 6px}
article{background:#fff;border:1px solid #e4e2dc;border-radius:10px;padding:12px 16px;margin:10px 0}
.q,.a{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.5 ui-monospace,Menlo,Consolas,monospace;margin:0}
.q{color:#69707b;max-height:12em;overflow:auto}.two{display:grid;grid-template-columns:1fr 1fr;gap:12px;margin-top:8px}
.a{border-left:4px solid #b3403a;padding:2px 10px}.right{border-left-color:#2b7a4b}small{color:#69707b}
@media(prefers-color-scheme:dark){body{background:#16181c;color:#e6e7ea}article{background:#1e2126;border-color:#32363d}}
"""


@dataclass(frozen=True)
class Held:
    """One held-out question, its answer, and what was said to it before and after."""

    prompt: str
    answer: str
    before: str
    after: str
    right: tuple[bool, bool]


def main(text: str, out: Path | None, root: Path = Path()) -> int:
    """Write `samples.html` and `samples.md` into `out`, or the run's own folder. Returns the exit code."""
    folder = finished.folder(text, root)
    run, rows = record.read(folder), read(folder)
    target = out or folder
    files.write_text(target / "samples.html", page(run, rows))
    files.write_text(target / "samples.md", markdown(run, rows))
    print(f"{len(rows)} held-out questions: {target / 'samples.html'}, {target / 'samples.md'}")
    return 0


def read(folder: Path) -> list[Held]:
    """What `samples.jsonl` and `heldout.jsonl` of a run hold; without the second a prompt is its id.

    Raises UserError where nothing was recorded, or something else than answers (a reward model's run).
    """
    path, asked = folder / "samples.jsonl", folder / "heldout.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: missing: a run writes it when it finishes, so there is nothing to show yet")
    prompts = {}
    try:
        if asked.is_file():
            lines = asked.read_text(encoding="utf-8").split("\n")
            prompts = {row["id"]: completions.text_of(row["prompt"]) for row in map(json.loads, filter(None, lines))}
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return [
            Held(prompts.get(r["id"], str(r["id"])), str(r["answer"]), r["before"], r["after"], tuple(r["right"]))
            for r in found
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no completions before and after ({type(error).__name__}: {error})") from None


def _kinds(rows: Sequence[Held]) -> dict[str, list[Held]]:
    return {name: [row for row in rows if row.right == right] for right, name in KINDS.items()}


def _told(run: record.Record, rows: Sequence[Held]) -> str:
    counts = ", ".join(f"{len(part)} {name}" for name, part in _kinds(rows).items())
    base = f"{run.name}, from {run.base.get('id')}: {len(rows)} held-out questions, greedy; {counts}."
    if not run.result or "difference" not in run.result:
        return base
    result = run.result
    scores = f"{report.plus_minus(result['before'])} before, {report.plus_minus(result['after'])} after"
    return f"{base} {result['metric']}: {scores}, difference {report.interval(result['difference'])}."


def page(run: record.Record, rows: Sequence[Held]) -> str:
    """One HTML page without scripts; every text of a data set or a model is escaped."""
    parts = []
    for name, part in _kinds(rows).items():
        articles = "".join(_article(row) for row in part)
        opened = " open" if name != "right before and after" else ""
        parts.append(f"<details{opened}><summary>{name} ({len(part)})</summary>{articles}</details>\n")
    title = html.escape(run.name)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}: samples</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n<p>{html.escape(_told(run, rows))}</p>\n"
        f"{''.join(parts)}</body></html>\n"
    )


def _article(row: Held) -> str:
    sides = "".join(
        f'<div><small>{name}</small><pre class="a{" right" if right else ""}">'
        f"{html.escape(said) or '(nothing)'}</pre></div>"
        for name, said, right in (("before", row.before, row.right[0]), ("after", row.after, row.right[1]))
    )
    asked = f'<pre class="q">{html.escape(row.prompt)}</pre><small>answer: {html.escape(row.answer)}</small>'
    return f'<article>{asked}<div class="two">{sides}</div></article>\n'


def markdown(run: record.Record, rows: Sequence[Held]) -> str:
    """The same as tables, at most MARKDOWN_ROWS of a kind, and it says how many are left out."""
    lines = [f"# {_cell(run.name)}: held-out samples", "", _told(run, rows), ""]
    for name, part in _kinds(rows).items():
        lines += [f"## {name} ({len(part)})", ""]
        if part:
            lines += ["| question | answer | before | after |", "|---|---|---|---|"]
        for row in part[:MARKDOWN_ROWS]:
            cells = (row.prompt, row.answer, row.before, row.after)
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
        if len(part) > MARKDOWN_ROWS:
            lines += ["", f"{len(part) - MARKDOWN_ROWS} more are in samples.html."]
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text for one cell of a table: on one line, and no character of it read as Markdown or HTML."""
    shown = html.escape(visible(text), quote=False)
    for mark in "\\`*_|[]~$":
        shown = shown.replace(mark, f"&#{ord(mark)};")
    return shown
