"""Properties of configs: what `resolved` gives loads to the same, and GRPO's batches are those TRL accepts."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from config_helper import write
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.config import Config, load, resolved
from rl.config.checks import generation_period, rollout_size
from rl.config.text import to_toml
from rl.errors import UserError

text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
word = st.text("abcdefghij_", min_size=1, max_size=6).filter(lambda name: name not in ("model", "name", "weight"))
number = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
leaf = text | number | st.booleans()
free = st.dictionaries(
    word,
    st.recursive(leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(word, inner, max_size=3)),
    max_size=3,
)


def some(**optional: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=optional)


share = st.floats(0.01, 1.0)
lora = some(
    rank=st.integers(1, 64),
    alpha=st.floats(0.5, 64),
    dropout=st.floats(0, 0.9),
    layers=st.integers(1, 30),
    targets=st.lists(word, min_size=1, max_size=3),
)
rollout = some(
    engine=st.sampled_from(["mlx", "torch"]),
    dtype=st.sampled_from(["float32", "float16"]),
    temperature=st.floats(0.1, 2) | st.integers(1, 2),
    top_p=share,
    top_k=st.integers(0, 50),
    min_p=st.floats(0, 1),
    max_completion_length=st.integers(1, 512),
    stop=st.lists(text.filter(bool), max_size=2),
    correction=st.sampled_from(["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]),
    correction_cap=st.floats(1, 10),
    max_batch=st.integers(1, 999),
)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Tables of a valid config."""
    model: dict[str, Any] = {"base": draw(st.sampled_from(["smollm2-135m-instruct", "org/name", "models/x.gguf"]))}
    if draw(st.booleans()):
        model["lora"] = draw(lora)
        if draw(st.booleans()):
            sizes = st.sampled_from([32, 64, 128])
            model["quantization"] = {"bits": draw(st.sampled_from([4, 8]))} | draw(some(group_size=sizes))
    source = draw(st.sampled_from(["arithmetic", "reasoning-gym", "jsonl", "hub"]))
    own: dict[str, st.SearchStrategy[Any]] = {
        "arithmetic": some(operation=st.sampled_from(list("+-*")), max_a=st.integers(0, 99), shots=st.integers(0, 5)),
        "reasoning-gym": st.fixed_dictionaries(
            {
                "task": st.lists(
                    st.fixed_dictionaries({"name": word}, optional={"weight": share, "options": free}), min_size=1
                )
            }
        ),
        "jsonl": st.just({"path": "x.toml"}) | st.just({"path": "x.toml", "heldout_path": "x.toml"}),
        "hub": st.fixed_dictionaries({"name": text}, optional={"split": text, "heldout_split": text}),
    }
    rewards = [{"name": "colorsys:rgb_to_hsv", "weight": 0.5} | draw(free) for _ in range(draw(st.integers(1, 3)))]
    algorithm, group, prompts = draw(st.sampled_from(["sft", "grpo"])), draw(st.integers(2, 8)), draw(st.integers(1, 8))
    args: dict[str, Any] = {"per_device_train_batch_size": group * prompts, "learning_rate": draw(st.floats(0, 1))}
    if algorithm == "grpo":
        args |= {"num_generations": group, "loss_type": draw(st.sampled_from(["dapo", "grpo"]))}
    return {
        "run": {"name": draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True))}
        | draw(some(seed=st.integers(0, 2**32 - 1), device=st.sampled_from(["auto", "mps", "cuda", "cpu"]))),
        "model": model,
        "data": {"source": source, "train_size": draw(st.integers(8, 10**6))} | draw(own[source]),
        "rollout": draw(rollout),
        "reward": rewards,
        "trainer": {"algorithm": algorithm} | args,
        "eval": draw(some(size=st.integers(1, 999), metric=st.sampled_from(["strict", "lenient"]))),
    }


def emit(value: Any) -> str:
    """Inline TOML, written apart from `rl.config.text`: every character beyond ASCII letters escaped."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + "".join(c if c.isascii() and c.isalnum() else f"\\U{ord(c):08x}" for c in value) + '"'
    if isinstance(value, list):
        return "[" + ",".join(map(emit, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{emit(name)}={emit(item)}" for name, item in value.items()) + "}"
    return repr(value)


@settings(max_examples=60, deadline=None)
@given(configs())
def test_resolved_round_trips_through_toml_and_json(tables: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), "".join(f"{name}={emit(table)}\n" for name, table in tables.items()))
        first = load(path)
        full = resolved(first)
        assert json.loads(json.dumps(full, allow_nan=False)) == full
        assert load(write(Path(folder), "".join(f"{n}={emit(t)}\n" for n, t in full.items()))) == first
        assert load(write(Path(folder), to_toml(full))) == first  # what `check` prints is a config
        for table, given_keys in tables.items():
            if isinstance(given_keys, dict):
                assert given_keys.keys() <= full[table].keys()
        assert resolved(replace(first, path=Path("elsewhere"))) == full  # no machine's path in the record


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(2, 9),
    st.none() | st.integers(1, 5),
    st.none() | st.integers(1, 40),
    st.integers(1, 4),
)
def test_batches_are_accepted_exactly_where_trls_own_config_accepts_them(
    batch: int, group: int, steps: int | None, generation_batch: int | None, accumulation: int
) -> None:
    """Leans on what `GRPOConfig.__post_init__` of TRL 1.16 says of generation_batch_size and num_generations."""
    from trl import GRPOConfig

    args = {"per_device_train_batch_size": batch, "num_generations": group, "gradient_accumulation_steps": accumulation}
    args |= {} if steps is None else {"steps_per_generation": steps}
    args |= {} if generation_batch is None else {"generation_batch_size": generation_batch}
    try:
        reference = GRPOConfig(output_dir="unused", use_cpu=True, bf16=False, **args)  # type: ignore[arg-type]
    except ValueError:
        reference = None
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"trainer.{name}={value}" for name, value in args.items()]
        try:
            config: Config | None = load(write(Path(folder)), overrides)
        except UserError as error:
            if "one must divide the other" in str(error):
                return  # stricter than TRL, for exact resume
            config = None
    assert (config is None) == (reference is None)
    if config is not None and reference is not None:
        assert rollout_size(config.trainer.args) == reference.generation_batch_size


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))
def test_generation_period_matches_a_count_of_micro_steps(spg: int, accumulation: int, iterations: int) -> None:
    """Walks TRL's loop: a new rollout each steps_per_generation × num_iterations micro-steps, as `_prepare_inputs`."""
    period = spg * iterations
    if period % accumulation and accumulation % period:
        return  # refused
    args = {"steps_per_generation": spg, "gradient_accumulation_steps": accumulation, "num_iterations": iterations}
    clean = [step for step in range(1, 50) if (step * accumulation) % period == 0]
    assert clean[0] == generation_period(args)
    assert all(step % clean[0] == 0 for step in clean)
