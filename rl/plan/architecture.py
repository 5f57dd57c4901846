"""Sizes of a decoder from its `config.json`: parameters by kind, and what a token takes.

The table of known models holds figures of the models' public config.json files on huggingface.co (Qwen, meta-llama,
HuggingFaceTB, google), so that a hub model can be planned before it is there. tests/test_plan.py holds the totals
against those that the model cards give.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.errors import UserError

if TYPE_CHECKING:
    from rl.config import Config

FAMILIES = ("llama", "mistral", "smollm3", "qwen2", "qwen3", "gemma3_text")
# quantities of SmolLM2-135M-Instruct, which comes in a package as GGUF, without a config.json
PACKAGED = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes in elements; `head_dim` of one attention head, `context` in tokens."""

    family: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    context: int
    windows: int = 0  # layers that see a sliding window only
    window: int = 0

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together, and of the value heads."""
        return self.kv_heads * self.head_dim

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normed a head at a time."""
        return self.family in ("qwen3", "gemma3_text")

    @property
    def norms(self) -> int:
        """Norms of the width of the residual stream in a layer."""
        return 4 if self.family == "gemma3_text" else 2

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear module of a layer."""
        return {
            "q_proj": (self.hidden, self.queries),
            "k_proj": (self.hidden, self.keys),
            "v_proj": (self.hidden, self.keys),
            "o_proj": (self.queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def matrix(self) -> int:
        """Parameters in the linear modules of all layers."""
        return self.layers * sum(a * b for a, b in self.linears.values())

    @property
    def embedding(self) -> int:
        """Parameters of one vocabulary matrix."""
        return self.vocab * self.hidden

    @property
    def small(self) -> int:
        """Parameters of norms and biases, which are never quantized."""
        biases = self.queries + 2 * self.keys if self.family == "qwen2" else 0
        heads = 2 * self.head_dim if self.qk_norm else 0
        return self.layers * (self.norms * self.hidden + heads + biases) + self.hidden

    @property
    def parameters(self) -> int:
        """All parameters, a tied head counted once."""
        return self.matrix + self.small + self.embedding * (1 if self.tied else 2)

    @property
    def head(self) -> int:
        """Parameters of a head that is not the embedding's own matrix."""
        return 0 if self.tied else self.embedding

    def adapter(self, rank: int, targets: tuple[str, ...], layers: int | None) -> int:
        """Parameters of A and B of a LoRA of `rank` on the `targets` of the top `layers` (all where None)."""
        pairs = [self.linears[t] for t in targets if t in self.linears]
        return rank * sum(a + b for a, b in pairs) * min(self.layers, layers or self.layers)


def from_config(told: dict[str, Any], where: str) -> Architecture:
    """Sizes from the contents of a `config.json`; `where` opens the error messages.

    Raises UserError for a family whose parameters are not known here, and for settings that are missing.
    """
    family = told.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{where}: found model_type {family!r}, the planner knows {', '.join(FAMILIES)}")
    try:
        heads, layers = told["num_attention_heads"], told["num_hidden_layers"]
        window = told.get("sliding_window") or 0
        return Architecture(
            family=family,
            vocab=told["vocab_size"],
            hidden=told["hidden_size"],
            intermediate=told["intermediate_size"],
            layers=layers,
            heads=heads,
            kv_heads=told.get("num_key_value_heads") or heads,
            head_dim=told.get("head_dim") or told["hidden_size"] // heads,
            # transformers' own defaults, where the file leaves them out
            tied=told.get("tie_word_embeddings", family in ("gemma3_text", "smollm3")),
            context=told.get("max_position_embeddings", 0),
            windows=_windows(told, family, layers) if window else 0,
            window=window,
        )
    except KeyError as error:
        raise UserError(f"{where}: no {error.args[0]} there: it must be a Hugging Face model's config.json") from error


def find(config: "Config", root: Path) -> Architecture:
    """The architecture that `[model]` starts from; nothing is loaded, fetched or written.

    Looked for in this order: the tiny and the packaged model, a folder, a run's result, the hub's cache on this
    machine, the table of known models. Raises UserError for what is nowhere there.
    """
    base = config.model.base
    where = f"{config.path}: [model] base = {base!r}"
    if base is None:
        from rl.config import load

        return find(load(config.path.parent / str(config.model.from_)), root)
    if base == "tiny":
        return _tiny(config)
    if base == "smollm2-135m-instruct":
        return known(PACKAGED)
    folder = root / Path(base).expanduser()
    cached = cached_config(base)
    for path in (folder / "config.json", *([cached] if cached else [])):
        if path.is_file():
            try:
                return from_config(json.loads(path.read_text()), str(path))
            except ValueError as error:
                raise UserError(f"{path}: not JSON ({error}): fetch it again") from error
    for name in KNOWN:  # by its id, or the folder that configs/mac/README.md makes of a model that also sees pictures
        if base == name or Path(base).name == f"{name.split('/')[1]}-text":
            return known(name)
    raise UserError(
        f"{where}: cannot be planned: no config.json in {folder}, none in the hub's cache, and not one of the models "
        f"known by name ({', '.join(sorted(KNOWN))}): fetch its config.json, or train with --force"
    )


