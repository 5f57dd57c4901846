"""`nox -s bench`: the table's arithmetic on hand-made numbers, equal work for all contestants, one scaled-down run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import rl.rollouts  # noqa: F401  binds BLAS before mlx loads
from rl import __main__ as cli
from rl import models
from rl.algorithms.bench import Stopwatch
from rl.bench import command as bench
from rl.bench import file as bench_file
from rl.bench import models as bench_models
from rl.bench import rollouts as bench_rollouts
from rl.bench import table as bench_table
from rl.bench.table import BATCH, ENGINE, HF, OURS, PAGED, STOCK
from rl.errors import RunFailed
from rl.rollouts import bench as contestants
from rl.rollouts import load
from rl.rollouts.engine import Engine

MACHINE = bench_table.Machine(bandwidth=1000.0, flops=500.0, launch=0.25, launches=3)
WORK = bench_table.Work("2 × 2", 2, 2, 5, 3)


def report(**changes: Any) -> bench_table.Report:
    """Three repetitions: the engine takes 1, 2 and 4 s."""
    seconds = {ENGINE: [1.0, 2.0, 4.0], BATCH: [1.2, 4.0, 5.0], HF: [3.0, 5.0, 20.0]}
    floors = [bench_table.Floor(0.1, 0.2, 0.25, 0.05)] * 3
    ours = [{"rollout": 1.0, "sync": 0.1, "backward": 2.0, "rest": 0.9}] * 2
    stock = [{"rollout": 6.0, "backward": 3.0, "rest": 1.0}, {"rollout": 4.0, "backward": 3.0, "rest": 1.0}]
    given = {
        "shape": "smollm2",
        "parameters": 134_515_008,
        "device": "cpu",
        "dtype": "float32",
        "full": True,
        "agreements": [bench_table.Agreement(HF, 128, 0.0, None, 1.0)],
        "machine": MACHINE,
        "contests": [bench_table.Contest(WORK, [12, 12, 12], [3, 3, 3], seconds, floors)],
        "syncs": [bench_table.Sync("LoRA rank 16", 420, 2_000_000, [0.001, 0.002, 0.004])],
        "steps": [bench_table.Steps("LoRA rank 16", 2, 4, 256, 128, {OURS: ours, STOCK: stock})],
    }
    return bench_table.Report(**(given | changes))


def cells(text: str, first: str) -> list[str]:
    """The cells of the table row that begins with `first`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


# --- arithmetic


def test_spread_is_median_least_and_largest() -> None:
    assert bench_table.spread([4.0, 1.0, 2.0]) == bench_table.Spread(2.0, 1.0, 4.0)
    assert bench_table.spread([1.0, 2.0]).median == 1.5
    assert bench_table.Spread(5195.2, 5100.0, 5300.4).text() == "5,195 (5,100–5,300)"
    with pytest.raises(ValueError, match="no measurements"):
        bench_table.spread([])


def test_ratios_are_taken_within_a_repetition() -> None:
    """Trap: the ratio of medians (here 4 / 2) hides that a repetition's slow moment hit both."""
    assert bench_table.ratios([1.0, 2.0, 4.0], [1.2, 4.0, 5.0]) == [1.2, 2.0, 1.25]
    assert bench_table.ratios([1.0, 2.0, 4.0], [1.2]) == [1.2]  # one that stayed out of later repetitions
    with pytest.raises(ValueError, match="longer"):
        bench_table.ratios([1.0], [1.0, 2.0])


def test_floor_on_paper() -> None:
    """2 prompts of 5 tokens, completions of 3, 3, 2 and 1: forwards of the prompts, then of 3 rows, then of 2.

    Weights 100 + 20 numbers of 4 bytes, 8 bytes a cached token.
    """
    sizes = bench_table.Sizes(body=100, head=20, cache_bytes=8, itemsize=4)
    moved = [480 + 80, 480 + (10 + 3) * 8, 480 + (10 + 4) * 8]
    sums = [2 * 2 * (5 * 100 + 20), 2 * 3 * 120, 2 * 2 * 120]
    found = bench_table.floor(sizes, MACHINE, 2, 5, [3, 3, 2, 1])
    assert found.bytes_s == pytest.approx(sum(moved) / 1000)
    assert found.flops_s == pytest.approx(sum(sums) / 500)
    assert found.forwards_s == pytest.approx(2080 / 500 + 720 / 500 + 480 / 500)  # sums, not bytes, in each
    assert found.launches_s == pytest.approx(3 * 3 * 0.25)


