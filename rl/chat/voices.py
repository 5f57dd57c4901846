"""The two policies of a chat: what a run made, and what it started from, loaded as the run sampled.

With MLX they share one model where they share a base: an adapter is exchanged, never merged, and the base speaks with
B = 0, which adds exactly nothing.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl import models
from rl.errors import UserError
from rl.hf_folder import check_folder, weights_sha256
from rl.models import Base
from rl.record import Record
from rl.rollouts.result import Completion, Sampling

Heard = Callable[[list[int]], None]


@dataclass(frozen=True)
class Source:
    """Folders of one policy: whole weights, and a PEFT adapter on them or None."""

    base: Path
    adapter: Path | None = None


def made(root: Path, folder: Path) -> Source:
    """What the run in `folder` made. Raises UserError where the base of its adapter is gone."""
    told = folder / "adapter_config.json"
    if not told.is_file():
        check_folder(folder, str(folder))
        return Source(folder)
    name = json.loads(told.read_text(encoding="utf-8"))["base_model_name_or_path"]
    base = root / name
    if not (base / "config.json").is_file():
        raise UserError(f"{told}: its base {name} is gone; train the run again with --restart")
    check_folder(base, str(told))
    return Source(base, folder)


def start(root: Path, folder: Path, run: Record) -> Source:
    """What that run started from: the run that [model] from names, or its base. Raises UserError where it is gone."""
    parent = next((p["name"] for p in run.parents if p.get("role") == "model.from"), None)
    if parent is not None:
        other = root / "models" / "final" / parent
        if not (other / "run.json").is_file():
            raise UserError(f"{run.name} came from the run {parent}, which is not in models/final any more")
        return made(root, other)
    if (own := made(root, folder)).adapter is not None:
        return Source(own.base)
    name, digest = str(run.base.get("id")), run.base.get("sha256")
    for told in sorted((root / "models" / "base").glob("*/base.json")):
        if json.loads(told.read_text(encoding="utf-8")).get("weights_sha256") == digest:
            return Source(told.parent)
    if (root / name / "config.json").is_file():
        return Source(root / name)
    if models.HUB_ID.fullmatch(name):
        return Source(models.fetch(name, f"the base of {run.name}"))
    raise UserError(f"{run.name} came from {name!r}, which is not here any more; --restart makes it again")


class MLXVoices:
    """Policies by MLX's engine."""

    def __init__(self, run: Record, stop_ids: list[int], tokenizer: Any):
        self.run, self.stop_ids, self.tokenizer = run, stop_ids, tokenizer
        self.built: dict[Path, Any] = {}  # samplers by base
        self.speaking: dict[Path, Source] = {}
        self.adapters: dict[Path, Any] = {}

    def answer(
        self, source: Source, prompt: list[int], sampling: Sampling, max_tokens: int, seed: int, heard: Heard
    ) -> Completion:
        """One completion of `source`; `heard` is told its tokens so far as they come."""
        engine = self._sampler(source).engine
        return engine.generate(
            [prompt], sampling, max_tokens=max_tokens, seed=seed, heard=lambda _, tokens: heard(tokens)
        )[0]

    def _sampler(self, source: Source) -> Any:
        from rl.rollouts import sampler, sync
        from rl.rollouts.device import backend

        if source.base not in self.built:
            rollout, kept = self.run.config.get("rollout", {}), self.run.rollout or {}
            shared = rollout.get("precision") == "shared"
            config = json.loads((source.base / "config.json").read_text(encoding="utf-8"))
            built = sampler.build(
                source.base,
                precision="shared" if shared else "full",
                dtype=kept.get("dtype") or ("float32" if shared or backend() == "cpu" else "float16"),
                eos_ids=self.stop_ids,
                context=config.get("max_position_embeddings"),
                stop=tuple(text for text in rollout.get("stop") or () if len(text.encode()) > 1),
                decode=self.tokenizer.decode,
            )
            built.engine.look_every = 1  # each token is shown when it is there
            self.built[source.base], self.speaking[source.base] = built, Source(source.base)
        built = self.built[source.base]
        if self.speaking[source.base] != source:
            adapter = source.adapter or self.speaking[source.base].adapter
            tensors = self._adapter(source.base, adapter)
            if source.adapter is None:
                tensors = {path: (a, b * 0, scale) for path, (a, b, scale) in tensors.items()}
            if not built.adapted:
                sync.attach_adapter(built.model, tensors)
                built.adapted = True
            sync.sync_adapter(built.model, tensors)
            self.speaking[source.base] = source
        return built

    def _adapter(self, base: Path, adapter: Path) -> Any:
        """{module: (A, B, scale)} read by PEFT, as the trainer's are."""
        if adapter not in self.adapters:
            from peft import PeftModel

            from rl.rollouts.sync import adapter_tensors

            policy = PeftModel.from_pretrained(models.load_policy(_base(base), "float32", "cpu"), adapter)
            self.adapters[adapter] = {
                path: (a.detach().clone(), b.detach().clone(), scale)
                for path, (a, b, scale) in adapter_tensors(policy).items()
            }
        return self.adapters[adapter]


class TorchVoices:
    """Policies by transformers' generate, each a model of its own."""

    def __init__(self, run: Record, stop_ids: list[int], tokenizer: Any):
        self.run, self.stop_ids, self.tokenizer = run, stop_ids, tokenizer
        self.built: dict[Source, Any] = {}

    def answer(
        self, source: Source, prompt: list[int], sampling: Sampling, max_tokens: int, seed: int, heard: Heard
    ) -> Completion:
        """As `MLXVoices.answer`."""
        if source not in self.built:
            from rl import device
            from rl.rollouts.torch_sampler import TorchSampler

            where = device.pick("auto")
            policy: Any = models.load_policy(_base(source.base), device.dtype_for(where), where)
            if source.adapter is not None:
                from peft import PeftModel

                policy = PeftModel.from_pretrained(policy, source.adapter).eval()
            stop = self.run.config.get("rollout", {}).get("stop") or ()
            pad = self.tokenizer.pad_token_id
            self.built[source] = TorchSampler(policy, self.stop_ids, pad, 1, stop, self.tokenizer.decode)
        return self.built[source].tell(prompt, sampling, max_tokens, seed, heard)


def _base(folder: Path) -> Base:
    return Base(folder.name, folder, weights_sha256(check_folder(folder, str(folder))))
