"""PPO's own arguments beside those of transformers' Trainer; read with `ast` when a config is checked (rl.trl_fields).

TRL 1.16 has no PPO: the names and most defaults are those of TRL's former `PPOConfig`.
"""

from dataclasses import dataclass
from typing import Literal

from transformers import TrainingArguments


@dataclass
class PPOConfig(TrainingArguments):
    """One rollout is num_mini_batches x gradient_accumulation_steps x per_device_train_batch_size completions, and is
    learned from in num_ppo_epochs x num_mini_batches optimizer steps, which is what `max_steps` counts."""

    learning_rate: float = 3e-6
    adam_epsilon: float = 1e-5
    remove_unused_columns: bool = False
    # passes over each rollout
    num_ppo_epochs: int = 4
    # optimizer steps a pass is cut into
    num_mini_batches: int = 1
    # the ratio pi / pi_old is clipped to 1 +- cliprange, the new value to the old one +- cliprange_value
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    # weight of the value loss
    vf_coef: float = 0.1
    # discount and lambda of generalized advantage estimation
    gamma: float = 1.0
    lam: float = 0.95
    # factor of the KL to the start in each token's reward, and its estimator; 0 = no reference is held
    kl_coef: float = 0.05
    kl_estimator: Literal["k1", "k3"] = "k1"
    # taken off the reward of a completion that was cut before a stop token
    missing_eos_penalty: float | None = None
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    # a backbone of its own or the policy's under the value head; unset = shared with [model.lora], separate without
    value_model: Literal["separate", "shared"] | None = None
    # prompts and completions are padded to multiples of it, so that a device sees few different shapes
    pad_to_multiple_of: int | None = None
