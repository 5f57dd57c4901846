"""Peak memory of a run, part by part, from sizes alone.

What is held all the time (weights, optimizer) is counted exactly. What comes and goes is the largest of a few moments:
the head's backward, when all activations are there; the end of the backward, when all gradients are; the optimizer's
step; a rollout. Activations are counted operator by operator, as transformers' Llama-like layers save them for their
backward. TRL's fused head never holds the logits of all tokens: it works on tiles.

`rl.plan.measure` holds this against real runs (docs/memory.md shows each): the aim is never below, at most 30 % above.
Not measured, since nobody here has a Mac: Metal's allocator, and the attention of torch on MPS, which is taken to be
its math path, with all scores of a layer held.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from rl.algorithms import GROUPED, pieces
from rl.plan.architecture import Architecture
from rl.plan.workload import Workload

Device = Literal["mps", "cuda", "cpu"]
Parts = dict[str, float]  # name of a part -> bytes

FLOAT, HALF = 4, 2
TILE_TOKENS, TILE_VOCABULARY = 4096, 32768  # of TRL's fused head (trl/kernels/chunked_logprob.py, trl/trainer/utils.py)
TILES_WITHOUT_TRITON = 9  # float32 tiles alive in its backward where torch's own operators take Triton's place
CUDA_WORKSPACE = 96 << 20  # cuBLAS's own
SYNC_PART = 64 << 20  # rl.rollouts.sync.PART_BYTES
PREFILL_TOKENS = 16_384  # rl.rollouts.forward.PREFILL_TOKENS
RING_STEP = 64  # rl.rollouts.cache.RING_STEP
# With CUDA MLX holds what its kernels read until they are done, and the engine waits for none of 8 steps between two
# looks: keys took six times their own size on an H100 (135M) and five times (600M). 16-bit models write them in place
# and hold a prompt once (rl/rollouts/parted.py) where the kernels know them, which no plan can tell
UNDER_WAY = 6
MARGIN = 0.05
HELD = ("trainer weights", "adapter", "reference copy", "value model", "reward models", "optimizer states", "gradients")
HELD += ("sampler weights",)
DEQUANTIZING = 9  # bytes a weight of rl.packed.dequantize at its fullest: codes, the same as float32, values


@dataclass(frozen=True)
class Prediction:
    """Bytes: of each part at the moment when its side is fullest, and the two sides' peaks."""

    trainer: Parts
    sampler: Parts
    moment: str  # of the trainer's peak

    @property
    def torch(self) -> float:
        """Peak of torch's allocator, slack not counted."""
        return sum(self.trainer.values())

    @property
    def mlx(self) -> float:
        """Peak of MLX's allocator, its cache not counted."""
        return sum(self.sampler.values())

    @property
    def total(self) -> float:
        """Both peaks: an allocator keeps what it has freed, so one side's peak does not make room for the other's."""
        return self.torch + self.mlx


def predict(shape: Architecture, work: Workload, device: Device) -> Prediction:
    """The peaks of `work` on a model of `shape`."""
    batches = (_trainer(shape, batch, device) for batch in _batches(shape, work, device))
    found = [(name, parts) for moments in batches for name, parts in moments.items()]
    moment, fullest = max(found, key=lambda one: sum(one[1].values()))
    sampler = _sampler(shape, work, device) if work.engine == "mlx" else {}
    return Prediction(fullest, sampler, moment)


def holds_codes(work: Workload, device: Device) -> bool:
    """Whether the trainer holds a quantized base as codes: as `rl.device.holds_codes`."""
    return work.bits > 0 and (work.hold == "packed" or (work.hold == "device" and device != "cpu"))


def codes_bytes(shape: Architecture, bits: int, group: int) -> float:
    """Bytes of all matrices as packed codes, each group with a float32 scale and bias."""
    return (shape.matrix + shape.embedding + shape.head) * (bits / 8 + 2 * FLOAT / group)


def trained_parameters(shape: Architecture, work: Workload) -> int:
    """How many numbers the optimizer changes in the policy."""
    if work.lora_rank == 0:
        return shape.parameters
    return shape.adapter(work.lora_rank, work.lora_targets, work.lora_layers)


