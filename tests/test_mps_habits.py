"""The habits that keep MPS well (rl/device.py): each reaches torch, transformers or accelerate as an argument.

No tensor here lies on MPS: jobs are told that their device is "mps" and train on the CPU, so that what reaches the
libraries can be seen on any machine.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rl import device, models
from rl.algorithms import base
from rl.algorithms.learner import Shared, forward, shared_prefix
from rl.errors import UserError
from rl.smoke import steps

CPU, MPS = torch.device("cpu"), torch.device("mps")


@pytest.fixture
def job_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., base.Job]:
    """`job_of(algorithm, **args)`: a job of one step whose device says "mps"."""
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: None)  # without MPS it raises

    def make(algorithm: str, **args: Any) -> base.Job:
        config = steps.make_config(CPU, algorithm, dtype="float32", **args)
        job = steps.make_job(config, tmp_path, CPU)
        job.device = MPS
        return job

    return make


def dtype_and_map(monkeypatch: pytest.MonkeyPatch, owner: str) -> dict[str, Any]:
    """What reaches `from_pretrained` of that class; the load itself ends there."""
    import transformers

    seen: dict[str, Any] = {}

    class Stop(Exception):
        pass

    def load(path: Any, **kwargs: Any) -> None:
        seen.update(kwargs)
        raise Stop

    monkeypatch.setattr(getattr(transformers, owner), "from_pretrained", load)
    seen["stop"] = Stop
    return seen


def test_models_are_loaded_whole_and_then_moved(monkeypatch: pytest.MonkeyPatch, tiny_base: models.Base) -> None:
    """Trap: device_map="auto" with a change of dtype segfaults on MPS."""
    seen = dtype_and_map(monkeypatch, "AutoModelForCausalLM")
    with pytest.raises(seen["stop"]):
        models.load_policy(tiny_base, "bfloat16", "mps")
    assert (seen["device_map"], seen["dtype"], seen["attn_implementation"]) == (None, torch.bfloat16, "sdpa")


def test_reward_models_too(monkeypatch: pytest.MonkeyPatch, make_config: Any, tiny_base: models.Base) -> None:
    from rl import start

    seen = dtype_and_map(monkeypatch, "AutoModelForSequenceClassification")
    with pytest.raises(seen["stop"]):
        start.load_scorer(make_config("tiny"), start.Start(tiny_base, tiny_base.sha256), None, MPS)
    assert (seen["device_map"], seen["dtype"]) == (None, torch.float32)


def test_the_loader_has_no_workers_and_pins_nothing(monkeypatch: pytest.MonkeyPatch, job_of: Any) -> None:
    """Trap: worker processes copy the parent on a Mac, and pinned memory belongs to another device."""
    from torch.utils.data import DataLoader

    seen: list[dict[str, Any]] = []
    real = DataLoader.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(kwargs)
        real(self, *args, **kwargs)

    monkeypatch.setattr(DataLoader, "__init__", init)
    for algorithm in ("sft", "grpo"):
        seen.clear()
        steps.take(job_of(algorithm))
        assert seen
        assert all(kwargs["num_workers"] == 0 and kwargs["pin_memory"] is False for kwargs in seen)


def test_the_cache_is_released_after_each_step_on_mps_alone(monkeypatch: pytest.MonkeyPatch, job_of: Any) -> None:
    """Trap: blocks of every length that a batch ever had stay allocated there."""
    calls: list[None] = []
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: calls.append(None))
    job = job_of("sft", max_steps=3)
    assert steps.take(job).outcome.steps == 3
    assert len(calls) == 3
    job = job_of("sft", max_steps=2)
    job.device = CPU
    steps.take(job)
    assert len(calls) == 3


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "kto", "reward", "grpo", "rloo", "ppo"])
def test_batches_come_in_buckets_and_padding_changes_no_gradient(
    monkeypatch: pytest.MonkeyPatch, job_of: Any, algorithm: str
) -> None:
    """Trap: MPS keeps a compiled graph of every shape; and a padding token that counts would change the gradient."""
    widths: set[int] = set()
    real = torch.nn.Embedding.forward

    def forward(self: Any, ids: torch.Tensor) -> torch.Tensor:
        widths.add(ids.shape[-1])
        return real(self, ids)

    norms = []
    for where in (MPS, CPU):
        job = job_of(algorithm)
        job.device = where
        with monkeypatch.context() as patch:
            if where == MPS:
                patch.setattr(torch.nn.Embedding, "forward", forward)
                # it asks the batch, which lies on the CPU here
                patch.setattr("rl.algorithms.learner.padded", lambda length, where: device.bucket(length))
            norms.append(steps.take(job).number("grad_norm"))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert norms[0] > 0
    assert widths
    # prompt and completion are each a bucket; logits of the last column may be left out
    assert all(width % device.BUCKET == 0 for width in widths), widths


def test_the_forward_without_repeated_work_keeps_to_buckets(
    monkeypatch: pytest.MonkeyPatch, tiny_base: models.Base
) -> None:
    """It takes the rows' left padding off, which would bring back a width of its own for every batch."""
    from trl.trainer.utils import add_fused_lm_head

    assert [device.padded(n, MPS) for n in (1, 32, 33)] == [32, 32, 64]
    assert [device.padded(n, CPU) for n in (1, 32, 33)] == [1, 32, 33]
    torch.manual_seed(0)
    model = models.load_policy(tiny_base, "float32", "cpu")
    add_fused_lm_head(model, temperature=1.0, outputs=("log_probs", "entropy"))
    ids, mask = torch.randint(2, 17, (3, 25)), torch.ones(3, 25, dtype=torch.long)
    ids[:, 3:12] = ids[0, 3:12]
    mask[:, :3] = 0
    prefix = shared_prefix(ids, mask, 8)
    assert prefix == 9
    plain = forward(model, ids, mask, 8, Shared(prefix))
    widths: list[int] = []

    def padded(length: int, where: torch.device) -> int:
        widths.append(device.bucket(length))
        return widths[-1]

    monkeypatch.setattr("rl.algorithms.learner.padded", padded)
    for mine, wide in zip(forward(model, ids, mask, 8, Shared(prefix)), plain, strict=True):
        torch.testing.assert_close(mine, wide)
    assert widths == [32]


