"""A run's settings: one TOML file -> frozen typed tables.

Checking imports none of torch, transformers, trl, mlx: TRL's own arguments are read from its sources (`rl.trl_fields`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rl import algorithms, trl_fields
from rl.config import builds, checks
from rl.config.reading import Source, about, key, keys_of, place, plain, read, read_toml, with_overrides
from rl.config.text import reference


@dataclass(frozen=True, kw_only=True)
class Run:
    """[run]: what the run is called and where it computes."""

    name: str = key("folder name under models/; letters, digits, '.', '_', '-'")
    seed: int = key("seed of weights, sampling and data order", 0, least=0, most=2**32 - 1)
    device: Literal["auto", "mps", "cuda", "cpu"] = key("auto takes mps, then cuda, then cpu", "auto")
    completions_every: int = key(
        "runs that sample while they train: steps between two rollouts kept in completions.parquet; 0 = none",
        10,
        least=0,
    )


@dataclass(frozen=True, kw_only=True)
class Lora:
    """[model.lora]: train a low-rank adapter (Hu et al. 2021, arXiv 2106.09685); without the table, all weights."""

    rank: int = key("rank r of A and B", 16, least=1)
    alpha: float = key("the update is scaled by alpha / rank", 32.0, above=0)
    dropout: float = key("dropout before A while training", 0.0, least=0, below=1)
    layers: int | None = key("adapt the top N layers; unset = all", None, least=1)
    targets: tuple[str, ...] = key(
        "names of the linear modules to adapt",
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    )


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """[model.quantization]: MLX affine quantization of the frozen base."""

    bits: Literal[4, 8] = key("bits per weight")
    group_size: Literal[32, 64, 128] = key("weights that share a scale and a bias", 64)
    hold: Literal["packed", "values"] | None = key(
        "what the trainer keeps of the base: packed = its codes, dequantized a layer at a time; values = all of it in "
        "float32; unset = packed on a GPU, values on a CPU, where a step would take longer",
        None,
    )


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """[model.tiny]: the character-level Llama of base = "tiny"."""

    hidden: int = key("width", 128, least=1)
    layers: int = key("number of layers", 4, least=1)
    heads: int = key("attention heads; divides hidden", 4, least=1)
    intermediate: int = key("width of the feed-forward layer", 384, least=1)
    alphabet: str = key("characters the tokenizer knows", "0123456789+-*= ")


@dataclass(frozen=True, kw_only=True)
class Model:
    """[model]: what training starts from; exactly one of base and from."""

    base: str | None = key(
        '"smollm2-135m-instruct" (packaged), "tiny", a local folder, a .gguf file, or a hub id "org/name"', None
    )
    from_: str | None = key("another config, relative to this one; its final model is the start", None)
    reference: str | None = key(
        "another config, relative to this one; its final model is the KL reference; unset = the start", None
    )
    lora: Lora | None = None
    quantization: Quantization | None = None
    tiny: TinyModel | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """[[data.task]]: one reasoning-gym generator, for source = "reasoning-gym"."""

    name: str = key("reasoning-gym's name of the task")
    weight: float = key("share of the rows, relative to the other tasks", 1.0, above=0)
    options: dict[str, Any] = field(default_factory=dict, metadata=about("the generator's own settings"))


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What says which rows a source gives; each key is read by the sources it names."""

    source: Literal["arithmetic", "reasoning-gym", "jsonl", "hub"] = key("where the rows come from")
    shots: int = key(
        "worked examples in front of each question (arithmetic, reasoning-gym); with the calculator, calls of it",
        0,
        least=0,
    )
    path: str | None = key(
        "jsonl: file of the rows, relative to this config, with columns prompt and answer; dpo, orpo, cpo and reward "
        "also take prompt, chosen, rejected, and kto prompt, completion, label",
        None,
    )
    heldout_path: str | None = key(
        "jsonl: file of the held-out rows, relative to this config; unset = split off from path", None
    )
    name: str | None = key('hub: id of the data set, "org/name" or "org/name:subset"', None)
    split: str = key("hub: split to train on", "train")
    heldout_split: str = key("hub: split to measure on", "test")
    operation: Literal["+", "-", "*"] = key("arithmetic: what a and b are combined with", "+")
    max_a: int = key("arithmetic: a is 0 to max_a", 50, least=0)
    max_b: int = key("arithmetic: b is 0 to max_b", 9, least=0)
    tasks: tuple[Task, ...] = field(default=(), metadata={"toml": "task"})


