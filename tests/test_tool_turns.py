"""Tools and turns in training: what is masked, what is weighed, what a tool that fails costs."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.chat_template_utils import is_chat_template_prefix_preserving, supports_tool_calling

from rl import measure, models
from rl.algorithms import dynamic_sampling, global_advantages, tool_turns
from rl.rollouts.result import GREEDY
from rl.tools import play
from rl.tools.toolbox import TURN, episode_seed
from tests import tools_helper
from tests.online_helper import inputs
from tests.tools_helper import make_job, resolve_ascii, trainer_of

CALL = "[slow_calculator expression={}]<eos>"


def asks(question: str, turn: int) -> str:
    """Calls the tool with the question, then says its last figure."""
    return CALL.format(question) if turn == 0 else f"{sum(map(int, question.split('+')))}<eos>"


@pytest.fixture(scope="module")
def ascii_base(tmp_path_factory: pytest.TempPathFactory) -> models.Base:
    return resolve_ascii(tmp_path_factory.mktemp("ascii"))


QUESTIONS = [("3+4", "7"), ("12+30", "42")]


def scored(job: Any, prompts: int = 2) -> tuple[Any, dict[str, torch.Tensor]]:
    trainer = trainer_of(job)
    return trainer, trainer._generate_and_score_completions(inputs(job, prompts))


def test_a_tools_tokens_are_masked_and_the_policys_are_not(ascii_base: models.Base, tmp_path: Path) -> None:
    job = make_job(ascii_base, tmp_path, asks, QUESTIONS)
    _, batch = scored(job)
    for row, (question, answer) in ((0, QUESTIONS[0]), (4, QUESTIONS[1])):
        said, told = CALL.format(question), f"\ntool\n{answer}<eos>\nassistant\n"
        length = int(batch["completion_mask"][row].sum())
        assert job.tokenizer.decode(batch["completion_ids"][row, :length]) == said + told + answer + "<eos>"
        turns = [len(said) - len("<eos>") + 1, len(told) - len("<eos>") + 1, len(answer) + 1]
        wanted = [1] * turns[0] + [0] * turns[1] + [1] * turns[2]
        assert batch["tool_mask"][row, :length].tolist() == wanted
        assert tool_turns.loss_mask(batch)[row].sum() == turns[0] + turns[2]


def test_weights_correct_sampled_tokens_only(ascii_base: models.Base, tmp_path: Path) -> None:
    """Trap: TRL gives tool tokens a sampler logprob of 0, which read as one would be a huge ratio."""
    job = make_job(ascii_base, tmp_path, asks, QUESTIONS)
    _, batch = scored(job)
    sampled = tool_turns.loss_mask(batch).bool()
    difference = batch["old_per_token_logps"] - batch["sampling_per_token_logps"]
    assert difference[sampled].abs().max() < 1e-4
    told = batch["completion_mask"].bool() & ~sampled
    assert difference[told].abs().max() > 1.0  # what the mask keeps away
    assert (batch["importance_sampling_ratio"][told] == 1.0).all()
    assert (batch["importance_sampling_ratio"][sampled] - 1.0).abs().max() < 1e-4


def test_metrics_of_the_two_programs_leave_a_tools_tokens_out(ascii_base: models.Base, tmp_path: Path) -> None:
    job = make_job(ascii_base, tmp_path, asks, QUESTIONS)
    trainer, _ = scored(job)
    metrics = trainer._metrics["train"]
    assert metrics["sampling/ess"][-1] == pytest.approx(1.0, abs=1e-4)
    assert metrics["sampling/ratio_p95"][-1] == pytest.approx(1.0, abs=1e-3)
    assert metrics["tools/call_frequency"][-1] == 1.0
    assert metrics["completions/mean_length"][-1] < 40  # of sampled tokens


def test_the_gradient_is_that_of_the_sampled_tokens(ascii_base: models.Base, tmp_path: Path) -> None:
    """-1/N sum A log pi over sampled tokens, by a forward without TRL; with the tool's tokens it is another one."""

    job = make_job(ascii_base, tmp_path, asks, QUESTIONS)
    trainer, batch = scored(job)
    batch["advantages"] = torch.arange(8.0) - 2.0  # the script says the same four times: advantages of a group cancel
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, batch).backward()
    got = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}

    def reference(mask: torch.Tensor) -> dict[str, torch.Tensor]:
        trainer.model.zero_grad()
        total = torch.zeros(())
        for row in range(len(mask)):
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
            length = int(batch["completion_mask"][row].sum())
            ids = torch.cat([prompt, batch["completion_ids"][row, :length]])
            logits = trainer.model(ids[None]).logits[0, len(prompt) - 1 : -1].float()
            logps = logits.log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0]
            total = total - batch["advantages"][row] * (logps * mask[row, :length]).sum()
        (total / mask.sum()).backward()
        return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}

    def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return max(float((a[n] - b[n]).abs().max() / a[n].abs().max()) for n in a)

    assert distance(reference(tool_turns.loss_mask(batch)), got) < 1e-3
    assert distance(reference(batch["completion_mask"]), got) > 1e-2


