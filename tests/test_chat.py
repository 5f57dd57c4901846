"""Talking to a run: what is streamed is what is generated, the base is the base, and commands do what they say."""

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rl import models, record
from rl.chat import command
from rl.chat.command import Chat
from rl.chat.voices import MLXVoices, Source, TorchVoices
from rl.config import Lora
from rl.errors import UserError
from rl.rollouts.result import GREEDY, Sampling


def a_record(base: models.Base) -> record.Record:
    config = {"rollout": {"precision": "full"}, "trainer": {"algorithm": "grpo"}}
    return record.Record(name="x", config=config, device="cpu", seed=0, base={"id": "tiny"}, data={})


@pytest.fixture(scope="module")
def adapted(tiny_base: models.Base, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """An adapter that changes what the tiny model says."""
    policy = models.add_lora(models.load_policy(tiny_base, "float32", "cpu"), Lora(rank=4, alpha=64.0))
    torch.manual_seed(1)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    folder = tmp_path_factory.mktemp("adapter")
    policy.save_pretrained(folder)
    return Source(tiny_base.path, folder)


@pytest.mark.parametrize("kind", [MLXVoices, TorchVoices])
def test_the_stream_is_the_completion_and_the_base_is_the_base(
    kind: Any, tiny_base: models.Base, adapted: Source
) -> None:
    """Independent reference: transformers' greedy generate on each policy. Back and forth, so that an adapter that is
    left on (or off) after a switch would show."""
    tokenizer = models.load_tokenizer(tiny_base)
    prompt = tokenizer("12+34=")["input_ids"]
    from peft import PeftModel

    base = models.load_policy(tiny_base, "float32", "cpu")
    plain = Source(tiny_base.path)

    def reference(policy: Any) -> list[int]:
        out = policy.generate(input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
        return out[0, len(prompt) :].tolist()

    wanted = {plain: reference(base)}
    wanted[adapted] = reference(PeftModel.from_pretrained(base, adapted.adapter))
    assert wanted[plain] != wanted[adapted]
    voices = kind(a_record(tiny_base), [tokenizer.eos_token_id], tokenizer)
    for source in (adapted, plain, adapted, plain):
        heard: list[list[int]] = []
        said = voices.answer(source, prompt, GREEDY, 8, 0, heard.append)
        assert said.tokens == wanted[source]
        assert heard[-1] == said.tokens
        assert [len(tokens) for tokens in heard] == list(range(1, len(said.tokens) + 1))
        assert all(said.tokens[: len(tokens)] == tokens for tokens in heard)


def test_hearing_changes_nothing_that_is_drawn(tiny_base: models.Base) -> None:
    tokenizer = models.load_tokenizer(tiny_base)
    voices = MLXVoices(a_record(tiny_base), [tokenizer.eos_token_id], tokenizer)
    engine = voices._sampler(Source(tiny_base.path)).engine
    prompts = [tokenizer(text)["input_ids"] for text in ("1+1=", "22+3=", "1+1=")]
    told: dict[int, list[int]] = {}
    drawn = engine.generate(prompts, Sampling(), max_tokens=6, seed=5, heard=told.__setitem__)
    again = engine.generate(prompts, Sampling(), max_tokens=6, seed=5)
    assert [c.tokens for c in drawn] == [c.tokens for c in again] == [told[i] for i in range(3)]


class Words:
    """A tokenizer of characters, with a chat template that shows roles."""

    chat_template = "yes"

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, ids))

    def __call__(self, text: list[str]) -> dict[str, Any]:
        return {"input_ids": [list(map(ord, t)) for t in text]}

    def apply_chat_template(self, chats: list[Any], **_: Any) -> dict[str, Any]:
        return {"input_ids": [list(map(ord, "|".join(f"{m['role'][0]}:{m['content']}" for m in c))) for c in chats]}


def talk(*lines: str, chat: bool = True, live: bool = False, says: str = "ok") -> tuple[list[str], list[tuple]]:
    asked: list[tuple] = []

    def answer(who: str, ids: list[int], heard: Any) -> list[int]:
        asked.append((who, "".join(map(chr, ids))))
        for n in range(1, len(says) + 1):
            heard(list(map(ord, says[:n])))
        return list(map(ord, says))

    out = io.StringIO()
    talked = Chat(Words(), answer, out, live, chat, [{"prompt": "2+2=", "answer": "4"}])
    for line in lines:
        if not talked.hear(line + "\n"):
            break
    return out.getvalue().splitlines(), asked


