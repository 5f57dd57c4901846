"""What a config asks of memory and time: rows, lengths, and which weights are trained, copied and quantized.

Lengths come from the rows where these can be had without a download or a tokenizer, else from an assumption that the
plan prints. Characters stand for tokens at a rate that errs towards more of them.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rl import trl_fields
from rl.algorithms import GROUPED, ONLINE, PREFERENCES, defaults
from rl.errors import UserError

if TYPE_CHECKING:
    from rl.config import Config

CHARACTERS_A_TOKEN = 3.0  # English text has about four, arithmetic about one
# longest question in tokens, chat template included, of data sets that recipes name
HUB_PROMPTS = {"openai/gsm8k": 288, "openai/gsm8k:main": 288}
HUB_ANSWERS = {"openai/gsm8k": 8, "openai/gsm8k:main": 8}
UNKNOWN_PROMPT = 512
GYM_PROMPT = 96  # of one question, and of each worked example
SAMPLES = 8
HELDOUT_CHUNK = 64  # rl.measure.CHUNK, which cannot be imported without numpy


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Counts of rows and tokens; a `row` is one sequence of prompt and completion in the trainer's forward.

    `prompt` counts the `prefix` that all prompts share. `length` is what the trainer's forward sees of a row.
    """

    algorithm: str
    rows: int  # in one forward with gradient
    micro_steps: int  # of them in an optimizer step
    rollout_rows: int  # completions sampled for one rollout, 0 where none are
    rollouts_per_step: float
    decoded: int  # rows that decode at once
    distinct: int  # prompts among them
    prompt: int
    prefix: int
    completion: int
    length: int
    checkpointing: bool
    autocast: bool
    lora_rank: int  # 0: all weights are trained
    lora_targets: tuple[str, ...]
    lora_layers: int | None
    bits: int  # of the quantized base, 0 for none
    group: int
    converts: bool  # the quantized base is made first
    reference: bool  # a frozen copy of all weights
    critic: bool  # a trained copy of all weights
    full_logits: bool  # logits of all scored positions at once
    old_logps: bool  # a forward without gradient before the loss
    reference_forward: bool
    engine: str
    sampler_dtype: str | None
    optimizer: str
    learned_rewards: int
    heldout: int
    assumed: str  # how the lengths were found
    # what records made before these were counted say of themselves: all values, each row with its own prompt
    hold: str = "values"  # of the quantized base in the trainer: "packed", "values", or "device" for the device's own
    prompts: int = 0  # distinct ones in one forward with gradient at most; 0 where each row reads its own


