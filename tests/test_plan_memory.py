"""rl/plan: what a config asks for, its peaks against measured ones, and how these are measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_helper import TINY, config_file

from rl import config as configs
from rl.plan import architecture, machine, memory, table, workload
from rl.plan.cases import LARGE, Case

ROOT = Path(__file__).resolve().parent.parent
TARGETS = configs.Lora().targets


# --- workload


def test_rows_and_rollouts_are_those_trl_computes(tmp_path: Path) -> None:
    """Trap: completions of one rollout, not of one micro-batch, are what decodes at once."""
    more = ["trainer.gradient_accumulation_steps=8", "trainer.steps_per_generation=4", "trainer.num_iterations=2"]
    work = workload.of(configs.load(config_file(tmp_path, rows=4), more))
    assert (work.rows, work.rollout_rows, work.decoded, work.distinct) == (4, 16, 16, 8)
    assert work.rollouts_per_step == 8 / (4 * 2)
    assert work.old_logps
    one = workload.of(configs.load(config_file(tmp_path, rows=4)))
    assert not one.old_logps  # on-policy, in one piece: the loss forward serves for the old logprobs


def test_lengths_of_the_tiny_problems(tmp_path: Path) -> None:
    work = workload.of(configs.load(config_file(tmp_path)))
    assert (work.prompt, work.prefix, work.length) == (len("50+9="), 0, 5 + 64)


def test_preferences_double_the_rows_and_hold_a_reference(tmp_path: Path) -> None:
    rows = [{"prompt": "1" * 30, "chosen": "22", "rejected": "3"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "held.jsonl").write_text(json.dumps({"prompt": "12", "answer": "3"}))
    text = TINY.format(rows=4).replace('"grpo"', '"dpo"').replace("num_generations = 4", "")
    text = text.replace("steps_per_generation = 1", "").replace('source = "arithmetic"', 'source = "jsonl"')
    text = text.replace('form = "char"', 'path = "rows.jsonl"\nheldout_path = "held.jsonl"')
    (tmp_path / "d.toml").write_text(text)
    work = workload.of(configs.load(tmp_path / "d.toml"))
    assert (work.rows, work.reference, work.rollout_rows) == (8, True, 0)
    assert work.length == 30 + 3 + 1
    adapted = workload.of(configs.load(tmp_path / "d.toml", ["model.lora.rank=4"]))
    assert not adapted.reference  # TRL keeps the start as a second adapter
    assert adapted.reference_forward


# --- memory


def test_what_is_held_all_the_time_is_counted_exactly(tmp_path: Path) -> None:
    config = configs.load(config_file(tmp_path))
    shape, work = architecture.find(config, tmp_path), workload.of(config)
    parts = memory.predict(shape, work, "cpu").trainer
    assert parts["trainer weights"] == 4 * shape.parameters
    assert parts["optimizer states"] == 8 * shape.parameters
    lora = workload.of(configs.load(config_file(tmp_path), ["model.lora.rank=8"]))
    parts = memory.predict(shape, lora, "cpu").trainer
    assert parts["adapter"] == 4 * shape.adapter(8, TARGETS, None)


def test_a_quantized_sampler_holds_codes_scales_and_biases() -> None:
    """4 bits in groups of 64 with float32 scale and bias: 0.5 + 8 / 64 bytes a weight."""
    shape = architecture.known("Qwen/Qwen3-8B")
    assert memory.codes_bytes(shape, 4, 64) / (shape.parameters - shape.small) == pytest.approx(0.625)


def test_checkpointing_keeps_the_residual_stream_alone() -> None:
    shape = architecture.known("HuggingFaceTB/SmolLM2-135M-Instruct")
    work = replace(table.standard("full", 8), micro_steps=1)
    kept = memory._activations(shape, work, "cpu")
    tokens = 8 * work.length
    assert kept == pytest.approx(tokens * shape.hidden * 4 * shape.layers, rel=0.2)
    assert memory._activations(shape, replace(work, checkpointing=False), "cpu") > 10 * kept


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(architecture.KNOWN)),
    st.sampled_from(["full", "LoRA", "4-bit LoRA"]),
    st.sampled_from(["mps", "cuda", "cpu"]),
    st.sampled_from([1, 2, 4, 8, 16, 32]),
    st.integers(1, 400),
)
def test_more_rows_or_tokens_never_need_less(name: str, method: str, device: str, rows: int, more: int) -> None:
    shape, work = architecture.known(name), table.standard(method, rows)
    before = memory.predict(shape, work, device)
    longer = replace(work, completion=work.completion + more, length=work.length + more)
    assert all(size >= 0 for size in (*before.trainer.values(), *before.sampler.values()))
    assert memory.predict(shape, longer, device).total >= before.total
    assert memory.predict(shape, replace(work, rows=2 * rows), device).torch >= before.torch
    assert memory.predict(shape, replace(work, decoded=2 * work.decoded), device).mlx >= before.mlx
    # the whole model's gradients and states are never less than an adapter's
    assert memory.predict(shape, replace(work, lora_rank=0), device).torch >= before.torch * 0.9


def test_predictions_hold_against_the_committed_measurements() -> None:
    found = table.checks(ROOT / table.RECORDS)
    assert len(found) >= 12
    assert {c.method.removeprefix("8-bit ").removeprefix("4-bit ") for c in found} == {"full", "LoRA"}
    assert any("bit" in c.method for c in found)
    assert min(c.parameters for c in found) < 2e6
    wrong = {f"{c.device} {c.name}": round(c.ratio, 3) for c in found if not 1.0 <= c.ratio <= 1.3}
    assert not wrong


def test_memory_page_follows_from_code_and_records() -> None:
    assert (ROOT / table.PAGE).read_text(encoding="utf-8") == table.page(ROOT / table.RECORDS)


def test_numbers_taken_from_elsewhere_are_still_those(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are written down again so that a plan needs no torch and no mlx."""
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    from rl import measure
    from rl.rollouts import cache, device, forward, sync

    assert workload.HELDOUT_CHUNK == measure.CHUNK
    assert memory.TILE_TOKENS == chunked_logprob.TOKEN_CHUNK_SIZE
    assert memory.TILE_VOCABULARY == utils._CHUNKED_LOGPROB_CHUNK_SIZE
    assert (memory.SYNC_PART, memory.PREFILL_TOKENS) == (sync.PART_BYTES, forward.PREFILL_TOKENS)
    monkeypatch.setattr(device, "backend", lambda: "cuda")
    assert device.steps_between_syncs() > memory.UNDER_WAY
    assert (memory.RING_STEP, machine.MLX_CACHE) == (cache.RING_STEP, device.CACHE_BYTES)


