"""A reward model in the loop: a sequence classifier with one label, asked in batches on the trainer's device.

What it reads. A model of this project reads what it was trained on: the prompt's tokens, the completion's, and EOS
where the completion ended by itself. With the policy's own tokenizer these are the very tokens that were sampled. Any
other model reads a whole conversation through its own chat template, or prompt, completion and EOS as one text, as
TRL's RewardTrainer tokenises.

What it returns. "standard" takes the mean and the standard deviation of the model's scores on the held-out pairs of its
own training, as many right completions as wrong ones: fixed numbers, so that a reward means the same at every step and
in every run. `clip` then bounds it.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.errors import RunFailed, UserError

if TYPE_CHECKING:
    import torch

FILE = "reward_model.json"  # beside the weights of a model made here: {"mean", "std", "n"} of its held-out scores
BATCH = 64


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of a reward model's raw scores, over `n` completions."""

    mean: float
    std: float
    n: int


@dataclass(frozen=True)
class RewardModel:
    """A sequence classifier in evaluation mode with its tokenizer; `statistics` where this project has made it."""

    model: Any
    tokenizer: Any
    statistics: Statistics | None


@dataclass
class LearnedReward:
    """The batch function of `[[reward]] name = "model"`; `open` gives it its model before the first call."""

    where: str
    batch_size: int = BATCH
    normalise: str = "standard"
    clip: float | None = None
    served: RewardModel | None = field(default=None, repr=False)
    policy_tokenizer: Any = field(default=None, repr=False)

    def open(self, folder: Path, policy_tokenizer: Any, device: "torch.device") -> None:
        """Load the model in `folder` onto `device`; `policy_tokenizer` made the tokens it will be asked about.

        Raises UserError where it is no reward model, or has no statistics to be normalised by.
        """
        self.served, self.policy_tokenizer = load(folder, device, self.where), policy_tokenizer
        if self.normalise == "standard" and self.served.statistics is None:
            raise UserError(
                f"{self.where}: normalise = 'standard' needs {FILE} beside the model, which only a run of algorithm "
                f"'reward' writes, and {folder} has none: set normalise = 'none'"
            )

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **_: Any,
    ) -> list[float]:
        """Rewards of `completions`, normalised and clipped; `completion_ids` are the tokens that the policy said."""
        if self.served is None:
            raise RunFailed(f"{self.where}: the reward model was asked before it was loaded")
        ids_N = self._sequences(self.served, list(prompts), list(completions), completion_ids)
        raw_N = scores(self.served.model, ids_N, self.batch_size)
        return [self._normalised(raw) for raw in raw_N]

    def _normalised(self, raw: float) -> float:
        if self.normalise == "standard" and self.served is not None and self.served.statistics is not None:
            raw = (raw - self.served.statistics.mean) / self.served.statistics.std
        return raw if self.clip is None else max(-self.clip, min(self.clip, raw))

    def _sequences(
        self, served: RewardModel, prompts: list[Any], completions: list[Any], said: Sequence[Sequence[int]] | None
    ) -> list[list[int]]:
        from rl.rewards.answers import text_of

        tokenizer = served.tokenizer
        if served.statistics is None:
            return [conversation(tokenizer, p, c) for p, c in zip(prompts, completions, strict=True)]
        prompts_N = _prompt_ids(tokenizer, prompts)
        if said is not None and tokenizer.get_vocab() == self.policy_tokenizer.get_vocab():
            return [[*p, *c] for p, c in zip(prompts_N, said, strict=True)]
        eos = self.policy_tokenizer.eos_token_id
        ended = [True] * len(completions) if said is None else [bool(ids) and ids[-1] == eos for ids in said]
        texts = [text_of(completion) for completion in completions]
        return [[*p, *answer_ids(tokenizer, t, e)] for p, t, e in zip(prompts_N, texts, ended, strict=True)]


def with_own_pad(tokenizer: Any) -> Any:
    """A copy of `tokenizer` that pads with a token that ends no completion, where it has a special one to spare.

    The score is read at the last token that is no padding: with EOS as padding a completion that ended would be scored
    as one that did not.
    """
    made = copy.deepcopy(tokenizer)
    if made.pad_token_id == made.eos_token_id:
        spare = [token for token in made.all_special_tokens if token != made.eos_token]
        made.pad_token = spare[0] if spare else made.eos_token
    made.padding_side = "right"
    return made


