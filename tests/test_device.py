"""The device, its precision and the trainer's defaults for it."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl import device
from rl.errors import UserError


@pytest.fixture
def sees(monkeypatch):
    """`sees(mps=…, cuda=…)`: make torch report these devices."""

    def pretend(*, mps: bool = False, cuda: bool = False) -> None:
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)

    return pretend


@pytest.mark.parametrize(
    ("mps", "cuda", "chosen"), [(True, True, "mps"), (True, False, "mps"), (False, True, "cuda"), (False, False, "cpu")]
)
def test_auto_takes_mps_then_cuda_then_cpu(sees, mps, cuda, chosen):
    sees(mps=mps, cuda=cuda)
    assert device.pick("auto") == torch.device(chosen)
    assert device.pick("cpu") == torch.device("cpu")
    assert device.pick(chosen) == torch.device(chosen)


@pytest.mark.parametrize(("asked", "has"), [("mps", {"cuda": True}), ("cuda", {"mps": True})])
def test_an_absent_device_is_refused_with_those_present(sees, asked, has):
    sees(**has)
    with pytest.raises(UserError) as error:
        device.pick(asked)
    text = str(error.value)
    assert f"[run] device = '{asked}'" in text
    assert f"valid here are 'auto', '{next(iter(has))}', 'cpu'" in text
    assert "\n" not in text


def test_dtypes_are_float32_and_the_half_each_device_can_do(monkeypatch):
    assert {device.dtype_for(kind) for kind in ("mps", "cuda", "cpu")} == {torch.float32}
    assert device.half_for("cpu") == torch.bfloat16
    for release, dtype in (("13.6.1", torch.float16), ("14.0", torch.bfloat16), ("26.1", torch.bfloat16)):
        monkeypatch.setattr("platform.mac_ver", lambda release=release: (release, ("", "", ""), "arm64"))
        assert device.half_for("mps") == dtype
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert device.half_for("cuda:0") == dtype


def test_trls_own_bf16_raises_without_a_gpu_and_ours_does_not(tmp_path, monkeypatch):
    """TRL turns bf16 on unless told otherwise, and transformers then refuses a machine without one."""
    from transformers import TrainingArguments

    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(ValueError, match="bf16"):
        TrainingArguments(output_dir=str(tmp_path), bf16=True, report_to="none")
    found = TrainingArguments(output_dir=str(tmp_path), **device.trainer_defaults(torch.device("cpu")))
    assert found.device == torch.device("cpu")
    assert (found.bf16, found.fp16, found.mixed_precision) == (False, False, "no")
    assert found.report_to == []
    assert (found.dataloader_num_workers, found.dataloader_pin_memory) == (0, False)


@pytest.mark.parametrize(
    ("kind", "cpu", "pinned"),
    [("cpu", True, False), ("mps", False, False), ("cuda", False, True), ("cuda:1", False, True)],
)
def test_defaults_per_device(kind, cpu, pinned):
    found = device.trainer_defaults(torch.device(kind))
    assert found == device.trainer_defaults(kind)
    assert (found["use_cpu"], found["dataloader_pin_memory"]) == (cpu, pinned)
    assert (found["bf16"], found["fp16"], found["gradient_checkpointing"]) == (False, False, False)
    assert found.get("pad_to_multiple_of") == (32 if kind == "mps" else None)


def test_defaults_are_arguments_that_trl_still_has_and_still_sets_otherwise():
    """Leans on TRL's `_BaseConfig` (trl/trainer/base_config.py), read without importing trl."""
    folder = Path(importlib.util.find_spec("trl").origin).parent / "trainer"
    known = set()
    for file in (
        folder / "base_config.py",
        Path(importlib.util.find_spec("transformers").origin).parent / "training_args.py",
    ):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and node.name in ("_BaseConfig", "TrainingArguments"):
                known |= {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
    assert set(device.trainer_defaults("cpu")) <= known
    source = (folder / "base_config.py").read_text()
    assert re.search(r"gradient_checkpointing: bool = field\(\s*default=True", source)
    assert "self.bf16 = not (self.fp16) if self.bf16 is None else self.bf16" in source


def test_memory_on_the_cpu_is_a_peak_in_bytes():
    """ru_maxrss counts KiB on Linux and bytes on macOS, and on Linux a child starts with its parent's peak."""
    code = (
        "from rl import device; before = device.memory_bytes(); block = bytearray(b'x') * 200_000_000; del block; "
        "print(device.memory_bytes() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 190e6 < int(done.stdout) < 230e6


def test_memory_elsewhere_is_the_allocators(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 123)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 456)
    assert device.memory_bytes(torch.device("cuda", 0)) == 123
    assert device.memory_bytes("mps") == 456


def test_description_names_the_device_and_its_size(monkeypatch):
    size = device.total_memory_bytes() / 1024**3
    assert re.fullmatch(rf"cpu: \w+, \d+ cores, {size:.1f} GiB", device.describe("cpu"))
    assert 0.5 < size < 1e5

    class Card:
        name, total_memory = "NVIDIA H200", 150 * 1024**3

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card)
    assert device.describe(torch.device("cuda", 0)) == "cuda: NVIDIA H200, 150.0 GiB"


def test_mps_gets_a_cap_and_its_cache_emptied_and_others_nothing(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.mps, "set_per_process_memory_fraction", lambda share: calls.append(share))
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: calls.append("emptied"))
    for kind in ("cpu", "cuda", "mps"):
        device.prepare(torch.device(kind))
        device.empty_cache(torch.device(kind))
    assert calls == [0.8, "emptied"]
    assert torch.backends.cuda.cudnn_sdp_enabled() is False  # its backward is NaN at some lengths (attention_check)


@given(st.integers(0, 10_000), st.sampled_from([1, 8, 32, 64]))
def test_bucket_is_the_next_multiple(length, multiple):
    found = device.bucket(length, multiple)
    assert found % multiple == 0
    assert length <= found < length + multiple
