"""A whole decode step's layers in one kernel, for MLX on CUDA: what kernels.py and streamed.py launch one by one.

An operation costs MLX's host 13 µs there, more than most of these kernels take: 165 of them are a small model's step.
Here so many blocks as run at once do the work of one stage after the other and meet in between (whole.cu). Which arrays
a layer reads the kernel finds by address: `Table` holds those of the weights, and `cache_table` makes them of a cache.

As with the other kernels, it is tried on the machine before it is used, and they go on where it is wrong.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from rl.rollouts import device, fused, kernels, streamed, turns
from rl.rollouts.fused import TILE

WARPS = 8  # of a block
AT_A_TIME = 16  # arrays whose addresses one kernel finds
KEPT = 1024  # bytes of a block's memory for the addresses of this layer and the next
ROOM = 47 * 1024  # and for what a stage of a small model does there
MOST_ROOM = 226 * 1024  # that a block may have, as it is alone on a processor
NAMES = ("QKV", "O", "GATE_UP", "DOWN")
INPUTS = ("rows", "first", "layers", "cached", "turns", "spans", "column", "now", "came")
OUTPUTS = ("out", "scratch", "parts")
OF_LINEAR = ("weight", "scales", "biases", "a", "b", "where", "bias")
FUNCTIONS = {
    "product": (
        "int BITS, int GROUP, int NT, int MT, int WARPS, int RANKS, bool NORM, bool GATED, bool BIAS, bool ADD",
        "const T* rows, Sizes rows_shape, const void* weight, Sizes weight_shape, const T* scales, const T* offsets, "
        "const T* gamma, const T* a, const T* b, const int* where, const T* bias, const T* more, T* out, float EPS",
    ),
    "attend": (
        "int D, int HEADS, int KV, int QUERIES, int ROWS, int AT_ONCE, int WARPS, bool NORM",
        "const T* qkv, const float* turns, const T* q_gamma, const T* k_gamma, "
        "const T* prompt_keys, const long long* prompt_keys_strides, "
        "const T* prompt_values, const long long* prompt_values_strides, "
        "const T* keys, const long long* keys_strides, Columns keys_shape, "
        "const T* values, const long long* values_strides, "
        "const int* spans, Sizes spans_shape, const int* column, T* out, float SCALE, float EPS",
    ),
    "stream": (
        "int NT, int WN, int MT, int STAGES, int SPLIT, bool PARTS, int RANKS, bool GATED, bool BIAS",
        "const T* rows, Sizes rows_shape, const T* weight, Sizes weight_shape, const T* a, const T* b, "
        "const int* where, const T* bias, void* out",
    ),
    "finish": (
        "int SPLIT, int RANKS, int EACH, bool BIAS",
        "const float* parts, const T* b, const int* where, const T* bias, const T* more, Sizes more_shape, "
        "const T* gamma, T* out, T* normed, float EPS",
    ),
}


@dataclass
class Table:
    """Where the kernel finds a model's weights: `state["layers"]` (layers, words), as whole.cu's Layer has them, made
    of `arrays`, which stay where they are as long as somebody holds them. `state["came"]` counts blocks that met."""

    state: dict[str, mx.array] = field(default_factory=dict)
    arrays: list[Any] = field(default_factory=list)

    def refresh(self, model: Any, layers: Sequence[fused.Layer]) -> None:
        """Take over addresses if any array is another one than at the last call."""
        rows = [_arrays(model, i, own) for i, own in enumerate(layers)]
        now = [array for row in rows for array in row]
        if "layers" in self.state and len(now) == len(self.arrays) and all(map(_is, now, self.arrays)):
            return
        words = np.array(_addresses(now), np.uint64).reshape(len(rows), -1)
        products, windows = fused.of(model), model.args.windows
        kinds = list(dict.fromkeys(windows))
        which = [[products.turn_of[i], kinds.index(window)] for i, window in enumerate(windows[: len(rows)])]
        self.state["layers"] = mx.array(np.concatenate([words, np.array(which, np.uint64)], axis=1))
        self.state.setdefault("came", mx.zeros((2,), mx.uint64))
        mx.eval(self.state)
        self.arrays = now


def _is(one: Any, other: Any) -> bool:
    return one is other


def _arrays(model: Any, i: int, own: fused.Layer) -> list[mx.array | None]:
    """Of layer i, in the order of whole.cu's Layer."""
    layers, stream = model.model.layers, streamed.chosen(model)
    after = [*(layer.input_layernorm for layer in layers[1:]), model.model.norm]
    before = after[i] if stream else layers[i].input_layernorm
    attention = layers[i].self_attn
    gammas = [attention.q_norm.weight, attention.k_norm.weight] if "q_norm" in attention else [None, None]
    out = [one.state.get(name) for one in own.every for name in OF_LINEAR]
    return [*out, before.weight, layers[i].post_attention_layernorm.weight, *gammas]