@pytest.mark.parametrize(("hold", "codes"), [(None, False), ("values", False), ("packed", True)])
def test_the_trainer_s_base_is_held_as_the_plan_says(tmp_path: Path, hold: str | None, codes: bool) -> None:
    """Whether a quantized base is dequantized for torch decides what an 8B model needs."""
    import torch

    from rl import device, start
    from rl.packed import PackedLinear

    more = ["model.tiny.hidden=64", "model.tiny.layers=1", "model.lora.rank=2", "model.quantization.bits=4"]
    config = configs.load(config_file(tmp_path), more + ([f"model.quantization.hold={hold}"] if hold else []))
    policy = start.load_policy(config, start.find(config, tmp_path, None), torch.device("cpu"))
    assert any(isinstance(module, PackedLinear) for module in policy.modules()) == codes
    work = workload.of(config)
    for kind in ("cpu", "cuda", "mps"):
        assert (
            memory.holds_codes(work, kind)
            == device.holds_codes(config, kind)
            == (codes or (not hold and kind != "cpu"))
        )
    big, values = architecture.known("Qwen/Qwen3-8B"), replace(work, hold="values")
    saved = memory.predict(big, values, "mps").torch - memory.predict(big, work, "mps").torch
    assert saved == 0 if hold == "values" else saved > 20e9


