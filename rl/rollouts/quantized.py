"""A quantized base that trainer and sampler share: packed weights for MLX, their exact dequantized values for torch.

A folder made here holds the Hugging Face model with the dequantized values and, in `mlx/`, the packed one that
`mlx_lm` loads as it is. Adapters trained on either belong to the same policy (QeRL, Huang et al. 2025, section 3).
"""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from rl.errors import UserError
from rl.files import sha256_file, write_json
from rl.rollouts.load import load_sampler

_GGUF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def build(base: Path, gguf: Path | None, bits: int, group_size: int, out: Path, source: str) -> str:
    """Make the shared folder `out` from the folder `base` unless it was made from the same weights (`source`, their
    sha256); returns the sha256 of the packed weights.

    With a GGUF file of 4-bit blocks of 32 (Q4_1) and `bits, group_size` = 4, 32 the file's own codes are taken:
    quantizing its dequantized values again would add error that the file does not have.
    """
    packed_file = out / "mlx" / "model.safetensors"
    made = {"source": source, "bits": bits, "group_size": group_size}
    if _made(out) != made:
        temporary = out.with_name(f".{out.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "mlx").mkdir(parents=True)
        model = load_sampler(base)
        nn.quantize(model, group_size=group_size, bits=bits)
        if gguf is not None and (bits, group_size) == (4, 32):
            packed = _packed_from_gguf(gguf, json.loads((base / "config.json").read_text()))
        else:
            packed = dict(tree_flatten(model.parameters()))
        _write(temporary, base, packed, bits, group_size)
        digest = sha256_file(temporary / "mlx" / "model.safetensors")
        write_json(temporary / "base.json", made | {"sha256": digest})
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)
    if not packed_file.exists():
        raise UserError(f"{out}: mlx/model.safetensors is missing; delete the folder and it will be made again")
    return json.loads((out / "base.json").read_text())["sha256"]


def _made(out: Path) -> dict | None:
    """What `out` says it was made from; None where nothing is."""
    if not (out / "base.json").exists():
        return None
    return {k: v for k, v in json.loads((out / "base.json").read_text()).items() if k != "sha256"}


def _packed_from_gguf(gguf: Path, config: dict) -> dict[str, mx.array]:
    """The file's codes under Hugging Face's names; float32 scales keep the dequantized values exact."""
    weights = {}
    for name, value in mx.load(str(gguf)).items():
        stem, _, kind = name.rpartition(".")
        if stem == "token_embd":
            target = "model.embed_tokens"
        elif stem == "output_norm":
            target = "model.norm"
        elif stem == "output":
            target = "lm_head"
        else:
            _, layer, part = stem.split(".")
            target = f"model.layers.{layer}.{_GGUF_NAMES[part]}"
            if part in ("attn_q", "attn_k"):
                heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
                value = _unpermute(value, heads)
        weights[f"{target}.{kind}"] = value if value.dtype == mx.uint32 else value.astype(mx.float32)
    return weights


def _unpermute(rows: mx.array, heads: int) -> mx.array:
    """Undo GGUF's row order of q and k: it interleaves the two halves that Hugging Face's RoPE keeps apart."""
    out = rows.shape[0]
    return rows.reshape(heads, out // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


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
    write_json(folder / "mlx" / "config.json", config | {"quantization": common | different})


def _input_size(value: mx.array, scales: mx.array, group_size: int) -> int:
    """The group size of one packed tensor: a GGUF file's blocks are always 32, ours are as asked."""
    for group in (group_size, 32, 64, 128):
        if value.shape[-1] * 32 % (scales.shape[-1] * group) == 0:
            bits = value.shape[-1] * 32 // (scales.shape[-1] * group)
            if bits in (2, 3, 4, 6, 8):
                return group
    raise UserError(f"packed weights of shape {value.shape} with scales {scales.shape} fit no affine format of MLX")