@dataclass(frozen=True, kw_only=True)
class Part(Rows):
    """[[data.mix]]: one of several sources, for source = "mix"; seed, form and system are those of [data]."""

    weight: float = key(
        "share of the rows, relative to the others; a source with fewer rows repeats them", 1.0, above=0
    )


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """[data.curriculum]: train on the questions that the start answers right sometimes, found by asking it first."""

    min_pass: float = key(
        "least share of right answers (by [eval] metric) of a question to keep", 0.05, least=0, most=1
    )
    max_pass: float = key("largest share of right answers of a question to keep", 0.95, least=0, most=1)
    samples: int = key("answers drawn to each question, as [rollout] says", 8, least=1)


@dataclass(frozen=True, kw_only=True)
class Data(Rows):
    """[data]: prompts and answers."""

    source: Literal["arithmetic", "reasoning-gym", "jsonl", "hub", "environment", "mix"] = key(
        "where the rows come from; environment: the rows() of [rollout] environment; mix: [[data.mix]]"
    )
    from_: str | None = key(
        "another config, relative to this one; train on the pairs its run has sampled (source gives the held-out rows)",
        None,
    )
    train_size: int = key("rows to train on, at most", least=1)
    seed: int = key("seed of generation, shuffling and the held-out split", 0, least=0, most=2**32 - 1)
    form: Literal["plain", "chat", "char"] = key(
        "plain text, chat messages, or single characters for the tiny model", "plain"
    )
    system: str | None = key("system message of the chat form", None)
    mix: tuple[Part, ...] | None = None
    curriculum: Curriculum | None = None


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """[rollout]: how completions are sampled, in training and (greedily) in measuring."""

    engine: Literal["mlx", "torch"] = key("mlx, or torch as the reference to compare with", "mlx")
    precision: Literal["shared", "full", "copy"] | None = key(
        "shared: trainer and sampler hold the same base and only the adapter is synced; full: all weights are synced; "
        "copy: as full, quantized at every sync, to study what that costs; unset = shared for a quantized LoRA run, "
        "else full",
        None,
    )
    bits: Literal[4, 8] | None = key("copy: bits per weight of the sampler's copy", None)
    group_size: Literal[32, 64, 128] | None = key("copy: weights that share a scale and a bias; unset = 64", None)
    dtype: Literal["float32", "float16", "bfloat16"] | None = key(
        "the sampler's activations; unset = chosen per device", None
    )
    temperature: float = key("divides the logits", 1.0, above=0)
    top_p: float = key("nucleus; 1 = off", 1.0, above=0, most=1)
    top_k: int = key("most probable tokens kept; 0 = off", 0, least=0)
    min_p: float = key("least probability, relative to the most probable token; 0 = off", 0.0, least=0, most=1)
    max_completion_length: int = key("new tokens at most, over all turns and with what tools say", 64, least=1)
    stop: tuple[str, ...] = key("texts that end a completion, beside EOS", ())
    correction: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = key(
        "importance-sampling correction of sampler against trainer; for rloo unset = sequence_truncate",
        "token_truncate",
    )
    correction_cap: float = key("ratio at which it truncates or masks", 2.0, least=1)
    max_batch: int = key("rows decoded at once", 256, least=1)
    max_batch_tokens: int = key(
        "tokens whose keys and values are held at once, 2 × layers × kv_heads × head_dim × bytes of dtype each "
        "(SmolLM2-135M: 45 KiB in float32)",
        65536,
        least=2,
    )
    tools: tuple[str, ...] = key(
        'functions that the policy may call while it answers, each "module:function" (GRPO\'s family, chat prompts); '
        '"rl.tools:calculator" is one',
        (),
    )
    environment: str | None = key(
        'a world of several turns, "module:Class": its methods are tools; "rl.environments:GuessNumber" is one', None
    )
    environment_options: dict[str, Any] = field(
        default_factory=dict, metadata=about("arguments of the environment's constructor")
    )
    max_turns: int = key("with tools: times the policy speaks, at most; the last turn's call is not made", 4, least=2)
    max_turn_length: int | None = key(
        "with tools: tokens the policy may say in one turn, a call whole; unset = all that is left of "
        "max_completion_length",
        None,
        least=1,
    )
    tool_timeout_s: float = key(
        "with tools: seconds a call may take; one that hangs costs its sample only", 5.0, above=0
    )
    samples: int | None = key(
        "dpo, kto, orpo, cpo, reward and `pairs`: completions sampled to each question to find a right and a wrong "
        "one; bon: to keep the best; online_dpo: sampled at every step; unset = 8",
        None,
        least=2,
    )


@dataclass(frozen=True, kw_only=True)
class Reward:
    """[[reward]]: one term of the reward; all other keys are the options of that reward."""

    name: str = key('name of a reward, or "module:function" for your own')
    weight: float = key("factor in the sum", 1.0)
    options: dict[str, Any] = field(
        default_factory=dict, metadata=about("the reward's own keys, e.g. pattern, extract", rest=True)
    )


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """[trainer]: the algorithm, then TRL's own arguments verbatim (of its config class for that algorithm)."""

    algorithm: Literal[algorithms.ALGORITHMS] = key("how to train; rl/algorithms/<name>.py says what it is")
    args: dict[str, Any] = field(
        default_factory=dict,
        metadata=about("any argument of TRL's config class that has no home in another table", rest=True),
    )


