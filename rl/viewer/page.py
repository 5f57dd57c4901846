"""Completions and curves as one HTML page that needs no network, and a server that keeps it fresh."""

import json
import math
from collections.abc import Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from rl import completions, record
from rl.errors import UserError
from rl.report import PANELS, duration

Row = dict[str, Any]
TEMPLATE = Path(__file__).with_name("page.html")
CAP_BYTES = 8 << 20  # of completions in a page: a browser stays quick
POINTS = 1000  # of a curve
SECONDS = 2.0  # between two looks of a page that watches


def data(folder: Path, rows: Sequence[Row], columns: Sequence[str], watch: float = 0.0) -> dict[str, Any]:
    """What the page shows of the run in `folder`: the newest of `rows` that fit into CAP_BYTES, and its curves."""
    run = record.read(folder)
    rewards = completions.reward_names(columns)
    kept: list[Row] = []
    size = 0
    for row in reversed(rows):
        shown = {name: row[name] for name in completions.FIXED if name not in ("id", "round", "group")}
        shown["rewards"] = {name: row[completions.REWARD + name] for name in rewards}
        size += len(json.dumps(shown))
        if kept and size > CAP_BYTES:
            break
        kept.append(shown)
    logged = [row for row in record.read_metrics(folder / "metrics.jsonl") if isinstance(row.get("step"), int)]
    last = max((row["step"] for row in logged), default=0)
    capped = None
    if len(kept) < len(rows):
        capped = (
            f"This page holds the newest {len(kept):,} of {len(rows):,} completions ({CAP_BYTES >> 20} MiB); "
            "the terminal viewer reads them all, and filters given on its command line apply before this cut."
        )
    algorithm = run.config.get("trainer", {}).get("algorithm", "?")
    wall = duration(logged[-1].get("wall_s") or run.wall_s) if logged else "–"
    return {
        "run": run.name,
        "about": f"{algorithm}, {run.status}, step {last}, {wall}, {run.device}",
        "version": f"{run.status} {len(logged)} {last} {len(rows)}",
        "watch": watch,
        "capped": capped,
        "rewards": rewards,
        "rows": kept[::-1],
        "curves": [{"title": title, "points": _points(logged, key)} for title, key in PANELS],
    }


def html(shown: dict[str, Any]) -> str:
    """The page with its data inside. `<` is escaped, so that no completion can end the script element."""
    text = json.dumps(record.finite(shown), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", text)


def _points(rows: Sequence[Row], key: str) -> list[list[float]]:
    """[step, value] of what was logged, thinned to about POINTS."""
    points = [
        [row["step"], row[key]]
        for row in rows
        if isinstance(row.get(key), int | float) and not isinstance(row[key], bool) and math.isfinite(row[key])
    ]
    every = max(1, -(-len(points) // POINTS))
    return points[::every] + (points[-1:] if points and (len(points) - 1) % every else [])


class Watcher(BaseHTTPRequestHandler):
    """`/` is the page, `/data.json` the run as it now is; nothing else, and only for names of this machine."""

    def __init__(self, fresh: Any, *args: Any, **kwargs: Any):
        self.fresh = fresh
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        """Answer; a page of another site that made its name point here is refused."""
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        if host not in ("127.0.0.1", "localhost"):
            return self._send(403, "text/plain", "only as 127.0.0.1 or localhost")
        if self.path not in ("/", "/data.json"):
            return self._send(404, "text/plain", "not here")
        try:
            shown = record.finite(self.fresh())
        except UserError as error:
            return self._send(503, "text/plain", str(error))
        if self.path == "/":
            return self._send(200, "text/html", html(shown))
        return self._send(200, "application/json", json.dumps(shown, ensure_ascii=False))

    def _send(self, status: int, kind: str, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


def server(fresh: Any, port: int) -> ThreadingHTTPServer:
    """A server on 127.0.0.1 of a page that shows `fresh()`; port 0 takes a free one. UserError for one in use."""
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(Watcher, fresh))
    except OSError as error:
        raise UserError(f"--port: found {port}, which is not free ({error.strerror}); 0 takes one that is") from None