def test_bars_by_the_median_of_ratios() -> None:
    judged = {bar.what: bar for bar in bench_table.bars(report())}
    batch = judged["rollout 2 × 2 ÷ BatchGenerator"]
    assert (batch.wanted, batch.found, batch.met) == (1.5, bench_table.Spread(1.25, 1.2, 2.0), False)
    hf = judged["rollout 2 × 2 ÷ HF generate"]
    assert (hf.wanted, hf.found, hf.met) == (1.5, bench_table.Spread(3.0, 2.5, 5.0), True)
    step = judged["whole GRPO step (LoRA rank 16) ÷ stock TRL"]
    assert (step.found.low, step.found.high, step.met) == (pytest.approx(2.0), pytest.approx(2.5), True)
    trainer = judged["trainer's part of the step (LoRA rank 16) ÷ stock TRL"]
    assert (trainer.found.median, trainer.met) == (pytest.approx(4 / 2.9), False)
    sync = judged["LoRA sync, % of the step"]
    assert (sync.wanted, sync.found.median, sync.met) == (2.0, pytest.approx(2.5), False)


def test_bars_by_device_and_only_at_full_size() -> None:
    def wanted(**changes: Any) -> list[float]:
        return [bar.wanted for bar in bench_table.bars(report(steps=[], **changes))]

    assert wanted() == [1.5, 1.5]
    assert wanted(device="cuda") == [1.5, 8.0]
    assert wanted(device="cuda", shape="tiny") == wanted(device="mps") == wanted(full=False) == []
    alone = bench_table.Work("4 × 1", 4, 1, 5, 3)
    contest = report().contests[0]
    single = bench_table.Contest(alone, contest.tokens, contest.longest, contest.seconds, contest.floors)
    assert wanted(contests=[single]) == [1.0, 1.5]  # nothing to share: it must only not lose


def test_the_table_says_what_was_missed() -> None:
    text = "\n".join(bench_table.section(report(), ["command: `x`"]))
    assert cells(text, "rollout 2 × 2 ÷ BatchGenerator")[1:] == ["≥ 1.5", "1.25 (1.20–2.00)", "**missed**"]
    assert cells(text, "rollout 2 × 2 ÷ HF generate")[1:] == ["≥ 1.5", "3.00 (2.50–5.00)", "met"]
    assert cells(text, "LoRA sync, % of the step")[1:] == ["≤ 2", "2.50 (2.50–2.50)", "**missed**"]
    rollout = cells(text, "2 × 2")
    assert rollout[1:4] == ["12 (12–12)", "3 (3–3)", "6 (3–12)"]
    assert rollout[6:8] == ["1.25 (1.20–2.00)", "3.00 (2.50–5.00)"]
    assert rollout[-1] == "8.0 (4.0–16.0)"  # 2 s over a floor of 0.25
    assert cells(text, "LoRA rank 16")[1:] == ["420", "2.0", "2.00 (1.00–4.00)", "1.00"]
    assert cells(text, "**whole step**")[1:] == ["4 (4–4)", "9 (8–10)", "2.25 (2.00–2.50)"]
    assert cells(text, "sync")[2:] == ["", ""]
    barely = bench_table.Bar("x", 1.5, bench_table.Spread(1.6, 1.4, 2.0))
    assert bench_table._verdict(barely) == "met by the median, not every time"


def test_a_scaled_down_table_says_so_and_judges_nothing() -> None:
    text = "\n".join(bench_table.section(report(full=False), []))
    assert "these numbers compare nothing" in text
    assert "### Bars" not in text
    assert "missed" not in text


def test_stopwatch_counts_inner_time_once() -> None:
    """Trap: sync happens inside the rollout; counted in both, the parts are more than the step."""
    now = [0.0]
    watch = Stopwatch(wait=lambda: None, clock=lambda: now[0])
    with watch.part("rollout"):
        now[0] += 99.0  # before the step
    watch.start()
    now[0] += 1.0
    with watch.part("rollout"):
        now[0] += 2.0
        with watch.part("sync"):
            now[0] += 4.0
        now[0] += 8.0
    now[0] += 16.0
    assert watch.stop() == {"rest": 17.0, "rollout": 10.0, "sync": 4.0}


