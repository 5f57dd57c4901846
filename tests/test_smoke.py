"""`nox -s mps_smoke`: it fails where something is wrong, and says nothing of MPS where there is none."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rl import __main__ as cli
from rl.errors import RunFailed
from rl.smoke import checks as smoke_checks
from rl.smoke import command as smoke
from rl.smoke import page as smoke_page
from rl.smoke import steps as smoke_steps
from rl.smoke.checks import Bench, Found

CPU = torch.device("cpu")
ABSENT = "MPS is absent here: nothing in this test says anything about MPS"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(CPU, tmp_path, 0)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a GPU, whatever this one has."""
    monkeypatch.setattr(smoke.devices, "pick", lambda name: CPU)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The report of a smoke test started from the command line, which must not go into this checkout's build/."""
    monkeypatch.setattr(smoke.main, "__defaults__", (tmp_path,))
    return tmp_path / "build" / "smoke.md"


def given(monkeypatch: pytest.MonkeyPatch, **checks: Callable[[Bench], Found]) -> None:
    monkeypatch.setattr(smoke_checks, "checks", lambda device: list(checks.items()))


def good(bench: Bench) -> Found:
    return Found("1.0e-07", "< 1e-05", True)


def bad(bench: Bench) -> Found:
    return Found("|Δlogp| 2.0e-01", "< 1e-05", False)


def broken(bench: Bench) -> Found:
    raise NotImplementedError("no operator [aten::foo]\nfor this device")


def test_a_failed_check_exits_1_with_one_line_and_is_in_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], on_cpu: None, written: Path
) -> None:
    given(monkeypatch, fine=good, wrong=bad, missing=broken)
    assert cli.main(["smoke"]) == 1
    told = capsys.readouterr()
    assert told.err == f"failed: 2 of 3 checks on cpu: wrong; missing. {ABSENT}\n"
    assert "no operator [aten::foo] for this device" in told.out  # an error's brackets are no markup
    report = written.read_text()
    assert re.search(r"^\| fine \| 1\.0e-07 \| < 1e-05 \| \d\.\d\d \| ok \|$", report, re.MULTILINE)
    # a bare | would end the cell
    assert re.search(r"^\| wrong \| \\\|Δlogp\\\| 2\.0e-01 \| < 1e-05 \| \d\.\d\d \| failed \|$", report, re.MULTILINE)
    assert "| NotImplementedError: no operator [aten::foo] for this device | no error |" in report
    assert "\n1 of 3 checks passed in " in report


def test_without_mps_the_first_and_the_last_line_say_so_and_no_line_claims_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], on_cpu: None, written: Path
) -> None:
    given(monkeypatch, fine=good)
    assert cli.main(["smoke"]) == 0
    told = capsys.readouterr()
    lines = told.out.strip().splitlines()
    assert lines[0].startswith("smoke test on cpu: ")
    assert lines[0].endswith(ABSENT)
    assert lines[-1].startswith("1 of 1 checks passed in ")
    assert " on cpu: " in lines[-1]
    assert lines[-1].endswith(ABSENT)
    assert told.err == ""
    for text in (told.out, written.read_text()):
        # the absence is told, the session's own name may be; nothing else names MPS
        assert "mps" not in text.replace(ABSENT, "").replace("nox -s mps_smoke", "").lower()


def test_the_words_follow_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: with torch's fallback on, operations that MPS lacks run on the CPU and a pass proves little."""
    monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK", raising=False)
    assert smoke.about_mps(torch.device("mps")) == "MPS was used"
    for other in ("cpu", "cuda"):
        assert smoke.about_mps(torch.device(other)) == ABSENT
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    assert "some operations may have run on the CPU" in smoke.about_mps(torch.device("mps"))


def test_a_machine_whose_mlx_does_not_load_is_described_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import rl.rollouts.device

    def absent() -> None:
        raise ImportError("libmlx.so")

    monkeypatch.setattr(rl.rollouts.device, "describe", absent)
    assert smoke.place(CPU).endswith(" (torch) and no MLX (ImportError)")


