"""A policy as one GGUF file, which llama.cpp, Ollama and LM Studio open.

Sources: the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md) for names and metadata; llama.cpp's
`convert_hf_to_gguf.py` for what it expects of each architecture. Names, the order of q and k rows and pre-tokenizers
are those of `rl.convert`, which reads such files.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rl import convert
from rl.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedTokenizerBase

Kind = Literal["float32", "float16", "q8_0"]
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # transformers' model_type is GGUF's name of these
BLOCK = 32  # numbers that share a scale in Q8_0; a row of another length stays float16
NO_MERGE = "Ā Ā"  # two bytes 0, which no text holds
INSTEAD = "take --to safetensors, or --to mlx"


def check(config: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", run: str) -> None:
    """Refuse by name what this writer has no rule for; `config` is of config.json.

    Raises UserError: an architecture, activation, RoPE, bias or window that is not written, or an unknown tokenizer.
    """
    family = config.get("model_type")
    if family not in ARCHITECTURES:
        valid = f"valid for gguf: {', '.join(ARCHITECTURES)}"
        raise UserError(f"{run}: its model is of the {family!r} family, {valid}; {INSTEAD}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    odd = {
        f"RoPE of type {kind!r}": kind != "default",
        "a sliding window": family != "llama" and bool(config.get("use_sliding_window")),
        "biases in its attention": family != "qwen2" and bool(config.get("attention_bias")),
        "biases in its feed-forward layers": bool(config.get("mlp_bias")),
        f"hidden_act {config.get('hidden_act')!r}": config.get("hidden_act", "silu") != "silu",
    }
    found = next((what for what, there in odd.items() if there), None)
    if found:
        raise UserError(f"{run}: its model ({family}) has {found}, which is not written as gguf; {INSTEAD}")
    vocabulary(tokenizer, run)


def write(
    path: Path,
    config: dict[str, Any],
    named: Iterable[tuple[str, "torch.Tensor"]],
    tokenizer: "PreTrainedTokenizerBase",
    kind: Kind,
    run: str,
) -> None:
    """Write `path`: metadata, tokenizer and the tensors `named` (merged, under transformers' names).

    Norms and biases stay float32, as llama.cpp wants them. Raises UserError as `check` does, and for a tensor that has
    no place in the file or does not fit float16.
    """
    import gguf

    check(config, tokenizer, run)
    writer = gguf.GGUFWriter(None, config["model_type"])
    _describe(writer, config, kind, run)
    _add_tokenizer(writer, config, tokenizer, run)
    for name, tensor in named:
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        own = convert.gguf_name(name)
        if own is None:
            raise UserError(f"{run}: tensor {name} has no place in a GGUF file of a {config['model_type']}; {INSTEAD}")
        values, raw = _stored(_ordered(name, tensor, config), kind, f"{run}: {name}")
        writer.add_tensor(own, values, raw_dtype=raw)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def modelfile(file: str, chat: bool) -> str:
    """Ollama's Modelfile beside `file`. A model without a chat template is asked with the bare prompt."""
    return f"FROM ./{file}\n" + ("" if chat else 'TEMPLATE "{{ .Prompt }}"\n')


def _ordered(name: str, tensor: "torch.Tensor", config: dict[str, Any]) -> "np.ndarray":
    """A tensor's float32 values with q and k rows as the architecture's files have them: only Llama's interleave."""
    values = tensor.detach().float().cpu().numpy()
    if config["model_type"] != "llama":
        return values
    heads = config["num_attention_heads"]
    rows = {"q_proj": heads, "k_proj": config.get("num_key_value_heads", heads)}
    part = name.split(".")[-2] if name.count(".") > 1 else ""
    return convert.permute(values, rows[part]) if part in rows else values


def _stored(values: "np.ndarray", kind: Kind, where: str) -> tuple["np.ndarray", Any]:
    """The values as they go into the file, and their GGUF type where numpy has none for it."""
    import gguf
    import numpy as np

    values = np.ascontiguousarray(values)
    if values.ndim == 1 or kind == "float32":
        return values, None
    if kind == "q8_0" and values.shape[-1] % BLOCK == 0:
        q8 = gguf.GGMLQuantizationType.Q8_0
        return gguf.quantize(values, q8), q8
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise UserError(f"{where}: holds values beyond float16's; take --dtype float32")
    return half, None


def _describe(writer: Any, config: dict[str, Any], kind: Kind, run: str) -> None:
    import gguf

    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    types = gguf.LlamaFileType
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(run)
    writer.add_file_type({"float32": types.ALL_F32, "float16": types.MOSTLY_F16, "q8_0": types.MOSTLY_Q8_0}[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(float(rope.get("rope_theta", config.get("rope_theta", 10000.0))))
    if config["model_type"] == "llama":
        writer.add_rope_dimension_count(head_dim)


def _add_tokenizer(writer: Any, config: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", run: str) -> None:
    pre, tokens, types, merges = vocabulary(tokenizer, run)
    # llama.cpp wants a text for each row of the embedding, which may have more than there are tokens, and no others
    rows = config["vocab_size"]
    tokens, types, spare = tokens[:rows], types[:rows], range(len(tokens), rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *(f"[PAD{i}]" for i in spare)])
    writer.add_token_types([*types, *(convert.UNUSED for _ in spare)])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    for add, i in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if i is not None and i < rows:
            add(i)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def vocabulary(tokenizer: "PreTrainedTokenizerBase", run: str) -> tuple[str, list[str], list[int], list[str]]:
    """llama.cpp's name of the pre-tokenizer; token texts, token types by id; merges.

    A vocabulary without merges gets one that does nothing: llama.cpp wants the list. Raises UserError for a tokenizer
    that is not byte-level BPE with a known pre-tokenizer.
    """
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    model, named = made["model"], f"{run}: its tokenizer"
    if model["type"] != "BPE":
        raise UserError(f"{named} is of type {model['type']}, valid for gguf: byte-level BPE; {INSTEAD}")
    pre = _pre(made, named)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    added = {entry["content"]: entry for entry in made["added_tokens"]}
    by_id = {i: text for text, i in model["vocab"].items()} | {entry["id"]: text for text, entry in added.items()}
    if sorted(by_id) != list(range(len(by_id))):
        raise UserError(f"{named} has gaps between its token ids, which is not written as gguf; {INSTEAD}")
    tokens = [by_id[i] for i in range(len(by_id))]
    return pre, tokens, [_kind(added.get(text)) for text in tokens], merges or [NO_MERGE]


def _pre(made: dict[str, Any], named: str) -> str:
    """Which of llama.cpp's pre-tokenizers a BPE tokenizer has."""
    from tokenizers import Tokenizer, models

    if (made.get("normalizer") or {"type": "NFC"})["type"] != "NFC":  # llama.cpp reads text as it is
        raise UserError(f"{named} normalizes text by {made['normalizer']['type']}, not written as gguf; {INSTEAD}")
    for name in convert.PRE_TOKENIZERS:
        known = Tokenizer(models.BPE())
        known.pre_tokenizer = convert.pre_tokenizer(name)
        if _rule(json.loads(known.to_str())["pre_tokenizer"]) == _rule(made["pre_tokenizer"]):
            return name
    known = ", ".join(convert.PRE_TOKENIZERS)
    raise UserError(f"{named} cuts text by a rule that is none of llama.cpp's {known}; {INSTEAD}")


def _rule(part: Any) -> Any:
    """A pre-tokenizer without what changes no token: where offsets lie."""
    if isinstance(part, dict):
        return {key: _rule(value) for key, value in part.items() if key != "trim_offsets"}
    return [_rule(value) for value in part] if isinstance(part, list) else part


def _kind(added: dict[str, Any] | None) -> int:
    if added is None:
        return convert.NORMAL
    return convert.CONTROL if added["special"] else convert.USER_DEFINED
