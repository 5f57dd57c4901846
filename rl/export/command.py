"""`python -m rl export`: a finished run as a folder that other tools open, checked by opening it.

The policy's logprobs on the run's own held-out completions are taken before anything is written (base and adapter
apart, in float32, as it was trained); the folder is written under a hidden name, opened by the tool it is meant for,
and compared; only then is it renamed. An adapter of a quantized base is merged into that base's dequantized values,
which is the policy that was trained: quantizing the sum again is another one, and happens on request only.
"""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rl import files, finished
from rl.checkpoints import free_bytes, is_full
from rl.errors import RunFailed, UserError
from rl.hf_folder import top_level_rope, weight_files
from rl.record import Record

ROOT = Path()
TARGETS = ("mlx", "safetensors", "gguf", "hub")
BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, 8: 1.125, 4: 0.625}  # of a weight, scales and biases counted
# mean |dlogp| above which the folder is not the run's policy; what quantizing costs is measured and said, not judged
TOLERANCE = {"float32": 2e-3, "float16": 5e-2, "bfloat16": 2e-1}
ROWS, TOKENS = 16, 512  # held-out completions compared, and tokens of each at most
SHARD = "4GB"

Target = Literal["mlx", "safetensors", "gguf", "hub"]


@dataclass(frozen=True)
class Asked:
    """What `--to` and its options say. `dtype` of the weights; `bits` where they are quantized instead."""

    target: Target
    dtype: str = "float16"
    bits: int | None = None

    @property
    def form(self) -> str:
        """What the weights are held in, in words."""
        return self.dtype if self.bits is None else f"{self.bits}-bit ({'Q8_0' if self.target == 'gguf' else 'affine'})"


@dataclass(frozen=True)
class Checked:
    """|dlogp| between the run's policy and the folder as its tool opens it, over `tokens` tokens."""

    mean: float
    largest: float
    tokens: int
    tool: str


def main(
    name: str,
    asked: Asked,
    out: Path | None = None,
    *,
    repo: str | None = None,
    private: bool = False,
    dry_run: bool = False,
) -> int:
    """Write the run's export (and upload it, for hub). Returns the exit code.

    Raises UserError for bad input, before anything is written, and RunFailed where the result is not the run's policy
    or the disk fills; neither leaves a part of a folder.
    """
    _check_asked(asked, repo, private, dry_run)
    folder, run = finished.find(ROOT, name)
    out = out or ROOT / "models" / "exports" / f"{run.name}-{asked.target}"
    base = _check_run(folder, run, out, asked)
    from rl.export import hub

    if asked.target == "hub" and not dry_run:
        hub.check_access(str(repo))
    from rl import train

    train.quiet()
    from rl.display import Display

    display = Display(stages=4 if asked.target == "hub" else 3)
    display.stage(f"{run.name}: the run's policy")
    from rl import device, models, start
    from rl.export.tokenizer import portable
    from rl.rollouts.parity import trainer_logprobs

    where = device.pick("auto")
    device.prepare(where)
    tokenizer = portable(models.load_tokenizer(models.Base(run.name, folder, "")))
    if asked.target == "gguf":
        from rl.export import gguf_file

        gguf_file.check(json.loads((base / "config.json").read_text()), tokenizer, run.name)
    rows = probe_rows(folder, tokenizer)
    policy = start.load_finished(ROOT, folder, str(folder), device.dtype_for(where), where).eval()
    before = trainer_logprobs(policy, rows)
    if run.config.get("model", {}).get("quantization"):
        display.note("its base is quantized: the adapter is merged into the base's dequantized values")
    display.stage(f"{asked.target}: written in {asked.form}")
    with _staged(out) as stage:
        write(asked, stage, policy, tokenizer, base, run)
        del policy
        display.stage(f"opened again by {_tool(asked)}")
        checked = compare(asked, stage, base, tokenizer, rows, before)
        display.note(
            f"mean |Δlogp| to the run {checked.mean:.1e} on {checked.tokens} tokens of {len(rows)} held-out "
            f"completions, largest {checked.largest:.1e}"
        )
        from rl.export import card

        card.write(stage, folder, run, asked.target, asked.form, checked, ROOT)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    display.note(f"{out}: {size / 1e6:,.1f} MB; {_use(asked, out, run)}")
    if asked.target == "hub":
        hub.upload(out, str(repo), private, display, dry_run=dry_run)
    return 0