def _addresses(arrays: Sequence[mx.array | None]) -> list[int]:
    """0 for one that is not there."""
    there = [array for array in arrays if array is not None]
    kinds, found = dict.fromkeys(array.dtype for array in there), {}
    for dtype in kinds:
        alike = [array for array in there if array.dtype == dtype]
        words = np.array(_described(alike, dims=0)).reshape(-1)
        found |= dict(zip(map(id, alike), words.tolist(), strict=True))
    return [0 if array is None else found[id(array)] for array in arrays]


def cache_table(prompts: Sequence[kernels.Pair], rings: Sequence[kernels.Pair]) -> mx.array:
    """(layers, 4, 5) of a cache as `kernels.hidden_states` takes it: of prompts' keys and values and of rings' each the
    address, three strides and how many columns there are. Whoever holds it holds these too."""
    pairs = zip(prompts, rings, strict=True)
    return _described([array for both in pairs for pair in both for array in pair], dims=4).reshape(-1, 4, 5)


def _described(arrays: Sequence[mx.array], dims: int) -> mx.array:
    """(arrays, 1 or 5): the address of each, and of those of 4 `dims` what `cache_table` says."""
    out = []
    for start in range(0, len(arrays), AT_A_TIME):
        some = list(arrays[start : start + AT_A_TIME])
        (words,) = _describe(dims)(
            inputs=some + some[:1] * (AT_A_TIME - len(some)),
            template=[("T", some[0].dtype)],
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(AT_A_TIME, 5 if dims else 1)],
            output_dtypes=[mx.uint64],
        )
        out.append(words[: len(some)])
    return mx.concatenate(out)


@cache
def _describe(dims: int) -> Callable[..., list[mx.array]]:
    lines = []
    for i in range(AT_A_TIME):
        told = [f"reinterpret_cast<unsigned long long>(i{i})"]
        if dims:
            told += [f"i{i}_strides[{j}]" for j in range(3)] + [f"i{i}_shape[2]"]
        lines += [f"out[{i * len(told) + j}] = {word};" for j, word in enumerate(told)]
    source = "if (threadIdx.x == 0) {\n" + "\n".join(lines) + "\n}"
    return device.cuda_kernel(f"describe{dims}", [f"i{i}" for i in range(AT_A_TIME)], source)


Step = Callable[[int, mx.array], mx.array]


def steps(
    model: Any,
    cached: mx.array,
    position_T_B: mx.array,
    spans: Sequence[mx.array],
    column_T: mx.array,
    table: Table | None = None,
) -> Step:
    """A function (t, tokens (B,)) -> hidden states (B, width), normed, of step t of those whose positions (T, B), spans
    (T, B, 5) for each kind of window and columns (T,) these are; else as `kernels.hidden_states`."""
    inner, products = model.model, fused.of(model)
    state = (table or products.table).state
    turns_T = mx.stack([kind[position_T_B] for kind in products.turns], axis=1)
    spans_T = mx.stack(list(spans), axis=1)
    stream = streamed.chosen(model)

    def step(t: int, token_B: mx.array) -> mx.array:
        x = inner.embed_tokens(token_B)
        first = inner.layers[0].input_layernorm(x) if stream else x
        given = (x, first, state["layers"], cached, turns_T, spans_T, column_T, _number(t), state["came"])
        out = _run(model, given)
        return out if stream else inner.norm(out)

    return step


@cache
def _number(t: int) -> mx.array:
    out = mx.array([t], mx.int32)
    mx.eval(out)
    return out


def _run(model: Any, given: Sequence[mx.array]) -> mx.array:
    rows, dtype = given[0], given[0].dtype
    kernel, room, scratch, parts = _kernel_of(model, len(rows))
    out, _, _ = kernel(
        inputs=list(given),
        template=[("T", dtype)],
        grid=(device.processors() * 32 * WARPS, 1, 1),
        threadgroup=(32 * WARPS, 1, 1),
        output_shapes=[rows.shape, (len(rows) * scratch,), (parts,)],
        output_dtypes=[dtype, dtype, mx.float32],
        shared_memory=KEPT + room,
    )
    return out