def of(
    config: "Config", *, prompt: int | None = None, completion: int | None = None, converted: bool = False
) -> Workload:
    """The workload of `config`; `prompt` and `completion` (of SFT's and preferences' rows) in tokens where known, and
    whether its quantized base has been `converted` by an earlier run."""
    algorithm, args, rollout = config.trainer.algorithm, config.trainer.args, config.rollout
    online, samples = algorithm in ONLINE, rollout.samples or SAMPLES
    asked, prefix, answer, assumed = _lengths(config)
    if prompt is not None:
        asked, prefix, assumed = prompt, 0, f"prompts of {prompt} tokens, as given"
    sampled_before = _samples_pairs(config)
    longest = rollout.max_completion_length if online or sampled_before else (completion or answer)
    accumulation = _value(config, "gradient_accumulation_steps")
    batch = _value(config, "per_device_train_batch_size")
    pairs = (algorithm in PREFERENCES and algorithm != "kto") or algorithm == "online_dpo"
    rows, rollouts, group = _sampling(config, batch, accumulation, samples)
    heldout = min(HELDOUT_CHUNK, config.eval.size)
    decoded = min(rollout.max_batch, max(rows, heldout, HELDOUT_CHUNK * samples if sampled_before else 0))
    cut = 10**9 if online else _value(config, "max_length", None) or 10**9
    packed = algorithm in ("sft", "bon") and bool(args.get("packing"))
    lora, quantization, whole = config.model.lora, config.model.quantization, config.model.lora is None
    compared = _compares(config)
    grouped = algorithm in GROUPED
    one_piece = grouped and rows == batch and _value(config, "num_iterations") == 1 and not _checkpointing(config)
    return Workload(
        algorithm=algorithm,
        rows=batch * (2 if pairs else 1),
        micro_steps=accumulation,
        rollout_rows=rows,
        rollouts_per_step=rollouts,
        decoded=decoded,
        distinct=max(1, min(decoded, heldout), -(-rows // group)),
        prompt=asked,
        prefix=prefix,
        completion=longest,
        length=cut if packed else min(asked + longest + (0 if online else 1), cut),
        checkpointing=_checkpointing(config),
        autocast=bool(args.get("bf16") or args.get("fp16")),
        lora_rank=0 if lora is None else lora.rank,
        lora_targets=() if lora is None else lora.targets,
        lora_layers=None if lora is None else lora.layers,
        bits=0 if quantization is None else quantization.bits,
        group=0 if quantization is None else quantization.group_size,
        converts=quantization is not None and not converted,
        reference=(compared and whole) or config.model.reference is not None,
        critic=algorithm == "ppo" and whole and args.get("value_model") != "shared",
        full_logits=algorithm in ("orpo", "cpo", "ppo"),
        old_logps=(grouped and not one_piece) or algorithm == "ppo",
        reference_forward=compared,
        engine=rollout.engine,
        sampler_dtype=rollout.dtype,
        optimizer=str(args.get("optim", "adamw_torch_fused")),
        learned_rewards=sum(reward.name == "model" for reward in config.rewards),
        heldout=heldout,
        assumed=assumed,
        hold=_hold(config),
        prompts=min(batch, -(-rows // group)) if grouped and not _checkpointing(config) else 0,
    )


def _hold(config: "Config") -> str:
    from rl.device import holds_codes

    if not holds_codes(config, "mps"):
        return "values"
    return "packed" if holds_codes(config, "cpu") else "device"


def _value(config: "Config", name: str, *default: Any) -> Any:
    """What TRL will use for an argument; the default where its class has no such argument."""
    algorithm = config.trainer.algorithm
    if default and name not in trl_fields.arguments(algorithm):
        return default[0]
    return trl_fields.value(algorithm, defaults(algorithm) | config.trainer.args, name)


def _sampling(config: "Config", batch: int, accumulation: int, samples: int) -> tuple[int, float, int]:
    """(completions of a rollout, rollouts an optimizer step, completions to each prompt); zeros where none are."""
    algorithm, args = config.trainer.algorithm, config.trainer.args
    if algorithm in GROUPED:
        steps = args.get("steps_per_generation") or accumulation
        if "generation_batch_size" in args:
            steps = args["generation_batch_size"] // batch
        rollouts = accumulation / (steps * _value(config, "num_iterations", 1))
        return batch * steps, rollouts, _value(config, "num_generations")
    if algorithm == "ppo":
        cuts = _value(config, "num_mini_batches")
        return batch * accumulation * cuts, 1 / (_value(config, "num_ppo_epochs") * cuts), 1
    if algorithm == "online_dpo":
        return batch * accumulation * samples, 1.0, samples
    return 0, 0.0, 1


def _compares(config: "Config") -> bool:
    """Whether each batch goes through the reference too."""
    algorithm = config.trainer.algorithm
    if algorithm in ("dpo", "kto", "online_dpo"):
        return not _value(config, "precompute_ref_log_probs", False)
    if algorithm == "ppo":
        return _value(config, "kl_coef") > 0
    return algorithm in GROUPED and bool(_value(config, "beta"))


def _checkpointing(config: "Config") -> bool:
    # rl.device.trainer_defaults turns TRL's default off
    return bool(config.trainer.args.get("gradient_checkpointing", False))


def _samples_pairs(config: "Config") -> bool:
    """Whether the run samples its own training rows before the first step."""
    algorithm = config.trainer.algorithm
    if algorithm == "bon":
        return True
    if algorithm not in PREFERENCES or config.data.from_ is not None:
        return False
    first = _first_row(config)
    return first is None or not ({"chosen", "label"} & first.keys())


def _first_row(config: "Config") -> dict[str, Any] | None:
    data = config.data
    if data.source != "jsonl" or data.path is None:
        return None
    with (config.path.parent / data.path).open(encoding="utf-8-sig") as file:
        line = next((text for text in file if text.strip()), "{}")
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _lengths(config: "Config") -> tuple[int, int, int, str]:
    """(tokens of the longest prompt, tokens all prompts share, tokens of the longest answer, how this is known)."""
    data = config.data
    if data.mix:
        from rl.data import mix

        found = [_lengths(part) for part in mix.parts(config)]
        longest = max(found, key=lambda one: one[0])
        return longest[0], min(one[1] for one in found), max(one[2] for one in found), f"{longest[3]}, of the longest"
    if data.source == "arithmetic":
        from rl.data import arithmetic

        train, heldout = arithmetic.rows(config)
        texts = [_text(row["prompt"]) for row in (*train, *heldout)]
        answers = [_text(row["completion"]) for row in train]
        longest, shared = max(map(len, texts)), len(_shared(texts))
        extra = 32 if data.form == "chat" else 0
        return longest + extra, shared, max(map(len, answers)) + 1, f"prompts of at most {longest} characters"
    if data.source == "jsonl":
        return _file_lengths(config)
    if data.source == "hub":
        longest = HUB_PROMPTS.get(str(data.name), UNKNOWN_PROMPT)
        how = "known of this data set" if data.name in HUB_PROMPTS else "assumed; --prompt says better"
        return longest, 0, HUB_ANSWERS.get(str(data.name), UNKNOWN_PROMPT), f"prompts of {longest} tokens, {how}"
    longest = GYM_PROMPT * (1 + data.shots)
    return longest, GYM_PROMPT * data.shots, GYM_PROMPT, f"prompts of {longest} tokens, assumed; --prompt says better"


def _file_lengths(config: "Config") -> tuple[int, int, int, str]:
    data = config.data
    rate = 1.0 if config.model.base == "tiny" else CHARACTERS_A_TOKEN
    paths = [p for p in (data.path, data.heldout_path) if p is not None]
    prompt = answer = 1
    for name in paths:
        path = config.path.parent / name
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                prompt = max(prompt, len(_text(row["prompt"])))
                said = [_text(row[k]) for k in ("chosen", "rejected", "completion", "answer") if k in row]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} line {number}: no row with a prompt ({error})") from error
            answer = max([answer, *map(len, said)])
    extra = 32 if data.form == "chat" else 0
    tokens, answered = round(prompt / rate) + extra, round(answer / rate) + 1
    return tokens, 0, answered, f"prompts of about {tokens} tokens, from {prompt} characters"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "".join(str(message.get("content") or "") for message in value)
    return str(value)


def _shared(texts: Iterable[str]) -> str:
    low, high = min(texts), max(texts)
    count = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return low[:count]
