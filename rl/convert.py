"""A GGUF file of the Llama family, turned into a Hugging Face folder that holds exactly the file's values.

`rl/export/gguf_file.py` goes the other way with the names, the order of rows and the pre-tokenizers kept here.
Sources: the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md) for names and metadata; llama.cpp's
`convert_hf_to_gguf.py` for the order of q and k rows and `llama-vocab.cpp` for the pre-tokenizers. transformers' own
GGUF loading gives the same weights but takes 20 s for SmolLM2 and splits text differently: for this file's
pre-tokenizer it has no rule and falls back to GPT-2's, so "a  12" becomes other tokens than the model was trained on.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.errors import UserError
from rl.hf_folder import LlamaShape, write_llama

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from tokenizers import Tokenizer

# GGUF tensor name -> transformers name; {i} is the layer
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
# what Qwen's layers have beside those, only written
QWEN_LAYER = {
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
}
PRE_TOKENIZERS = ("gpt-2", "smollm", "qwen2", "llama-bpe")  # the ones whose splits are tested
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # GGUF token types; CONTROL and USER_DEFINED are kept whole in text
# Qwen 2's and Llama 3's rule differ in how many digits make one piece (llama.cpp's llama-vocab.cpp)
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def unpermute[Rows](rows: Rows, heads: int) -> Rows:
    """Undo llama.cpp's reordering of the rows of q_proj and k_proj, in numpy or in mlx.

    Shapes: [heads × head_dim, n] in and out. The file interleaves the two halves of each head's rotary pairs (row
    2j + s of a head holds row s × head_dim/2 + j); transformers and mlx-lm rotate halves.
    """
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def permute[Rows](rows: Rows, heads: int) -> Rows:
    """The inverse of `unpermute`: q and k rows in the order that a GGUF file of a Llama has them."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(rows.shape)


def gguf_name(name: str) -> str | None:
    """The GGUF name of a Llama's or Qwen's tensor by its transformers name, or None when they have no such tensor."""
    if name.startswith("model.layers."):
        _, _, layer, rest = name.split(".", 3)
        return next((f"blk.{layer}.{own}" for own, hf in (LAYER | QWEN_LAYER).items() if hf == rest), None)
    return next((own for own, hf in OUTER.items() if hf == name), None)


def hf_name(name: str) -> str | None:
    """The transformers name of a Llama's GGUF tensor, or None when Llamas have no such tensor."""
    if name.startswith("blk."):
        _, layer, rest = name.split(".", 2)
        return f"model.layers.{layer}.{LAYER[rest]}" if rest in LAYER else None
    return OUTER.get(name)


def read_gguf(path: Path) -> tuple["GGUFReader", dict[str, Any]]:
    """Open a GGUF file; returns the reader (tensors are mapped, not read) and its metadata.

    Raises:
        UserError: not a GGUF file, truncated, or of another architecture than llama.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        size = path.stat().st_size
        raise UserError(f"{path}: not a whole GGUF file ({size} bytes found; {error}): fetch it again") from error
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UserError(
            f"{path}: a GGUF file of architecture {architecture!r}: only 'llama' files are converted, "
            "take the model's Hugging Face folder instead"
        )
    return reader, metadata


def shape_of(path: Path, metadata: dict[str, Any], tied: bool) -> LlamaShape:
    """The sizes in a Llama's GGUF metadata.

    Raises:
        UserError: a size is missing, or the rotary frequencies are scaled (a Llama this converter does not know).
    """
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise UserError(
            f"{path}: llama.rope.scaling.type is {scaling!r}: only files without it are converted, "
            "take the model's Hugging Face folder instead"
        )
    try:
        heads, hidden = metadata["llama.attention.head_count"], metadata["llama.embedding_length"]
        eos = metadata["tokenizer.ggml.eos_token_id"]
        return LlamaShape(
            vocab=len(metadata["tokenizer.ggml.tokens"]),
            hidden=hidden,
            intermediate=metadata["llama.feed_forward_length"],
            layers=metadata["llama.block_count"],
            heads=heads,
            kv_heads=metadata.get("llama.attention.head_count_kv", heads),
            head_dim=metadata.get("llama.attention.key_length", hidden // heads),
            context=metadata["llama.context_length"],
            rope_theta=metadata.get("llama.rope.freq_base", 10000.0),
            rms_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
            tied=tied,
            bos=metadata.get("tokenizer.ggml.bos_token_id"),
            eos=eos,
            pad=metadata.get("tokenizer.ggml.padding_token_id", eos),
        )
    except KeyError as error:
        raise UserError(
            f"{path}: the GGUF metadata has no {error.args[0]}: take the model's Hugging Face folder instead"
        ) from error


def pre_tokenizer(name: str) -> Any:
    """How a byte-level BPE tokenizer cuts text into pieces, by llama.cpp's name (one of PRE_TOKENIZERS)."""
    from tokenizers import Regex, pre_tokenizers

    if name in ("qwen2", "llama-bpe"):
        cut = Regex(_PIECES % ("{1,3}" if name == "llama-bpe" else ""))
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([pre_tokenizers.Split(cut, behavior="isolated"), bytes_only])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)  # numbers are read one digit at a time
    return pre_tokenizers.Sequence([digits, byte_level]) if name == "smollm" else byte_level


