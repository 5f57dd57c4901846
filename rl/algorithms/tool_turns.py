"""Tools and turns in GRPO's family: TRL's loop, fed with the config's tools and the MLX sampler.

TRL calls the tools, appends their results and samples the next turn; it returns a `tool_mask`, 0 on every token that
was not sampled, with which it masks the loss, the importance weights and what it logs. Ours are the rest: each turn
draws from a stream of its own and is not sampled past what is left of `max_completion_length`, an environment's `reset`
gets a seed that is the same for all completions of a prompt, and a run with too many hanging calls stops.

Leans on trl 1.16.0, each held by tests/test_tool_turns.py: `_generate` calls `_generate_single_turn(prompt_ids, ...)`
once a turn with the history's ids, in later turns for the rows that called a tool; `vllm_mode` other than "colocate"
takes the context from the model's config; a tokenizer with a `response_template` keeps it.
"""

from typing import Any

import torch
from trl.chat_template_utils import (
    add_response_schema,
    get_training_chat_template,
    is_chat_template_prefix_preserving,
    supports_tool_calling,
)

from rl.errors import UserError
from rl.tools.templates import CHAT_TEMPLATE, response_template
from rl.tools.toolbox import Toolbox, episode_seed


def loss_mask(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which completion tokens were sampled, (B, T): without tools all that are no padding."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


def without_nones(value: Any) -> Any:
    """Messages as they were: a table gives every call the arguments of all others, None where it has none."""
    if isinstance(value, dict):
        return {k: without_nones(v) for k, v in value.items() if v is not None}
    return [without_nones(v) for v in value] if isinstance(value, list) else value


def prepare(tokenizer: Any, box: Toolbox, where: str) -> None:
    """Give the tokenizer a chat template that writes tool calls and a `response_template` that reads them.

    The model's own where TRL knows it, else ours (rl.tools.templates) for ChatML and for tokenizers without any; both
    are saved with the run. Raises UserError for a template that is neither.
    """
    known = set(tokenizer.get_vocab())

    def clean(text: str) -> str:
        """A tokenizer of single characters raises on any other, and a tool may say anything."""
        return "".join(c if c in known else "?" for c in text)

    if all(len(token) == 1 or token in tokenizer.all_special_tokens for token in known):
        box.runner.clean = clean
    if tokenizer.chat_template and tokenizer.chat_template != CHAT_TEMPLATE and supports_tool_calling(tokenizer):
        if getattr(tokenizer, "response_template", None) is None:
            try:
                add_response_schema(tokenizer)
            except ValueError:
                raise UserError(
                    f"{where}: [rollout] tools: nobody knows how to read tool calls of this model's chat template, "
                    'valid: a model whose tokenizer has a response_template (Qwen3, Llama 3.2, ...), or "<|im_end|>" '
                    "as EOS and no tool calls in its template"
                ) from None
        if not is_chat_template_prefix_preserving(tokenizer):
            tokenizer.chat_template = get_training_chat_template(tokenizer)
        return
    if tokenizer.chat_template and tokenizer.eos_token != "<|im_end|>":
        raise UserError(
            f"{where}: [rollout] tools: the model's chat template writes no tool calls and is not ChatML (EOS "
            f"'{tokenizer.eos_token}'), valid: a model whose template does (Qwen3, Llama 3.2, ...), or ChatML"
        )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.response_template = response_template(tokenizer.eos_token, box.names())


class Turns:
    """Mixed in before `online.Online` and TRL's GRPOTrainer; does nothing where the job has no toolbox."""

    turn = 0  # of the rollout under way
    longest_prompt = 0

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        if self.job.toolbox is not None:
            inputs = [row | {"prompt": without_nones(row["prompt"])} for row in inputs]
            if self.job.toolbox.seat is not None:
                inputs = [{"seed": self._seed(i)} | row for i, row in enumerate(inputs)]
        return super()._generate_and_score_completions(inputs)

    def _seed(self, row: int) -> int:
        """One for all completions of a prompt: their rewards are compared, so they meet the same world."""
        group = row // self.num_generations
        return episode_seed(self.args.seed, self.state.global_step, self.sampling_round, group)

    def _generate(self, prompts: list[Any]) -> Any:
        if self.job.toolbox is None:
            return super()._generate(prompts)
        self.turn = 0
        try:
            out = super()._generate(prompts)
        finally:
            self.turn = 0
        self.completions = out[1]
        self.job.toolbox.runner.check()
        return out

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        generation = self.vllm_generation if self.job.toolbox is not None and self.use_vllm else None
        if generation is None:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        most, longest = self.max_completion_length, max(map(len, prompt_ids))
        if self.turn == 0:
            self.longest_prompt = longest
        # of a row's prompt only the longest is known here: too long a turn is cut by TRL, none is too short
        left = max(most - (len(ids) - self.longest_prompt) for ids in prompt_ids)
        room = self.model.config.max_position_embeddings - longest
        generation.max_tokens = max(1, min(self.job.toolbox.room(max(1, left), most), room))
        try:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        finally:
            generation.max_tokens = most
            self.turn += 1