def test_turns_draw_from_their_own_streams_within_what_is_left(ascii_base: models.Base, tmp_path: Path) -> None:
    """Trap: a second turn with the first one's (seed, step, row) would draw the same random numbers again."""
    job = make_job(ascii_base, tmp_path, asks, QUESTIONS, rollout={"max_completion_length": 64})
    scored(job)
    (_, first, step_0), (texts, second, step_1) = job.sampler.calls
    assert first == 64
    assert step_0 != step_1
    shortest = min(len(t) - len("<eos>") * t.count("<eos>") for t in texts)
    assert second < 64
    assert second % TURN == 0
    assert shortest  # the texts hold the history
    assert all(t.endswith("assistant\n") and "\ntool\n" in t for t in texts)


def test_all_completions_of_a_prompt_meet_the_same_world(ascii_base: models.Base, tmp_path: Path) -> None:
    def script(question: str, turn: int) -> str:
        return "[add number=5]<eos>" if turn == 0 else "done<eos>"

    job = make_job(
        ascii_base, tmp_path, script, [("a", "5"), ("b", "6")], rollout={"environment": "tests.tools_helper:Counter"}
    )
    trainer, batch = scored(job)
    seen = [seat._inner.seed for seat in trainer.environments]
    assert seen[:4] == [episode_seed(0, 0, 0, 0)] * 4
    assert seen[4:] == [episode_seed(0, 0, 0, 1)] * 4
    assert [seat._reward() for seat in trainer.environments] == [1.0] * 4 + [0.0] * 4
    first = job.tokenizer.decode(batch["prompt_ids"][0], skip_special_tokens=True)
    assert f"a (seed {seen[0] % 100})" in first  # what reset() says is part of the prompt


def test_worked_calls_of_two_tools_reach_the_policy_as_written(ascii_base: models.Base, tmp_path: Path) -> None:
    """Trap: an Arrow table gives each call the other's arguments too, and the policy would read `x=None`."""
    job = make_job(ascii_base, tmp_path, asks, QUESTIONS)
    for row in job.train:
        calls = [
            {"type": "function", "function": {"name": "a", "arguments": {"x": 1}}},
            {"type": "function", "function": {"name": "b", "arguments": {"y": "z"}}},
        ]
        row["prompt"] = [{"role": "assistant", "content": "", "tool_calls": calls}, *row["prompt"]]
    trainer = trainer_of(job)
    rows = [trainer.train_dataset[i] for i in (0, 1) for _ in range(4)]
    batch = trainer._generate_and_score_completions(rows)
    wanted = play.prompt_with_tools(job.tokenizer, job.train[0]["prompt"], job.toolbox.callables())
    assert batch["prompt_ids"][0][batch["prompt_mask"][0].bool()].tolist() == wanted
    assert "[a x=1][b y=z]" in job.tokenizer.decode(wanted)


