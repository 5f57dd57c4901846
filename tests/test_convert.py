"""The packaged SmolLM2 file, converted: values, tokens and settings against references written here."""

import json
import re
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from rl import convert, files, hf_folder, models
from rl.errors import UserError


@pytest.fixture(scope="module")
def reader(smollm2) -> GGUFReader:
    return GGUFReader(smollm2.gguf)


@pytest.fixture(scope="module")
def weights(smollm2) -> dict[str, np.ndarray]:
    return load_file(smollm2.path / "model.safetensors")


def raw(reader: GGUFReader, name: str) -> np.ndarray:
    """A tensor's bytes as they lie in the file, one row of the matrix per row."""
    return next(tensor.data for tensor in reader.tensors if tensor.name == name)


def q4_1_row(packed: bytes) -> list[np.float32]:
    """Blocks of 20 bytes: fp16 scale, fp16 minimum, 16 bytes whose low nibbles are weights 0-15, high ones 16-31."""
    values = []
    for start in range(0, len(packed), 20):
        scale, least = (np.float32(v) for v in struct.unpack_from("<2e", packed, start))
        nibbles = packed[start + 4 : start + 20]
        values += [scale * np.float32(byte & 15) + least for byte in nibbles]
        values += [scale * np.float32(byte >> 4) + least for byte in nibbles]
    return values


def q8_0_row(packed: bytes) -> list[np.float32]:
    """Blocks of 34 bytes: fp16 scale, 32 signed bytes."""
    values = []
    for start in range(0, len(packed), 34):
        scale, *whole = struct.unpack_from("<e32b", packed, start)
        values += [np.float32(scale) * np.float32(v) for v in whole]
    return values


@pytest.mark.parametrize("layer", [0, 17, 29])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("ffn_down", "mlp.down_proj"), ("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj")],
)
def test_weights_are_exactly_the_files(reader, weights, layer, theirs, ours):
    packed = raw(reader, f"blk.{layer}.{theirs}.weight")
    found = weights[f"model.layers.{layer}.{ours}.weight"]
    assert found.dtype == np.float32
    for row in (0, 1, 100, len(packed) - 1):
        assert found[row].tolist() == q4_1_row(packed[row].tobytes())


@pytest.mark.parametrize(("theirs", "ours", "heads"), [("attn_q", "q_proj", 9), ("attn_k", "k_proj", 3)])
def test_rows_of_q_and_k_are_back_in_rotary_halves(reader, weights, theirs, ours, heads):
    """llama.cpp interleaves the halves of each head's rotary pairs: unnoticed, attention is scrambled."""
    packed = raw(reader, f"blk.5.{theirs}.weight")
    found = weights[f"model.layers.5.self_attn.{ours}.weight"]
    assert found.shape == (heads * 64, 576)
    for head in range(heads):
        for pair in (0, 1, 15, 31):
            for half in (0, 1):
                row = q4_1_row(packed[head * 64 + 2 * pair + half].tobytes())
                assert found[head * 64 + half * 32 + pair].tolist() == row


def test_embedding_and_norms_are_exactly_the_files(reader, weights):
    packed = raw(reader, "token_embd.weight")
    for token in (0, 2, 28, 49151):
        assert weights["model.embed_tokens.weight"][token].tolist() == q8_0_row(packed[token].tobytes())
    assert np.array_equal(weights["model.norm.weight"], raw(reader, "output_norm.weight"))
    ours = "model.layers.3.post_attention_layernorm.weight"
    assert np.array_equal(weights[ours], raw(reader, "blk.3.ffn_norm.weight"))
    assert len(weights) == 30 * 9 + 2  # the head is the embedding


