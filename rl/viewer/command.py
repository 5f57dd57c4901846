"""`python -m rl completions RUN`."""

from pathlib import Path
from typing import Any

from rich.console import Console

from rl import completions, files, finished
from rl.checkpoints import disk_guard
from rl.errors import UserError
from rl.viewer import page, query, terminal

LIMIT = 20  # completions shown in a terminal that asks for no other number


def main(
    text: str,
    *,
    reward: list[str],
    length: list[str],
    step: list[str],
    words: str | None,
    sort: str | None,
    limit: int | None,
    whole: bool = False,
    steps: bool = False,
    html: Path | None = None,
    watch: bool = False,
    port: int = 0,
    root: Path = Path(),
) -> int:
    """Show completions in the terminal, or write (`html`) or serve (`watch`) the page. Returns the exit code."""
    folder = finished.folder(text, root, unfinished=True)
    conditions: dict[str, Any] = {"reward": reward, "length": length, "step": step, "text": words, "sort": sort}

    def chosen(most: int | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
        table = completions.read(folder)
        rows = table.to_pylist()
        return query.build(table.column_names, **conditions, limit=most).of(rows), rows, table.column_names

    if watch:
        return _watch(folder, text, root, conditions, port)
    console = Console()
    if html is not None:
        rows, every, columns = chosen(limit)
        with disk_guard(html.parent):
            files.write_text(html, page.html(page.data(folder, rows, columns)))
        console.print(f"{len(rows):,} of {len(every):,} completions in {html}")
        return 0
    rows, every, columns = chosen(None if steps else LIMIT if limit is None else limit)
    if steps:
        terminal.summary(console, rows)
    else:
        terminal.show(console, rows, len(every), columns, whole=whole)
    return 0


def _watch(folder: Path, text: str, root: Path, conditions: dict[str, Any], port: int) -> int:
    """Serve the page until Ctrl-C; a run that finishes meanwhile is followed to where its result went."""
    query.build([f"{completions.REWARD}x"], **conditions | {"reward": []})  # bad conditions are said at once

    def fresh() -> dict[str, Any]:
        now = finished.folder(text, root, unfinished=True)
        try:
            table = completions.read(now)
            rows, columns = table.to_pylist(), table.column_names
        except UserError:  # none yet: the curves are there all the same
            rows, columns = [], list(completions.FIXED)
        else:
            rows = query.build(columns, **conditions).of(rows)
        return page.data(now, rows, columns, page.SECONDS)

    with page.server(fresh, port) as serving:
        print(f"{folder.name}: http://127.0.0.1:{serving.server_address[1]}/  (Ctrl-C stops the viewer)", flush=True)
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            print("stopped")
    return 0
