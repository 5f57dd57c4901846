"""The two ways to run a model under lm-eval: its own `hf` model in torch, or ours in MLX."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from evals import runs
from rl.errors import UserError

Backend = Literal["mlx", "hf"]
FAMILIES = Path(__file__).resolve().parent.parent / "rl" / "rollouts" / "families.py"


@dataclass(frozen=True)
class Loaded:
    """A model ready for lm-eval. `device` for people and records; `kind` is torch's or MLX's name of it."""

    lm: Any
    backend: Backend
    tokenizer: Any
    device: str
    kind: str


@cache
def _families() -> ModuleType:
    """rl/rollouts/families.py by itself: importing its package would import torch and MLX."""
    spec = importlib.util.spec_from_file_location("duet_families", FAMILIES)
    if spec is None or spec.loader is None:
        raise ImportError(f"{FAMILIES}: cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def choose(wanted: str, device: str, subject: runs.Subject) -> Backend:
    """The backend for a subject: `wanted`, or with "auto" MLX where the engine knows the family, else hf.

    A device is torch's business, so naming one chooses hf. Raises UserError where MLX was asked for and cannot serve.
    """
    if wanted == "hf" or (wanted == "auto" and device != "auto"):
        return "hf"
    if wanted == "mlx" and device != "auto":
        raise UserError(f"--device {device} is for --backend hf; MLX runs on its own default device: leave it out")
    path = subject.model / "config.json"
    config = runs.read_json(path, "get the file again")
    why = "mlx is not installed here" if importlib.util.find_spec("mlx") is None else None
    try:
        _families().sampler_config(config)
    except UserError as error:
        told = str(error).partition(": ")[0].replace("[model] base", "it")
        why = f"{path}: {told}; the MLX engine decodes {', '.join(_families().FAMILIES)}"
    except (KeyError, TypeError, AttributeError) as error:
        why = f"{path}: not a configuration the MLX engine can read ({error!r})"
    if why and wanted == "mlx":
        raise UserError(f"--backend mlx: {why}; use --backend hf")
    return "hf" if why else "mlx"


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer in `folder`. Raises UserError when it cannot be read or has no EOS."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no tokenizer can be read ({str(error).splitlines()[0]})") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no EOS token, so no completion would end; set eos_token there")
    return tokenizer


def load(
    subject: runs.Subject, tokenizer: Any, backend: Backend, *, device: str, dtype: str, batch_size: int
) -> Loaded:
    """Load a subject. Raises UserError for a device that is not there and for a family that MLX does not decode."""
    if backend == "mlx":
        from evals import mlx_model
        from rl.rollouts.device import describe

        lm = mlx_model.build(subject.model, adapter=subject.adapter, dtype=dtype, batch_size=batch_size)
        found = describe()
        return Loaded(lm, backend, tokenizer, f"{found['backend']}: {found['device']}", found["backend"])
    from rl.device import describe as torch_describe
    from rl.device import pick

    where = pick(device)  # type: ignore[arg-type]  # the command line allows these names only
    lm = _hf(subject, tokenizer, where.type, dtype, batch_size)
    if where.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    return Loaded(lm, backend, tokenizer, torch_describe(where), where.type)


def peak_memory_bytes(loaded: Loaded) -> int:
    """Peak so far: of the allocator on a GPU, of the whole process on a CPU (on mps what is held now)."""
    if loaded.backend == "mlx" and loaded.kind != "cpu":
        from rl.rollouts.device import peak_memory_bytes as peak

        return peak()
    from rl.device import memory_bytes

    return memory_bytes(loaded.kind)


def _hf(subject: runs.Subject, tokenizer: Any, device: str, dtype: str, batch_size: int) -> Any:
    """lm-eval's `hf` model, with every token of the tokenizer's and the model's own EOS as the end."""
    from lm_eval.models.huggingface import HFLM
    from transformers import GenerationConfig

    lm = HFLM(
        pretrained=str(subject.model),
        tokenizer=tokenizer,
        peft=str(subject.adapter) if subject.adapter else None,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
    )
    score = lm._loglikelihood_tokens
    # rolling scores ask it for lm-eval's own bar, which would run beside ours
    lm._loglikelihood_tokens = lambda *asked, **options: score(*asked, **options | {"disable_tqdm": True})
    own = lm.model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [] if own is None else [own])}
    # Plain greedy decoding: a folder may ship sampling settings or a repetition penalty. And rows that end early in a
    # batch must stop there: lm-eval drops EOS when it decodes, so text after it would look like the answer's.
    lm.model.generation_config = GenerationConfig(
        eos_token_id=sorted(ends), pad_token_id=lm.tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
    )
    return lm


@contextmanager
def bos(lm: Any, added: bool | None) -> Iterator[None]:
    """Within it the model adds BOS to prompts, or not, or (None) as its tokenizer does."""
    before = getattr(lm, "add_bos_token", None)
    lm.add_bos_token = added
    try:
        yield
    finally:
        lm.add_bos_token = before