def _kernel_of(model: Any, rows: int) -> tuple[Callable[..., list[mx.array]], int, int, int]:
    """For so many rows: the kernel, bytes of a block's memory for stages, numbers of scratch a row and float32 numbers
    of parts."""
    own, attention, stream = fused.of(model).layers[0], model.model.layers[0].self_attn, streamed.chosen(model)
    normed, size = "q_norm" in attention, turns.head_size(attention)
    together, shares, at_once = _sharing(rows, attention, size)
    told = {"HEADS": attention.n_heads, "KV": attention.n_kv_heads, "D": size}
    told |= {"KEPT": KEPT // 16, "TOGETHER": together, "ATTEND_ROWS": shares, "AT_ONCE": at_once}
    told |= {"QK_NORM": normed, "GATE_UP_OUT": sum(own.gate_up.sizes)}
    numbers = {
        "EPS": model.model.norm.eps,
        "QK_EPS": attention.q_norm.eps if normed else 0.0,
        "SCALE": attention.scale,
    }
    shapes, room, parts = {}, ROOM, 1
    for name, one in zip(NAMES, own.every, strict=True):
        gated, last = name == "GATE_UP", name in ("O", "DOWN")
        outputs, ranks = sum(one.sizes), one.rank // TILE
        shape = {"IN": one.inputs, "OUT": outputs, "RANKS": ranks, "GATED": gated, "BIAS": "bias" in one.state}
        if stream:
            found = _shape(one, rows, last, gated)
            shape |= {"NT": found.tiles, "WN": found.warps, "MT": found.rows}
            shape |= {"STAGES": found.stages, "SPLIT": found.split}
            room = max(room, found.bytes(2 if gated else 1, ranks))
            parts = max(parts, found.split * rows * (outputs + one.rank) if last else 1)
        else:
            shape |= {"BITS": one.settings.get("bits", 16), "GROUP": one.settings.get("group_size", 1)}
            shape |= {"NORM": not last, "ADD": last, "NT": kernels.tiles_of(one, rows, gated=gated)}
            shape["MT"] = eights(rows)
        shapes[name] = shape
    scratch = sum(own.qkv.sizes) + own.o.inputs + own.down.inputs + sum(own.o.sizes)
    return _kernel(_header(stream, told, numbers, shapes, room)), room, scratch, parts


def eights(rows: int) -> int:
    """Of the rows that a small model's block multiplies."""
    return 2 if rows <= 16 else kernels.ROWS // 8


def _sharing(rows: int, attention: Any, size: int) -> tuple[int, int, int]:
    """Queries of a block of attend.cu, its rows, and pieces it asks for at once: what takes all blocks the least time
    for some hundred keys of a prompt and a quarter as many of each row's own."""
    together = kernels.sharing(rows, attention, size)[0]

    def keys(shares: int) -> int:
        work = -(-rows // shares) * attention.n_heads // together
        return -(-work // device.processors()) * (256 + 64 * shares)

    return together, min((n for n in (8, 4, 2, 1) if n * together <= 8), key=keys), 2 if size <= 64 else 1


def _shape(one: fused.Product, rows: int, last: bool, gated: bool) -> streamed.Shape | None:
    return streamed.shape_at_once(one, rows, device.processors(), MOST_ROOM, parts=last, gated=gated)


def _header(
    stream: bool, told: dict[str, int], numbers: dict[str, float], shapes: dict[str, dict[str, int]], room: int
) -> str:
    """What whole.cu knows beforehand: constants, and the stages' bodies as functions."""
    titles = {"QKV": "Qkv", "O": "O", "GATE_UP": "GateUp", "DOWN": "Down"}
    lines = [f"constexpr int ROOM_BYTES = {room}, {', '.join(f'{k} = {v:d}' for k, v in told.items())};"]
    lines += [f"constexpr float {name} = {value!r}f;" for name, value in numbers.items()]
    for name, shape in shapes.items():
        inside = " ".join(f"static constexpr int {key} = {value:d};" for key, value in shape.items())
        lines.append(f"struct {titles[name]} {{ {inside} }};")
    chosen = f"#define STREAMED {stream:d}"
    parts = [chosen, kernels.read("whole.cuh"), kernels.read("product.cuh"), "\n".join(lines)]
    for name in ("attend", *(("stream", "finish") if stream else ("product",))):
        constants, parameters = FUNCTIONS[name]
        parts.append(
            f"template <typename T, {constants}, typename Ready>\nFUNCTION void {name}(\n    {parameters},\n"
            f"    Place blockIdx, const Ready& ready) {{\n{kernels.read(f'{name}.cu')}}}"
        )
    return "\n".join(parts)


@cache
def _kernel(header: str) -> Callable[..., list[mx.array]]:
    return device.cuda_kernel("whole", INPUTS, kernels.read("whole.cu"), header, contiguous=True, outputs=OUTPUTS)


def state(model: Any) -> list[Any]:
    """What `steps` reads beside its arguments, as an input of compiled steps; the layers' weights are not: it has their
    addresses."""
    inner, products = model.model, fused.of(model)
    near = [inner.embed_tokens, inner.norm, model.get("lm_head", {}), inner.layers[0].input_layernorm]
    return [near, products.turns, products.table.state]


def chosen(model: Any) -> bool:
    """What `usable` found, also while a step is compiled."""
    return (products := fused.of(model)) is not None and products.right.get(_key(products), False)


def usable(model: Any) -> bool:
    """Whether `steps` may decode this model, for which `kernels.usable` and `streamed.usable` have answered: all its
    layers are alike, and the kernel was right on them. Brings the table up to date; call it as `kernels.usable`."""
    if (products := fused.of(model)) is None:
        return False
    if (key := _key(products)) not in products.right:
        products.right[key] = _knows(model) and kernels.right(model, _trial)
    if products.right[key]:
        products.table = products.table or Table()
        products.table.refresh(model, products.layers)
    return products.right[key]


def _key(products: fused.Fused) -> tuple[Any, ...]:
    return ("whole", *map(_kind, products.layers[0].every))


def _kind(one: fused.Product) -> tuple[Any, ...]:
    return (tuple(one.settings.items()), one.rank, "bias" in one.state, tuple(one.sizes))


def _knows(model: Any) -> bool:
    layers, stream = fused.of(model).layers, streamed.chosen(model)
    alike = len({tuple(map(_kind, own.every)) for own in layers}) == 1
    if stream:
        told = zip(layers[0].every, (False, True, False, True), (False, False, True, False), strict=True)
        fits = all(_shape(one, 1, last, gated) for one, last, gated in told)
    else:
        fits = all(one.inputs * sum(one.sizes) < kernels.WIDE for one in layers[0].every)
    gammas = [m.weight for layer in model.model.layers for m in (layer.input_layernorm, layer.post_attention_layernorm)]
    dtype = model.model.norm.weight.dtype
    return alike and fits and all(gamma.dtype == dtype for gamma in gammas)


def _trial(model: Any, normal: Callable[..., mx.array]) -> dict[str, tuple[mx.array, mx.array]]:
    """A step of few rows and one of many, by the other kernels and by this one: hidden states and rings. Of two layers:
    on such inputs SmolLM2's 30 make of one rounding a tenth of the largest number."""
    out, products, length, columns = {}, fused.of(model), 40, 24
    attention, layers = model.model.layers[0].self_attn, min(2, len(products.layers))
    size, kv_heads = turns.head_size(attention), attention.n_kv_heads
    shaken = [kernels.shaken_layer(own, normal) for own in products.layers[:layers]]
    turns.reach(model, 256)
    table = Table()
    table.refresh(model, shaken)
    for rows, at in ((5, 23), (71, 13)):
        every = np.arange(rows)
        spans = np.stack([every, every % 3, every % 2, 33 + every % 7, 1 + every * 5 % columns], axis=1)
        prompts = [tuple(normal(3, kv_heads, length, size) for _ in range(2)) for _ in range(layers)]
        rings = [tuple(normal(rows, kv_heads, columns, size) for _ in range(2)) for _ in range(layers)]
        mine = [tuple(mx.contiguous(array + 0) for array in pair) for pair in rings]
        token_B, position_B = mx.array(every % 50, mx.int32), mx.array(every * 3 % 200, mx.int32)
        spans_B, column = mx.array(spans, mx.int32), mx.array(at, mx.int32)
        mx.eval(prompts, rings, mine)
        one = streamed if streamed.chosen(model) else kernels
        expected = one.hidden_states(model, token_B, position_B, prompts, rings, [spans_B] * layers, column, shaken)
        mx.eval(expected)
        kinds = [spans_B[None]] * len(set(model.args.windows))
        cached = cache_table(prompts, mine)
        found = steps(model, cached, position_B[None], kinds, column[None], table)(0, token_B)
        mx.eval(found)
        out[f"a step of {rows} rows"] = found, expected
        out[f"the last keys of {rows} rows"] = mine[-1][0], rings[-1][0]
        out[f"the last values of {rows} rows"] = mine[-1][1], rings[-1][1]
    return out