def test_prompts_read_once_are_counted_once(tmp_path: Path) -> None:
    """8 prompts of 100 tokens, 4 completions of 10 each: a prompt's last token is read with each of its completions,
    and a completion's last is read by nobody, so 8 x 99 + 32 x 10 tokens in place of 32 x 110."""
    shape = architecture.known("HuggingFaceTB/SmolLM2-135M-Instruct")
    work = replace(
        workload.of(configs.load(config_file(tmp_path))),
        **{"rows": 32, "rollout_rows": 32, "prompts": 8, "prompt": 100, "prefix": 0, "completion": 10, "length": 110},
    )
    assert memory._tokens(shape, work, "cpu") == 8 * 99 + 320
    assert memory._tokens(shape, replace(work, prefix=90), "cpu") == 90 + 8 * 9 + 320
    for whole in (replace(work, prompts=0), replace(work, checkpointing=True), replace(work, algorithm="ppo")):
        assert memory._tokens(shape, whole, "cpu") == 3520  # PPO's trainer has a forward of its own


def test_the_plan_takes_the_way_that_the_learner_takes() -> None:
    """Trap: where narrow models on a GPU read whole rows, a plan of prompts read once was a third below an H100's peak.
    The learner is asked with a batch of these sizes, the planner with the sizes."""
    import torch
    from transformers import AutoConfig

    from rl.algorithms import learner

    ids = torch.randint(5, 900, (32, 288), generator=torch.Generator().manual_seed(0))
    ids[1::2, :32] = ids[::2, :32]
    for name, wholes in (("SmolLM2-135M", (False, True)), ("SmolLM2-1.7B", (False, False))):
        told = architecture.config_json(f"HuggingFaceTB/{name}-Instruct")
        shape = architecture.from_config(told, name)
        config = AutoConfig.for_model(told.pop("model_type"), **told)
        work = replace(table.standard("LoRA", 8), checkpointing=False, rows=32, prompts=16)
        work = replace(work, prompt=32, completion=256, length=288)
        for device, whole in zip(("cpu", "cuda"), wholes, strict=True):
            cost = learner.piece_tokens(torch.device(device), config)
            assert (learner.share(ids, torch.ones_like(ids), 256, cost=cost) is None) == whole
            tokens = 32 * 288 if whole else 16 * 31 + 32 * 256
            assert memory._tokens(shape, work, device) == tokens