def _check_asked(asked: Asked, repo: str | None, private: bool, dry_run: bool) -> None:
    from rl.models import HUB_ID

    valid = {"mlx": (4, 8), "gguf": (8,)}.get(asked.target, ())
    if asked.bits is not None and asked.bits not in valid:
        ways = " or ".join(map(str, valid)) if valid else f"none: {asked.target} weights are not quantized"
        raise UserError(f"--quantize {asked.bits} with --to {asked.target}: valid: {ways}")
    if asked.target == "gguf" and asked.dtype == "bfloat16":
        raise UserError("--dtype bfloat16 with --to gguf: valid: float16, float32, or --quantize 8")
    if asked.target == "hub":
        if repo is None or not HUB_ID.fullmatch(repo):
            found = "missing" if repo is None else f"found {repo!r}"
            raise UserError(f"--repo: {found}, valid: USER/NAME, the model's id on the hub")
    elif repo is not None or private or dry_run:
        raise UserError(f"--repo, --private, --dry-run are of --to hub, found --to {asked.target}")


def _check_run(folder: Path, run: Record, out: Path, asked: Asked) -> Path:
    """The folder of the run's whole model, or of its adapter's base; refuses what cannot be exported to `out`."""
    from rl import start

    if run.config.get("trainer", {}).get("algorithm") == "reward":
        raise UserError(
            f"{run.name}: a reward model scores texts and cannot say any; {folder} is what transformers and peft open"
        )
    if out.exists():
        raise UserError(f"{out}: is there already; remove it, or name another with --out")
    adapter = (folder / "adapter_config.json").is_file()
    base = start.adapter_base(ROOT, folder, str(folder)) if adapter else folder
    stored = sum(_weights(path) for path in weight_files(base, str(base)))
    needed = int(stored * BYTES[asked.dtype if asked.bits is None else asked.bits]) + 32_000_000
    if (free := free_bytes(out)) < needed:
        raise UserError(
            f"{out}: about {needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free: free some space, "
            "or name a folder on another disk with --out"
        )
    return base


def _weights(path: Path) -> int:
    """How many numbers a safetensors file holds, from its header."""
    from math import prod

    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def probe_rows(folder: Path, tokenizer: Any) -> list[list[int]]:
    """Token rows the two sides are compared on: held-out prompts with the run's own completions after training."""
    from rl.measure import prompt_ids

    heldout, samples = (_jsonl(folder / name)[:ROWS] for name in ("heldout.jsonl", "samples.jsonl"))
    if not heldout or not samples:
        raise UserError(f"{folder}: heldout.jsonl and samples.jsonl are not there, so nothing can be compared on them")
    prompts = prompt_ids(tokenizer, [row["prompt"] for row in heldout])
    said = tokenizer([s["after"] for s in samples], add_special_tokens=False)["input_ids"]
    rows = [[*p, *ids, tokenizer.eos_token_id] for p, ids in zip(prompts, said, strict=True)]
    return [row[-TOKENS:] for row in rows]


def _jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@contextlib.contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """An empty hidden folder beside `out`, renamed to it at the end; gone when anything went wrong."""
    stage = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        stage.mkdir(parents=True)
        yield stage
        if out.exists():
            raise UserError(f"{out}: was made while this was written; remove it, or name another with --out")
        stage.rename(out)
    except Exception as error:
        if is_full(error):
            raise RunFailed(f"{out}: the disk filled while writing; nothing was kept: free some space") from error
        if isinstance(error, OSError) and error.filename and str(out.parent) in str(error.filename):
            raise UserError(f"{out}: cannot be written ({error.strerror}): name another folder with --out") from error
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def write(asked: Asked, stage: Path, policy: Any, tokenizer: Any, base: Path, run: Record) -> None:
    """The weights and tokenizer of `policy` into `stage`, as `asked`."""
    from rl.rollouts.sync import merged_weights

    if asked.target == "mlx":
        from rl.rollouts.export import write_model

        write_model(base, merged_weights(policy), tokenizer, stage, asked.dtype, asked.bits)
    elif asked.target == "gguf":
        from rl.export import gguf_file

        kind: Any = asked.dtype if asked.bits is None else "q8_0"
        name = gguf_name(run, asked)
        told = json.loads((base / "config.json").read_text())
        gguf_file.write(stage / name, told, merged_weights(policy), tokenizer, kind, run.name)
        files.write_text(stage / "Modelfile", gguf_file.modelfile(name, bool(tokenizer.chat_template)))
    else:
        _write_safetensors(asked, stage, policy, tokenizer)


