"""Best-of-n: what is kept of a draw, whatever the rewards; training on the very tokens; a run that resumes exactly."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from config_helper import tiny_run
from hypothesis import given
from hypothesis import strategies as st
from preference_helper import built, make_config, make_job
from run_helper import train_until_ctrl_c
from safetensors.numpy import load_file
from test_pairs import Letters, Script, questions

from rl import config, judge, models, pairs, train
from rl.algorithms import bon
from rl.errors import RunFailed, UserError
from rl.rewards.functions import RewardFunction

Row = dict[str, Any]


def rewarding(values: dict[str, float | None], weight: float = 1.0) -> RewardFunction:
    return RewardFunction("own", weight, lambda prompts, completions, **c: [values.get(t, 0.0) for t in completions])


def drawn(texts: dict[str, list[str]], rows: list[Row], *functions: RewardFunction) -> pairs.Drawn:
    settings = make_config(
        Path("x.toml"),
        "bon",
        rollout=config.Rollout(precision="full", samples=len(next(iter(texts.values()))), max_completion_length=9),
        eval=config.Eval(metric="lenient"),
    )
    return pairs.sample(settings, rows, Script(texts), Letters(), [0], {"run": "start"}, functions=functions)


def kept(out: pairs.Drawn) -> list[tuple[str, str]]:
    return [(row["id"], row["completion"]) for row in out.rows]


def test_with_a_verifier_alone_every_distinct_right_completion_is_kept() -> None:
    texts = {"a": ["7", "so 7", "7", "8"], "b": ["1", "2", "3", "4"], "c": ["5", "5", "5", "5"]}
    out = drawn(texts, questions({"a": "7", "b": "9", "c": "5"}))
    assert kept(out) == [("qa/0", "7"), ("qa/1", "so 7"), ("qc/0", "5")]
    assert out.rows[1]["completion_ids"] == [*map(ord, "so 7"), 0]
    assert out.rows[1]["prompt_ids"] == [ord("a")]
    assert "2 of 3 questions have a right completion among 4 (58% are right); 3 are kept" in out.told()


def test_of_the_right_ones_the_highest_sum_of_rewards_is_kept() -> None:
    """A wrong completion is not kept however it scores, one that was cut or has no reward neither."""
    texts = {"a": ["7", "so 7", "is 7", "8", "at 7…", "on 7"]}
    first = rewarding({"7": 1.0, "so 7": 2.0, "is 7": 2.0, "8": 9.0, "at 7": 9.0, "on 7": None})
    second = rewarding({"is 7": 1.0, "on 7": None}, weight=-0.5)
    assert kept(drawn(texts, questions({"a": "7"}), first)) == [("qa/0", "so 7"), ("qa/1", "is 7")]
    out = drawn(texts, questions({"a": "7"}), first, second)
    assert kept(out) == [("qa/0", "so 7")]
    assert out.rows[0]["reward"] == 2.0


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.5, 1.0])), min_size=4, max_size=4),
        min_size=1,
        max_size=5,
    )
)
def test_any_draw_keeps_right_ones_of_the_best_reward_once(problems: list[list[tuple[int, float]]]) -> None:
    texts = {chr(97 + i): [f"{r} {n}" for n, r in said] for i, said in enumerate(problems)}
    scores = rewarding({f"{r} {n}": r for said in problems for n, r in said})
    rows = questions(dict.fromkeys(texts, "2"))
    expected = []
    for i, said in enumerate(problems):
        able = [r for n, r in said if n == 2]
        expected += [(f"q{chr(97 + i)}/0", f"{max(able)} 2")] if able else []
    if not expected:
        with pytest.raises(RunFailed, match="no rows: 0 of"):
            drawn(texts, rows, scores)
        return
    assert kept(drawn(texts, rows, scores)) == expected


def test_the_judge_calls_rewards_as_trl_does() -> None:
    heard: dict[str, Any] = {}

    def own(prompts: list, completions: list, **columns: Any) -> list[float | None]:
        heard.update(columns, prompts=prompts, completions=completions)
        return [1.0, None]

    chat = [{"role": "user", "content": "a"}]
    rows = [{"id": i, "prompt": chat, "answer": "1", "completion": "gold"} for i in "ab"]
    function = RewardFunction("own", 0.5, own)
    sums = judge.totals([function], rows, ["x", "y"], [[1], [2]])
    assert sums[0] == 0.5
    assert math.isnan(sums[1])
    assert heard["completions"] == [[{"role": "assistant", "content": t}] for t in "xy"]
    assert (heard["completion_ids"], heard["answer"], "completion" in heard) == ([[1], [2]], ["1", "1"], False)
    assert judge.totals([], rows, ["x", "y"], [[1], [2]]) == [0.0, 0.0]
    zeros = RewardFunction("zeros", 1.0, lambda prompts, completions, **c: [0.0, 0.0])
    assert judge.totals([function, zeros], rows, ["x", "y"], [[1], [2]]) == [0.5, 0.0]


def test_the_loss_is_on_the_sampled_tokens_alone(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"id": "a", "prompt_ids": [3, 4], "completion_ids": [5, 1]},
        {"id": "b", "prompt_ids": [6], "completion_ids": [7, 8, 1]},
    ]
    job = make_job(tiny_base, make_config(tmp_path / "x.toml", "bon"), rows, tmp_path)
    trainer = built(monkeypatch, bon, job)
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert sorted(zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)) == [
        ([3, 4, 5, 1], [-100, -100, 5, 1]),
        ([6, 7, 8, 1], [-100, 7, 8, 1]),
    ]


def test_rows_that_were_not_sampled_are_named(tiny_base: models.Base, tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "1+1=", "completion": "2"}]
    job = make_job(tiny_base, make_config(tmp_path / "x.toml", "bon"), rows, tmp_path)
    with pytest.raises(UserError, match="row 'a' has no 'prompt_ids', 'completion_ids'; bon takes questions"):
        bon.train(job)


RUN = tiny_run(
    "bon",
    most=9,
    train_size=24,
    size=8,
    completion=6,
    rollout="samples = 64",
    trainer="per_device_train_batch_size = 4\nlearning_rate = 5e-3\nmax_steps = 5\nsave_steps = 2",
    metric="lenient",
)


def test_a_run_samples_once_and_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("whole", "broken"):
        Path(f"{name}.toml").write_text(RUN.format(name=name))
    assert train.main(Path("whole.toml")) == 0
    train_until_ctrl_c(monkeypatch, Path("broken.toml"), 3)
    with monkeypatch.context() as patched:
        patched.setattr("rl.pairs.sample", lambda *_, **__: pytest.fail("sampled again"))
        assert train.main(Path("broken.toml"), resume=True) == 0
    folders = [Path("models/final", name) for name in ("whole", "broken")]
    first, second = ((f / "pairs.jsonl").read_bytes() for f in folders)
    assert first == second
    assert all(json.loads(line)["completion_ids"] for line in first.splitlines())
    whole, broken = (load_file(f / "model.safetensors") for f in folders)
    for name, weight in whole.items():
        np.testing.assert_array_equal(broken[name], weight, err_msg=name)