def test_everything_passes_here_in_under_a_minute(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], on_cpu: None
) -> None:
    smoke_checks.packages(Bench(CPU, tmp_path, 0))  # a cold import takes longer than all checks
    started = time.perf_counter()
    assert smoke.main(tmp_path) == 0
    assert time.perf_counter() - started < 60
    report = (tmp_path / "build" / "smoke.md").read_text()
    rows = [line.split(" | ") for line in report.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 29
    assert {row[-1] for row in rows} == {"ok |"}
    assert sum("float32" in row[0] for row in rows) == 4
    for algorithm in ("SFT", "DPO", "GRPO"):
        for kind in ("all weights", "LoRA"):
            (row,) = [row for row in rows if row[0] == f"| a step of {algorithm}, {kind}"]
            assert float(re.findall(r"max (\S+),", row[1])[0]) < smoke_checks.DLOGP
    for named in ("torch 2.", "mlx 0.", "trl 1.", "Python 3.", "- commit: ", "- machine: "):
        assert named in report
    assert capsys.readouterr().out.count("ok") >= 26
    assert not list(tmp_path.glob("build/*.tmp"))


def test_a_product_in_a_lower_precision_fails(monkeypatch: pytest.MonkeyPatch, bench: Bench) -> None:
    """As TF32 would: 10 bits of mantissa where 23 were asked for."""
    real = torch.nn.functional.linear
    assert smoke_checks.matmul(bench, "float32").ok
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, w: real(x.half().float(), w.half().float()).to(x.dtype)
    )
    assert not smoke_checks.matmul(bench, "float32").ok
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w: real(x, w) * float("nan"))
    assert not smoke_checks.matmul(bench, "bfloat16").ok


@pytest.mark.parametrize("dtype", smoke_checks.DTYPES)
def test_a_mask_that_loses_its_padding_fails(monkeypatch: pytest.MonkeyPatch, bench: Bench, dtype: str) -> None:
    real = torch.nn.functional.scaled_dot_product_attention
    assert smoke_checks.attention(bench, dtype).ok
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, attn_mask: real(q, k, v, is_causal=True),
    )
    assert not smoke_checks.attention(bench, dtype).ok


@pytest.mark.parametrize(
    ("dtype", "other"),
    [("float32", torch.bfloat16), ("float16", torch.bfloat16), ("bfloat16", torch.float16)],
)
def test_a_hand_over_through_another_dtype_changes_bits(
    monkeypatch: pytest.MonkeyPatch, bench: Bench, dtype: str, other: torch.dtype
) -> None:
    from rl.rollouts import checks

    real = checks.to_mlx
    assert smoke_checks.handover(bench, dtype).ok
    monkeypatch.setattr(checks, "to_mlx", lambda tensor: real(tensor.to(other).to(tensor.dtype)))
    assert not smoke_checks.handover(bench, dtype).ok
    monkeypatch.setattr(checks, "to_mlx", lambda tensor: real(tensor.to(other)))
    found = smoke_checks.handover(bench, dtype)
    sent = re.findall(r"[\d,]+", found.value)
    assert sent[0].replace(",", "") == sent[1].replace(",", "")  # another dtype is all wrong
    flush = torch.finfo(getattr(torch, dtype)).tiny
    monkeypatch.setattr(checks, "to_mlx", lambda t: real(torch.where(t.abs() < flush, torch.zeros_like(t), t)))
    assert not smoke_checks.handover(bench, dtype).ok


def test_a_weight_that_differs_on_the_device_fails_the_gradient(monkeypatch: pytest.MonkeyPatch, bench: Bench) -> None:
    from rl import models

    assert smoke_checks.gradient(bench).ok
    real = models.load_policy

    def changed(base: Any, dtype: Any, device: Any) -> Any:
        model = real(base, dtype, device)
        if dtype == "float32":
            with torch.no_grad():
                model.model.layers[0].self_attn.q_proj.weight[0, 0] += 0.1
        return model

    monkeypatch.setattr(models, "load_policy", changed)
    assert not smoke_checks.gradient(bench).ok


def test_a_sampler_that_stops_following_fails_the_step(monkeypatch: pytest.MonkeyPatch, bench: Bench) -> None:
    from rl.rollouts.sampler import MLXSampler

    real, calls = MLXSampler.sync, []

    def once(self: MLXSampler, policy: Any) -> Any:
        calls.append(None)
        return real(self, policy) if len(calls) == 1 else None

    monkeypatch.setattr(MLXSampler, "sync", once)
    found = smoke_checks.train(bench, "sft", lora=False)
    assert not found.ok
    assert float(re.findall(r"max (\S+),", found.value)[0]) > 1e-3


@pytest.mark.parametrize(("algorithm", "lora"), [("sft", False), ("dpo", False), ("reward", True), ("grpo", True)])
def test_a_step_whose_gradient_is_not_finite_fails_and_names_where(
    monkeypatch: pytest.MonkeyPatch, bench: Bench, algorithm: Any, lora: bool
) -> None:
    real = smoke_steps.make_job

    def poisoned(*arguments: Any) -> Any:
        job = real(*arguments)
        module = next(m for n, m in job.model.named_modules() if n.endswith("layers.1.mlp.down_proj"))
        module.register_full_backward_hook(
            lambda m, into, out: tuple(None if g is None else g * torch.nan for g in into)
        )
        return job

    monkeypatch.setattr(smoke_steps, "make_job", poisoned)
    found = smoke_checks.train(bench, algorithm, lora)
    assert not found.ok
    assert "0 of " in found.value
    assert re.search(r", step 1: gradient .*layers\.1\.mlp\.", found.value)