@pytest.mark.parametrize("word", ["raise", "exit", "hang"])
def test_a_tool_that_fails_costs_its_own_sample(ascii_base: models.Base, tmp_path: Path, word: str) -> None:
    def script(question: str, turn: int) -> str:
        return CALL.format(question) if turn == 0 else "42<eos>"

    rollout = {"tool_timeout_s": 0.2, "max_completion_length": 120}
    job = make_job(ascii_base, tmp_path, script, [(word, "1"), ("12+30", "42")], rollout=rollout)
    began = time.perf_counter()
    trainer, batch = scored(job)
    assert time.perf_counter() - began < 20
    texts = job.tokenizer.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    said = {"raise": "KeyError: 'no such sum'", "exit": "SystemExit: 3", "hang": "no result within 0.2 s"}[word]
    assert all("tool\n{" in t and said in t for t in texts[:4])
    assert all("tool\n42" in t and "error" not in t for t in texts[4:])
    assert job.toolbox.runner.take() == {
        "tools/calls": 8.0,
        "tools/errors": 4.0,
        "tools/timeouts": 4.0 * (word == "hang"),
    }
    assert trainer._metrics["train"]["tools/failure_frequency"][-1] == 0.5
    assert torch.isfinite(batch["advantages"]).all()


def test_an_environment_that_hangs_is_left_out_and_replaced(ascii_base: models.Base, tmp_path: Path) -> None:
    """The call that hangs may still change the environment: the seat's next episode must have a new one."""

    def script(question: str, turn: int) -> str:
        return f"[add number={question.split()[0]}]<eos>" if turn == 0 else "done<eos>"

    rollout = {"environment": "tests.tools_helper:Counter", "tool_timeout_s": 0.2, "max_completion_length": 120}
    job = make_job(ascii_base, tmp_path, script, [("13", "13"), ("6", "6")], rollout=rollout)
    trainer, batch = scored(job)
    assert [seat._reward() for seat in trainer.environments] == [None] * 4 + [1.0] * 4
    assert torch.isfinite(batch["advantages"][4:]).all()
    before = tools_helper.Counter.made
    job.sampler.script = lambda question, turn: "[add number=6]<eos>" if turn == 0 else "done<eos>"
    trainer._generate_and_score_completions(inputs(job, 2))
    assert tools_helper.Counter.made == before + 4
    assert [seat._reward() for seat in trainer.environments] == [0.0] * 4 + [1.0] * 4


@pytest.mark.parametrize(
    ("length", "turns", "turn_length"),
    [
        (120, 3, None),
        (120, 2, None),
        (60, 3, None),
        (55, 3, None),
        (40, 3, None),
        (20, 3, None),
        (120, 3, 36),
        (120, 3, 9),
    ],
    ids=[
        "whole",
        "fewer turns",
        "cut in the answer",
        "no room for the answer",
        "no room for the result",
        "cut at once",
        "a call fills its turn",
        "no room for a call in a turn",
    ],
)
def test_measuring_plays_what_trl_plays(
    ascii_base: models.Base, tmp_path: Path, length: int, turns: int, turn_length: int | None
) -> None:
    """Before and after are only comparable with training when the loop is the same, to the token."""

    def script(question: str, turn: int) -> str:
        if turn < 2:
            return f"so [slow_calculator expression={question}]<eos>" if turn == 0 else "[nothing x=1]<eos>"
        return "7<eos>"

    rollout = {"max_completion_length": length, "max_turns": turns, "max_turn_length": turn_length}
    job = make_job(ascii_base, tmp_path, script, [("3+4", "7"), ("raise", "1")], rollout=rollout)
    trainer = trainer_of(job)
    rows = inputs(job, 2)
    trainer._sync_tool_dicts = [job.toolbox.table(None)] * len(rows)
    trainer._async_tool_dicts = [{}] * len(rows)
    prompts, completions, mask, messages, *_ = trainer._generate([row["prompt"] for row in rows])
    episodes = play.play(job.sampler, job.tokenizer, job.toolbox, rows, GREEDY, max_tokens=length, context=1024)
    assert [e.prompt for e in episodes] == prompts
    assert [e.completion for e in episodes] == completions
    assert [e.mask for e in episodes] == mask
    assert [e.messages for e in episodes] == messages
    assert max(map(len, completions)) <= length
    if turn_length is not None:
        assert all(most == turn_length for _, most, _ in job.sampler.calls)
        assert {any(m["role"] == "tool" for m in said) for said in messages} == {turn_length == 36}


