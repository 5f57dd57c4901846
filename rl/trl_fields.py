"""TRL's own arguments, read from its installed sources with `ast`: names, types and defaults in 0.05 s.

Importing `trl.GRPOConfig` would take 10-24 s. A test compares what is read here with the real dataclasses.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import operator
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rl.algorithms import ALIKE
from rl.config.reading import Source, Where, check_json, check_value, nearest
from rl.errors import UserError

# class -> (package, file below it); a class of TRL and what it inherits from
SOURCES = {
    "SFTConfig": ("trl", "trainer/sft_config.py"),
    "GRPOConfig": ("trl", "trainer/grpo_config.py"),
    "RLOOConfig": ("trl", "trainer/rloo_config.py"),
    "DPOConfig": ("trl", "trainer/dpo_config.py"),
    "KTOConfig": ("trl", "trainer/kto_config.py"),
    "ORPOConfig": ("trl", "experimental/orpo/orpo_config.py"),
    "CPOConfig": ("trl", "experimental/cpo/cpo_config.py"),
    "RewardConfig": ("trl", "trainer/reward_config.py"),
    "PPOConfig": ("rl", "algorithms/ppo_settings.py"),  # ours: TRL 1.16 has none
    "_BaseConfig": ("trl", "trainer/base_config.py"),
    "TrainingArguments": ("transformers", "training_args.py"),
}
ENUMS = (("transformers", "trainer_utils.py"), ("transformers", "training_args.py"), ("transformers", "debug_utils.py"))
CLASSES = {
    "sft": "SFTConfig",
    "grpo": "GRPOConfig",
    "rloo": "RLOOConfig",
    "ppo": "PPOConfig",
    "dpo": "DPOConfig",
    "kto": "KTOConfig",
    "orpo": "ORPOConfig",
    "cpo": "CPOConfig",
    "reward": "RewardConfig",
}
CLASSES |= {algorithm: CLASSES[other] for algorithm, other in ALIKE.items()}

# values TRL checks only in the middle of training; a test compares them with its sources
VALUES: dict[tuple[str, str], tuple[str, ...]] = {
    ("grpo", "loss_type"): ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"),
    ("grpo", "scale_rewards"): ("group", "batch", "none"),
    ("grpo", "importance_sampling_level"): ("token", "sequence"),
    ("grpo", "multi_objective_aggregation"): ("sum_then_normalize", "normalize_then_sum"),
    ("dpo", "loss_type"): (
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
        *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    ),
    ("dpo", "f_divergence_type"): ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    ("kto", "loss_type"): ("kto", "apo_zero_unpaired"),
}
# what `__post_init__` takes beside the annotated type
ALSO: dict[tuple[str, str], Any] = {("dpo", "loss_type"): str}
LEAST: dict[str, float] = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 1,
    "generation_batch_size": 1,
    "num_iterations": 1,
    "num_generations": 2,
    "learning_rate": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "max_grad_norm": 0,
    "beta": 0,
    "epsilon": 0,
    "num_ppo_epochs": 1,
    "num_mini_batches": 1,
    "cliprange": 0,
    "cliprange_value": 0,
    "vf_coef": 0,
    "gamma": 0,
    "lam": 0,
    "kl_coef": 0,
    "missing_eos_penalty": 0,
    "pad_to_multiple_of": 1,
    "max_length": 1,
    "save_total_limit": 1,
    "logging_steps": 0,
}

# argument -> where the setting lives, or why it is refused; a name ending in * stands for all that begin so
_ROLLOUT_ENGINE = "[rollout] engine says what samples; vLLM and transformers' batching are not used here"
_LOCAL = "refused: a run writes to its own folder only; publish models/final/<run> yourself"
_MLX = "refused: [model.quantization] is MLX's, and bitsandbytes is not used here"
_EVAL = "refused: the run measures before and after by itself: [eval]"
_LAST = "refused: the result is the last policy; choosing by the held-out score would inflate it"
_RESUME = "refused: --resume continues to exactly the weights of an uninterrupted run, and this breaks that"
HOMES = {
    "seed": "it belongs in [run] seed",
    "data_seed": "it belongs in [run] seed",
    "temperature": "it belongs in [rollout] temperature",
    "top_p": "it belongs in [rollout] top_p",
    "top_k": "it belongs in [rollout] top_k",
    "min_p": "it belongs in [rollout] min_p",
    "max_completion_length": "it belongs in [rollout] max_completion_length",
    "max_tool_calling_iterations": "it belongs in [rollout] max_turns, which is one more",
    "vllm_importance_sampling_correction": "it belongs in [rollout] correction",
    "vllm_importance_sampling_mode": "it belongs in [rollout] correction",
    "vllm_importance_sampling_cap": "it belongs in [rollout] correction_cap",
    "vllm_importance_sampling_clip_*": "it belongs in [rollout] correction_cap",
    "vllm_*": _ROLLOUT_ENGINE,
    "use_vllm": _ROLLOUT_ENGINE,
    "use_transformers_*": _ROLLOUT_ENGINE,
    "transformers_continuous_batching_config": _ROLLOUT_ENGINE,
    "cache_implementation": _ROLLOUT_ENGINE,
    "generation_kwargs": "sampling belongs in [rollout] temperature, top_p, top_k, min_p, stop",
    "repetition_penalty": "refused: the samplers of [rollout] have no such filter",
    "output_dir": "the run folder follows from [run] name",
    "overwrite_output_dir": "use --restart on the command line",
    "logging_dir": "the run folder follows from [run] name",
    "run_name": "it belongs in [run] name",
    "resume_from_checkpoint": "use --resume on the command line",
    "reward_weights": "it belongs in [[reward]] weight",
    "reward_funcs": "it belongs in [[reward]] name",
    "use_cpu": "it belongs in [run] device",
    "no_cuda": "it belongs in [run] device",
    "use_mps_device": "it belongs in [run] device",
    "model_init_kwargs": "it belongs in [model] and [rollout] dtype",
    "trust_remote_code": "refused: code that comes with a model is not run",
    "peft_config": "it belongs in [model.lora]",
    "use_peft": "it belongs in [model.lora]",
    "lora_*": "it belongs in [model.lora]",
    "quantization_config": _MLX,
    "load_in_*": _MLX,
    "bnb_*": _MLX,
    "load_best_model_at_end": _LAST,
    "metric_for_best_model": _LAST,
    "greater_is_better": _LAST,
    "eval_*": _EVAL,
    "evaluation_strategy": _EVAL,
    "per_device_eval_batch_size": _EVAL,
    "num_generations_eval": _EVAL,
    "generate_during_eval": _EVAL,
    "bf16_full_eval": _EVAL,
    "fp16_full_eval": _EVAL,
    "batch_eval_metrics": _EVAL,
    "include_for_metrics": _EVAL,
    "prediction_loss_only": _EVAL,
    "do_eval": _EVAL,
    "do_predict": _EVAL,
    "push_to_hub*": _LOCAL,
    "hub_*": _LOCAL,
    "log_completions_hub_repo": _LOCAL,
    "save_only_model": _RESUME,
    "ignore_data_skip": _RESUME,
    "auto_find_batch_size": "refused: runs would differ by memory; set per_device_train_batch_size",
}
_BITSANDBYTES = ("bnb", "8bit", "4bit", "paged_", "ademamix", "lion_")  # torchao's 4- and 8-bit ones with them


@dataclass(frozen=True)
class Argument:
    """One argument: its type (None where TOML cannot hold it) and its default (None where it is computed)."""

    type: Any
    default: Any


@functools.cache
def arguments(algorithm: str) -> dict[str, Argument]:
    """Name -> Argument of TRL's config class for a name in CLASSES, its bases included, in the order of declaration.

    Raises UserError when trl or transformers is not installed.
    """
    if algorithm in ALIKE:
        return arguments(ALIKE[algorithm])
    enums = _enums()
    found: dict[str, Argument] = {}
    for name in reversed(_lineage(CLASSES[algorithm])):
        constants: dict[str, Any] = {}
        for node in _class(name).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                constants[node.targets[0].id] = _literal(node.value, {})
            if isinstance(node, ast.If):  # what depends on the machine is no constant
                constants |= {n.id: None for n in ast.walk(node) if isinstance(n, ast.Name)}
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            options = _field_options(node.value)
            wanted = _choices(options) or _type(node.annotation, enums)
            found[node.target.id] = Argument(wanted, _literal(options.get("default", node.value), constants))
    return found


def value(algorithm: str, args: dict[str, Any], name: str) -> Any:
    """What TRL will use for an argument: the config's value, or TRL's default."""
    return args.get(name, arguments(algorithm)[name].default)


def check(algorithm: str, args: dict[str, Any], source: Source) -> None:
    """Raise UserError for an argument that TRL does not have, of a wrong type, or with a home in another table."""
    known = arguments(algorithm)
    for name, found in args.items():
        where: Where = ("trainer", name)
        home = home_of(name)
        if home and (name, found) != ("eval_strategy", "no"):  # which says what happens anyway
            raise source.error(where, home)
        if name not in known:
            raise source.unknown(("trainer",), name, ["algorithm", *known], _instead(name, known, algorithm, source))
        argument = known[name]
        if argument.type is None:
            raise source.error(where, "refused: it takes a Python object, which TOML cannot hold")
        if name == "optim" and isinstance(found, str) and any(part in found for part in _BITSANDBYTES):
            raise source.error(where, f"found '{found}'; {_MLX}: use adamw_torch or adafactor")
        owner = ALIKE.get(algorithm, algorithm)
        wanted = argument.type | ALSO[owner, name] if (owner, name) in ALSO else argument.type
        check_value(wanted, found, source, where)
        check_json(found, source, where)
        if (owner, name) in VALUES:
            for item in found if isinstance(found, list) else [found]:
                check_value(Literal[VALUES[owner, name]], item, source, where)
        if name in LEAST and found < LEAST[name]:
            raise source.error(where, f"found {found}, valid: ≥ {LEAST[name]:g}")


def home_of(name: str) -> str | None:
    """Where a trainer argument's setting lives, or why it is refused; None when [trainer] is its home."""
    if name in HOMES:
        return HOMES[name]
    return next((home for key, home in HOMES.items() if key[-1] == "*" and name.startswith(key[:-1])), None)