@pytest.mark.parametrize("algorithm", ["sft", "ppo"])
def test_checkpointing_is_not_the_reentrant_kind(monkeypatch: pytest.MonkeyPatch, job_of: Any, algorithm: str) -> None:
    """Trap: the reentrant kind finds no gradient behind a frozen embedding, and warns only."""
    import torch.utils.checkpoint as checkpoint

    seen: list[dict[str, Any]] = []
    real = checkpoint.checkpoint

    def spy(function: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return real(function, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "checkpoint", spy)
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", spy, raising=False)
    step = steps.take(job_of(algorithm, lora=True, gradient_checkpointing=True))
    assert len(step.moved) == len(step.trained) // 2
    assert seen
    assert all(kwargs["use_reentrant"] is False for kwargs in seen)


@pytest.mark.parametrize(("release", "refused"), [("13.6.1", True), ("14.0", False), ("26.1", False)])
def test_bf16_is_refused_where_macos_has_none(
    monkeypatch: pytest.MonkeyPatch, job_of: Any, release: str, refused: bool
) -> None:
    monkeypatch.setattr("platform.mac_ver", lambda: (release, ("", "", ""), "arm64"))
    job = job_of("sft", bf16=True)
    if not refused:
        assert base.arguments(job, {"bf16"})["bf16"] is True
        return
    with pytest.raises(UserError) as error:
        base.arguments(job, {"bf16"})
    said = "smoke test: [trainer] bf16: found true, and macOS 13.6.1 has none on mps (14 has), valid: fp16 = true, "
    assert str(error.value).startswith(said)
    assert base.arguments(job_of("sft", fp16=True), {"fp16"})["fp16"] is True


def test_memory_is_capped_below_what_metal_recommends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: beyond it macOS swaps, and MLX, in the same memory, starves."""
    shares: list[float] = []
    monkeypatch.setattr(torch.mps, "set_per_process_memory_fraction", shares.append)
    device.prepare(MPS)
    assert shares == [0.8]


def test_macos_decides_what_half_precision_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 came with macOS 14; the float32 default needs none of it."""
    for release, half in (("13.6.1", torch.float16), ("14.0", torch.bfloat16), ("26.1", torch.bfloat16)):
        monkeypatch.setattr("platform.mac_ver", lambda release=release: (release, ("", "", ""), "arm64"))
        assert device.half_for(MPS) == half
        assert device.dtype_for(MPS) == torch.float32


def test_attention_asks_for_torchs_own_kernel_and_never_for_a_cuda_one(
    monkeypatch: pytest.MonkeyPatch, job_of: Any
) -> None:
    """On MPS scaled_dot_product_attention is its math path where a gradient is wanted; flash kernels are CUDA's."""
    calls: list[dict[str, Any]] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    job = job_of("sft")
    assert job.model.config._attn_implementation == "sdpa"
    assert steps.take(job).outcome.steps == 1
    assert calls
    # heads that share keys are repeated by transformers: grouped keys have no math path on older torch
    assert not any(kwargs.get("enable_gqa") for kwargs in calls)


def test_fp16_on_a_cpu_is_refused() -> None:
    """Trap: accelerate trains on in float32 there without a word."""
    with pytest.raises(UserError, match=r"x.toml: \[trainer\] fp16: found true, which accelerate leaves out on a CPU"):
        device.check_half(CPU, {"fp16": True}, "x.toml")
    device.check_half(CPU, {"bf16": True}, "x.toml")
    device.check_half(MPS, {"fp16": True}, "x.toml")
