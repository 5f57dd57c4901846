"""The completions viewer and the samples page: filters, caps, the live server, and texts that try to break out."""

import json
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from run_helper import checkpoint, fresh
from test_completions import row

from rl import completions, files, finished, record, run
from rl.errors import UserError
from rl.viewer import command, page, query, samples

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><!-- \u2028 'x'"
BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run at step 4 with two logged rollouts, one completion of which is an attack on the page."""
    opened = run.start(tmp_path, fresh(tmp_path))
    completions.write(opened.folder, 1, 0, [row("7", reward=0.0, length=1), row(EVIL, reward=1.0, length=40)])
    completions.write(
        opened.folder, 3, 0, [row("Seven\x1b[2J", reward=0.5, length=9), row("", reward=None, ended=False)]
    )
    checkpoint(opened, 4)
    run.close(opened, "interrupted")
    return tmp_path


def table(root: Path) -> Any:
    return completions.read(finished.folder("demo", root, unfinished=True))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"reward": [">0.5"]}, [EVIL]),
        ({"reward": [">=0.5", "<1"]}, ["Seven\x1b[2J"]),
        ({"reward": ["exact=1"], "length": ["9..40"]}, [EVIL, "Seven\x1b[2J"]),
        ({"step": ["!=1"], "sort": "reward"}, ["Seven\x1b[2J", ""]),
        ({"text": "SEVEN"}, ["Seven\x1b[2J"]),
        ({"sort": "-length", "limit": 2}, [EVIL, "Seven\x1b[2J"]),
        ({"sort": "-reward", "limit": 1}, [EVIL]),
    ],
)
def test_filters(root: Path, given: dict[str, Any], wanted: list[str]) -> None:
    found = table(root)
    rows = query.build(found.column_names, **given).of(found.to_pylist())
    assert [r["completion"] for r in rows] == wanted


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"reward": ["high"]}, "no reward 'high', valid: exact"),
        ({"reward": ["exct>1"]}, "did you mean 'exact'?"),
        ({"length": [">"]}, "--length: found '>', valid: a number"),
        ({"step": ["1..2..3"]}, "--step: found '1..2..3'"),
        ({"step": ["3..1"]}, "--step: found '3..1', valid: from the lower to the higher, 1..3"),
        ({"sort": "size"}, "--sort: found 'size', valid: step, reward"),
    ],
)
def test_a_bad_filter_is_one_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        query.build(["reward", "rewards/exact"], **given)


def test_an_unknown_run_lists_the_nearest(root: Path) -> None:
    with pytest.raises(
        UserError, match=r"demmo: no such run in models/final or models/checkpoints, did you mean 'demo'"
    ):
        finished.folder("demmo", root, unfinished=True)
    with pytest.raises(UserError, match="holds no run; make one"):
        finished.folder("demo", root)


def show(root: Path, **given: Any) -> int:
    plain = {"reward": [], "length": [], "step": [], "words": None, "sort": None, "limit": None, "root": root}
    return command.main("demo", **plain | given)


def test_the_terminal_shows_no_control_character(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(root, step=["3"]) == 0
    shown = capsys.readouterr().out
    assert "Seven\\x1b[2J" in shown
    assert "\x1b" not in shown
    assert "2 of 4 completions" in shown
    assert show(root, steps=True) == 0
    assert re.search(r"^\s*1\s+2\s+0\.500\s+20\.5\s+1\.00\s*$", capsys.readouterr().out, re.MULTILINE)


def inlined(text: str) -> dict[str, Any]:
    return json.loads(text.split('id="data">', 1)[1].split("</script>", 1)[0])


def test_no_completion_ends_the_pages_script(root: Path) -> None:
    out = root / "page.html"
    assert show(root, html=out) == 0
    text = out.read_text(encoding="utf-8")
    assert text.count("</script>") == 2  # the template's own
    assert "<img" not in text
    assert [r["completion"] for r in inlined(text)["rows"]][1] == EVIL
    rewards = next(c for c in inlined(text)["curves"] if c["title"] == "reward")
    assert rewards["points"] == [[n, n / 10] for n in range(1, 5)]
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", text.replace(EVIL, ""))


def test_a_large_log_is_cut_and_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = table(root)
    monkeypatch.setattr(page, "CAP_BYTES", 600)
    shown = page.data(root / "models/checkpoints/demo", found.to_pylist(), found.column_names)
    assert 0 < len(shown["rows"]) < 4
    assert shown["rows"][-1]["completion"] == ""  # the newest stay
    assert f"the newest {len(shown['rows'])} of 4 completions" in shown["capped"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_browser_shows_the_page(root: Path) -> None:
    """The script really runs: cards, curves and counts are there, and the attack is text."""
    out = root / "page.html"
    show(root, html=out)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={root / 'profile'}"]
    done = subprocess.run(
        [str(BROWSER), *flags, "--dump-dom", out.as_uri()], capture_output=True, text=True, timeout=90, check=True
    )
    dom = done.stdout
    assert "<title>demo</title>" in dom  # not "owned"
    assert "4 of 4 completions" in dom
    assert len(re.findall(r'class="card', dom)) == 4
    assert len(re.findall(r'class="chart"', dom)) == 1
    assert "&lt;img src=x onerror=" in dom


def test_the_live_page_follows_the_run(root: Path) -> None:
    """Fresh rows come with the next look; only this machine's names are answered."""
    folder = root / "models" / "checkpoints" / "demo"

    def fresh_data() -> dict[str, Any]:
        found = completions.read(folder)
        return page.data(folder, found.to_pylist(), found.column_names, page.SECONDS)

    with page.server(fresh_data, 0) as serving:
        address = f"http://127.0.0.1:{serving.server_address[1]}"
        threading.Thread(target=serving.serve_forever, daemon=True).start()

        def get(path: str, host: str | None = None) -> str:
            asked = urllib.request.Request(address + path, headers={"Host": host} if host else {})
            with urllib.request.urlopen(asked, timeout=10) as answer:
                return answer.read().decode()

        first = inlined(get("/"))
        completions.write(folder, 5, 0, [row("new")])
        record.append_metrics(folder / "metrics.jsonl", 5, 1.0, {"reward": 0.9})
        second = json.loads(get("/data.json"))
        for path, host, status in (("/etc/passwd", None, 404), ("/", "evil.example:80", 403)):
            with pytest.raises(urllib.error.HTTPError) as error:
                get(path, host)
            assert error.value.code == status
        serving.shutdown()
    assert first["watch"] == page.SECONDS
    assert [len(shown["rows"]) for shown in (first, second)] == [4, 5]
    assert first["version"] != second["version"]
    assert second["curves"][0]["points"][-1] == [5, 0.9]


