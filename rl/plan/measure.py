"""`python -m rl plan --measure`: run a case as `train` runs it, two steps on random weights, and note the peaks.

What counts as the peak:
- on CUDA `torch.cuda.max_memory_allocated`;
- on a CPU the most bytes of tensor storages alive at once: every operator of the run is seen by a dispatch mode, and a
  storage counts from the operator that makes it to its last reference. What a kernel allocates and frees inside one
  operator is not seen;
- MLX's own counter, `mx.get_peak_memory`.
"""

import json
import os
import random
import shutil
import signal
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rl import files
from rl.device import give_back
from rl.errors import RunFailed, UserError
from rl.plan.architecture import KNOWN, config_json
from rl.plan.cases import LARGE, SMALL, Case

if TYPE_CHECKING:
    from rl.config import Config

ALPHABET = "".join(chr(c) for c in range(32, 127) if chr(c) not in '"\\')
LONGEST = 180.0  # seconds of a case: some five times what the slowest should take on a GPU
STEPS = 2  # the optimizer's states are there from the second on
LORA = {"rank": 16, "alpha": 32.0}
BLOCK = 1_000_003  # numbers; no multiple of any width, so that rows differ
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "mlx")


@dataclass
class LiveBytes:
    """Bytes of the storages seen so far that are still referenced, and the most there were."""

    now: int = 0
    peak: int = 0


