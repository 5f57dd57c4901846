"""The tokenizer of an export: the run's own, or for the tiny model one that takes any text, as other tools expect."""

import json
from typing import Any

from rl.tiny import EOS, PAD


def portable(tokenizer: Any) -> Any:
    """`tokenizer`, or where it is the tiny model's (single ASCII characters, an error for any other) the same tokens as
    byte-level BPE without merges: mlx-lm and llama.cpp try texts of their own on it, and characters that it lacks are
    left out there. Other tokenizers come back as they are.
    """
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = made["model"].get("vocab")
    if made["model"]["type"] != "WordLevel" or not all(t in (PAD, EOS) or _ascii(t) for t in vocab):
        return tokenizer
    from gguf.vocab import bytes_to_unicode
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    from rl.convert import pre_tokenizer

    letter = bytes_to_unicode()  # the letter that stands for each byte in a byte-level vocabulary
    renamed = {text if text in (PAD, EOS) else letter[ord(text)]: i for text, i in vocab.items()}
    own = Tokenizer(models.BPE(vocab=renamed, merges=[]))
    own.pre_tokenizer, own.decoder = pre_tokenizer("gpt-2"), decoders.ByteLevel()
    own.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (PAD, EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=own,
        pad_token=PAD,
        eos_token=EOS,
        padding_side=tokenizer.padding_side,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
    )


def _ascii(text: str) -> bool:
    return len(text) == 1 and text.isascii()