def build_tokenizer(path: Path, metadata: dict[str, Any]) -> "Tokenizer":
    """The byte-level BPE tokenizer that a GGUF file describes.

    Raises:
        UserError: another kind of tokenizer, or a pre-tokenizer whose rule is not known here.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UserError(
            f"{path}: tokenizer {kind!r} with pre-tokenizer {pre!r}: only 'gpt2' with one of "
            f"{', '.join(PRE_TOKENIZERS)} is converted, take the model's Hugging Face folder instead"
        )
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    merges = [(a, b) for a, b in merges if a + b in vocab]  # llama.cpp wants at least one, so some do nothing
    whole_words = pre == "llama-bpe"  # a piece that is a token is not taken apart
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole_words))
    tokenizer.pre_tokenizer = pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    whole = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(t, special=kind == CONTROL, normalized=False) for t, kind in whole])
    if metadata.get("tokenizer.ggml.add_bos_token", False):
        bos = metadata["tokenizer.ggml.bos_token_id"]
        template = f"{tokens[bos]}:0 $A:0"
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[(tokens[bos], bos)])
    return tokenizer


def dequantized(reader: "GGUFReader", path: Path, heads: int, kv_heads: int) -> dict[str, "np.ndarray"]:
    """Every tensor of a Llama's GGUF file in float32, under its transformers name, q and k rows in that order.

    Raises:
        UserError: a tensor that a plain Llama does not have (biases, experts, rotary factors).
    """
    import numpy as np
    from gguf import dequantize

    permuted = {"self_attn.q_proj.weight": heads, "self_attn.k_proj.weight": kv_heads}
    tensors = {}
    for tensor in reader.tensors:
        name = hf_name(tensor.name)
        if name is None:
            raise UserError(
                f"{path}: tensor {tensor.name} is not one of a plain Llama's: "
                "take the model's Hugging Face folder instead"
            )
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        head_count = permuted.get(name.split(".", 3)[-1])
        tensors[name] = np.ascontiguousarray(unpermute(values, head_count) if head_count else values)
    return tensors


def gguf_to_folder(path: Path, folder: Path) -> None:
    """Write the model in the GGUF file `path` as a Hugging Face folder: float32 weights, tokenizer, chat template.

    Raises:
        UserError: see the functions above; also when layers are missing.
    """
    reader, metadata = read_gguf(path)
    shape = shape_of(path, metadata, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    tokenizer = build_tokenizer(path, metadata)
    tensors = dequantized(reader, path, shape.heads, shape.kv_heads)
    expected = len(LAYER) * shape.layers + len(OUTER) - shape.tied
    if len(tensors) != expected:
        raise UserError(f"{path}: {len(tensors)} tensors found, {expected} expected: fetch the file again")
    write_llama(folder, shape, tensors, tokenizer, metadata.get("tokenizer.chat_template"))