def _instead(name: str, known: dict[str, Argument], algorithm: str, source: Source) -> str | None:
    """What to say of an unknown argument: its table, its algorithm, or that nothing is near."""
    others = [other for other in CLASSES if other != algorithm and name in arguments(other)]
    if others:
        return f"it is an argument of algorithm '{others[0]}', this is '{algorithm}'"
    if table := source.home(name):
        return f"it belongs in {table}"
    hint = _meant(name, ["algorithm", *(other for other in known if home_of(other) is None)])
    owner = "TRL's " if SOURCES[CLASSES[algorithm]][0] == "trl" else ""
    return hint if hint.startswith("did") else f"valid: algorithm and the arguments of {owner}{CLASSES[algorithm]}"


def _meant(name: str, known: list[str]) -> str:
    """ "did you mean ...": initials ("lr"), a part ("batch_size"), a misspelling, beginnings ("grad_accum")."""
    words, parts = {other: other.split("_") for other in known}, name.split("_")
    initials = [other for other in known if "".join(word[:1] for word in words[other]) == name]
    whole = [other for other in known if _holds(words[other], parts, str.__eq__)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    begun = [other for other in known if _holds(words[other], parts, str.startswith)]
    found = next((some for some in (initials[:1], whole, near, begun) if 0 < len(some) <= 3), None)
    if found is None:
        return nearest(name, known)
    return f"did you mean {' or '.join(repr(other) for other in found)}?"


def _holds(words: list[str], parts: list[str], alike: Callable[[str, str], bool]) -> bool:
    """Whether neighbours among `words` are `alike` to `parts`."""
    starts = range(len(words) - len(parts) + 1)
    return any(all(alike(w, p) for w, p in zip(words[i:], parts, strict=False)) for i in starts)


def _lineage(name: str) -> list[str]:
    """The class and its bases, nearest first."""
    bases = [base.id for base in _class(name).bases if isinstance(base, ast.Name)]
    return [name, *(ancestor for base in bases for ancestor in _lineage(base))]


def _class(name: str) -> ast.ClassDef:
    tree = _tree(*SOURCES[name])
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


@functools.cache
def _tree(package: str, file: str) -> ast.Module:
    """Syntax tree of a file of an installed package, found without running the package."""
    spec = importlib.util.find_spec(package)  # of a top-level name: a submodule's would import its parent
    if spec is None or spec.origin is None:
        raise UserError(f"'{package}' is not installed for {sys.executable}: run nox, or .venv/bin/python after it")
    path = Path(spec.origin).parent / file
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path}: missing from '{package}': install the locked version, `uv sync --locked`") from None


