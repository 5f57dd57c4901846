"""`nox -s bench -- --part peers`: the table on hand-made steps, the job a peer gets, peers that are not there."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rl import __main__ as cli
from rl.bench import child as bench_child
from rl.bench import peers as bench_peers
from rl.bench.child import OURS
from rl.bench.peers import SMALLER, Outcome, Task

ROOT = Path(__file__).resolve().parent.parent
SUMS = Task("sums", "two steps", Path("x.toml"), [])


def rows(*steps: tuple[float, float, int]) -> list[dict[str, float]]:
    return [{"step": i + 1, "wall_s": w, "reward": r, "tokens": n} for i, (w, r, n) in enumerate(steps)]


def cells(text: str, first: str, nth: int = 0) -> list[str]:
    lines = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in lines[nth].strip("|").split("|")]


OUTCOMES = [
    Outcome(OURS, "abc", rows((30, 0.1, 90), (32, 0.2, 100), (36, 0.5, 80)), {"resident": 2 * 10**9, "allocated": 0}),
    Outcome("mlx-lm-lora", "5.10.2", rows((10, 0.1, 90), (11, 0.3, 100), (12, 0.4, 100), (13, 0.6, 50)), {}),
    Outcome("mlxrl", "", [], {}, "not installed there"),
]


def test_losses_are_shown_as_plainly_as_wins() -> None:
    """Ours takes 2 and 4 s a step, the peer 1 s: it is 3 times faster, and the table says 0.33.

    Trap: a first step, in which kernels compile (30 s here), counted as a step.
    """
    text = bench_peers.markdown([(SUMS, OUTCOMES)], {"command": "`x`"})
    assert cells(text, OURS) == [OURS, "abc", "3", "3 (2–4)", "1.00", "35 (20–50)", "2.00", "–"]
    assert cells(text, "mlx-lm-lora")[2:6] == ["4", "1 (1–1)", "0.33", "100 (50–100)"]
    assert cells(text, "mlxrl")[2:] == ["0", "–", "–", "–", "–", "–"]
    assert "- mlxrl: not installed there" in text


def test_reward_against_time_ends_where_the_shortest_ends() -> None:
    """The peer trains for 3 s after its first step: there we have done our first step and the one of 2 s."""
    text = bench_peers.markdown([(SUMS, OUTCOMES)], {})
    assert "at 3.0 s" in text
    assert cells(text, OURS, 1)[-4:] == ["0.100", "0.100", "0.200", "0.200"]
    assert cells(text, "mlx-lm-lora", 1)[-4:] == ["0.100", "0.300", "0.400", "0.600"]
    assert cells(text, "mlx-lm-lora", 1)[1:5] == ["0.100", "0.300", "0.400", "0.600"]


def test_a_peer_gets_the_rows_and_settings_of_this_projects_run(
    smollm2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rl import config as configs
    from rl import data, models, start

    monkeypatch.setattr(models, "resolve_base", lambda *_: smollm2)
    monkeypatch.setattr(start, "find", lambda *_: start.Start(smollm2, "x"))
    sums, long = bench_peers.tasks(tmp_path, "cpu", ROOT)
    for task, length, rows_a_step in ((sums, 4, 32), (long, 32, 8)):
        config = configs.load(task.path, task.overrides)
        given = bench_peers._work(task, "cuda", ROOT)
        work = given["work"]
        assert work["texts"] == [row["prompt"] for row in data.build(config).train]
        assert [row["prompt"] for row in given["rows"]] == work["texts"]
        assert work["max_tokens"] == length
        assert (
            work["prompts_a_step"] * work["group"] == rows_a_step == config.trainer.args["per_device_train_batch_size"]
        )
        assert (work["steps"], work["learning_rate"]) == (config.trainer.args["max_steps"], 2e-4)
        assert work["model"] == str(smollm2.path / "mlx")  # the codes; on a CPU, where they are slow, the values
    assert {len(ids) for ids in work["prompts"]} == {256}


def test_absent_peers_are_named_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def ours(task: Task, name: str, version: str, *_: Any) -> Outcome:
        asked.append(name)
        return OUTCOMES[0]

    monkeypatch.setattr(bench_peers, "contestant", ours)
    monkeypatch.setattr(bench_peers, "tasks", lambda *_: [SUMS])
    monkeypatch.setattr(bench_peers, "prepare", lambda *_: None)
    monkeypatch.setattr(bench_peers, "DISTRIBUTIONS", {"mlx-lm-lora": "no-such-peer", "mlxrl": "no-such-other"})
    where = ["--peers-path", str(tmp_path / "none"), "--out", str(tmp_path)]
    assert cli.main(["bench", "--part", "peers", *where]) == 0
    assert asked == [OURS]
    (table,) = tmp_path.glob("bench-peers-*.md")
    text = table.read_text()
    assert text in capsys.readouterr().out
    assert "- mlx-lm-lora: not installed there: `python -m pip install --no-deps --target build/peers" in text
    assert len(json.loads(table.with_suffix(".json").read_text())["results"][0]["outcomes"]) == 3


def test_this_projects_rows_come_from_its_own_metrics(tmp_path: Path) -> None:
    run = tmp_path / "models" / "checkpoints" / "peers-sums"
    run.mkdir(parents=True)
    told = {"step": 1, "wall_s": 3.5, "reward": 0.25, "completions/mean_length": 3.75, "loss": 0.0}
    (run / "metrics.jsonl").write_text(json.dumps(told) + '\n{"step": 2, "wa')
    (run / "run.json").write_text(json.dumps({"config": {"trainer": {"per_device_train_batch_size": 8}}}))
    assert bench_peers._rows(tmp_path, OURS) == [{"step": 1, "wall_s": 3.5, "reward": 0.25, "tokens": 30}]


def test_the_long_works_reward_differs_within_a_group() -> None:
    assert bench_child.differing(["", ""], ["ab", "ac"]) == [(97 + 98) % 11, (97 + 99) % 11]


def test_an_error_names_no_place() -> None:
    assert bench_peers._without_places("OSError: '/some/where/x' is gone") == "OSError: is gone"


def test_memory_is_compared_where_both_go_backward_on_as_many_rows() -> None:
    """Trap: 64 rows at a time beside a peer's 8, and resident bytes of one beside allocated ones of another."""

    def line(**memory: dict[str, int]) -> str:
        named = {"peer": "mlx-lm-lora", "ours": OURS, "smaller": SMALLER}
        made = [Outcome(named[key], "", rows((1, 0.0, 1), (2, 0.0, 1)), value) for key, value in memory.items()]
        return "".join(bench_peers.memory_bar(made))

    peer = {"resident": 4 * 10**9, "allocated": 10 * 10**9}
    text = line(ours={"resident": 1, "allocated": 1}, peer=peer, smaller={"resident": 1, "allocated": 13 * 10**9})
    assert text == f"Peak allocated, {SMALLER}: 1.30 × mlx-lm-lora's; bar: at most 1.3: met."
    text = line(peer=peer, smaller={"resident": 1, "allocated": 14 * 10**9})
    assert "1.40 × mlx-lm-lora's; bar: at most 1.3: **missed**." in text
    assert "Peak resident" in line(peer={"resident": 4}, smaller={"resident": 6, "allocated": 1})
    assert line(ours=peer, peer=peer) == line(peer=peer, smaller={}) == ""


