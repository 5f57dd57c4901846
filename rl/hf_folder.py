"""Hugging Face model folders: writing one whole for a Llama, checking one made elsewhere, hashing its weights."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl import files
from rl.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
DTYPE_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
DTYPE_BYTES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """What a Llama's `config.json` says; sizes in elements, `context` in tokens, token ids of the tokenizer."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    rope_theta: float
    rms_eps: float
    tied: bool
    bos: int | None
    eos: int
    pad: int


def top_level_rope(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a `config.json` with `rope_theta` (and `rope_scaling`) also at the top level.

    transformers 5 saves them inside `rope_parameters` only, where mlx-lm's llama, olmo2, qwen2 and gemma2 do not look:
    they fall back to their defaults with no warning. Nested tables per layer type (gemma 3) are left as they are.
    """
    rope = config.get("rope_parameters") or {}
    if "rope_theta" not in rope:
        return dict(config)
    out = {**config, "rope_theta": rope["rope_theta"]}
    if rope.get("rope_type", "default") != "default":
        out["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    return out


def llama_config(shape: LlamaShape) -> dict[str, Any]:
    """`config.json` of a `LlamaForCausalLM` without biases, in float32."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": shape.bos,
        "dtype": "float32",
        "eos_token_id": shape.eos,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.context,
        "mlp_bias": False,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": shape.pad,
        "rms_norm_eps": shape.rms_eps,
        "rope_parameters": {"rope_theta": shape.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": shape.tied,
        "use_cache": True,
        "vocab_size": shape.vocab,
    }
    return top_level_rope(config)


def write_llama(
    folder: Path,
    shape: LlamaShape,
    tensors: dict[str, "np.ndarray"],
    tokenizer: "Tokenizer",
    template: str | None,
) -> None:
    """Write config, weights (one float32 safetensors file), tokenizer, chat template and generation config.

    Not atomic as a whole: the caller writes into a temporary folder and renames it.
    """
    from safetensors.numpy import save

    # transformers refuses a file whose metadata does not say who laid out the tensors
    files.write_bytes(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    files.write_json(folder / "config.json", llama_config(shape))
    specials = {"bos_token_id": shape.bos, "eos_token_id": shape.eos, "pad_token_id": shape.pad}
    files.write_json(folder / "generation_config.json", {k: v for k, v in specials.items() if v is not None})
    files.write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    names = {f"{k[:3]}_token": tokenizer.id_to_token(v) for k, v in specials.items() if v is not None}
    settings = {
        # the generic class: a model's own class rebuilds the pre-tokenizer and loses ours
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.context,
        "padding_side": "left",
        **names,
    }
    files.write_json(folder / "tokenizer_config.json", settings)
    if template is not None:
        files.write_text(folder / "chat_template.jinja", template)


def check_safetensors(path: Path) -> None:
    """Check a safetensors file against its own header, without reading the tensors.

    The format: 8 bytes little-endian header length, that many bytes of JSON, then the data; each tensor's offsets
    are relative to the data's start (github.com/huggingface/safetensors, "Format").

    Raises:
        UserError: the file is shorter or longer than its header says, or the header is not one.
    """
    found = path.stat().st_size
    again = "fetch or save the file again"
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise UserError(f"{path}: truncated: a safetensors file has at least 8 bytes, found {found}: {again}")
        length = int.from_bytes(head, "little")
        if length > 100_000_000:  # the format's own limit
            raise UserError(
                f"{path}: not a safetensors file: its first 8 bytes announce a {length}-byte header: {again}"
            )
        if length > found - 8:
            raise UserError(f"{path}: truncated: expected at least {8 + length} bytes (header), found {found}: {again}")
        raw = file.read(length)
    try:
        header = {name: entry for name, entry in json.loads(raw).items() if name != "__metadata__"}
        spans = sorted((*entry["data_offsets"], name) for name, entry in header.items())
        end = max((stop for _, stop, _ in spans), default=0)
        sizes = {name: DTYPE_BYTES.get(entry["dtype"], 0) * prod(entry["shape"]) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: corrupt safetensors header ({type(error).__name__}): {again}") from error
    if found != 8 + length + end:
        word = "truncated" if found < 8 + length + end else "too long"
        raise UserError(f"{path}: {word}: expected {8 + length + end} bytes, found {found}: {again}")
    position = 0
    for start, stop, name in spans:
        known = header[name]["dtype"] in DTYPE_BYTES
        if start != position or (known and stop - start != sizes[name]):
            raise UserError(f"{path}: corrupt safetensors header: tensor {name} has bytes {start}..{stop}: {again}")
        position = stop


def weight_files(folder: Path, where: str) -> list[Path]:
    """The safetensors files of a model folder, sorted by name; `where` opens the error messages.

    Raises:
        UserError: none there, only files of another format, or an index that names a file that is not there.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not an index of safetensors files: fetch it again") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"{where}: {len(missing)} of the {len(names)} weight files that {INDEX} lists are missing, "
                f"{missing[0]} first: fetch them into {folder}"
            )
        return [folder / name for name in names]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{where}: only pickled weights there ({pickles[0]}), which can run code when loaded: "
            f"save the model again with safetensors (save_pretrained writes {WEIGHTS})"
        )
    raise UserError(f"{where}: no weights in {folder}: expected {WEIGHTS} or {INDEX} with the files it lists")


def weights_sha256(paths: list[Path]) -> str:
    """Hex sha256 of one weight file, or of the JSON object {name: sha256} when there are several."""
    digests = {path.name: files.sha256_file(path) for path in paths}
    return next(iter(digests.values())) if len(digests) == 1 else files.sha256_json(digests)


def check_folder(folder: Path, where: str) -> list[Path]:
    """Check a model folder made elsewhere and return its weight files; nothing is loaded.

    Raises:
        UserError: no `config.json` or a malformed one, an adapter folder, no tokenizer, or weights that are missing,
            not safetensors, truncated or corrupt.
    """
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{where}: {folder} holds a LoRA adapter, not a model: to build on a run, name its config in [model] from"
        )
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"{where}: no config.json in {folder}: it is not a Hugging Face model folder")
    try:
        kind = json.loads(config.read_text()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{config}: not a JSON object ({error}): fetch it again") from error
    if not isinstance(kind, str):
        raise UserError(f"{config}: no model_type: it must name the architecture, such as 'llama'")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{where}: no tokenizer in {folder}: expected one of {', '.join(TOKENIZER_FILES)}")
    paths = weight_files(folder, where)
    for path in paths:
        check_safetensors(path)
    return paths