@functools.cache
def _enums() -> dict[str, tuple[str, ...]]:
    """Enum name -> its string values, for annotations such as `SchedulerType | str`."""
    found = {}
    for node in (node for source in ENUMS for node in _tree(*source).body):
        if isinstance(node, ast.ClassDef) and any(
            isinstance(b, ast.Name) and b.id == "ExplicitEnum" for b in node.bases
        ):
            members = [_literal(item.value, {}) for item in node.body if isinstance(item, ast.Assign)]
            found[node.name] = tuple(member for member in members if isinstance(member, str))
    return found


def _field_options(node: ast.expr | None) -> dict[str, ast.expr]:
    """Keyword arguments of `field(...)`, or nothing for a plain default."""
    return {k.arg: k.value for k in node.keywords if k.arg} if isinstance(node, ast.Call) else {}


def _choices(options: dict[str, ast.expr]) -> Any:
    """A Literal of `metadata={"choices": [...]}` where those are constants; None stands beside them where it is the
    default, since TOML has no None to give."""
    metadata = _literal(_entry(options.get("metadata"), "choices"), {})
    return Literal[tuple(metadata)] if isinstance(metadata, list) and metadata else None


def _entry(node: ast.expr | None, name: str) -> ast.expr | None:
    """The value under a constant key of a dict display."""
    if not isinstance(node, ast.Dict):
        return None
    pairs = zip(node.keys, node.values, strict=True)
    return next((v for k, v in pairs if isinstance(k, ast.Constant) and k.value == name), None)