def test_config_says_rope_theta_twice_and_ties_the_head(smollm2):
    """transformers reads `rope_parameters`, mlx-lm only the top level, and each has another default."""
    from transformers import AutoConfig

    stored = json.loads((smollm2.path / "config.json").read_text())
    assert stored["rope_theta"] == stored["rope_parameters"]["rope_theta"] == 100000.0
    loaded = AutoConfig.from_pretrained(smollm2.path)
    assert loaded.rope_parameters["rope_theta"] == 100000.0
    assert loaded.tie_word_embeddings
    assert np.float32(loaded.rms_norm_eps) == np.float32(1e-5)
    sizes = (loaded.num_hidden_layers, loaded.num_attention_heads, loaded.num_key_value_heads, loaded.head_dim)
    assert sizes == (30, 9, 3, 64)
    assert (loaded.vocab_size, loaded.max_position_embeddings) == (49152, 8192)


def test_top_level_rope_carries_scaling_and_leaves_others_alone():
    llama3 = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}}
    found = hf_folder.top_level_rope(llama3)
    assert found["rope_theta"] == 5e5
    assert found["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    gemma3 = {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}
    assert hf_folder.top_level_rope(gemma3) == gemma3
    assert hf_folder.top_level_rope({"rope_theta": 1.0}) == {"rope_theta": 1.0}


def test_base_record_holds_the_hashes(smollm2):
    record = json.loads((smollm2.path / "base.json").read_text())
    assert record["weights_sha256"] == smollm2.sha256 == files.sha256_file(smollm2.path / "model.safetensors")
    assert record["made_from"]["sha256"] == files.sha256_file(smollm2.gguf)
    assert record["made_from"]["file"] == smollm2.gguf.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert smollm2.path.name == "SmolLM2-135M-Instruct"


# --- tokens, against a byte-level BPE in plain Python


def byte_letters() -> dict[int, str]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the rest follow from U+0100."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


LETTERS = byte_letters()
# llama.cpp's rule for "smollm": each digit alone, then GPT-2's pattern on what is left
PIECES = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:_|[^\s\w])+|\s+(?!\S)|\s+")


def reference_tokens(text: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    tokens = []
    for chunk in re.split(r"(\d)", text):
        for piece in PIECES.findall(chunk):
            symbols = [LETTERS[byte] for byte in piece.encode()]
            while pairs := [pair for pair in pairwise(symbols) if pair in ranks]:
                best, merged, i = min(pairs, key=ranks.__getitem__), [], 0
                while i < len(symbols):
                    both = tuple(symbols[i : i + 2]) == best
                    merged.append("".join(best) if both else symbols[i])
                    i += 2 if both else 1
                symbols = merged
            tokens += symbols
    return tokens


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return models.load_tokenizer(smollm2)


@pytest.fixture(scope="module")
def ranks(reader) -> dict[tuple[str, str], int]:
    merges = reader.get_field("tokenizer.ggml.merges").contents()
    return {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}


@given(st.text(alphabet="0123456789 \n\taeiTthesd'.,+-*=_?é", max_size=40))
@example("a  12")  # GPT-2's own split gives the second space to the number
@example("x =\n    1234")
@example("What is 50 + 9 =?")
def test_text_splits_as_the_model_was_trained_digit_by_digit(tokenizer, ranks, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == reference_tokens(text, ranks)
    assert tokenizer.decode(ids) == text


def test_special_tokens_and_chat_template_are_the_files(tokenizer, reader):
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.padding_side) == (2, 2, "left")
    assert len(tokenizer) == 49152
    assert tokenizer("<|im_start|>1<|im_end|>").input_ids == [1, tokenizer.convert_tokens_to_ids("1"), 2]
    assert tokenizer.chat_template == reader.get_field("tokenizer.chat_template").contents()
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"


def test_the_converted_model_can_add_and_knows_paris(smollm2, tokenizer):
    model = models.load_policy(smollm2, "float32", "cpu")
    for prompt, answer in (("1 + 2 = 3\n5 + 4 = 9\n2 + 3 =", " 5"), ("The capital of France is", " Paris")):
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, inputs.input_ids.shape[1] :]
        assert tokenizer.decode(out).startswith(answer)


# --- files that are refused


