"""The tiny model: a character-level Llama with random weights, for tests and for comparing algorithms in minutes."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rl.errors import UserError
from rl.hf_folder import LlamaShape, write_llama

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    from rl.config import TinyModel

PAD, EOS = "<pad>", "<eos>"
CONTEXT = 1024  # tokens; rotary positions cost no weights


def char_tokenizer(alphabet: str) -> "Tokenizer":
    """One token per character: <pad> is 0, <eos> is 1, then the alphabet in order; decoding adds no spaces.

    A character outside the alphabet makes encoding raise, rather than vanish from the prompt.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate((PAD, EOS, *alphabet))}
    # no unknown token: the model below raises on what it does not hold
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<none>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (PAD, EOS)])
    return tokenizer


def is_character_level(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether it is such a tokenizer, also one that a run has saved."""
    from tokenizers.models import WordLevel

    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    return isinstance(model, WordLevel) and all(len(word) == 1 for word in words)


def check_text(tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str], where: str) -> None:
    """Refuse texts with characters the tiny model's alphabet lacks; `where` opens the error message.

    Raises:
        UserError: names the characters.
    """
    missing = sorted(set().union(*texts) - set(tokenizer.get_vocab()))
    more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
    if missing:
        raise UserError(
            f"{where}: the data holds {' '.join(map(repr, missing[:10]))}{more}, which the tiny model has no token "
            "for: add them to [model.tiny] alphabet (of the run it starts from), or take a model with words"
        )


def shape_of(tiny: "TinyModel", where: str) -> LlamaShape:
    """The Llama that `[model.tiny]` asks for; `where` opens the error messages.

    Raises:
        UserError: sizes that do not make a Llama, or an alphabet that is empty or repeats a character.
    """
    if tiny.heads < 1 or tiny.hidden % (2 * tiny.heads):
        raise UserError(
            f"{where}: [model.tiny] hidden = {tiny.hidden} must be a multiple of 2 × heads ({tiny.heads}): "
            "rotary positions turn pairs of numbers in each head"
        )
    repeated = sorted({char for char in tiny.alphabet if tiny.alphabet.count(char) > 1})
    if repeated or not tiny.alphabet:
        found = f"repeats {''.join(repeated)!r}" if repeated else "is empty"
        raise UserError(f"{where}: [model.tiny] alphabet {found}: give each character once")
    return LlamaShape(
        vocab=len(tiny.alphabet) + 2,
        hidden=tiny.hidden,
        intermediate=tiny.intermediate,
        layers=tiny.layers,
        heads=tiny.heads,
        kv_heads=tiny.heads,
        head_dim=tiny.hidden // tiny.heads,
        context=CONTEXT,
        rope_theta=10000.0,
        rms_eps=1e-5,
        tied=True,
        bos=None,
        eos=1,
        pad=0,
    )


def write_tiny(folder: Path, tiny: "TinyModel", seed: int, where: str = "tiny model") -> None:
    """Write a Hugging Face folder of the tiny model with transformers' own initial weights for `seed`.

    torch's global random state is left as it was.

    Raises:
        UserError: see `shape_of`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rl.hf_folder import llama_config

    shape = shape_of(tiny, where)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**llama_config(shape)))
    # the head is the embedding: one name for one tensor, as transformers saves it
    tensors = {name: value.numpy() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    write_llama(folder, shape, tensors, char_tokenizer(tiny.alphabet), template=None)