class Tracker(TorchDispatchMode):
    """Counts the storages of every tensor that goes into or comes out of an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.live = LiveBytes()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, then look at what it took and what it gave."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for value in tree_leaves((args, kwargs, out)):
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                self._note(value.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.live.now += size
        self.live.peak = max(self.live.peak, self.live.now)
        live, seen = self.live, self.seen

        def gone() -> None:
            seen.discard(key)
            live.now -= size

        # torch keeps one Python object for a storage as long as the storage lives
        weakref.finalize(storage, gone).atexit = False


def main(names: list[str], out: Path, budget: float | None = None) -> int:
    """Measure the cases of these names (all that suit the device where none is given), one after the other, and write
    `out`/<device>-<name>.json as each ends. With a `budget` in seconds a case begins only while the longest so far
    would still end within it; the cases stand in order of value. A case of more than LONGEST seconds is given up on.

    Raises UserError for a name that is none, RunFailed where a case failed or none was measured.
    """
    known = {case.name: case for case in (*SMALL, *LARGE)}
    for name in names:
        if name not in known:
            raise UserError(f"--measure {name}: no such case, valid: {', '.join(known)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = names or [case.name for case in (LARGE if device == "cuda" else SMALL)]
    home, failed, longest, begun = Path.cwd(), [], 0.0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="duet-plan-") as shared:
        for number, name in enumerate(wanted):
            started = time.monotonic()
            if budget is not None and started - begun + longest > budget:
                print(f"not begun within {budget:.0f} s: {', '.join(wanted[number:])}", flush=True)
                if number == 0:
                    raise RunFailed(f"--budget {budget:.0f}: nothing was measured")
                break
            folder = Path(shared, name)
            folder.mkdir()
            os.chdir(folder)  # runs write below the working directory
            try:
                with bounded(LONGEST):
                    record = measure(known[name], folder, device, Path(shared, "bases"))
            except Exception as error:  # a case that does not fit the machine must not take the others with it
                failed.append(f"{name} ({type(error).__name__}: {error!s:.120})")
                print(f"{name}: failed, {type(error).__name__}: {error!s:.200}", flush=True)
                continue
            finally:
                os.chdir(home)
                shutil.rmtree(folder)
                longest = max(longest, time.monotonic() - started)
            files.write_json(home / out / f"{device}-{name}.json", record)
            print(f"{name}: {record['peaks']} in {time.monotonic() - started:.0f} s", flush=True)
    if failed:
        raise RunFailed(f"not measured: {'; '.join(failed)}")
    return 0


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block once it has run for `seconds`: the other cases want their time too."""

    def late(_number: int, _frame: Any) -> None:
        raise TimeoutError(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def short_answers() -> Iterator[None]:
    """In the block a run's held-out answers, before and after, are one token each: the peak is that of its steps."""
    from rl import measure as heldout

    whole = heldout.measure

    def short(sampler: Any, tokenizer: Any, rows: Any, grade: Any, _longest: int, *more: Any) -> Any:
        return whole(sampler, tokenizer, rows, grade, 1, *more)

    heldout.measure = short
    try:
        yield
    finally:
        heldout.measure = whole


def measure(case: Case, folder: Path, device: str, bases: Path) -> dict[str, Any]:
    """Train `case` in `folder` and return its record: case, sizes as they came out, peaks in bytes, versions.

    Random weights of a known model are written to `bases` once and serve every case of that model.
    """
    from rl import config as configs
    from rl.display import Display
    from rl.plan import architecture, workload
    from rl.train import quiet, train_run

    quiet()
    path = write_case(case, folder, device, bases)
    config = configs.load(path)
    shape = architecture.find(config, folder)
    expected = workload.of(config, prompt=case.prompt, completion=case.completion)
    counters, note = _counters(config, device)
    with counters(), short_answers():
        train_run(path, [], Display(stages=5))
    peaks = note()
    lines = (folder / "models" / "final" / config.run.name / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    longest = max((row.get("completions/max_length") or 0 for row in logged), default=0)
    return {
        "case": asdict(case),
        "device": device,
        "architecture": asdict(shape),
        "workload": asdict(expected),
        "longest_completion": longest,
        "step_s": logged[-1]["wall_s"] - logged[0]["wall_s"],
        "peaks": peaks,
        "packages": {name: _version(name) for name in PACKAGES},
    }


def write_case(case: Case, folder: Path, device: str, bases: Path) -> Path:
    """The config of `case` and its rows in `folder`; for a model of the table its folder of random weights too."""
    base = bases / case.model.rpartition("/")[2] if case.model in KNOWN else None
    if base is not None and not base.exists():
        write_random(base, case.model)
    _write_rows(case, folder)
    return write_config(case, folder, base, device)


def write_config(case: Case, folder: Path, base: Path | None, device: str) -> Path:
    """`folder`/case.toml; `base` is the model's folder, None for a tiny one."""
    from rl.config.text import to_toml

    model: dict[str, Any] = {"base": str(base)}
    if base is None:
        hidden, layers = (int(part) for part in case.model.removeprefix("tiny-").split("x"))
        sizes = {"hidden": hidden, "layers": layers, "heads": max(1, hidden // 64), "intermediate": 3 * hidden}
        model = {"base": "tiny", "tiny": sizes | {"alphabet": ALPHABET}}
    if case.method != "full":
        model["lora"] = LORA
    if case.method in ("q4", "q8"):
        model["quantization"] = {"bits": int(case.method[1]), "group_size": 64}
    trainer = {
        "algorithm": case.algorithm,
        "max_steps": STEPS,
        "per_device_train_batch_size": case.rows,
        "gradient_accumulation_steps": case.accumulation,
        "learning_rate": 1e-6,
        "save_strategy": "no",
    }
    if case.algorithm in ("grpo", "rloo"):
        trainer |= {"num_generations": 2, "steps_per_generation": case.accumulation}
    tables: dict[str, Any] = {
        "run": {"name": "case", "device": device},
        "model": model,
        "data": {"source": "jsonl", "path": "train.jsonl", "heldout_path": "heldout.jsonl", "train_size": 1024},
        "rollout": {"engine": case.engine, "max_completion_length": case.completion},
        "trainer": trainer | case.trainer,
        "eval": {"size": 4},
    }
    if case.algorithm not in ("sft", "dpo", "orpo"):
        tables["reward"] = [{"name": "exact", "extract": "last_number"}]
    path = folder / "case.toml"
    files.write_text(path, to_toml(tables))
    return path


def write_random(folder: Path, name: str) -> None:
    """A model folder with the sizes of a known model, normal weights in bfloat16 and a tokenizer of characters.

    The weights repeat one block: drawing billions of numbers takes longer than measuring with them.
    """
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from rl.tiny import EOS, PAD, char_tokenizer

    told = config_json(name) | {"rope_theta": 10000.0, "eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0}
    config = AutoConfig.for_model(told.pop("model_type"), **told)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    block = torch.empty(BLOCK).normal_(0, 0.02, generator=torch.Generator().manual_seed(0)).bfloat16()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    tensors = {}
    for key, value in model.state_dict().items():
        if key in tied:
            continue
        if value.dim() == 1:
            tensors[key] = torch.ones(value.shape, dtype=torch.bfloat16)
        else:
            tensors[key] = block.repeat(-(-value.numel() // BLOCK))[: value.numel()].view(value.shape)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=char_tokenizer(ALPHABET), pad_token=PAD, eos_token=EOS)
    tokenizer.save_pretrained(folder)


def _write_rows(case: Case, folder: Path) -> None:
    """Prompts of exactly `prompt` tokens that share no beginning, with answers of `completion` tokens."""
    draw, letters = random.Random(0), ALPHABET.replace(" ", "")

    def text(count: int) -> str:
        return "".join(draw.choice(letters) for _ in range(count))

    def row(preference: bool) -> dict[str, str]:
        prompt, answer = text(case.prompt), text(max(1, case.completion - 1))
        if preference:
            return {"prompt": prompt, "chosen": answer, "rejected": text(max(1, case.completion - 1))}
        return {"prompt": prompt, "answer": "1", "completion": answer}

    count = 4 * case.rows * case.accumulation * STEPS
    for name, rows, preference in (
        ("train.jsonl", count, case.algorithm in ("dpo", "orpo")),
        ("heldout.jsonl", 8, False),
    ):
        lines = [json.dumps(row(preference)) for _ in range(rows)]
        files.write_text(folder / name, "\n".join(lines) + "\n")


def _counters(config: "Config", device: str) -> tuple[Callable[[], Any], Callable[[], dict[str, int]]]:
    """A context in which peaks are counted, and what reads them off afterwards."""
    from contextlib import nullcontext

    give_back(torch.device(device))  # what an earlier case has left
    sampled = config.rollout.engine == "mlx"
    if sampled:
        from rl.rollouts import device as mlx_device

        mlx_device.reset_peak_memory()
    tracker = Tracker()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def note() -> dict[str, int]:
        peaks = {"mlx": mlx_device.peak_memory_bytes() if sampled else 0}
        if device == "cuda":
            return peaks | {
                "torch": torch.cuda.max_memory_allocated(),
                "torch_reserved": torch.cuda.max_memory_reserved(),
            }
        return peaks | {"torch": tracker.live.peak}

    return (nullcontext if device == "cuda" else lambda: tracker), note


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