def small_gguf(path: Path, **changes: object) -> Path:
    """A Llama of one layer in GGUF with the changes given; `extra` and `drop` name a tensor to add or leave out."""
    values = {"architecture": "llama", "pre": "smollm", "scaling": None, "extra": None, "drop": None, "add_bos": False}
    values |= changes
    writer = GGUFWriter(path, values["architecture"])
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500.0)
    if values["scaling"]:
        writer.add_string("llama.rope.scaling.type", values["scaling"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(values["pre"])
    writer.add_token_list(["<s>", "</s>", "a", "b", "1", "ab"])
    writer.add_token_types([3, 3, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(values["add_bos"])
    random = np.random.default_rng(0)
    shapes = {"token_embd.weight": (6, 8), "output_norm.weight": (8,), "output.weight": (6, 8)}
    for name, shape in {
        "attn_norm": (8,),
        "attn_q": (8, 8),
        "attn_k": (4, 8),
        "attn_v": (4, 8),
        "attn_output": (8, 8),
        "ffn_norm": (8,),
        "ffn_gate": (16, 8),
        "ffn_up": (16, 8),
        "ffn_down": (8, 16),
    }.items():
        shapes[f"blk.0.{name}.weight"] = shape
    shapes |= {values["extra"]: (8,)} if values["extra"] else {}
    for name, shape in shapes.items():
        if name != values["drop"]:
            writer.add_tensor(name, random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_of_ones_own_is_converted(make_config, tmp_path):
    """An untied head, BOS added, pad taken from EOS, and two files of one name in two folders."""
    source = small_gguf(tmp_path / "mine.gguf", add_bos=True)
    base = models.resolve_base(make_config("mine.gguf"), tmp_path)
    assert base.gguf == source
    assert base.path.name == f"mine-{files.sha256_file(source)[:8]}"
    tokenizer = models.load_tokenizer(base)
    assert tokenizer("ab1</s>").input_ids == [0, 5, 4, 1]
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 1)
    model = models.load_policy(base, "float32", "cpu")
    assert model.config.rope_parameters["rope_theta"] == 500.0
    head = next(tensor.data for tensor in GGUFReader(source).tensors if tensor.name == "output.weight")
    assert np.array_equal(model.lm_head.weight.detach().numpy(), head)
    assert not np.array_equal(model.model.embed_tokens.weight.detach().numpy(), head)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2': only 'llama' files"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken': only 'gpt2' with one of gpt-2, smollm"),
        ({"scaling": "yarn"}, "llama.rope.scaling.type is 'yarn'"),
        ({"extra": "rope_freqs.weight"}, "tensor rope_freqs.weight is not one of a plain Llama's"),
        ({"extra": "blk.0.attn_q.bias"}, "tensor blk.0.attn_q.bias is not one of a plain Llama's"),
        ({"drop": "blk.0.ffn_up.weight"}, "11 tensors found, 12 expected"),
    ],
)
def test_gguf_files_that_are_not_plain_llamas_are_refused(make_config, tmp_path, changes, found):
    small_gguf(tmp_path / "mine.gguf", **changes)
    with pytest.raises(UserError, match=re.escape(found)) as error:
        models.resolve_base(make_config("mine.gguf"), tmp_path)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["mine.gguf"]


@pytest.mark.parametrize("kept", [0, 3, 100, 400, 2000])
def test_a_truncated_gguf_is_refused(make_config, tmp_path, kept):
    path = small_gguf(tmp_path / "mine.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=f"not a whole GGUF file \\({kept} bytes found"):
        models.resolve_base(make_config("mine.gguf"), tmp_path)


def test_unpermute_inverts_the_writers_permutation():
    """llama.cpp's writer, in one line: halves of each head become neighbours."""
    rows = np.arange(3 * 8 * 5).reshape(24, 5)
    written = rows.reshape(3, 2, 4, 5).swapaxes(1, 2).reshape(24, 5)
    assert not np.array_equal(written, rows)
    assert np.array_equal(convert.unpermute(written, 3), rows)
