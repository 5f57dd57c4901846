"""A quantized base that trainer and sampler share: packed weights for MLX, their exact dequantized values for torch.

A folder made here holds the Hugging Face model with the dequantized values and, in `mlx/`, the packed one that
`mlx_lm` loads as it is. Adapters trained on either belong to the same policy (QeRL, Huang et al. 2025, section 3).
"""

import errno
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from rl.convert import hf_name, unpermute
from rl.errors import UserError
from rl.files import sha256_file, write_json
from rl.rollouts.families import sampler_config
from rl.rollouts.load import load_sampler

# key in base.json -> the file whose sha256 it is: what MLX samples from, and what torch trains on
HASHED = {"sha256": "mlx/model.safetensors", "dequantized_sha256": "model.safetensors"}


def build(base: Path, gguf: Path | None, bits: int, group_size: int, out: Path, source: str) -> str:
    """Make the shared folder `out` from the folder `base` unless it is there, whole and made from the same weights
    (`source`, their sha256); returns the sha256 of the packed weights.

    With a GGUF file of 4-bit blocks of 32 (Q4_1) and `bits, group_size` = 4, 32 the file's own codes are taken:
    quantizing its dequantized values again would add error that the file does not have. Written beside `out` and
    renamed; of two processes at once, the second keeps what the first one made. Raises UserError on a full disk.
    """
    made = {"source": source, "bits": bits, "group_size": group_size}
    if found := _intact(out, made):
        return found
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    aside = out.with_name(f".{out.name}.{os.getpid()}.old.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had this number
    try:
        (temporary / "mlx").mkdir(parents=True)
        if gguf is not None and (bits, group_size) == (4, 32):
            packed = _packed_from_gguf(gguf, json.loads((base / "config.json").read_text()))
        else:
            model = load_sampler(base)
            nn.quantize(model, group_size=group_size, bits=bits)
            packed = dict(tree_flatten(model.parameters()))
        _write(temporary, base, packed, bits, group_size)
        digests = {key: sha256_file(temporary / name) for key, name in HASHED.items()}
        write_json(temporary / "base.json", made | digests)
        while not _renamed(temporary, out):
            if found := _intact(out, made):
                return found
            with suppress(FileNotFoundError):  # another process may be taking it away too
                out.rename(aside)  # of other weights, or damaged
            shutil.rmtree(aside, ignore_errors=True)
        return digests["sha256"]
    except (OSError, RuntimeError) as error:
        # MLX raises a RuntimeError for a write that failed, and does not say why
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "Unable to write" in str(error):
            raise UserError(f"{out}: the disk is full while writing the quantized base: free some space") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _intact(out: Path, made: dict[str, Any]) -> str | None:
    """The sha256 of the packed weights in `out` if it was made from that and no weights changed since, else None."""
    try:
        record = json.loads((out / "base.json").read_text())
        digests = {key: sha256_file(out / name) for key, name in HASHED.items()}
    except (OSError, ValueError):
        return None
    return digests["sha256"] if record == made | digests else None


def _renamed(folder: Path, target: Path) -> bool:
    """Rename `folder` to `target`; False where a folder of that name is there already."""
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _packed_from_gguf(gguf: Path, config: dict) -> dict[str, mx.array]:
    """The file's codes under Hugging Face's names; float32 scales keep the dequantized values exact."""
    weights = {}
    for name, value in mx.load(str(gguf)).items():
        stem, _, kind = name.rpartition(".")
        target = (hf_name(f"{stem}.weight") or name).removesuffix(".weight")
        part = stem.rpartition(".")[2]
        if part in ("attn_q", "attn_k"):
            value = unpermute(value, config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"])
        weights[f"{target}.{kind}"] = value if value.dtype == mx.uint32 else value.astype(mx.float32)
    return weights


def _write(folder: Path, base: Path, packed: dict[str, mx.array], bits: int, group_size: int) -> None:
    """Packed weights with their config in `mlx/`, dequantized values and everything else beside them."""
    layers = {}
    dequantized = {}
    for name, value in packed.items():
        stem, _, kind = name.rpartition(".")
        if kind in ("scales", "biases"):
            continue
        if f"{stem}.scales" in packed:
            scales = packed[f"{stem}.scales"]
            own_group = _input_size(value, scales, group_size)
            own_bits = value.shape[-1] * 32 // (scales.shape[-1] * own_group)
            layers[stem] = {"bits": own_bits, "group_size": own_group, "mode": "affine"}
            value = mx.dequantize(value, scales, packed[f"{stem}.biases"], group_size=own_group, bits=own_bits)
        dequantized[name] = value.astype(mx.float32)
    common = {"bits": bits, "group_size": group_size, "mode": "affine"}
    different = {stem: found for stem, found in layers.items() if found != common}
    mx.save_safetensors(str(folder / "model.safetensors"), dequantized, metadata={"format": "pt"})
    mx.save_safetensors(str(folder / "mlx" / "model.safetensors"), packed, metadata={"format": "mlx"})
    for path in base.iterdir():
        if path.suffix in (".json", ".jinja", ".txt", ".model") and path.name not in ("base.json", "config.json"):
            shutil.copy(path, folder / path.name)
            shutil.copy(path, folder / "mlx" / path.name)
    config = json.loads((base / "config.json").read_text())
    write_json(folder / "config.json", config)
    # mlx_lm's own tools read RoPE's settings at the top level only
    write_json(folder / "mlx" / "config.json", sampler_config(config) | {"quantization": common | different})


def _input_size(value: mx.array, scales: mx.array, group_size: int) -> int:
    """The group size of one packed tensor: a GGUF file's blocks are always 32, ours are as asked."""
    for group in (group_size, 32, 64, 128):
        if value.shape[-1] * 32 % (scales.shape[-1] * group) == 0:
            bits = value.shape[-1] * 32 // (scales.shape[-1] * group)
            if bits in (2, 3, 4, 6, 8):
                return group
    raise UserError(f"packed weights of shape {value.shape} with scales {scales.shape} fit no affine format of MLX")
