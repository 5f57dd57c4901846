"""An lm-eval model in MLX: this project's engine decodes, and scores only the tokens that are asked for.

Tokens are made as lm-eval's own `hf` model makes them (lm_eval/models/huggingface.py, version 0.4.13), so both ask the
weights the same questions. Departures from it:
- BOS is left out of a prompt that brings its own by looking at each prompt, not at the first of its batch;
- a stop string ends its own row at once, not the batch when all rows have met it; an empty one is none;
- log-softmax is taken in float32, whatever the weights are in;
- sampling knows no top-k of 50 that nobody asked for, and its draws do not depend on the batch size;
- what the decode engine cannot do (beams, penalties) is refused by name.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

import rl.rollouts  # noqa: F401  binds BLAS before mlx loads
from evals import mlx_adapter
from rl import models
from rl.errors import RunFailed, UserError
from rl.hf_folder import weight_files
from rl.rollouts import device, fused, scoring
from rl.rollouts.engine import Engine
from rl.rollouts.load import load_sampler
from rl.rollouts.pool import common_prefix
from rl.rollouts.result import Sampling

MAX_NEW = 256  # tokens of an answer where the task does not say: hf's default
SCORED_TOKENS = 8_192  # through the layers at once when continuations are scored
SHARED_TOKENS = 32  # a shorter beginning that all inputs share costs more to pass around than to read again
ROUNDS = 4  # rows of one engine call, in batches: a finished row's place goes to the next, and finished calls are kept
SAMPLED_ROWS = 256  # the same where tokens are drawn: a draw is named by (seed, call, row), for any batch size
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "typical_p": 1.0, "use_cache": True}
NUCLEUS = ("top_p", "top_k", "min_p")
NOT_FINITE = "the model's logits are not finite: its weights are broken, or too large for the dtype"

log = logging.getLogger(__name__)


def build(
    folder: Path,
    *,
    adapter: Path | None,
    dtype: str = "float32",
    batch_size: int = 32,
    max_length: int | None = None,
    progress: Callable[[int], None] | None = None,
    tokenizer: Any = None,
) -> "MLXModel":
    """Load the Hugging Face folder `folder`, with the PEFT adapter in `adapter` unmerged, as a model for lm-eval.

    A quantized base made by `rl.rollouts.quantized` runs packed where packed products are fast, and from its
    dequantized values elsewhere: the same weights either way. Where no `tokenizer` is given it is the adapter's, or the
    model's where that has none. `batch_size` is in sequences, `max_length` (the context, prompt and answer together) in
    tokens, by default what the model's config says; `progress` hears how many more requests are done.

    Raises:
        UserError: a family that the engine does not decode, no weights or not whole ones, no tokenizer or one without
            EOS, an adapter that is more than plain LoRA or of another model.
    """
    from transformers import AutoConfig, GenerationConfig

    weight_files(folder, str(folder))
    device.share_memory()
    packed = device.keeps_packed_weights() and (folder / "mlx" / "config.json").is_file()
    model = load_sampler(folder, dtype, packed=packed)
    if adapter is not None:
        mlx_adapter.attach(model, adapter)
    fused.fuse(model)
    if tokenizer is None:
        source = adapter if adapter is not None and (adapter / "tokenizer.json").is_file() else folder
        tokenizer = models.load_tokenizer(models.Base(source.name, source, ""))
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if (folder / "generation_config.json").is_file():
        own = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    else:
        own = config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [] if own is None else [own])}
    return MLXModel(
        model,
        tokenizer,
        sorted(ends),
        batch_size=batch_size,
        max_length=max_length or resolve_max_length(config, tokenizer),
        progress=progress,
    )


@dataclass(frozen=True)
class _Drawing:
    """What requests must share to be decoded in one call."""

    sampling: Sampling
    max_tokens: int
    seed: int


class MLXModel(TemplateLM):
    """See `build`. `add_bos_token` may be set at any time: None is the tokenizer's own habit."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        ends: Sequence[int],
        *,
        batch_size: int,
        max_length: int,
        progress: Callable[[int], None] | None = None,
    ):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.max_length, self.max_gen_toks = batch_size, max_length, MAX_NEW
        self.add_bos_token: bool | None = None
        self.progress = progress
        self.engine = Engine(model, ends, max_batch=batch_size, decode=tokenizer.decode)

    # --- text and tokens

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's EOS."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: BOS, or EOS where there is none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's request cache."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; by default special tokens are added as `add_bos_token` says, and never to a text that has BOS."""
        if add_special_tokens is None:
            has_it = has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = False if has_it else self.add_bos_token
        return self._encode(string, add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text. A template that refuses the system message gets the others only, as in hf."""

        def render(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return render(chat_history)
        except jinja2.exceptions.TemplateError:
            log.warning("the chat template takes no system message: it is left out")
            return render([message for message in chat_history if message["role"] != "system"])

    def _encode(self, text: str, special: bool | None) -> list[int]:
        added = {} if special is None else {"add_special_tokens": special}
        return self.tokenizer.encode(text, **added)

    # --- scoring

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in lm-eval's windows: every token once, in as much context as fits."""
        totals: list[float] = []
        for part in self._parts(requests):
            found = iter(self._loglikelihood_tokens([window for windows in part for window in windows]))
            for windows in part:
                text = requests[len(totals)].args[0]
                totals.append(sum(next(found)[0] for _ in windows))
                self._report("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def _parts(self, requests: list[Instance]) -> Iterator[list[list[tuple[None, list[int], list[int]]]]]:
        """The windows of each text, so many texts at a time that some batches are full."""
        part: list[list[tuple[None, list[int], list[int]]]] = []
        for request in requests:
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            part.append([(None, *make_disjoint_window(pair)) for pair in pairs])
            if sum(map(len, part)) >= ROUNDS * self.batch_size:
                yield part
                part = []
        if part:
            yield part

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, is it the greedy continuation) of each continuation after its context.

        Requests that differ in their last token only are read once. Raises UserError for a continuation that has no
        tokens or more than the context holds.
        """
        same: dict[tuple[int, ...], list[int]] = {}
        for i, (text, context, continuation) in enumerate(requests):
            if not (context and 0 < len(continuation) <= self.max_length):
                told = repr(text[1][:40]) if text else "a window"
                raise UserError(
                    f"continuation {told}: found {len(continuation)} tokens to score after {len(context)} of context, "
                    f"valid are 1 to {self.max_length} after at least 1: shorten it, or give it a context"
                )
            same.setdefault(tuple((context + continuation)[-(self.max_length + 1) : -1]), []).append(i)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        spans = {row: max(len(requests[i][2]) for i in asked) for row, asked in same.items()}
        shared = min((len(row) - span for row, span in spans.items()), default=0)
        shared = min(shared, common_prefix(list(same))) if len(same) > 1 else 0
        shared = shared if shared >= SHARED_TOKENS else 0
        common = scoring.read(self.model, next(iter(same))[:shared]) if shared else None
        for batch in self._batches(sorted(same, key=lambda row: (-len(row), row))):
            asked = [[requests[i][2] for i in same[row]] for row in batch]
            found = scoring.score(self.model, [row[shared:] for row in batch], asked, common)
            for row, scored in zip(batch, found, strict=True):
                for i, (logprobs, likeliest) in zip(same[row], scored, strict=True):
                    answers[i] = (float(logprobs.sum(dtype="float64")), bool(likeliest.all()))
                    if not abs(answers[i][0]) < float("inf"):  # also true for NaN
                        raise RunFailed(NOT_FINITE)
                    if requests[i][0] is not None:
                        self._report("loglikelihood", requests[i][0], answers[i])
        return answers

    def _batches(self, rows: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Rows that come longest first, cut into batches by their number and by the tokens of the longest."""
        start = 0
        while start < len(rows):
            size = max(1, min(self.batch_size, SCORED_TOKENS // len(rows[start])))
            yield rows[start : start + size]
            start += size

    # --- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each (prompt, settings), up to the first of its stop strings, which is cut off.

        Greedy unless the settings say otherwise; draws are named by the setting `seed`, or else by lm-eval's own torch
        seed. Prompts that leave no room for the answer lose tokens on the left. Raises UserError for settings the
        engine does not know and an answer longer than the context.
        """
        eos = self.tokenizer.decode([self.eot_token_id])
        alike: dict[_Drawing, list[int]] = {}
        until: list[list[str]] = []
        for i, request in enumerate(requests):
            drawing, stops = _settings(request.args[1], self.max_gen_toks, self.max_length)
            alike.setdefault(drawing, []).append(i)
            until.append(handle_stop_sequences(stops, eos=eos))
        answers = [""] * len(requests)
        for drawing, indices in alike.items():
            prompts = self._prompts([requests[i].args[0] for i in indices], self.max_length - drawing.max_tokens)
            order = sorted(range(len(indices)), key=lambda k: (-len(prompts[k]), prompts[k], k))
            size = SAMPLED_ROWS if drawing.sampling.temperature else ROUNDS * self.batch_size
            for call, start in enumerate(range(0, len(order), size)):
                chosen = order[start : start + size]
                done = self.engine.generate(
                    [prompts[k] for k in chosen],
                    drawing.sampling,
                    max_tokens=drawing.max_tokens,
                    seed=drawing.seed,
                    step=call,
                    stop=[[text for text in until[indices[k]] if text not in ("", eos)] for k in chosen],
                )
                for k, completion in zip(chosen, done, strict=True):
                    if not completion.finite:
                        raise RunFailed(NOT_FINITE)
                    i = indices[k]
                    text = self.tokenizer.decode(completion.tokens, skip_special_tokens=True)
                    answers[i] = postprocess_generated_text(text, stop=until[i], think_end_token=None)
                    self._report("generate_until", requests[i].args, answers[i])
        return answers

    def _prompts(self, texts: list[str], room: int) -> list[list[int]]:
        """Tokens of each prompt, its last `room`; an empty one is BOS (or EOS)."""
        found = []
        for text in texts:
            special = False if has_bos_prefix(text, self.tokenizer.bos_token) else self.add_bos_token
            found.append(self._encode(text, special) or [self.prefix_token_id])
        cut = sum(len(ids) > room for ids in found)
        if cut:
            log.warning("%d prompts have more than %d tokens: cut on the left to leave room for the answer", cut, room)
        return [ids[-room:] for ids in found]

    def _report(self, kind: str, arguments: Any, answer: Any) -> None:
        self.cache_hook.add_partial(kind, arguments, answer)
        if self.progress:
            self.progress(1)


def _settings(options: dict[str, Any], default: int, context: int) -> tuple[_Drawing, list[str]]:
    """lm-eval's generation settings, made plain: (how to draw, stop strings)."""
    told = dict(normalize_gen_kwargs(options, default))
    until, length, drawn = told.pop("until"), told.pop("max_gen_toks"), told.pop("do_sample")
    temperature, seed = float(told.pop("temperature", 0.0)), int(told.pop("seed", torch.initial_seed()))
    filters = {name: told.pop(name) for name in NUCLEUS if name in told}
    odd = {name: value for name, value in told.items() if name not in NEUTRAL or value != NEUTRAL[name]}
    if odd:
        raise UserError(
            f"generation settings {json.dumps(odd, default=str)}: MLX knows until, max_gen_toks, do_sample, "
            f"temperature, {', '.join(NUCLEUS)} and seed: leave them out, or use --backend hf"
        )
    if not 0 < length < context:
        raise UserError(f"max_gen_toks = {length}: valid are 1 to {context - 1}, one less than the model's context")
    if not drawn:  # tasks say top_p beside greedy decoding, where it means nothing
        return _Drawing(Sampling(temperature=0.0), length, 0), until
    if temperature <= 0.0:
        raise UserError(f"do_sample = true with temperature {temperature}: set a temperature above 0")
    sampling = Sampling(
        temperature=temperature,
        top_p=float(filters.get("top_p", 1.0)),
        top_k=int(filters.get("top_k", 0)),
        min_p=float(filters.get("min_p", 0.0)),
    )
    return _Drawing(sampling, length, seed), until