def test_history_system_base_and_both() -> None:
    shown, asked = talk("hi", "/system be brief", "/base", "more", "/clear", "/both", "again", "/quit", "never")
    assert asked == [
        ("run", "u:hi"),
        ("base", "s:be brief|u:hi|a:ok|u:more"),
        ("run", "s:be brief|u:again"),
        ("base", "s:be brief|u:again"),
    ]
    assert shown[0] == "ok"
    assert shown[-2:] == ["run: ok", "base: ok"]


def test_without_a_template_a_line_is_continued_alone() -> None:
    shown, asked = talk("1+1=", "2+2=", "/system x", "/try 0", "/try 9", "/what", chat=False)
    assert [text for _, text in asked] == ["1+1=", "2+2=", "2+2="]
    assert "(the answer is 4)" in shown
    assert shown[-2:] == ["(/try N with N from 0 to 0)", "(no command /what; /help lists them)"]


def test_an_answer_of_a_pipe_is_one_line_and_cannot_move_the_cursor() -> None:
    """Trap: a script that reads line n for question n; and an escape sequence in a completion."""
    shown, _ = talk("a", "b", says="one\ntwo\x1b[2J")
    assert shown == ["one\\ntwo\\x1b[2J"] * 2
    live, _ = talk("a", live=True, says="one\ntwo\x1b[2J")
    assert live == ["run: one", "two\\x1b[2J"]


def test_adapter_start_is_found(adapted: Source, tiny_base: models.Base) -> None:
    from rl.chat import voices

    root = Path("/")
    assert voices.made(root, adapted.adapter) == adapted
    assert voices.start(root, adapted.adapter, a_record(tiny_base)) == Source(tiny_base.path)


@pytest.mark.parametrize("engine", ["mlx", "torch"])
def test_a_script_asks_a_run_through_a_pipe(
    engine: str, tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """From run.json to the answer, and both where run and base are whole models (here equal ones)."""
    folder = tmp_path / "models" / "final" / "demo"
    shutil.copytree(tiny_base.path, folder)
    run = replace(a_record(tiny_base), status="finished", base={"id": str(tiny_base.path), "sha256": "x"})
    record.save(run, folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("12+34=\n/both\n12+34=\n"))
    given = {"temperature": 0.0, "top_p": None}
    assert command.main("demo", engine=engine, given=given, max_tokens=4, seed=0, root=tmp_path) == 0
    tokenizer = models.load_tokenizer(tiny_base)
    prompt = tokenizer("12+34=", return_tensors="pt")["input_ids"]
    policy = models.load_policy(tiny_base, "float32", "cpu")
    out = policy.generate(input_ids=prompt, max_new_tokens=4, do_sample=False)[0, prompt.shape[1] :]
    said = tokenizer.decode(out, skip_special_tokens=True)
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [said, "(both answer)", f"run: {said}", f"base: {said}"]
    assert "note:" not in shown.err
    with pytest.raises(UserError, match=r"--temperature: found -1\.0, valid: ≥ 0"):
        command.main("demo", engine=engine, given={"temperature": -1.0}, max_tokens=4, seed=0, root=tmp_path)
    with pytest.raises(UserError, match="demi: no such run in models/final, did you mean 'demo'"):
        command.main("demi", engine=engine, given={}, max_tokens=4, seed=0, root=tmp_path)


def test_a_run_with_tools_is_said_to_speak_without_them(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = tmp_path / "models" / "final" / "demo"
    shutil.copytree(tiny_base.path, folder)
    run = replace(a_record(tiny_base), status="finished", base={"id": str(tiny_base.path), "sha256": "x"})
    run.config["rollout"]["tools"] = ["rl.tools:calculator"]
    record.save(run, folder)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert command.main("demo", engine="mlx", given={}, max_tokens=4, seed=0, root=tmp_path) == 0
    shown = capsys.readouterr()
    assert "x was trained with rl.tools:calculator: chat has no tools" in shown.err
    assert shown.out == ""