def test_a_sampler_that_is_another_policy_is_a_failed_row_with_the_layer(
    monkeypatch: pytest.MonkeyPatch, bench: Bench
) -> None:
    """The start-up check's own error, without a traceback."""
    real = smoke_steps.both_sides

    def other(*arguments: Any) -> Any:
        both = real(*arguments)
        with torch.no_grad():
            both.policy.model.layers[1].mlp.up_proj.weight += 0.5
        return both

    monkeypatch.setattr(smoke_steps, "both_sides", other)
    with pytest.raises(RunFailed):
        smoke_checks.parity(bench, shared=False)
    (row,) = smoke.run([("parity", lambda bench: smoke_checks.parity(bench, shared=False))], bench)
    assert not row.found.ok
    assert row.found.value.startswith("trainer and sampler are not the same policy: ")
    assert "model.layers.1.mlp" in row.found.value


def test_operations_that_leave_mps_are_counted_each_time(bench: Bench) -> None:
    """Trap: torch warns of the first such operation of a process and is silent of all others."""
    import warnings
    from collections import Counter

    def leaves(bench: Bench) -> Found:
        for operator in ("aten::foo", "aten::foo.out", "aten::foo"):
            text = f"The operator '{operator}' is not currently supported on the MPS backend and will fall back to run"
            warnings.warn(f"{text} on the CPU. This may have performance implications.", stacklevel=1)
        assert torch.is_warn_always_enabled()
        return good(bench)

    fallen: Counter[str] = Counter()
    assert all(row.found.ok for row in smoke.run([("a", leaves), ("b", good)], bench, fallen=fallen))
    assert fallen == {"aten::foo": 2, "aten::foo.out": 1}
    assert smoke.fallbacks(fallen) == Found("3: aten::foo 2, aten::foo.out 1", "0", False)
    assert smoke.fallbacks(Counter()) == Found("0", "0", True)
    assert not torch.is_warn_always_enabled()


def test_on_mps_the_page_goes_to_the_published_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """And only there: a page named after a Mac's chip that another device wrote would be a false claim."""
    monkeypatch.setattr("rl.doctor.chip", lambda: "Apple M4 Max")
    monkeypatch.setattr(smoke.devices, "prepare", lambda device: None)
    monkeypatch.setattr(smoke.devices, "memory_bytes", lambda device: 0)
    given(monkeypatch, fine=good)
    published = tmp_path / "evals" / "published" / "mps-m4-max.md"
    for device in (CPU, torch.device("mps")):
        monkeypatch.setattr(smoke.devices, "pick", lambda name, device=device: device)
        assert smoke.main(tmp_path) == 0
        assert published.exists() == (device.type == "mps")
    told = capsys.readouterr().out.strip().splitlines()
    assert published.read_text() == (tmp_path / "build" / "smoke.md").read_text()
    assert "| operations that fell back to the CPU | 0 | 0 |" in published.read_text()
    assert told[-1].startswith("2 of 2 checks passed in ")
    assert told[-1].endswith("MPS was used")


@pytest.mark.parametrize(
    ("chip", "name"), [("Apple M1", "m1"), ("Apple M3 Ultra", "m3-ultra"), ("a/../b (R)", "a-b-r")]
)
def test_a_chip_gives_a_file_name(monkeypatch: pytest.MonkeyPatch, chip: str, name: str) -> None:
    monkeypatch.setattr("rl.doctor.chip", lambda: chip)
    assert smoke_page.chip_name() == name


def test_a_gradient_that_autocast_spoils_fails(monkeypatch: pytest.MonkeyPatch, bench: Bench) -> None:
    """As an 8-bit float would: 3 bits of mantissa where bfloat16 has 7."""
    real = torch.nn.functional.linear
    assert smoke_checks.gradient(bench, autocast="bfloat16").ok

    def coarse(x: torch.Tensor, w: torch.Tensor, b: Any = None) -> torch.Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return real(x, w, b)
        return real(x.to(torch.float8_e4m3fn).to(x.dtype), w.to(torch.float8_e4m3fn).to(w.dtype), b)

    monkeypatch.setattr(torch.nn.functional, "linear", coarse)
    assert not smoke_checks.gradient(bench, autocast="bfloat16").ok