def answer_ids(tokenizer: Any, text: str, ended: bool = True) -> list[int]:
    """Tokens of a completion as a reward model made here reads it: the text's own, and EOS where it ended by itself."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    return [*ids, tokenizer.eos_token_id] if ended else ids


def pair_ids(tokenizer: Any, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Token ids of a preference row's two sequences, prompt and completion: the sampled ones where the row has them."""
    from rl.rewards.answers import text_of

    if "prompt_ids" in row:
        return [*row["prompt_ids"], *row["chosen_ids"]], [*row["prompt_ids"], *row["rejected_ids"]]
    prompt = _prompt_ids(tokenizer, [row["prompt"]])[0]
    chosen, rejected = (answer_ids(tokenizer, text_of(row[column])) for column in ("chosen", "rejected"))
    return [*prompt, *chosen], [*prompt, *rejected]


def conversation(tokenizer: Any, prompt: Any, completion: Any) -> list[int]:
    """Token ids of prompt and completion as TRL's RewardTrainer makes them, for a model trained elsewhere."""
    if isinstance(prompt, str):
        return tokenizer(f"{prompt}{completion}{tokenizer.eos_token}")["input_ids"]
    said = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    return tokenizer.apply_chat_template([*prompt, *said], tokenize=True, return_dict=True)["input_ids"]


def scores(model: Any, sequences_N: Sequence[Sequence[int]], batch_size: int = BATCH) -> list[float]:
    """The model's raw score of each sequence of token ids, in their order; evaluation mode, no gradient.

    Batches hold sequences of like length, padded on the right. Raises RunFailed for one that is longer than the model's
    context.
    """
    import torch

    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and (longest := max(map(len, sequences_N), default=0)) > context:
        raise RunFailed(f"a sequence of {longest} tokens is longer than the reward model's context of {context}")
    order = sorted(range(len(sequences_N)), key=lambda i: len(sequences_N[i]))
    pad, device = model.config.get_text_config().pad_token_id, next(model.parameters()).device
    out = [0.0] * len(sequences_N)
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            width = max(len(sequences_N[i]) for i in part)
            ids_B_T = torch.full((len(part), width), pad, dtype=torch.long)
            mask_B_T = torch.zeros_like(ids_B_T)
            for row, i in enumerate(part):
                ids_B_T[row, : len(sequences_N[i])] = torch.tensor(sequences_N[i])
                mask_B_T[row, : len(sequences_N[i])] = 1
            with torch.no_grad():
                logits_B_1 = model(
                    input_ids=ids_B_T.to(device), attention_mask=mask_B_T.to(device), use_cache=False
                ).logits
            for i, value in zip(part, logits_B_1[:, 0].float().tolist(), strict=True):
                out[i] = value
    finally:
        model.train(training)
    return out


def load(folder: Path, device: "torch.device", where: str) -> RewardModel:
    """The reward model in `folder`, in evaluation mode on `device`.

    Raises:
        UserError: no sequence classifier with one label and a trained head, or no statistics that can be read.
    """
    from transformers import AutoModelForSequenceClassification

    from rl.device import dtype_for
    from rl.hf_folder import check_folder, weights_sha256
    from rl.models import Base, load_tokenizer

    base = Base(folder.name, folder, weights_sha256(check_folder(folder, where)))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kinds = config.get("architectures") or []
    if not any(str(kind).endswith("ForSequenceClassification") for kind in kinds):
        raise UserError(f"{where}: {folder} holds {', '.join(map(str, kinds)) or 'no architecture'}, no reward model")
    tokenizer = load_tokenizer(base, padding_side="right")
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder,
        dtype=dtype_for(device),
        attn_implementation="sdpa",
        device_map=None,  # "auto" segfaults on MPS when it also changes the dtype
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    if info["missing_keys"]:
        raise UserError(f"{where}: {folder} lacks the weight {sorted(info['missing_keys'])[0]}: fetch the model again")
    if model.config.num_labels != 1:
        raise UserError(f"{where}: {folder} gives {model.config.num_labels} scores, valid: 1")
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return RewardModel(model.to(device).eval().requires_grad_(False), tokenizer, _statistics(folder / FILE))


def _statistics(path: Path) -> Statistics | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        made = Statistics(float(found["mean"]), float(found["std"]), int(found["n"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not what a reward model's run writes ({error!r}): train it again") from None
    if not made.std > 0:
        raise UserError(f"{path}: std is {made.std}: the model gives every completion the same score; train it again")
    return made


def _prompt_ids(tokenizer: Any, prompts: list[Any]) -> list[list[int]]:
    from rl.measure import prompt_ids  # here, since it reads rl.rewards

    return prompt_ids(tokenizer, prompts)