def test_ending_ids_hold_the_share_asked_for() -> None:
    tokens = [1] * 10 + [2] * 20 + [3] * 30 + [4] * 40
    for share in (0.05, 0.25, 0.6):
        assert sum(t in bench_rollouts.ending_ids(tokens, share) for t in tokens) >= share * len(tokens)
    assert len(bench_rollouts.ending_ids(tokens, 0.05)) == 1  # no more ids than the share needs
    assert bench_rollouts.ending_ids(tokens, 1.0) == [1, 2, 3, 4]


# --- a bounded time


def test_a_budget_is_shared_out_and_runs_down() -> None:
    now = [100.0]
    budget = bench_rollouts.Budget(60.0, lambda: now[0])
    part = budget.part(0.5)
    now[0] += 20.0
    assert (part.left(), budget.left()) == (10.0, 40.0)
    now[0] += 50.0
    assert budget.left() == -10.0
    assert budget.part(0.5).left() == 0.0
    assert bench_rollouts.Budget(None).part(0.1).left() == float("inf")


def test_the_slowest_stay_out_first_and_nobody_plays_alone() -> None:
    last = {ENGINE: 4.0, BATCH: 2.0, HF: 13.0, PAGED: 3.0}
    names = list(last)
    assert bench_rollouts._affordable(names, last, 22.0) == names
    assert bench_rollouts._affordable(names, last, 21.0) == [ENGINE, BATCH, PAGED]
    assert bench_rollouts._affordable(names, last, 8.0) == [ENGINE, BATCH]
    assert bench_rollouts._affordable(names, last, 5.9) == []


def bounded(
    sides: tuple[Any, Any], base: models.Base, folder: Path, share: bench_rollouts.Budget, whole: bench_rollouts.Budget
) -> bench_table.Contest | None:
    policy, model = sides
    given = bench_rollouts.Setting(torch.device("cpu"), "float32", True, 3, folder, lambda text: None)
    work = bench_table.Work("2 × 2", 2, 2, 12, 4)
    sizes = bench_models.sizes_of(policy)
    absent = {PAGED: "not asked"}
    never = policy.config.vocab_size
    batch = contestants.batch_here(model)
    return bench_rollouts.contest(
        work, subject(base), given, policy, Engine(model, []), batch, never, sizes, MACHINE, absent, share, whole
    )


def test_a_contest_ends_in_time_with_what_it_has(
    sides: tuple[Any, Any], tiny_base: models.Base, tmp_path: Path
) -> None:
    """Trap: a repetition that was cut short counts for one contestant and not for the others."""
    always, none = bench_rollouts.Budget(None), bench_rollouts.Budget(0.0)
    assert bounded(sides, tiny_base, tmp_path, always, none) is None
    one = bounded(sides, tiny_base, tmp_path, none, always)
    assert {name: len(times) for name, times in one.seconds.items()} == {ENGINE: 1, BATCH: 1, HF: 1}
    assert len(one.tokens) == len(one.floors) == 1
    # a clock that moves when it is looked at: three looks for the warm-up, three for a repetition, one more
    ticks = iter(range(100))
    cut = bounded(sides, tiny_base, tmp_path, always, bench_rollouts.Budget(8.5, lambda: float(next(ticks))))
    assert {len(times) for times in cut.seconds.values()} == {1}


def test_a_file_keeps_what_other_commands_measured(tmp_path: Path) -> None:
    path = tmp_path / "bench-cpu"
    bench_file.write(path, report(), ["rollouts"], {"command": "first"})
    bench_file.write(path, report(shape="tiny"), ["rollouts"], {"command": "second"})
    bench_file.write(path, report(notes=["not run: sync"]), ["sync"], {"command": "third"})
    bench_file.write(path, report(), ["rollouts"], {"command": "fourth"})
    text = path.with_suffix(".md").read_text()
    told = [line for line in text.splitlines() if line.startswith(("- command", "- **not run", "# "))]
    assert told == [
        *("# Bench on cpu", "- command: second", "- command: fourth", "- command: third", "- **not run: sync**"),
    ]
    sections = json.loads(path.with_suffix(".json").read_text())["sections"]
    assert [section["shape"] for section in sections] == ["tiny", "smollm2", "smollm2"]


