"""Which model families the engine decodes, and what mlx-lm must be told of one so that its logits are transformers'.

mlx-lm 0.32.2 reads RoPE's settings from the top level of config.json, transformers 5 writes them inside
`rope_parameters`: without the copies below a Llama would run with theta 10000 (mean |dlogp| 0.39) and no warning.
What mlx-lm's layers cannot express is refused by name, never approximated.
"""

from typing import Any

from rl.errors import UserError
from rl.hf_folder import top_level_rope

FAMILIES = ("llama", "mistral", "smollm3", "qwen2", "qwen3", "gemma3_text")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ACTIVATIONS = {"gemma3_text": ("hidden_activation", "gelu_pytorch_tanh")}
INSTEAD = 'set rollout.engine = "torch"'


def sampler_config(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of config.json that mlx-lm reads, with RoPE's moved to where it looks.

    Raises UserError for a family the engine has not been checked with, and for settings of a checked one that mlx-lm's
    layers do not have.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"[model] base is of the {family!r} family; the MLX engine decodes {', '.join(FAMILIES)}: "
            f"choose one of these or {INSTEAD}"
        )
    _refuse_what_is_missing(family, config)
    out = _gemma(config) if family == "gemma3_text" else top_level_rope(config)
    _refuse_rope(out)
    out.pop("layer_types", None)  # the engine's own masks know them (`windows`); mlx-lm's Llama wants a full layer
    return out


def windows(config: dict[str, Any]) -> tuple[int | None, ...]:
    """Of each layer, how many positions back (its own included) a token sees; None = all of them.

    Follows transformers 5.23's configuration classes, also for a config.json from before `layer_types`.
    """
    layers, window = config["num_hidden_layers"], config.get("sliding_window")
    family, kinds = config["model_type"], config.get("layer_types")
    if family == "mistral":  # one kind for all layers, and no layer_types
        return (window,) * layers
    if family == "llama" or (family in ("smollm3", "qwen2", "qwen3") and not config.get("use_sliding_window")):
        return (None,) * layers
    if kinds is None and family == "gemma3_text":
        pattern = config.get("sliding_window_pattern", 6)
        kinds = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
    elif kinds is None and family == "smollm3":
        rope = config.get("no_rope_layers") or [(i + 1) % 4 for i in range(layers)]
        kinds = ["full_attention" if r else "sliding_attention" for r in rope]
    elif kinds is None:
        first = config.get("max_window_layers", 28)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _refuse(family: str, what: str) -> UserError:
    return UserError(f"[model] base ({family}) has {what}, which the MLX engine does not decode: {INSTEAD}")


def _refuse_what_is_missing(family: str, config: dict[str, Any]) -> None:
    kinds = set(config.get("layer_types") or ["full_attention"]) - {"full_attention", "sliding_attention"}
    if kinds:
        raise _refuse(family, f"{', '.join(sorted(kinds))} layers")
    if family == "llama" and "sliding_attention" in (config.get("layer_types") or []):
        raise _refuse(family, "sliding_attention layers")
    key, activation = ACTIVATIONS.get(family, ("hidden_act", "silu"))
    if config.get(key, activation) != activation:
        raise _refuse(family, f"{key} {config[key]!r}")
    biased = config.get("attention_bias", False)
    if biased and family in ("qwen3", "gemma3_text"):
        raise _refuse(family, "biases in its attention")
    if family == "qwen2" and config.get("head_dim") not in (
        None,
        config["hidden_size"] // config["num_attention_heads"],
    ):
        raise _refuse(family, f"head_dim {config['head_dim']}, not hidden_size / num_attention_heads")
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if config.get(key):
            raise _refuse(family, f"{key} {config[key]}")


def _refuse_rope(config: dict[str, Any]) -> None:
    family, rope = config["model_type"], config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise _refuse(family, f"RoPE of type {kind!r} (it decodes {', '.join(ROPE_TYPES)})")
    rotated = {**(config.get("rope_parameters") or {}), **config}.get("partial_rotary_factor", 1.0)
    if rotated != 1.0:
        raise _refuse(family, f"partial_rotary_factor {rotated}")
    if kind == "yarn":
        odd = [k for k in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(k) is not None]
        if odd or rope.get("truncate") is False:
            raise _refuse(family, f"yarn RoPE with its own {', '.join(odd) or 'truncate = false'}")


def _gemma(config: dict[str, Any]) -> dict[str, Any]:
    """Gemma 3's two RoPEs, and which layers take which, as mlx-lm's pattern: every p-th layer is global."""
    sliding = [window is not None for window in windows(config)]
    full = range(1, len(sliding) + 2)
    pattern = next((p for p in full if all(s == bool((i + 1) % p) for i, s in enumerate(sliding))), None)
    if pattern is None:
        raise _refuse("gemma3_text", "global layers that are not every n-th")
    out = {**config, "sliding_window_pattern": pattern}
    out.setdefault("rope_theta", 1e6)
    out.setdefault("rope_local_base_freq", 1e4)
    nested = config.get("rope_parameters") or {}
    if "full_attention" in nested:
        whole, local = nested["full_attention"], nested.get("sliding_attention") or {}
        out["rope_theta"] = whole.get("rope_theta", 1e6)
        out["rope_local_base_freq"] = local.get("rope_theta", 1e4)
        if local.get("rope_type", "default") != "default":
            raise _refuse("gemma3_text", f"RoPE of type {local['rope_type']!r} in its sliding layers")
        if whole.get("rope_type", "default") != "default":
            out["rope_scaling"] = {name: value for name, value in whole.items() if name != "rope_theta"}
    return out