def test_fewer_rows_at_a_time_are_the_same_work(smollm2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rl import config as configs
    from rl import models

    monkeypatch.setattr(models, "resolve_base", lambda *_: smollm2)
    long = bench_peers.tasks(tmp_path, "cuda", ROOT)[1]
    assert long.contestants() == (OURS, "mlx-lm-lora", "mlxrl", SMALLER)
    args = [configs.load(long.path, long.overrides + more).trainer.args for more in ([], long.smaller)]
    sampled = [a["per_device_train_batch_size"] * a["steps_per_generation"] for a in args]
    stepped = [a["per_device_train_batch_size"] * a.get("gradient_accumulation_steps", 1) for a in args]
    assert sampled == stepped == [64, 64]
    assert args[1]["per_device_train_batch_size"] == 8  # prompts a step, which is mlx-lm-lora's
    assert args[0]["num_generations"] == args[1]["num_generations"] == 8


def test_no_one_eats_up_what_the_others_need() -> None:
    assert bench_peers.share(480, 7) == 120  # and a minute for each of the six
    assert bench_peers.share(210, 7) == 30  # too little for that: equal parts
    assert bench_peers.share(90, 1) == 90


def test_the_peak_is_told_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: a contestant that is stopped would have no peak, though it has reached it in its first step."""
    monkeypatch.setattr(bench_child, "EVERY_S", 0.01)
    path, done = tmp_path / "memory.json", threading.Event()
    thread = threading.Thread(target=bench_child.watch, args=(path, done))
    thread.start()
    until = time.monotonic() + 10
    while not path.is_file() and time.monotonic() < until:
        time.sleep(0.01)
    done.set()
    thread.join()
    found = json.loads(path.read_text())
    assert 10**7 < found["resident"] < 10**11
    assert "allocated" not in found  # MLX's count alone would hide what torch holds on a CPU