@dataclass(frozen=True, kw_only=True)
class Eval:
    """[eval]: the run's own held-out check, before and after."""

    size: int = key("held-out questions", 256, least=1)
    metric: Literal["strict", "lenient"] = key("which score is the result; both are recorded", "strict")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run. `path` is the file it came from; paths of other configs inside are relative to its folder."""

    path: Path
    run: Run
    model: Model
    data: Data
    rollout: Rollout = field(default_factory=Rollout)
    rewards: tuple[Reward, ...] = field(default=(), metadata={"toml": "reward"})
    trainer: Trainer
    eval: Eval = field(default_factory=Eval)


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a config, and the configs it builds on.

    `overrides` are "table.key=value" strings that win over the file; an unset `rollout.precision` comes back decided.
    Raises UserError (one line: file, table, key, found, valid). Writes nothing and imports no heavy package.
    """
    return _load(Path(path), overrides, ())


def resolved(config: Config) -> dict[str, Any]:
    """Every setting with its default filled in, JSON-able, in the TOML's shape; unset keys are left out.

    Loading it as TOML from the same folder gives an equal Config.
    """
    return plain(config)


def describe() -> str:
    """Markdown of every table and key: type, default, range, meaning. `configs/README.md` holds it."""
    return reference(Config)


def builds_on(config: Config) -> dict[str, Path]:
    """Where the config names another config ("model.from", "reward.0.model") -> that file."""
    model, data = config.model, config.data
    named: dict[str, Any] = {"model.from": model.from_, "model.reference": model.reference, "data.from": data.from_}
    # a reward model may also be a folder or a hub id
    named |= {f"reward.{i}.model": r.options.get("model") for i, r in enumerate(config.rewards) if r.name == "model"}
    configs = {where: other for where, other in named.items() if isinstance(other, str)}
    return {
        where: config.path.parent / other
        for where, other in configs.items()
        if other.endswith(".toml") or not where.startswith("reward.")
    }


def _load(path: Path, overrides: Sequence[str], chain: tuple[Path, ...]) -> Config:
    tables, overridden = with_overrides(read_toml(path), overrides, Config)
    source = Source(str(path), overridden, _home)
    config: Config = read(Config, tables, source, also={"path": path})
    trl_fields.check(config.trainer.algorithm, config.trainer.args, source)
    config = _with_recipe(config, tables)
    checks.check(config, source)
    chain = (*chain, path)
    for dotted, other in builds_on(config).items():
        where = place(dotted)
        if not other.is_file():
            raise source.error(where, f"no such file: '{other}' (paths are relative to the config's folder)")
        seen = [known.resolve() for known in chain]
        if other.resolve() in seen:
            circle = [*chain[seen.index(other.resolve()) :], other]
            raise source.error(where, "configs build on each other: " + " -> ".join(p.name for p in circle))
        builds.check_parent(where, _load(other, (), chain), source, config.trainer.algorithm)
    return _decided(config)


def _with_recipe(config: Config, tables: dict[str, Any]) -> Config:
    """The config with the defaults of its algorithm; `tables` says what was given."""
    algorithm = config.trainer.algorithm
    trainer = replace(config.trainer, args=algorithms.defaults(algorithm) | config.trainer.args)
    config = replace(config, trainer=trainer)
    if algorithm == "rloo" and "correction" not in tables.get("rollout", {}):
        config = replace(config, rollout=replace(config.rollout, correction="sequence_truncate"))
    return config


def _decided(config: Config) -> Config:
    """The config with the settings filled in that follow from others."""
    if config.rollout.precision is None:
        shared = config.model.lora is not None and config.model.quantization is not None
        config = replace(config, rollout=replace(config.rollout, precision="shared" if shared else "full"))
    if config.model.base == "tiny" and config.model.tiny is None:
        config = replace(config, model=replace(config.model, tiny=TinyModel()))
    return config


def _home(name: str) -> str | None:
    """The tables that have a key of this name, for the error about one in the wrong table."""
    tables = {
        "run": Run,
        "model": Model,
        "model.lora": Lora,
        "model.quantization": Quantization,
        "model.tiny": TinyModel,
    }
    tables |= {"data": Data, "data.curriculum": Curriculum, "rollout": Rollout, "eval": Eval}
    places = [f"[{table}]" for table, cls in tables.items() if name in keys_of(cls)]
    if not places and any(name in trl_fields.arguments(algorithm) for algorithm in trl_fields.CLASSES):
        places = [] if trl_fields.home_of(name) else ["[trainer]"]
    return " or ".join(places) or None