def test_samples_before_and_after(tmp_path: Path) -> None:
    """Each question in the part that it belongs to, in both files, with every text escaped."""
    folder = tmp_path / "demo"
    record.save(fresh(tmp_path), folder)
    said = [("a", False, True), ("b", True, False), (EVIL, False, False), ("d|e", True, True)]
    rows = [{"id": str(i), "answer": "4", "before": t, "after": t, "right": [b, a]} for i, (t, b, a) in enumerate(said)]
    files.write_text(folder / "samples.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    asked = [{"id": str(i), "prompt": f"question {i}"} for i in range(4)]
    files.write_text(folder / "heldout.jsonl", "".join(json.dumps(r) + "\n" for r in asked))
    assert samples.main(str(folder), None) == 0
    page_text, text = ((folder / f"samples.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    for name in ("learned (1)", "lost (1)", "still wrong (1)", "right before and after (1)"):
        assert name in page_text
        assert f"## {name}" in text
    assert "<script" not in page_text + text
    assert "<img" not in page_text + text
    assert "| question 0 | 4 | a | a |" in text.split("## lost")[0]
    assert "d&#124;e" in text
    assert page_text.index("question 0") < page_text.index("question 1") < page_text.index("question 2")
    with pytest.raises(UserError, match="missing: a run writes it when it finishes"):
        samples.read(tmp_path)