def test_shorter_prompts_that_are_read_whole_may_hold_more() -> None:
    """Where the longest prompts are read once, the longest that are not are planned for too."""
    shape = architecture.known("HuggingFaceTB/SmolLM2-135M-Instruct")
    work = replace(table.standard("LoRA", 8), checkpointing=False, rows=32, prompts=4, prompt=256)
    cost = round(2e9 / (shape.matrix // shape.layers))
    longest, shorter = memory._batches(shape, work, "cuda")
    assert (longest, shorter.length) == (work, shorter.prompt + 256)
    p = shorter.prompt
    assert 32 * p <= 4 * (p - 1) + cost  # whole rows are the fewest tokens, and no longer with one token more
    assert 32 * (p + 1) > 4 * p + cost


# --- measuring


def test_live_bytes_by_hand() -> None:
    """Three tensors of 4,000 bytes, one of them freed before the last is made; a view is no new storage."""
    import torch

    from rl.plan.measure import Tracker

    tracker = Tracker()
    with tracker:
        a = torch.zeros(1000)
        b = a + 1
        assert tracker.live.now == 8000
        del a
        assert tracker.live.now == 4000
        c = b.view(10, 100)
        assert tracker.live.now == 4000
        d = c.t().contiguous()
        assert (tracker.live.now, tracker.live.peak) == (8000, 8000)
        del b, c, d
    assert (tracker.live.now, tracker.live.peak) == (0, 8000)


def test_what_autograd_saves_is_live() -> None:
    import torch

    from rl.plan.measure import Tracker

    x = torch.zeros(1000, requires_grad=True)
    tracker = Tracker()
    with tracker:
        y = (x.exp() * 2).sum()  # exp keeps its result
        assert tracker.live.now == 4000 + 4000 + 4
        y.backward()
    assert tracker.live.now == 4000 + 4000 + 4  # the weight, its gradient and the loss


def test_cases_are_recorded_as_they_end_and_none_begins_that_would_end_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real run of two steps on random weights of a known model's sizes; the second case waits for another day."""
    from types import SimpleNamespace

    from rl import measure as heldout
    from rl.plan import measure

    small = ("qwen3", 64, 96, 2, 4, 2, 16, 150, True, 512)
    monkeypatch.setitem(architecture.KNOWN, "any/small", small)
    given = {"model": "any/small", "method": "lora", "rows": 4, "prompt": 12, "completion": 6}
    monkeypatch.setattr(measure, "SMALL", (Case(name="first", **given), Case(name="second", **given)))
    monkeypatch.setattr(measure.torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    asked, real = [], heldout.measure
    monkeypatch.setattr(heldout, "measure", lambda *args: asked.append(args[4]) or real(*args))
    ticks = iter([0.0, 0.0, 30.0, 30.0, 30.0])  # the first case takes 30 s, and so might the second
    monkeypatch.setattr(measure, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    assert measure.main([], Path("out"), budget=50) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cpu-first.json"]
    assert asked == [1, 1]  # before and after: no answer longer than it must be, the peak is a step's
    assert "not begun within 50 s: second" in capsys.readouterr().out
    (checked,) = table.checks(tmp_path / "out")
    assert min(checked.measured) > 0
    assert checked.parameters == architecture.known("any/small").parameters
    assert json.loads((tmp_path / "out" / "cpu-first.json").read_text())["longest_completion"] == 6


def test_a_case_that_takes_too_long_is_given_up_on_and_the_next_one_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap: one that hangs takes the time of all others; what was recorded before it stays."""
    import signal
    import time

    from rl.errors import RunFailed
    from rl.plan import measure

    def slow(case: Case, *_: object) -> dict:
        if case.name == "1m-lora-grpo":
            time.sleep(60)
        return {"peaks": {}}

    monkeypatch.setattr(measure, "LONGEST", 0.2)
    monkeypatch.setattr(measure, "measure", slow)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunFailed, match=r"not measured: 1m-lora-grpo \(TimeoutError: took more than 0.2 s\)"):
        measure.main(["1m-full-grpo", "1m-lora-grpo", "1m-full-sft"], Path("out"))
    assert sorted(path.name.partition("-")[2] for path in (tmp_path / "out").iterdir()) == [
        "1m-full-grpo.json",
        "1m-full-sft.json",
    ]
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_scores_on_a_gpu_are_those_of_the_pieces_without_a_mask() -> None:
    """Trap: prompts read once see only themselves, and the completions behind them have a mask and a fused kernel: all
    scores of all rows would make 135M with 512 tokens a third larger than it is."""
    shape = architecture.known("HuggingFaceTB/SmolLM2-1.7B-Instruct")  # wide: a piece of its own is worth its launches
    work = table.standard("LoRA", 8)
    work = replace(work, checkpointing=False, rows=32, prompts=16, prompt=256, prefix=0, completion=256, length=512)
    assert memory._scores(shape, work, "mps") == 32 * 512**2
    assert memory._scores(shape, work, "cuda") == 16 * 256**2
    assert memory._scores(shape, replace(work, prefix=100), "cuda") == 100**2  # what all prompts share goes first, once
    assert memory._scores(shape, replace(work, prompts=0), "cuda") == 32 * 512**2
    assert memory._scores(shape, replace(work, checkpointing=True), "cuda") == 32 * 512**2
    narrow = architecture.known("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert memory._scores(narrow, work, "cuda") == 16 * 256**2
    short = replace(work, prompt=32, length=288)
    assert memory._scores(narrow, short, "cuda") == 32 * 288**2
    # each layer's own copy of a mask is held beside them: the completions' over all they see
    assert memory._masks(shape, work, "cuda") == 32 * 256 * 512


def test_a_gpu_measures_first_what_nothing_else_can() -> None:
    assert [case.method for case in LARGE[:3]] == ["q4"] * 3
