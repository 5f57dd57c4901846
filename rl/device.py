"""Which device trains, in which precision, with how much memory; and the habits that keep MPS well.

Nothing here imports torch before a function needs it. What is said about MPS comes from its documentation and from
reports of others: none of it was measured on a Mac by this project.
"""

import gc
import os
import platform
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rl.errors import UserError

if TYPE_CHECKING:
    import torch

    from rl.config import Config

GIB = 1024**3
BUCKET = 32  # tokens: on MPS lengths are padded to multiples of it
MPS_SHARE = 0.8  # of the memory Metal recommends: beyond it macOS swaps and MLX, in the same memory, starves


def pick(name: Literal["auto", "mps", "cuda", "cpu"] = "auto") -> "torch.device":
    """The device called `name`; "auto" takes mps, then cuda, then cpu.

    Raises:
        UserError: a device this machine or this torch does not have.
    """
    import torch

    present = available()
    if name == "auto":
        return torch.device(present[0])
    if name not in present:
        why = f"torch {torch.__version__} sees none on this {platform.system()} {platform.machine()} machine"
        raise UserError(f"[run] device = {name!r}: {why}: valid here are 'auto', {', '.join(map(repr, present))}")
    return torch.device(name)


def available() -> tuple[str, ...]:
    """Names of the devices present, the preferred one first; "cpu" is always the last."""
    import torch

    found = {"mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available()}
    return (*(name for name, there in found.items() if there), "cpu")


def dtype_for(device: "torch.device | str") -> "torch.dtype":
    """The dtype of the trainer's weights and activations unless the config sets one: float32 on every device.

    Half precision there costs more agreement with the sampler than it saves time at these sizes: mean |Δlogp| on
    SmolLM2-135M is .005 in float16 and .049 in bfloat16. For a model too large for that, see `half_for`.
    """
    import torch

    del device
    return torch.float32


def half_for(device: "torch.device | str") -> "torch.dtype":
    """The half precision a device can train in: bfloat16, or float16 on macOS before 14 and GPUs before Ampere."""
    import torch

    kind = torch.device(device).type
    if kind == "mps":
        return torch.bfloat16 if macos_major() >= 14 else torch.float16
    if kind == "cuda":
        # an emulated bfloat16 is slower than float32
        return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    return torch.bfloat16


def macos_major() -> int:
    """The major version of macOS, 0 elsewhere."""
    release = platform.mac_ver()[0]
    return int(release.split(".")[0]) if release else 0


def prepare(device: "torch.device") -> None:
    """Set what a device needs before its first use: on MPS a cap on memory, on CUDA no cuDNN attention.

    cuDNN's attention backward returns NaN for some lengths under a mask (see rl/attention_check.py); the other kernels
    do not, and at these sizes cost nothing.
    """
    import torch

    if device.type == "mps":
        torch.mps.set_per_process_memory_fraction(MPS_SHARE)
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def empty_cache(device: "torch.device") -> None:
    """Hand unused blocks back between steps on MPS, where batches of varying length leak; elsewhere nothing."""
    if device.type == "mps":
        import torch

        torch.mps.empty_cache()


def give_back(device: "torch.device") -> None:
    """Collect garbage and hand all that torch keeps for reuse back to the system, where MLX may need it."""
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
    empty_cache(device)


def bucket(length: int, multiple: int = BUCKET) -> int:
    """`length` in tokens rounded up to a multiple, so that a device sees few different shapes."""
    return -(-length // multiple) * multiple


def padded(length: int, device: "torch.device | str") -> int:
    """The width at which `length` tokens are computed: a bucket on MPS, which keeps a graph of every shape."""
    return bucket(length) if str(device).split(":")[0] == "mps" else length


def holds_codes(config: "Config", device: "torch.device | str") -> bool:
    """Whether the trainer of `config` holds its quantized base as codes (rl/packed.py), not as float32 values.

    A CPU dequantizes too slowly to do it in every pass, and what it holds is shared with the sampler. Reward models and
    samplers with weights of their own need the values.
    """
    quantization = config.model.quantization
    if quantization is None or config.rollout.precision != "shared" or config.trainer.algorithm == "reward":
        return False
    kind = str(device).split(":")[0]
    return (quantization.hold or ("values" if kind == "cpu" else "packed")) == "packed"


def trainer_defaults(device: "torch.device | str") -> dict[str, Any]:
    """Arguments of TRL's and transformers' trainers that are ours to set per device; the config may override each.

    TRL's own defaults turn on bf16 (it raises on a CPU, and as autocast it moves logprobs by .03) and gradient
    checkpointing (a second forward pass that models of these sizes do not need). Where the config turns checkpointing
    on, it is the non-reentrant kind: the other gives adapters behind a frozen embedding no gradient. On MPS batches are
    padded to buckets.
    """
    kind = str(device).split(":")[0]
    defaults: dict[str, Any] = {
        "bf16": False,
        "fp16": False,
        "use_cpu": kind == "cpu",
        "gradient_checkpointing": False,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        # worker processes copy the parent on a Mac, and the rows are in memory already
        "dataloader_num_workers": 0,
        # pinning is for copies to a separate GPU; it warns on MPS and the CPU
        "dataloader_pin_memory": kind == "cuda",
        "report_to": "none",
    }
    return defaults | ({"pad_to_multiple_of": BUCKET} if kind == "mps" else {})


def check_half(device: "torch.device | str", args: dict[str, Any], where: str) -> None:
    """Refuse bf16 training where the device has no bfloat16, and fp16 on a CPU; `where` names the config.

    Raises:
        UserError: `args` ask for it on macOS before 14 or on a GPU before Ampere; or for fp16 on a CPU, where
            accelerate goes on in float32 without a word.
    """
    import torch

    if args.get("fp16") and torch.device(device).type == "cpu":
        raise UserError(
            f"{where}: [trainer] fp16: found true, which accelerate leaves out on a CPU, "
            "valid: bf16 = true, or neither for float32"
        )
    if args.get("bf16") and half_for(device) != torch.bfloat16:
        kind = torch.device(device).type
        why = f"macOS {platform.mac_ver()[0]} has none on mps (14 has)" if kind == "mps" else "this GPU has none"
        raise UserError(f"{where}: [trainer] bf16: found true, and {why}, valid: fp16 = true, or neither for float32")


def memory_bytes(device: "torch.device | str" = "cpu") -> int:
    """Memory used by this process so far, in bytes.

    On cuda the peak of torch's allocator; on mps what the driver holds now for this process (Metal keeps no peak);
    on the cpu the peak resident size.
    """
    kind = str(device).split(":")[0]
    if kind == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    if kind == "mps":
        import torch

        return torch.mps.driver_allocated_memory()
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux a child's ru_maxrss starts at its parent's peak; this one starts at 0
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def total_memory_bytes() -> int:
    """The machine's memory in bytes; on a Mac the GPU's too."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cores() -> int:
    """Cores this process may use, which a container or `taskset` may have lowered."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(device: "torch.device | str") -> str:
    """One line for people and run records, such as "cpu: x86_64, 2 cores, 23.4 GiB"."""
    kind = str(device).split(":")[0]
    size = total_memory_bytes() / GIB
    if kind == "cuda":
        import torch

        card = torch.cuda.get_device_properties(device)
        return f"cuda: {card.name}, {card.total_memory / GIB:.1f} GiB"
    if kind == "mps":
        return f"mps: Apple {platform.machine()}, macOS {platform.mac_ver()[0]}, {size:.1f} GiB shared"
    return f"cpu: {platform.machine()}, {cores()} cores, {size:.1f} GiB"