def _trainer(shape: Architecture, work: Workload, device: Device) -> dict[str, Parts]:
    """What torch holds at each moment that may be its fullest."""
    whole = work.lora_rank == 0
    base: float = shape.parameters * FLOAT
    if holds_codes(work, device):
        base = codes_bytes(shape, work.bits, work.group) + shape.small * FLOAT
    trained = trained_parameters(shape, work) + (shape.parameters - shape.head if work.critic else 0)
    kept: Parts = {"trainer weights": base}
    if device == "cuda":
        kept["kernels' workspace"] = CUDA_WORKSPACE
    if not whole:
        kept["adapter"] = trained * FLOAT
        if work.reference_forward:  # TRL's second adapter, which holds the start
            kept["adapter"] *= 2
    if work.reference:
        kept["reference copy"] = shape.parameters * FLOAT
    if work.critic:
        kept["value model"] = (shape.parameters - shape.head) * FLOAT
    if work.learned_rewards:
        kept["reward models"] = work.learned_rewards * shape.parameters * FLOAT
    kept["optimizer states"] = trained * FLOAT * _states(work.optimizer)

    gradients = trained * FLOAT
    # a gradient of the embedding is dense, and the head's comes before the layers'
    vocabulary = shape.embedding * FLOAT if whole else 0
    activations = _activations(shape, work, device)
    layer = _layer_backward(shape, work, device)
    head = _head(shape, work, device)
    collected = gradients if work.micro_steps > 1 else 0
    looked_at = max(shape.embedding if whole else 0, max(a * b for a, b in shape.linears.values()) if whole else 0)
    forward = kept | {
        "activations": activations,
        "logits": head + (vocabulary if not collected else 0),
        "gradients": collected + (vocabulary if collected else 0),
    }
    layers = kept | {"activations": activations + layer, "gradients": collected or vocabulary}
    end = kept | {"gradients": gradients + vocabulary, "activations": layer if work.checkpointing else layer / 2}
    step = kept | {"gradients": gradients, "workspace": looked_at * (FLOAT + 3)}
    rollout = kept | {"workspace": _hand_over(shape, work) if work.engine == "mlx" else 0}
    if work.engine == "torch":
        rollout["KV cache"] = 2.0 * shape.layers * shape.keys * FLOAT * work.decoded * (work.prompt + work.completion)
        # `generate` returns every step's logits; the last step's are filtered and normalized
        rollout["logits"] = (work.completion + 4.0) * work.decoded * shape.vocab * FLOAT
    moments = {
        "the head's backward": forward,
        "the last layers' backward": layers,
        "the end of the backward": end,
        "the optimizer's step": step,
        "the rollout": rollout,
    }
    return {name: _with_margin(parts) for name, parts in moments.items()}


def _with_margin(parts: Parts) -> Parts:
    """The parts with what is too small to list: MARGIN of all that comes and goes."""
    passing = sum(size for name, size in parts.items() if name not in HELD)
    return parts | {"small things": MARGIN * passing}


def _states(optimizer: str) -> float:
    if optimizer.startswith("adamw"):
        return 2.0
    return {"sgd": 0.0, "adagrad": 1.0, "rmsprop": 1.0}.get(optimizer, 2.0)


