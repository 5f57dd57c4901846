"""Settings that are each valid and impossible together. One error at a time, one line each."""

from __future__ import annotations

import ast
import difflib
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl import models, names, reporting, trl_fields
from rl.algorithms import GROUPED, ONLINE, PREFERENCES, defaults
from rl.config import builds, mix, ppo, preferences, tools
from rl.config.reading import Source
from rl.errors import UserError

if TYPE_CHECKING:
    from rl.config import Config

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# keys of [data] that not every source reads
SOURCES_OF = {
    "operation": ("arithmetic",),
    "max_a": ("arithmetic",),
    "max_b": ("arithmetic",),
    "shots": ("arithmetic", "reasoning-gym"),
    "tasks": ("reasoning-gym",),
    "path": ("jsonl",),
    "heldout_path": ("jsonl",),
    "name": ("hub",),
    "split": ("hub",),
    "heldout_split": ("hub",),
}

# rewards that tell right from wrong
VERIFIERS = ("exact", "reasoning-gym", "math-verify")


def check(config: Config, source: Source) -> None:
    """Raise UserError for the first impossible combination."""
    if not NAME.fullmatch(config.run.name):
        valid = "valid: up to 100 letters, digits, '.', '_', '-', beginning with a letter or digit (it names a folder)"
        raise source.error(("run", "name"), f"found {config.run.name!r}, {valid}")
    builds.check(config, source)
    reporting.check(config, source)
    _check_model(config, source)
    check_data(config, source)
    mix.check(config, source)
    _check_rollout(config, source)
    tools.check(config, source)
    _check_rewards(config, source)
    _check_trainer(config, source)
    if config.trainer.algorithm in ONLINE:
        _check_recipe(config, source)
        if config.trainer.algorithm == "ppo":
            ppo.check(config, source)
            _check_save_steps(config.trainer.args, ppo.period(config.trainer.args), source)
        elif config.trainer.algorithm in GROUPED:
            _check_grpo(config, source)
    if config.trainer.algorithm in (*PREFERENCES, "online_dpo"):
        preferences.check(config, source)