def test_a_failed_part_leaves_the_others(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("out of memory\nin /some/where/file.cc")

    kept: list[int] = []
    monkeypatch.setattr(bench, "sync_times", broken)
    found = bench.bench(
        subject(tiny_base),
        setting(tmp_path),
        ["sync", "step"],
        bench_rollouts.Budget(0.1),
        lambda report: kept.append(len(report.notes)),
    )
    assert found.notes[-1].startswith("not run: step")  # the budget was spent on loading
    again = bench.bench(
        subject(tiny_base), setting(tmp_path), ["sync"], bench_rollouts.Budget(None), lambda report: None
    )
    assert again.notes == ["failed: sync, RuntimeError: out of memory"]
    assert kept[0] == 0  # written before the first part


# --- equal work


@pytest.fixture(scope="module")
def sides(tiny_base: models.Base) -> tuple[Any, Any]:
    """The tiny model in torch and in MLX."""
    return models.load_policy(tiny_base, torch.float32, "cpu"), load.load_sampler(tiny_base.path)


def test_every_contestant_gives_the_forced_lengths(sides: tuple[Any, Any]) -> None:
    """Trap: a vocabulary of 17 samples its EOS every few tokens, which would shorten one contestant's work."""
    policy, model = sides
    prompts = [[2, 3, 4, 5]] * 3 + [[6, 7, 8, 9]] * 3
    never = policy.config.vocab_size
    full = contestants.engine(Engine(model, []), prompts, 40, ending=[never], seed=1)
    assert [len(c.tokens) for c in full] == [40] * 6
    assert any(policy.generation_config.eos_token_id in c.tokens for c in full)
    tail = contestants.engine(Engine(model, []), prompts, 40, ending=[3, 5], seed=1)
    limits = [len(c.tokens) for c in tail]
    assert len(set(limits)) > 1
    assert all(len(c.tokens) == 40 or c.tokens[-1] in (3, 5) for c in tail)
    kept = policy.generation_config
    assert [len(t) for t in contestants.hf_generate(policy, prompts, limits, seed=1)] == limits
    assert policy.generation_config is kept
    batch = contestants.batch_generator(model, prompts, limits, seed=1)
    assert [len(c.tokens) for c in batch] == limits
    again = contestants.engine(Engine(model, []), prompts, 40, ending=[3, 5], seed=1)
    assert [c.tokens for c in again] == [c.tokens for c in tail]
    with pytest.raises(ValueError, match="one length only"):
        contestants.hf_generate(policy, [[2], [2, 3]], [1, 1])


def subject(base: models.Base) -> bench_models.Subject:
    tokenizer = models.load_tokenizer(base)
    texts = bench_models.prompt_texts(tokenizer, 16, 12)
    return bench_models.Subject("tiny", base, tokenizer, texts, tokenizer(texts)["input_ids"])


def setting(folder: Path) -> bench_rollouts.Setting:
    return bench_rollouts.Setting(torch.device("cpu"), "float32", True, 1, folder, lambda text: None)


def test_contestants_agree_before_timing(sides: tuple[Any, Any], tiny_base: models.Base, tmp_path: Path) -> None:
    policy, model = sides
    given = (subject(tiny_base), setting(tmp_path), policy, policy, Engine(model, []), contestants.batch_here(model))
    found, absent = bench_rollouts.agree(*given, policy.config.vocab_size)
    assert [a.contestant for a in found] == [ENGINE, BATCH, HF, PAGED]
    assert absent == {}
    assert all(a.regret < 1e-5 and a.tokens == 8 * 16 for a in found)
    assert all(a.dlogp < 1e-5 for a in found[:2])
    assert found[2].dlogp is found[3].dlogp is None


def test_a_contestant_with_other_weights_is_not_timed(
    sides: tuple[Any, Any], tiny_base: models.Base, tmp_path: Path
) -> None:
    policy, _ = sides
    other = load.load_sampler(tiny_base.path)
    other.model.layers[0].mlp.up_proj.weight = other.model.layers[0].mlp.up_proj.weight * 30.0
    given = (subject(tiny_base), setting(tmp_path), policy, policy, Engine(other, []), contestants.batch_here(other))
    with pytest.raises(RunFailed, match=f"{ENGINE} is not the same policy"):
        bench_rollouts.agree(*given, policy.config.vocab_size)


def test_judge_sees_a_token_that_is_not_the_best(sides: tuple[Any, Any]) -> None:
    policy, model = sides
    prompts = [[2, 3, 4, 5]]
    tokens = contestants.engine(Engine(model, []), prompts, 4, ending=[99], temperature=0.0)[0].tokens
    with torch.no_grad():
        logprobs = policy(torch.tensor([prompts[0] + tokens])).logits[0, 3:-1].log_softmax(-1)
    second = int(logprobs[3].topk(2).indices[1])
    found = bench_rollouts.judge("x", policy, prompts, [[*tokens[:3], second]], [[0.0] * 4])
    assert found.equal == 0.75
    assert found.regret == pytest.approx((logprobs[3].max() - logprobs[3, second]).item() / 4, rel=1e-4)
    chosen = [*logprobs[range(3), tokens[:3]].tolist(), logprobs[3, second].item()]
    assert found.dlogp == pytest.approx(-sum(chosen) / 4, rel=1e-4)


def test_sizes_are_the_models(sides: tuple[Any, Any]) -> None:
    """Width 32, 2 layers of 4 heads, feed-forward 64, 17 tokens: 2 (4·32² + 3·32·64), 17·32, 2·2·32 floats a token."""
    policy, model = sides
    vocabulary = policy.config.vocab_size
    assert bench_models.sizes_of(policy) == bench_table.Sizes(20480, vocabulary * 32, 2 * 2 * 32 * 4, 4)
    one = contestants.launches(model, 2)
    assert 2 * 7 + 1 < one < 400  # at least the seven products of each layer and the head
    assert contestants.launches(model, 16) == one
    assert 0 < contestants.launch_seconds() < 1e-2


def test_random_base_has_the_sizes_and_the_tokenizer(smollm2: models.Base, tmp_path: Path) -> None:
    sizes = {"hidden": 16, "intermediate": 24, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8}
    base = bench_models.random_base(smollm2, tmp_path / "random", {**sizes, "rope_theta": 1e5})
    tokenizer = models.load_tokenizer(base)
    texts = bench_models.prompt_texts(tokenizer, 3, 20)
    ids = tokenizer(texts)["input_ids"]
    assert [len(row) for row in ids] == [20] * 3
    assert ids == models.load_tokenizer(smollm2)(texts)["input_ids"]
    policy = models.load_policy(base, torch.float32, "cpu")
    assert sum(p.numel() for p in policy.parameters()) == 49152 * 16 + 16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24 + 3 * 16
    assert torch.isfinite(policy(torch.tensor(ids)).logits).all()


# --- the command


def test_a_quick_run_measures_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command on the tiny model; forced lengths, agreement and shares hold in what it wrote."""
    import trl.trainer.utils

    stock = trl.trainer.utils._use_triton
    assert bench.main(quick=True, repeats=1, dtype="float32", root=tmp_path) == 0
    assert trl.trainer.utils._use_triton is stock  # ours would stay in force for what else this process trains
    table, values = sorted((tmp_path / "build").iterdir(), reverse=True)  # and nothing else is left there
    written = json.loads(values.read_text())
    assert table.name == f"bench-{written['sections'][0]['report']['device']}.md"
    assert table.read_text() in capsys.readouterr().out
    (section,) = written["sections"]
    assert section["about"]["command"] == "`nox -s bench -- --shape tiny --quick --repeats 1 --dtype float32`"
    assert section["bars"] == []
    report = section["report"]
    assert report["notes"] == []
    contests = {contest["work"]["name"]: contest for contest in report["contests"]}
    assert contests["8 × 8"]["tokens"] == [64 * 16]
    assert contests["1 × 16"]["tokens"] == contests["16 × 1"]["tokens"] == [16 * 16]
    assert 64 <= contests["8 × 8, long tail"]["tokens"][0] < 64 * 16 * 0.7
    for contest in contests.values():
        assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in contest["seconds"].values())
        assert contest["floors"][0]["forwards_s"] < contest["seconds"][ENGINE][0]
    full, lora = report["syncs"]
    assert full["bytes"] == 4 * report["parameters"]
    assert lora["bytes"] == 4 * 4 * 16 * (4 * 256 + 3 * 512)  # 4 layers, rank 16, A and B of the seven products
    for steps in report["steps"]:
        (ours,), (theirs,) = steps["seconds"][OURS], steps["seconds"][STOCK]
        assert ours["sync"] > 0
        assert "sync" not in theirs
        assert {"rollout", "reward", "logprobs and loss", "backward", "rest"} <= ours.keys() & theirs.keys()


@pytest.mark.parametrize("arguments", [["--shape", "huge"], ["--repeats", "0"], ["--dtype", "int8"], ["--part", "x"]])
def test_what_cannot_be_benched_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", *arguments])
    assert caught.value.code == 2
    assert arguments[1] in capsys.readouterr().err