def gguf_name(run: Record, asked: Asked) -> str:
    """`run-F16.gguf`, as llama.cpp's own files are called."""
    return f"{run.name}-{'Q8_0' if asked.bits else {'float32': 'F32', 'float16': 'F16'}[asked.dtype]}.gguf"


def _write_safetensors(asked: Asked, stage: Path, policy: Any, tokenizer: Any) -> None:
    import torch

    model = policy.merge_and_unload() if hasattr(policy, "peft_config") else policy
    model = model.to(getattr(torch, asked.dtype))
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise UserError(f"{name}: holds values beyond {asked.dtype}'s; take --dtype float32 or bfloat16")
    model.save_pretrained(stage, safe_serialization=True, max_shard_size=SHARD)
    tokenizer.save_pretrained(stage)
    told = json.loads((stage / "config.json").read_text())
    files.write_json(stage / "config.json", top_level_rope(told))


def compare(asked: Asked, stage: Path, base: Path, tokenizer: Any, rows: list[list[int]], before: list[Any]) -> Checked:
    """Open what was written with the tool it is for and compare logprobs.

    Raises RunFailed when it is not the run's policy, or its tokenizer cuts the held-out texts otherwise.
    """
    import numpy as np

    readers: dict[str, Callable[[], list[Any]]] = {
        "mlx": lambda: _from_mlx(stage, rows),
        "gguf": lambda: _from_gguf(next(stage.glob("*.gguf")), base, tokenizer, rows),
    }
    after = readers.get(asked.target, lambda: _from_safetensors(stage, rows))()
    difference = np.abs(np.concatenate(before) - np.concatenate(after))
    checked = Checked(float(difference.mean()), float(difference.max()), len(difference), _tool(asked))
    limit = TOLERANCE[asked.dtype] if asked.bits is None else float("inf")
    if not checked.mean <= limit:  # also true for NaN
        raise RunFailed(
            f"what {checked.tool} opens is not the run's policy: mean |Δlogp| {checked.mean:.3g} on {checked.tokens} "
            f"tokens, at most {limit} expected in {asked.dtype}; nothing was kept"
        )
    return checked


def _tool(asked: Asked) -> str:
    return {"mlx": "mlx_lm.load", "gguf": "transformers' GGUF reader"}.get(asked.target, "transformers")


def _from_mlx(stage: Path, rows: list[list[int]]) -> list[Any]:
    from rl.rollouts.export import logprobs

    return logprobs(stage, rows)


def _from_safetensors(stage: Path, rows: list[list[int]]) -> list[Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from rl.rollouts.parity import trainer_logprobs

    # the values as stored, computed in float32: half precision has no fast kernels on every CPU
    model = AutoModelForCausalLM.from_pretrained(stage, dtype=torch.float32, local_files_only=True)
    return trainer_logprobs(model.eval(), rows)


def _from_gguf(path: Path, base: Path, tokenizer: Any, rows: list[list[int]]) -> list[Any]:
    import torch
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM

    from rl import convert
    from rl.rollouts.parity import trainer_logprobs

    metadata = {name: field.contents() for name, field in GGUFReader(path).fields.items()}
    own = convert.build_tokenizer(path, metadata)
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    for text in texts:
        if (cut := own.encode(text).ids) != (told := tokenizer(text)["input_ids"]):
            raise RunFailed(f"the GGUF file's tokenizer cuts {text!r:.60} into {cut[:8]}…, the run's into {told[:8]}…")
    told = json.loads((base / "config.json").read_text())
    # transformers' reader has no rule for a Qwen's key_length and takes its class's default
    extra = {"head_dim": told["head_dim"]} if told.get("head_dim") else {}
    with contextlib.redirect_stderr(io.StringIO()):  # it draws a bar of its own
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, **extra)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype=torch.float32, local_files_only=True
        )
    return trainer_logprobs(model.eval(), rows)


def _use(asked: Asked, out: Path, run: Record) -> str:
    """The command that opens what was written."""
    if asked.target == "mlx":
        return f"mlx_lm.generate --model {out} --prompt ..., or copy it into LM Studio's models folder"
    if asked.target == "gguf":
        return f"ollama create {run.name} -f {out}/Modelfile, or llama-cli -m {out / gguf_name(run, asked)}"
    return f"AutoModelForCausalLM.from_pretrained('{out}')"