def _pieces(shape: Architecture, work: Workload, device: Device) -> tuple[pieces.Way, tuple[int, ...]]:
    """The way that the learner takes through a micro-batch, and the tokens of each of its pieces."""
    if work.algorithm not in GROUPED or work.checkpointing:
        return "whole", (work.rows * work.length,)
    sizes = pieces.Sizes(
        rows=work.rows,
        prompt=work.prompt,
        completion=work.completion,
        prompts=work.prompts,
        prefix=work.prefix,
    )
    way = pieces.choose(sizes, device, pieces.piece_tokens(device, shape.matrix // shape.layers))
    return way, pieces.ways(sizes, device)[way]


def _batches(shape: Architecture, work: Workload, device: Device) -> Iterator[Workload]:
    """The batches that may be the fullest: the one with the longest prompts, and where the learner reads those once the
    one with the longest prompts that it does not, which may hold more."""
    yield work
    way = _pieces(shape, work, device)[0]
    if way == "whole":
        return
    for prompt in range(work.prompt - 1, 0, -1):
        shorter = replace(
            work, prompt=prompt, prefix=min(work.prefix, prompt - 1), length=work.length - work.prompt + prompt
        )
        if _pieces(shape, shorter, device)[0] != way:
            yield shorter
            return


def _tokens(shape: Architecture, work: Workload, device: Device) -> int:
    """Tokens of one forward with gradient, all its pieces together."""
    return sum(_pieces(shape, work, device)[1])


def _layer_saved(shape: Architecture, work: Workload, device: Device) -> tuple[float, float]:
    """Bytes of one token in one layer that autograd keeps: (all of them, the residual stream's share)."""
    whole, d, i, q, k = work.lora_rank == 0, shape.hidden, shape.intermediate, shape.queries, shape.keys
    normed = d if whole else 0  # a norm's weight that is trained needs what it multiplies
    gemma = shape.family == "gemma3_text"
    full = 2 * (d + normed)  # the inputs of the two norms
    if gemma:  # norms behind attention and feed-forward too, computed in float32
        full += 2 * (d + normed)
    heads: float = shape.heads
    if shape.qk_norm:
        full += (q + k) * (2 if whole else 1)
    if _math_attention(shape, work, device):
        heads += shape.heads * _scores(shape, work, device) / _tokens(shape, work, device)  # softmax's output is kept
    inner = 4 * q + 4 * i  # queries, keys and values repeated for every head, output; gate, its activation, up, product
    casts = 2 * d  # the two inputs of linears
    ranks = 0.0
    if not whole:
        ranks = work.lora_rank * sum(t in work.lora_targets for t in shape.linears)
    if work.autocast:
        # each linear casts its own copy of its input
        half = inner + 5 * d + (i + q if not whole else 0) + ranks
        return (full + heads) * FLOAT + half * HALF, d * FLOAT
    return (full + inner + casts + heads + ranks) * FLOAT, d * FLOAT


def _math_attention(shape: Architecture, work: Workload, device: Device) -> bool:
    """Whether attention holds all its scores: on MPS, and on CUDA in float32 where heads share keys and no row is
    padded (its fused kernels for shared keys are for half precision, and transformers repeats keys under a mask only).
    """
    return device == "mps" or (device == "cuda" and shape.kv_heads != shape.heads and not work.autocast)


def _scores(shape: Architecture, work: Workload, device: Device) -> float:
    """Scores of one head that the math path makes of a micro-batch: all of them on MPS; on CUDA those of the
    first piece, whose tokens see no earlier one's, since a later one has a mask, and with it a fused kernel.
    """
    way, _ = _pieces(shape, work, device)
    if device == "mps" or way == "whole":
        return work.rows * work.length**2
    prefix = pieces.shared(work.prefix, device)
    return prefix**2 if prefix else work.prompts * work.prompt**2


def _masks(shape: Architecture, work: Workload, device: Device) -> float:
    """Numbers of a layer's mask where rows are padded or see an earlier piece: each layer turns the booleans into its
    own numbers and keeps them. Without a mask, where the math path then runs, its scores are more."""
    way, _ = _pieces(shape, work, device)
    if way == "whole":
        return 0 if _math_attention(shape, work, device) else work.rows * work.length**2
    last = work.completion if way == "prompts" else work.length - pieces.shared(work.prefix, device)
    return work.rows * last * work.length


def _activations(shape: Architecture, work: Workload, device: Device) -> float:
    saved, stream = _layer_saved(shape, work, device)
    tokens, whole = _tokens(shape, work, device), work.lora_rank == 0
    per_token = shape.layers * (stream if work.checkpointing else saved)
    # the final norm, its output, positions (cosine and sine), ids and masks
    per_token += shape.hidden * FLOAT * (3 if whole else 2) + 2 * shape.head_dim * FLOAT + 64
    total, item = tokens * per_token, HALF if work.autocast else FLOAT
    if work.prompts and not work.checkpointing:  # keys and values of what was read once, again for each row
        again = max(0, work.rows * work.length - tokens)
        total += 2 * shape.layers * again * shape.queries * item
        if again and shape.kv_heads != shape.heads:  # and as the cache holds them, before heads share them
            total += 2 * shape.layers * work.rows * work.length * shape.keys * item
    total += _masks(shape, work, device) * (1 if work.checkpointing else shape.layers) * item
    if work.autocast:  # weights cast once, and kept for the backward
        total += shape.matrix * HALF / (shape.layers if work.checkpointing else 1)
    # below the first adapter there is nothing to keep
    if work.lora_layers is not None and not work.checkpointing:
        total *= min(1.0, (work.lora_layers + 1) / shape.layers)
    total += work.rows * work.length * work.length * 5  # the attention mask, as numbers and as booleans
    if work.critic:
        total *= 2
    return total


def _layer_backward(shape: Architecture, work: Workload, device: Device) -> float:
    """What one layer's backward holds beside what was saved: with checkpointing the layer computed again."""
    tokens = _tokens(shape, work, device)
    passing = tokens * (3 * shape.intermediate + 2 * shape.hidden) * FLOAT
    if _math_attention(shape, work, device):
        passing = max(passing, 2.0 * shape.heads * _scores(shape, work, device) * FLOAT)
    if work.checkpointing:
        passing += tokens * _layer_saved(shape, work, device)[0]
    if holds_codes(work, device):
        passing += DEQUANTIZING * max(a * b for a, b in shape.linears.values())
    return passing


def _head(shape: Architecture, work: Workload, device: Device) -> float:
    """Logits or their tiles, in the backward."""
    scored = work.rows * (work.completion + 1)
    if work.full_logits:
        if work.algorithm == "ppo":
            return 6.0 * scored * shape.vocab * FLOAT
        return 5.0 * work.rows * work.length * shape.vocab * FLOAT
    if work.algorithm == "reward":
        return 2.0 * work.rows * work.length * FLOAT
    if device == "mps":
        scored = work.rows * work.length  # the number of scored positions would change shapes there
    tokens, width = min(scored, TILE_TOKENS), min(shape.vocab, TILE_VOCABULARY)
    item = HALF if work.autocast else FLOAT
    tiles: float = tokens * TILE_VOCABULARY * item  # of this width whatever the vocabulary
    if device != "cuda":
        tiles += TILES_WITHOUT_TRITON * tokens * width * FLOAT
    hidden = 3 * scored * shape.hidden * FLOAT  # those scored, their gradient, and it among the others
    weights = width * shape.hidden * (FLOAT + HALF) if work.autocast else 0
    if holds_codes(work, device):
        weights += DEQUANTIZING * width * shape.hidden  # the head's tile
    return tiles + hidden + weights


def _hand_over(shape: Architecture, work: Workload) -> float:
    """Tensors laid end to end, and the booleans of the check that all are finite."""
    part = SYNC_PART if work.lora_rank else max(SYNC_PART, shape.embedding * FLOAT)
    return min(part, trained_parameters(shape, work) * FLOAT) * 2.5


def _kv(shape: Architecture, work: Workload, item: int, grouped: bool, steps: int = 1) -> float:
    """Keys and values of a rollout at its end, with what moving them takes.

    A step writes into new arrays while the old ones are held, so what is drawn counts twice, and once more for each
    further one of `steps` under way; `grouped` (MLX on a CPU) holds a prompt once for all its completions, otherwise
    each row has its own.
    """
    drawn, prompts = work.decoded * work.completion, work.distinct * work.prompt
    if grouped:
        tokens = (1.0 + steps) * drawn + 1.4 * prompts
    else:
        width = -(-work.prompt // RING_STEP) * RING_STEP + -(-work.completion // RING_STEP) * RING_STEP
        tokens = (1.0 + steps) * work.decoded * width + 2.0 * prompts
    return 2.0 * shape.layers * shape.keys * item * tokens


def _sampler(shape: Architecture, work: Workload, device: Device) -> Parts:
    """What MLX holds: on a CPU the dequantized values of the weights in float32, elsewhere codes or a half copy."""
    shared = work.bits > 0
    exact = device == "cpu" or (shared and device != "cuda")
    item = {"float32": FLOAT, None: FLOAT if exact else HALF}.get(work.sampler_dtype, HALF)
    weights: float = shape.parameters * item
    if shared and device != "cpu":
        scales = (shape.matrix + shape.embedding + shape.head) * 2 * (item - FLOAT) / work.group
        weights = codes_bytes(shape, work.bits, work.group) + scales + shape.small * item
    parts: Parts = {"sampler weights": weights}
    if work.lora_rank:
        parts["sampler adapter"] = 2.0 * trained_parameters(shape, work) * FLOAT
        arriving = 0.0
    else:  # the old weights stay until the new ones are there, and the trainer's numbers until they are converted
        arriving = shape.parameters * FLOAT + (weights if item != FLOAT else 0)
    grouped, steps = device == "cpu", UNDER_WAY if device == "cuda" else 1
    tokens = min(PREFILL_TOKENS, work.distinct * work.prompt)
    reading = tokens * (4 * shape.intermediate + 6 * shape.hidden + 4 * shape.queries) * item
    if device == "cpu":  # no fused attention
        reading += 2.0 * work.distinct * shape.heads * work.prompt**2 * item
    drawing = 4.0 * work.decoded * shape.vocab * FLOAT + 3.0 * work.decoded * shape.intermediate * item
    cached, moving = (_kv(shape, work, item, grouped, many) for many in (1, steps))
    first = {"KV cache": cached, "prompts and logits": steps * reading}  # as many layers of it, by the same reason
    rolling = {"KV cache": moving, "prompts and logits": drawing}
    read = 1.5 * shape.embedding * HALF  # the largest matrix as it lies in the file
    moments = [parts | first, parts | rolling, parts | {"weights arriving": arriving}, parts | {"weights read": read}]
    if work.converts:  # float32 weights turn into codes and back: one after the other, or as a GPU's queue gets to them
        making = (
            (1 if device == "cpu" else 2) * shape.parameters * FLOAT
            + codes_bytes(shape, work.bits, work.group)
            + shape.embedding * FLOAT
        )
        moments.append({"making the quantized base, once": making})
    return max(map(_with_margin, moments), key=lambda moment: sum(moment.values()))