def converted(config: "Config", root: Path) -> bool:
    """Whether an earlier run has made the quantized base that `config` asks for (`rl.start.find` names its folder)."""
    base, quantization = config.model.base, config.model.quantization
    if base is None or base == "tiny" or quantization is None:
        return False
    cached = cached_config(base)
    name = PACKAGED if base == "smollm2-135m-instruct" else base
    ending = f"-q{quantization.bits}g{quantization.group_size}"
    names = [Path(name).name, *([cached.parent.name] if cached else [])]
    return any((root / "models" / "base" / f"{own}{ending}").is_dir() for own in names)


def known(name: str) -> Architecture:
    """One of the models in the table; instruction-tuned ones have the sizes of their base."""
    return from_config(config_json(name), name)


def config_json(name: str) -> dict[str, Any]:
    """What the `config.json` of a known model says, as far as sizes and RoPE go."""
    family, hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, tied, context = KNOWN[name]
    told = {
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": context,
    }
    if family == "gemma3_text":
        told |= {"sliding_window": 512 if hidden == 1152 else 1024, "sliding_window_pattern": 6}
    return told


def _windows(told: dict[str, Any], family: str, layers: int) -> int:
    kinds = told.get("layer_types")
    if kinds is not None:
        return sum(kind == "sliding_attention" for kind in kinds)
    if family == "gemma3_text":
        pattern = told.get("sliding_window_pattern", 6)
        return sum((i + 1) % pattern != 0 for i in range(layers))
    return layers if family == "mistral" else 0


def _tiny(config: "Config") -> Architecture:
    from rl.config import TinyModel

    tiny = config.model.tiny or TinyModel()
    return Architecture(
        family="llama",
        vocab=len(tiny.alphabet) + 2,
        hidden=tiny.hidden,
        intermediate=tiny.intermediate,
        layers=tiny.layers,
        heads=tiny.heads,
        kv_heads=tiny.heads,
        head_dim=tiny.hidden // tiny.heads,
        tied=True,
        context=1024,
    )


def cached_config(base: str) -> Path | None:
    """`config.json` of a hub id in the hub's cache, where a model has been fetched before."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    found = sorted((hub / f"models--{base.replace('/', '--')}" / "snapshots").glob("*/config.json"))
    return found[-1] if found else None


# family, hidden, intermediate, layers, heads, key-value heads, head width, vocabulary, tied head, context
KNOWN: dict[str, tuple[str, int, int, int, int, int, int, int, bool, int]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama", 576, 1536, 30, 9, 3, 64, 49152, True, 8192),
    "HuggingFaceTB/SmolLM2-360M-Instruct": ("llama", 960, 2560, 32, 15, 5, 64, 49152, True, 8192),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": ("llama", 2048, 8192, 24, 32, 32, 64, 49152, True, 8192),
    "HuggingFaceTB/SmolLM3-3B": ("smollm3", 2048, 11008, 36, 16, 4, 128, 128256, True, 65536),
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True, 32768),
    "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True, 32768),
    "Qwen/Qwen2.5-3B-Instruct": ("qwen2", 2048, 11008, 36, 16, 2, 128, 151936, True, 32768),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False, 32768),
    "Qwen/Qwen2.5-14B-Instruct": ("qwen2", 5120, 13824, 48, 40, 8, 128, 152064, False, 32768),
    "Qwen/Qwen2.5-32B-Instruct": ("qwen2", 5120, 27648, 64, 40, 8, 128, 152064, False, 32768),
    "Qwen/Qwen2.5-72B-Instruct": ("qwen2", 8192, 29568, 80, 64, 8, 128, 152064, False, 32768),
    "Qwen/Qwen3-0.6B": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True, 40960),
    "Qwen/Qwen3-1.7B": ("qwen3", 2048, 6144, 28, 16, 8, 128, 151936, True, 40960),
    "Qwen/Qwen3-4B": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True, 40960),
    "Qwen/Qwen3-8B": ("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False, 40960),
    "Qwen/Qwen3-14B": ("qwen3", 5120, 17408, 40, 40, 8, 128, 151936, False, 40960),
    "Qwen/Qwen3-32B": ("qwen3", 5120, 25600, 64, 64, 8, 128, 151936, False, 40960),
    "meta-llama/Llama-3.2-1B-Instruct": ("llama", 2048, 8192, 16, 32, 8, 64, 128256, True, 131072),
    "meta-llama/Llama-3.2-3B-Instruct": ("llama", 3072, 8192, 28, 24, 8, 128, 128256, True, 131072),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", 4096, 14336, 32, 32, 8, 128, 128256, False, 131072),
    "meta-llama/Llama-3.3-70B-Instruct": ("llama", 8192, 28672, 80, 64, 8, 128, 128256, False, 131072),
    "google/gemma-3-1b-it": ("gemma3_text", 1152, 6912, 26, 4, 1, 256, 262144, True, 32768),
    "google/gemma-3-4b-it": ("gemma3_text", 2560, 10240, 34, 8, 4, 256, 262208, True, 131072),
}
