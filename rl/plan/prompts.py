"""The longest prompt of a config, counted in its own rows by its own tokenizer: no run is refused on an assumption."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.errors import UserError
from rl.models import PACKAGED, packaged_gguf
from rl.plan.architecture import cached_config

if TYPE_CHECKING:
    from rl.config import Config

HERE = ("arithmetic", "reasoning-gym", "jsonl")  # sources whose rows are made or read on this machine


def longest(config: "Config", root: Path) -> int | None:
    """Tokens of the longest prompt, chat template included; None where rows or tokenizer cannot be had here, or tools
    stand in the prompt too. Writes and fetches nothing."""
    data = config.data
    sources = {part.source for part in data.mix or ()} or {data.source}
    if config.model.base == "tiny":  # its tokens are characters, which the plan has counted
        return None
    if data.from_ is not None or config.rollout.tools or not sources <= set(HERE):
        return None
    from rl import data as rows_of

    try:
        tokenizer = _tokenizer(config, root)
        if tokenizer is None:
            return None
        rows = rows_of.build(config)
        return max(
            rows_of.prompt_tokens(row, tokenizer, str(config.path), None) for row in (*rows.train, *rows.heldout)
        )
    except (UserError, OSError, ValueError):
        return None  # what is wrong is said better where the run loads it


def _tokenizer(config: "Config", root: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    base = config.model.base
    if base is None:
        from rl.config import load

        return _tokenizer(load(config.path.parent / str(config.model.from_)), root)
    if base == PACKAGED:
        from rl.convert import build_tokenizer, read_gguf

        gguf = packaged_gguf(str(config.path))
        told = read_gguf(gguf)[1]
        template = told.get("tokenizer.chat_template")
        return PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(gguf, told), chat_template=template)
    cached = cached_config(base)
    folder = next((f for f in (root / base, *([cached.parent] if cached else [])) if f.is_dir()), None)
    return None if folder is None else AutoTokenizer.from_pretrained(folder, local_files_only=True)
