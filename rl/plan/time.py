"""How long a step takes, from operations, bytes and a machine's figures: a rough estimate, good to a factor of two.

The learner multiplies: 2 operations a weight and token forwards, twice that backwards where all weights are trained.
Decoding reads: each step takes all weights and the keys and values seen so far through memory once for all rows.
"""

from dataclasses import dataclass

from rl.plan.architecture import Architecture
from rl.plan.machine import Machine
from rl.plan.memory import FLOAT, trained_parameters
from rl.plan.workload import Workload

# shares of the published figures that such programs reach
MULTIPLIED = {"mps": 0.5, "cuda": 0.45, "cpu": 0.5}
MOVED = 0.7
LAUNCHES = {"mps": 150e-6, "cuda": 300e-6, "cpu": 0.0}  # seconds a layer and decoding step: below it no GPU decodes


@dataclass(frozen=True)
class Seconds:
    """Seconds of one optimizer step, by part."""

    rollout: float
    sync: float
    learner: float
    optimizer: float

    @property
    def step(self) -> float:
        """All of it."""
        return self.rollout + self.sync + self.learner + self.optimizer


def predict(shape: Architecture, work: Workload, machine: Machine, sampler_weights: float) -> Seconds | None:
    """Seconds of a step of `work`, None where the machine's speed is unknown; `sampler_weights` in bytes."""
    if not machine.flops:
        return None
    flops = (machine.half_flops if work.autocast else machine.flops) * MULTIPLIED[machine.device]
    bandwidth = machine.bandwidth * MOVED
    trained = trained_parameters(shape, work)
    learner = work.micro_steps * learner_operations(shape, work) / flops
    return Seconds(
        rollout=work.rollouts_per_step * _rollout(shape, work, machine, sampler_weights, bandwidth),
        sync=work.rollouts_per_step * 3 * trained * FLOAT / bandwidth,
        learner=learner,
        optimizer=7 * trained * FLOAT / bandwidth,
    )


def learner_operations(shape: Architecture, work: Workload) -> float:
    """Operations of one micro-batch: forward, backward, and the forwards that go before the loss."""
    whole = work.lora_rank == 0
    tokens, scored = work.rows * work.length, work.rows * work.completion
    layers = 2.0 * shape.matrix * tokens + 2.0 * shape.layers * shape.queries * work.length * tokens
    head = 2.0 * shape.embedding * (tokens if work.algorithm in ("orpo", "cpo") else scored)
    backward = 2 if whole else 1
    passes = 1 + backward + work.checkpointing + work.old_logps + work.reference_forward
    heads = 2 + backward + work.old_logps + work.reference_forward  # its backward computes the logits again
    if work.critic:
        passes += 1 + backward + work.checkpointing
    return passes * layers + heads * head


def _rollout(shape: Architecture, work: Workload, machine: Machine, sampler_weights: float, bandwidth: float) -> float:
    if not work.rollout_rows:
        return 0.0
    flops = machine.half_flops * MULTIPLIED[machine.device]
    prompts = max(1, work.distinct) * max(1, work.prompt - work.prefix) + work.prefix
    reading = 2.0 * shape.matrix * prompts / flops
    waves = -(-work.rollout_rows // work.decoded)
    item = FLOAT if machine.device == "cpu" or work.bits else 2
    cached = 2.0 * shape.layers * shape.keys * item * work.decoded * (work.prompt + work.completion / 2)
    moving = (sampler_weights + cached) / bandwidth
    multiplying = 2.0 * (shape.matrix + shape.embedding) * work.decoded / flops
    a_token = max(moving, multiplying, LAUNCHES[machine.device] * shape.layers)
    return reading + waves * work.completion * a_token