def _literal(node: ast.expr | None, constants: dict[str, Any]) -> Any:
    """A constant expression's value, or a class constant's; None for what is computed."""
    if isinstance(node, ast.Name):
        return constants.get(node.id)
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None


_NAMES = {"int": int, "float": float, "bool": bool, "str": str, "dict": dict, "list": list, "Any": Any}


def _type(node: ast.expr, enums: dict[str, tuple[str, ...]]) -> Any:
    """An annotation as a type `conforms` knows; None for a class that TOML cannot hold.

    `Enum | str` becomes the Literal of the enum's values, which is what the class accepts in the end.
    """
    if isinstance(node, ast.Constant):
        return types.NoneType if node.value is None else None
    if isinstance(node, ast.Name):
        return Literal[enums[node.id]] if node.id in enums else _NAMES.get(node.id)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        inside = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if node.value.id == "Literal":
            return Literal[tuple(_literal(item, {}) for item in inside)]
        parts = [_type(item, enums) for item in inside]
        if node.value.id == "tuple":  # TOML has lists only
            return list[parts[0]] if len(set(parts)) == 1 else None
        return {"list": list, "dict": dict}[node.value.id][tuple(parts)] if None not in parts else None
    if isinstance(node, ast.BinOp):
        parts = [_type(part, enums) for part in _union(node)]
        named = [p for p in parts if p is not None and p is not types.NoneType]
        is_enum = any(isinstance(part, ast.Name) and part.id in enums for part in _union(node))
        if is_enum:
            named = [p for p in named if p is not str]
        return functools.reduce(operator.or_, named) if named else None
    return None


def _union(node: ast.expr) -> list[ast.expr]:
    """The parts of `a | b | c`."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_union(node.left), *_union(node.right)]
    return [node]