def test_the_held_out_check_grades_what_the_policy_says_last(ascii_base: models.Base, tmp_path: Path) -> None:
    """Trap: the tool's result counted as the answer would pay for the call alone."""
    from rl import rewards

    def mute(question: str, turn: int) -> str:
        return CALL.format(question) if turn == 0 else "I know<eos>"

    done = {}
    for name, script in (("says", asks), ("mute", mute)):
        job = make_job(ascii_base, tmp_path, script, QUESTIONS)
        grade = rewards.grader(job.config.rewards)
        done[name] = measure.measure(job.sampler, job.tokenizer, job.train, grade, 60, toolbox=job.toolbox)
    assert [s.strict for s in done["says"].scores] == [True, True]
    assert [s.lenient for s in done["mute"].scores] == [False, False]
    assert re.search(r"tool\n7\n?assistant\n7", done["says"].completions[0])


def test_refilled_batches_and_global_advantages_keep_the_mask(ascii_base: models.Base, tmp_path: Path) -> None:
    job = make_job(ascii_base, tmp_path, asks, QUESTIONS)
    _, batch = scored(job)
    parts = [dynamic_sampling.take_rows(batch, torch.arange(4)), dynamic_sampling.take_rows(batch, torch.arange(4, 8))]
    joined = dynamic_sampling.join(parts, 0)
    assert joined["num_items_in_batch"] == tool_turns.loss_mask(batch).sum() < batch["completion_mask"].sum()
    mask = tool_turns.loss_mask(batch)
    given = global_advantages.advantages(torch.arange(8.0), None, mask, 0.0)
    assert (given[mask == 0] == 0).all()
    assert given[mask == 1].mean().abs() < 1e-5


def test_our_template_passes_what_trl_asks_of_one(
    smollm2: models.Base, ascii_base: models.Base, tmp_path: Path
) -> None:
    job = make_job(ascii_base, tmp_path, asks, QUESTIONS)
    chat = models.load_tokenizer(smollm2)
    assert not supports_tool_calling(chat)  # SmolLM2's own drops calls
    tool_turns.prepare(chat, job.toolbox, "x.toml")
    for tokenizer in (chat, job.tokenizer):
        assert supports_tool_calling(tokenizer)
        assert is_chat_template_prefix_preserving(tokenizer)
        call = {"type": "function", "function": {"name": "slow_calculator", "arguments": {"expression": "1+2"}}}
        asked = [{"role": "user", "content": "1+2"}]
        said = [{"role": "assistant", "content": "", "tool_calls": [call]}]
        head = play.prompt_with_tools(tokenizer, asked, job.toolbox.callables())
        whole = tokenizer.apply_chat_template(
            asked + said, tools=job.toolbox.callables(), tokenize=True, return_dict=False
        )
        assert whole[: len(head)] == head
        parsed = play.parse(tokenizer, whole[len(head) :], head, job.toolbox.callables())
        assert parsed == said[0]


def test_a_runs_tokenizer_reads_its_calls_after_saving(ascii_base: models.Base, tmp_path: Path) -> None:
    job = make_job(ascii_base, tmp_path, asks, QUESTIONS)
    job.tokenizer.save_pretrained(tmp_path / "saved")
    again = models.load_tokenizer(models.Base("saved", tmp_path / "saved", ""))
    assert again.chat_template == job.tokenizer.chat_template
    ids = again(CALL.format("1+2"))["input_ids"]
    assert play.parse(again, ids, [], [])["tool_calls"][0]["function"]["arguments"] == {"expression": "1+2"}