def generation_period(args: dict[str, Any]) -> int:
    """Optimizer steps between two rollouts of GRPO (1 when a step holds whole rollouts), TRL's defaults filled in.

    Checkpoints are exact at multiples of it: elsewhere TRL's buffer of completions is lost.
    """
    micro, accumulation = _micro_steps_per_rollout(args), _arg(args, "gradient_accumulation_steps")
    return max(1, micro // accumulation)


def rollout_size(args: dict[str, Any]) -> int:
    """Completions of one GRPO rollout in one process, as TRL's `GRPOConfig.__post_init__` computes it."""
    return _arg(args, "per_device_train_batch_size") * _steps_per_generation(args)


def _check_model(config: Config, source: Source) -> None:
    model = config.model
    if (model.base is None) == (model.from_ is None):
        found = "neither is set" if model.base is None else f"found base = '{model.base}' and from = '{model.from_}'"
        raise source.table_error(("model",), f"base, from: {found}, valid: exactly one of the two")
    if model.tiny is not None and model.base != "tiny":
        raise source.error(("model", "tiny"), f"only for base = 'tiny', found {_named(model.base, model.from_)}")
    if model.quantization is not None and model.lora is None:
        raise source.error(("model", "quantization"), "a quantized base cannot be trained itself: add [model.lora]")
    own = config.trainer.algorithm == "reward" or config.rollout.precision not in (None, "shared")
    if model.quantization is not None and model.quantization.hold == "packed" and own:
        found = "found 'packed', valid for a reward model and without precision = 'shared': values"
        raise source.error(("model", "quantization", "hold"), found)
    if model.base is not None and _is_bitsandbytes(model.base):
        made = "valid: the model it was made of, with [model.quantization] bits = 4 and [model.lora]: MLX quantizes it"
        raise source.error(("model", "base"), f"found '{model.base}', packed by bitsandbytes, which has no MPS; {made}")
    if model.base is not None and not _may_be_there(model.base):
        valid = f"valid: '{models.PACKAGED}', 'tiny', a model folder, a .gguf file, or a hub id 'org/name'"
        close = difflib.get_close_matches(model.base, (models.PACKAGED, "tiny"), n=1)
        hint = f", did you mean '{close[0]}'?" if close else ""
        raise source.error(("model", "base"), f"found '{model.base}', and there is no such folder, {valid}{hint}")
    if model.tiny is not None and model.tiny.hidden % model.tiny.heads:
        found = f"found {model.tiny.heads} heads for hidden {model.tiny.hidden}, valid: a divisor of hidden"
        raise source.error(("model", "tiny", "heads"), found)
    if model.tiny is not None and (
        len(set(model.tiny.alphabet)) != len(model.tiny.alphabet) or not model.tiny.alphabet
    ):
        found = f"found {model.tiny.alphabet!r}, valid: at least one character, each once"
        raise source.error(("model", "tiny", "alphabet"), found)
    if model.lora is not None and not model.lora.targets:
        raise source.error(("model", "lora", "targets"), "found an empty list, valid: names of linear modules")


def _may_be_there(base: str) -> bool:
    """False where a base can be neither on the hub nor on any machine; a folder may be made later, or elsewhere."""
    known = base in (models.PACKAGED, "tiny") or base.endswith(".gguf") or "/" in base
    return known or Path(base).expanduser().is_dir()


def _is_bitsandbytes(base: str) -> bool:
    """Whether a hub id says so by its usual name, or a local folder by its config.json."""
    if "bnb-4bit" in base.lower() or "bnb-8bit" in base.lower():
        return True
    try:
        said = json.loads((Path(base).expanduser() / "config.json").read_text(encoding="utf-8"))
        return said["quantization_config"]["quant_method"] == "bitsandbytes"
    except (OSError, ValueError, KeyError, TypeError):
        return False  # another kind of base, or one whose loading says what is wrong with it


def check_data(config: Config, source: Source) -> None:
    data = config.data
    if data.source == "jsonl" and data.path is None:
        raise source.table_error(("data",), "path: missing, source = 'jsonl' needs the file of its rows")
    if data.source == "hub" and data.name is None:
        raise source.table_error(("data",), "name: missing, source = 'hub' needs the id of a data set, \"org/name\"")
    if data.source == "reasoning-gym" and not data.tasks:
        raise source.table_error(("data",), "task: missing, source = 'reasoning-gym' needs at least one [[data.task]]")
    for name, owners in SOURCES_OF.items():
        # a default that is written out changes nothing (and `resolved` writes it out)
        if data.source not in owners and getattr(data, name) != type(data).__dataclass_fields__[name].default:
            of = " or ".join(f"'{owner}'" for owner in owners)
            raise source.error(
                ("data", "task" if name == "tasks" else name), f"only for source = {of}, found source = '{data.source}'"
            )
    for name, path in (("path", data.path), ("heldout_path", data.heldout_path)):
        if path is not None and not (config.path.parent / path).is_file():
            found = f"no such file: '{config.path.parent / path}' (paths are relative to the config's folder)"
            raise source.error(("data", name), found)
    if data.form == "char" and data.source == "reasoning-gym":
        raise source.error(("data", "form"), "found 'char' for source = 'reasoning-gym', valid: plain, chat")
    if data.shots and data.form == "char":
        raise source.error(("data", "shots"), f"found {data.shots} with form = 'char', valid: 0 there")
    if data.system is not None and data.form != "chat":
        raise source.error(("data", "system"), f"only for form = 'chat', found form = '{data.form}'")
    if config.model.base == "tiny" and data.source == "arithmetic":
        if data.form != "char":
            found = f"found '{data.form}', valid: char, the tiny model knows single characters only"
            raise source.error(("data", "form"), found)
        alphabet = config.model.tiny.alphabet if config.model.tiny else None
        signs = f"0123456789{data.operation}=" + ("-" if data.operation == "-" else "")
        missing = [] if alphabet is None else [sign for sign in dict.fromkeys(signs) if sign not in alphabet]
        if missing:
            found = f"found {alphabet!r}, without {' '.join(missing)} that the [data] problems are written with"
            raise source.error(("model", "tiny", "alphabet"), found)


def _check_rollout(config: Config, source: Source) -> None:
    rollout, model = config.rollout, config.model
    if "" in rollout.stop:
        raise source.error(("rollout", "stop"), "found an empty text, which ends every completion at once")
    if rollout.precision == "shared" and model.lora is None:
        raise source.error(
            ("rollout", "precision"), "found 'shared' without [model.lora], valid: full, or add [model.lora]"
        )
    shared = model.lora is not None and model.quantization is not None and rollout.precision != "full"
    if shared and rollout.dtype == "bfloat16":
        # |Δlogp| 0.40 between the two sides was measured there, against 1e-4 in float32
        raise source.error(
            ("rollout", "dtype"), "found 'bfloat16' for a quantized base that is shared, valid: float32, float16"
        )
    _check_copy(config, source)
    if rollout.max_batch_tokens <= rollout.max_completion_length:
        valid = f"valid: > max_completion_length {rollout.max_completion_length}, and the prompt's tokens more"
        raise source.error(("rollout", "max_batch_tokens"), f"found {rollout.max_batch_tokens}, {valid}")
    if config.trainer.args.get("mask_truncated_completions") and any(len(text) > 1 for text in rollout.stop):
        found = "found true with a [rollout] stop of several characters, whose last token TRL takes for a cut"
        raise source.error(("trainer", "mask_truncated_completions"), f"{found}, valid: false")
    if config.trainer.args.get("loss_type") == "vespo" and rollout.correction.startswith("sequence"):
        found = f"found '{rollout.correction}' with loss_type 'vespo', valid: none, token_truncate, token_mask"
        raise source.error(("rollout", "correction"), found)


def _check_copy(config: Config, source: Source) -> None:
    """`copy` samples from other weights than it trains: nothing hides that, and what it asks for is there."""
    rollout, model = config.rollout, config.model
    if rollout.precision != "copy":
        for name in ("bits", "group_size"):
            if (found := getattr(rollout, name)) is not None:
                valid = "only for precision = 'copy'; [model.quantization] is for a base that both sides share"
                raise source.error(("rollout", name), f"found {found}, {valid}")
        return
    if rollout.bits is None:
        raise source.table_error(("rollout",), "bits: missing, precision = 'copy' needs them, valid: 4, 8", "bits")
    if rollout.engine != "mlx":
        raise source.error(("rollout", "precision"), "found 'copy' with engine = 'torch', valid there: full")
    if model.quantization is not None:
        found = "found 'copy' with [model.quantization], valid: shared, or no such table: copy has its own bits"
        raise source.error(("rollout", "precision"), found)
    if config.trainer.algorithm not in GROUPED:
        found = f"found 'copy' for '{config.trainer.algorithm}', valid there: full, shared (copy: {', '.join(GROUPED)})"
        raise source.error(("rollout", "precision"), found)
    if rollout.correction == "none":
        found = "found 'none' with precision = 'copy', whose samples are of another policy, valid: any other"
        raise source.error(("rollout", "correction"), found)


def _check_rewards(config: Config, source: Source) -> None:
    from rl import rewards  # here, since a reward may be built without any config

    algorithm = config.trainer.algorithm
    if algorithm in ONLINE:
        if not config.rewards:
            raise source.table_error(
                ("trainer",), f"algorithm: '{algorithm}' needs a reward, found none: add [[reward]] with a name"
            )
        if not any(reward.weight for reward in config.rewards):
            raise source.error(("reward", 0, "weight"), "found 0 for every [[reward]], valid: one other than 0")
    for i, reward in enumerate(config.rewards):
        if reward.name == "model" and algorithm in ("sft", *PREFERENCES):
            found = f"found 'model', and '{algorithm}' asks a verifier only, valid there: {', '.join(VERIFIERS)}"
            raise source.error(("reward", i, "name"), found)
        if ":" in reward.name:  # read, not imported: the user's own module may import anything
            node = names.find(reward.name, "function")
            if isinstance(node, ast.AsyncFunctionDef):
                node = f"'{reward.name}' is async; a reward returns its list directly"
            if isinstance(node, str):
                raise source.error(("reward", i, "name"), node)
            continue
        # same options, and reasoning-gym's import takes seconds
        light = replace(reward, name="exact") if reward.name == "reasoning-gym" else reward
        try:
            rewards.build((light,))
        except UserError as error:
            said = str(error).partition(": ")[2]
            named = next((word for word in re.findall(r"\w+", said) if word in reward.options), "name")
            raise source.table_error(("reward", i), said, named) from None


def _check_trainer(config: Config, source: Source) -> None:
    args, algorithm = config.trainer.args, config.trainer.algorithm

    def effective(name: str) -> Any:
        return trl_fields.value(algorithm, args, name)

    max_steps, epochs = effective("max_steps"), effective("num_train_epochs")
    if max_steps == 0 or max_steps < -1:
        raise source.error(("trainer", "max_steps"), f"found {max_steps}, valid: ≥ 1, or -1 for num_train_epochs")
    if max_steps == -1 and epochs <= 0:
        raise source.error(("trainer", "num_train_epochs"), f"found {epochs}, valid: > 0, or set max_steps")
    if effective("bf16") and effective("fp16"):
        raise source.error(("trainer", "fp16"), "found true with bf16 = true, valid: one of the two")
    if effective("save_strategy") == "best":
        raise source.error(("trainer", "save_strategy"), "found 'best', valid: steps, epoch, no")
    if args.get("packing_strategy") == "wrapped":
        found = "found 'wrapped', where examples attend to their neighbours, valid: bfd, bfd_split"
        raise source.error(("trainer", "packing_strategy"), found)
    if algorithm in ("sft", "bon") and args.get("padding_free") and not args.get("packing"):
        found = "found true without packing, which TRL takes without max_length only: set packing = true instead"
        raise source.error(("trainer", "padding_free"), found)
    if effective("logging_strategy") == "steps" and effective("logging_steps") == 0:
        raise source.error(("trainer", "logging_steps"), "found 0, valid: > 0")
    for name in ("save_steps", "logging_steps"):
        steps = args.get(name)
        if steps is not None and (steps <= 0 or (steps > 1 and steps != int(steps))):
            raise source.error(("trainer", name), f"found {steps}, valid: a whole number ≥ 1, or a share below 1")


def _check_recipe(config: Config, source: Source) -> None:
    """An algorithm's name says which loss it takes, and a weight belongs to what the loss is of."""
    args, algorithm, rollout = config.trainer.args, config.trainer.algorithm, config.rollout
    recipe = defaults(algorithm)
    for name in ("loss_type", "importance_sampling_level", "scale_rewards", "multi_objective_aggregation"):
        if name in recipe and args[name] != recipe[name]:
            valid = f"valid: '{recipe[name]}', which is what '{algorithm}' means; algorithm = 'grpo' takes any"
            raise source.error(("trainer", name), f"found {args[name]!r}, {valid}")
    if args.get("loss_type") == "cispo":
        high = args.get("epsilon_high", _arg(args, "epsilon"))
        if high < 1:
            whence = "" if "epsilon_high" in args else " (unset, so epsilon)"
            valid = "valid: ≥ 1, with loss_type 'cispo' it is the largest weight itself; 5 is usual"
            raise source.table_error(("trainer",), f"epsilon_high: found {high}{whence}, {valid}", "epsilon_high")
    if algorithm == "rloo" and rollout.correction.startswith("token"):
        valid = "valid: sequence_truncate, sequence_mask, none; rloo's loss is of whole sequences, not of tokens"
        raise source.error(("rollout", "correction"), f"found '{rollout.correction}', {valid}")
    clip = args.get("reward_clip_range")
    if clip is not None and (len(clip) != 2 or clip[0] >= clip[1]):
        raise source.error(("trainer", "reward_clip_range"), f"found {clip}, valid: [least, most]")
    for i, reward in enumerate(config.rewards):
        free = reward.options["limit"] - reward.options["cache"] if reward.name == "overlong" else 0
        if free >= rollout.max_completion_length:
            found = f"limit - cache = {free}, valid: < [rollout] max_completion_length {rollout.max_completion_length}"
            raise source.error(("reward", i, "limit"), f"{found}, or nothing is ever punished")


def _check_grpo(config: Config, source: Source) -> None:
    """What TRL's `GRPOConfig.__post_init__` refuses, and what would make an exact resume impossible."""
    args = config.trainer.args
    if "generation_batch_size" in args and "steps_per_generation" in args:
        raise source.error(("trainer", "steps_per_generation"), "not together with generation_batch_size: set one")
    batch = _arg(args, "per_device_train_batch_size")
    group = trl_fields.value(config.trainer.algorithm, args, "num_generations")  # RLOO's default is its own
    given = args.get("generation_batch_size")
    if given is not None and given % batch:
        found = f"found {given}, valid: a multiple of per_device_train_batch_size ({batch}), {_around(given, batch)}"
        raise source.error(("trainer", "generation_batch_size"), found)
    size = rollout_size(args)
    if size % group:
        if given is not None:
            valid = f"valid: a multiple of num_generations ({group}), {_around(size, math.lcm(group, batch))}"
            raise source.error(("trainer", "generation_batch_size"), f"found {given}, {valid}")
        steps = _steps_per_generation(args)
        name = "steps_per_generation" if "steps_per_generation" in args else "gradient_accumulation_steps"
        made = f"per_device_train_batch_size {batch} × {name} {steps} = {size} completions, not divisible by {group}"
        divisors = [g for g in range(2, size + 1) if size % g == 0]
        near = [g for g in divisors if g < group][-1:] + [g for g in divisors if g > group][:1]
        valid = f"valid here: {' or '.join(map(str, near))}" if near else "make the batch larger"
        raise source.error(("trainer", "num_generations"), f"{made}; {valid}")
    if args.get("remove_unused_columns"):
        raise source.error(("trainer", "remove_unused_columns"), "found true, valid: false, rewards read the columns")
    if size // group > config.data.train_size:
        found = f"found {config.data.train_size}, valid: ≥ {size // group}, the prompts of one rollout"
        raise source.error(("data", "train_size"), found)
    _check_boundaries(args, source)


def _check_boundaries(args: dict[str, Any], source: Source) -> None:
    """A checkpoint is exact only between rollouts, and so must every step that is saved lie there."""
    micro, accumulation = _micro_steps_per_rollout(args), _arg(args, "gradient_accumulation_steps")
    if micro % accumulation and accumulation % micro:
        made = f"steps_per_generation × num_iterations = {micro} and gradient_accumulation_steps = {accumulation}"
        raise source.error(
            ("trainer", "steps_per_generation" if "steps_per_generation" in args else "gradient_accumulation_steps"),
            f"{made}: one must divide the other, so that checkpoints fall between rollouts",
        )
    _check_save_steps(args, generation_period(args), source)


def _check_save_steps(args: dict[str, Any], period: int, source: Source) -> None:
    """Every checkpoint lies at a multiple of the optimizer steps between two rollouts."""
    if args.get("save_strategy", "steps") != "steps":
        return
    save = _arg(args, "save_steps")
    if "save_steps" not in args and 0 < _arg(args, "max_steps") <= save:
        return  # the run ends before TRL's default asks for a checkpoint
    if save < 1:
        raise source.error(("trainer", "save_steps"), f"found {save}, valid: a whole number of steps, ≥ {period}")
    if save % period:
        default = "" if "save_steps" in args else " (TRL's default)"
        valid = f"valid: a multiple of the {period} steps per rollout, {_around(int(save), period)}"
        raise source.error(("trainer", "save_steps"), f"found {save}{default}, {valid}")


def _steps_per_generation(args: dict[str, Any]) -> int:
    if "generation_batch_size" in args:
        return args["generation_batch_size"] // _arg(args, "per_device_train_batch_size")
    return args.get("steps_per_generation") or _arg(args, "gradient_accumulation_steps")


def _micro_steps_per_rollout(args: dict[str, Any]) -> int:
    return _steps_per_generation(args) * _arg(args, "num_iterations")


def _arg(args: dict[str, Any], name: str) -> Any:
    return trl_fields.value("grpo", args, name)


def _around(value: int, unit: int) -> str:
    """The multiples of `unit` next to a value: "nearest 4 or 8"."""
    below = value // unit * unit
    return f"nearest {below} or {below + unit}" if below else f"nearest {unit}"


def _named(base: str | None, from_: str | None) -> str:
    return f"base = '{base}'" if base is not None else f"from = '{from_}'"
