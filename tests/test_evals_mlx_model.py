"""The MLX model under lm-eval against lm-eval's own `hf` model: the same values on the same weights.

Tolerances, float32 on both sides: 1e-4 a log-likelihood (absolute), 1e-4 a perplexity (relative); texts, choices and
`is_greedy` are equal.
"""

import json
import math
from pathlib import Path
from typing import Any

import lm_eval
import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from mlx_model_helper import ASKED, CONTEXT, hf, instances, ours, task, told, write, write_quantized

from evals.mlx_model import MLXModel
from rl.errors import UserError
from rl.rollouts import scoring

FAMILIES = ("llama", "qwen2", "qwen3", "4-bit base and adapter")
TOLERANCE = 1e-4

Pair = tuple[HFLM, MLXModel]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> dict[str, tuple[Path, Path | None]]:
    """Model folder and adapter of each family; do not change their files."""
    root = tmp_path_factory.mktemp("models")
    made: dict[str, tuple[Path, Path | None]] = {name: (write(root / name, name), None) for name in FAMILIES[:3]}
    return made | {FAMILIES[3]: write_quantized(root / "quantized", made["llama"][0])}


@pytest.fixture(scope="module")
def pairs(folders: dict[str, tuple[Path, Path | None]]) -> dict[str, Pair]:
    """lm-eval's model and ours, of each family."""
    return {name: (hf(*found), ours(*found)) for name, found in folders.items()}


@pytest.fixture(scope="module")
def llama(pairs: dict[str, Pair]) -> Pair:
    return pairs["llama"]


# --- whole tasks


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_defaults=False)


def evaluated(lm: Any, tasks: list[dict[str, Any]], manager: TaskManager, **options: Any) -> dict[str, Any]:
    return lm_eval.simple_evaluate(model=lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options)


def assert_same(theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    assert theirs["results"].keys() == mine["results"].keys()
    for name, values in theirs["results"].items():
        for metric, value in values.items():
            if isinstance(value, int | float):
                assert mine["results"][name][metric] == pytest.approx(value, rel=TOLERANCE), (name, metric)
        for one, other in zip(theirs["samples"][name], mine["samples"][name], strict=True):
            assert one["arguments"] == other["arguments"]
            if isinstance(one["resps"][0][0], str):
                assert (one["resps"], one["filtered_resps"]) == (other["resps"], other["filtered_resps"])


@pytest.mark.parametrize("family", FAMILIES)
def test_public_tasks_of_six_kinds_give_hf_values(pairs: dict[str, Pair], manager: TaskManager, family: str) -> None:
    """Multiple choice, cloze, generation with two filters, perplexity in several windows, targets of many tokens, and
    sentences without context; the definitions are lm-eval's own."""
    tasks = [
        task("arc/arc_easy"),
        task("lambada/lambada_openai"),
        task("gsm8k/gsm8k") | {"num_fewshot": 0},
        task("wikitext/wikitext"),
        task("piqa/piqa"),
        task("blimp/adjunct_island"),
    ]
    theirs, mine = (evaluated(lm, tasks, manager, gen_kwargs={"max_gen_toks": 24}) for lm in pairs[family])
    assert len(mine["results"]) == len(tasks)
    assert_same(theirs, mine)
    # the comparison says something: neither all right nor all wrong
    assert 0 < theirs["results"]["arc_easy"]["acc,none"] <= 1
    assert 1 < theirs["results"]["lambada_openai"]["perplexity,none"] < math.inf


def test_few_shot_chat_prompts_give_hf_values(pairs: dict[str, Pair], manager: TaskManager) -> None:
    """Trap: a template that already writes BOS must not get a second one."""
    for pair in (pairs["llama"], pairs["qwen3"]):
        options = {"apply_chat_template": True, "fewshot_as_multiturn": True, "gen_kwargs": {"max_gen_toks": 16}}
        tasks = [task("gsm8k/gsm8k") | {"num_fewshot": 1}, task("piqa/piqa") | {"num_fewshot": 1}]
        theirs, mine = (evaluated(lm, tasks, manager, **options) for lm in pair)
        assert_same(theirs, mine)
        assert mine["configs"]["gsm8k"]["num_fewshot"] == 1
        assert "<user>" in mine["samples"]["gsm8k"][0]["arguments"][0][0]


# --- scoring


@pytest.mark.parametrize("family", FAMILIES)
def test_each_log_likelihood_is_hf_within_the_tolerance(pairs: dict[str, Pair], family: str) -> None:
    asked = [pair for pair in ASKED if family in ("llama", FAMILIES[3]) or "<bos>" not in pair[0]]
    theirs, mine = (lm.loglikelihood(instances("loglikelihood", asked), disable_tqdm=True) for lm in pairs[family])
    for pair, one, other in zip(asked, theirs, mine, strict=True):
        assert other[0] == pytest.approx(one[0], abs=TOLERANCE), pair
        assert other[1] is one[1], pair


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_every_token_the_likeliest(pairs: dict[str, Pair], family: str) -> None:
    """Against transformers' own greedy steps. Trap: judging the last token only, which choices share their path to."""
    theirs, mine = pairs[family]
    context = mine.tok_encode("The heron waited")
    ids = torch.tensor([context])
    for _ in range(5):
        with torch.no_grad():
            ids = torch.cat([ids, theirs.model(ids).logits[:, -1:].argmax(-1)], dim=1)
    greedy = ids[0, len(context) :].tolist()
    changed = [[*greedy[:i], 5 if greedy[i] != 5 else 6, *greedy[i + 1 :]] for i in (0, 2, 4)]
    asked = [(None, context, tokens) for tokens in (greedy, greedy[:1], *changed)]
    assert [found for _, found in mine._loglikelihood_tokens(asked)] == [True, True, False, False, False]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_length", [7, 40])
def test_rolling_windows_are_hf_at_any_context(pairs: dict[str, Pair], family: str, max_length: int) -> None:
    """Texts shorter than a window, of exactly one, one token longer, of many, and an empty one."""
    theirs, mine = pairs[family]
    whole = mine.tokenizer.decode(mine.tok_encode("The heron waited by the river " * 9, add_special_tokens=False))
    ids = mine.tok_encode(whole, add_special_tokens=False)
    texts = ["", *(mine.tokenizer.decode(ids[:n]) for n in (1, max_length - 1, max_length, max_length + 1, len(ids)))]
    before = theirs._max_length, mine.max_length
    theirs._max_length = mine.max_length = max_length
    try:
        asked = instances("loglikelihood_rolling", [(text,) for text in texts])
        found = [lm.loglikelihood_rolling(asked, disable_tqdm=True) for lm in pairs[family]]
    finally:
        theirs._max_length, mine.max_length = before
    assert found[1] == pytest.approx(found[0], abs=TOLERANCE)
    assert len(set(found[1])) == len(texts)


def test_log_softmax_is_in_float32_whatever_the_weights(folders: dict[str, tuple[Path, Path | None]]) -> None:
    """Trap: in float16 a log-likelihood comes in steps of 1/64 from 8 nats on."""
    lm = ours(folders["llama"][0], dtype="float16")
    asked = instances("loglikelihood", [("Tom has", f" {a} apples{b}") for a in range(30, 50) for b in ".,;"])
    values = np.array([value for value, _ in lm.loglikelihood(asked, disable_tqdm=True)])
    whole = [value for value, _ in ours(folders["llama"][0]).loglikelihood(asked, disable_tqdm=True)]
    assert (values * 64 % 1 != 0).mean() > 0.9
    np.testing.assert_allclose(values, whole, atol=0.1)


def test_logits_are_made_for_continuations_alone_and_a_few_at_a_time(
    llama: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap: logits of whole rows: 32 rows of 2,048 tokens with 49,152 words are 13 GB."""
    asked = instances(
        "loglikelihood", [("The heron waited by the river until " * 4, f" {word} fish") for word in "abcd"]
    )
    plain = llama[1].loglikelihood(asked, disable_tqdm=True)
    rows: list[int] = []
    real = scoring.head

    def head(model: Any, hidden: mx.array) -> mx.array:
        rows.append(hidden.shape[0])
        return real(model, hidden)

    monkeypatch.setattr(scoring, "head", head)
    monkeypatch.setattr(scoring, "LOGITS", 3 * llama[1].model.args.vocab_size)
    again = llama[1].loglikelihood(asked, disable_tqdm=True)
    pairs = [llama[1]._encode_pair(*request.args) for request in asked]
    assert sum(rows) == sum(len(continuation) for _, continuation in pairs)
    assert max(rows) == 3
    assert [v for v, _ in again] == pytest.approx([v for v, _ in plain], abs=1e-5)


def test_a_beginning_that_all_share_is_read_once(llama: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few-shot examples; and choices of one token ask for one row together."""
    shots = "Question: which floats on water? Answer: the cork.\n" * 2
    asked = [(f"{shots}Question: {q}?\nAnswer:", c) for q in ("who", "where is it", "when") for c in (" a", " b")]
    theirs = llama[0].loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)
    read: list[tuple[int, int]] = []
    real = scoring.prefill

    def prefill(model: Any, rows: Any, common: Any = None) -> Any:
        read.append((len(rows), max(map(len, rows))))
        return real(model, rows, common)

    monkeypatch.setattr(scoring, "prefill", prefill)
    mine = llama[1].loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)
    assert [v for v, _ in mine] == pytest.approx([v for v, _ in theirs], abs=TOLERANCE)
    shared = len(llama[1].tok_encode(shots))
    assert read[0][0] == 1
    assert read[0][1] >= shared
    assert read[1:] == [(3, scoring.BUCKET)]


def test_a_continuation_that_cannot_be_scored_is_named(llama: Pair) -> None:
    """lm-eval's model stops at a bare assert there."""
    with pytest.raises(UserError, match=r"0 tokens to score"):
        llama[1].loglikelihood(instances("loglikelihood", [("Tom has", "")]), disable_tqdm=True)
    with pytest.raises(UserError, match=rf"valid are 1 to {CONTEXT}"):
        llama[1].loglikelihood(instances("loglikelihood", [("Tom", " apples" * (CONTEXT + 1))]), disable_tqdm=True)


# --- generation


PROMPTS = ("Question: What is 12 - 5?\nAnswer:", "Tom has", "The heron waited by the river", "Who", "The cork floats")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("until", [[], "e", [" the", "7"], ["has 1", "s"], ["\n", "<eos>"]])
def test_generation_is_hf_with_any_stops(pairs: dict[str, Pair], family: str, until: Any) -> None:
    """hf one row at a time: in a batch it goes on until the last row has met the same stop."""
    theirs, mine = pairs[family]
    asked = told(PROMPTS, until=until)
    expected = [theirs.generate_until([request], disable_tqdm=True)[0] for request in asked]
    assert mine.generate_until(asked) == expected


def test_a_row_ends_at_its_stop_while_decoding(llama: Pair) -> None:
    """Trap: cutting the text afterwards costs every row its full length. The stop spans tokens."""
    mine = llama[1]
    free = mine.generate_until(told(PROMPTS[:1], until=[], max_gen_toks=20))[0]
    tokens = mine.tok_encode(free, add_special_tokens=False)
    pieces = [mine.tokenizer.decode([t]) for t in tokens]
    stop = pieces[1][-1:] + pieces[2][:1]  # the end of one token and the beginning of the next
    asked = told(PROMPTS[:1], until=[stop], max_gen_toks=100)
    assert mine.generate_until(asked) == [free.split(stop)[0]]
    assert mine.engine.totals.last_tokens <= 3


def test_long_prompts_are_cut_on_the_left_as_in_hf(llama: Pair) -> None:
    """The end of the prompt is kept, with room for the answer."""
    prompts = ["The heron waited by the river. " * 30, "Tom has"]
    asked = told(prompts, max_gen_toks=150)
    expected = [llama[0].generate_until([request], disable_tqdm=True)[0] for request in asked]
    assert llama[1].generate_until(asked) == expected


@pytest.mark.parametrize("added", [None, False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_bos_is_added_as_hf_decides(pairs: dict[str, Pair], family: str, added: bool | None) -> None:
    theirs, mine = pairs[family]
    before = theirs.add_bos_token
    theirs.add_bos_token = mine.add_bos_token = added
    try:
        for text in ("Tom has", "<bos>Tom has", "<eos>Tom"):
            assert mine.tok_encode(text) == theirs.tok_encode(text)
            assert mine._prompts([text], 99) == theirs.tok_batch_encode([text])[0].tolist()
        assert mine.prefix_token_id == theirs.prefix_token_id
        assert mine.eot_token_id == theirs.eot_token_id
    finally:
        theirs.add_bos_token = mine.add_bos_token = before


def test_chat_templates_and_names_are_hf(pairs: dict[str, Pair]) -> None:
    """A template that refuses the system message gets the others."""
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who?"}]
    prefilled = [*chat[1:], {"role": "assistant", "content": "Tom"}]
    for theirs, mine in pairs.values():
        for messages, prompt in ((chat, True), (chat[1:], True), (prefilled, False)):
            assert mine.apply_chat_template(messages, prompt) == theirs.apply_chat_template(messages, prompt)
        assert mine.chat_template(True) == theirs.chat_template(True)
        assert mine.tokenizer_name == theirs.tokenizer_name
        assert mine.max_length == theirs.max_length == CONTEXT
        assert mine.max_gen_toks == theirs.max_gen_toks


def test_draws_follow_the_seed_and_not_the_batch_size(folders: dict[str, tuple[Path, Path | None]]) -> None:
    """Trap: results are kept by seed and settings, so a draw must not depend on how many rows run at once."""
    drawn = {"do_sample": True, "temperature": 1.5, "until": []}
    asked = told(["Tom has"] * 6, **drawn)
    torch.manual_seed(11)  # as lm-eval's torch_random_seed does
    found = {size: ours(folders["llama"][0], batch_size=size).generate_until(asked) for size in (1, 4)}
    assert found[1] == found[4]
    assert len(set(found[1])) > 1  # repeats of one question differ
    lm = ours(folders["llama"][0], batch_size=4)
    assert lm.generate_until(told(["Tom has"] * 6, **drawn, seed=11)) == found[1]
    torch.manual_seed(12)
    assert lm.generate_until(asked) != found[1]
    greedy = lm.generate_until(told(["Tom has"], until=[]))
    assert lm.generate_until(told(["Tom has"], **drawn, top_k=1)) == greedy
    assert lm.generate_until(told(["Tom has"], **drawn, top_p=1e-6)) == greedy
    assert lm.generate_until(told(["Tom has"], **drawn, min_p=1.0)) == greedy
    # temperature alone switches sampling on, and top_p means nothing beside greedy decoding
    assert lm.generate_until(told(["Tom has"], until=[], do_sample=None, temperature=1e-6)) == greedy
    assert lm.generate_until(told(["Tom has"], until=[], do_sample=False, top_p=0.95, temperature=0.0)) == greedy


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"num_beams": 4}, r'"num_beams": 4'),
        ({"repetition_penalty": 1.1, "num_beams": 1}, r'\{"repetition_penalty": 1.1\}'),
        ({"max_length": 9}, "max_length"),
        ({"max_gen_toks": CONTEXT}, rf"max_gen_toks = {CONTEXT}: valid are 1 to {CONTEXT - 1}"),
        ({"do_sample": True}, "temperature above 0"),
    ],
)
def test_settings_the_engine_does_not_know_are_refused_by_name(llama: Pair, wrong: dict[str, Any], named: str) -> None:
    """Trap: a setting passed over in silence gives another number under the same task's name."""
    with pytest.raises(UserError, match=named):
        llama[1].generate_until(told(["Tom"], **wrong))


# --- batches


words = st.sampled_from(["Tom", " has", " 12", " apples", "\n", "Question:", " the", " heron", " 7", "zq"])
phrases = st.lists(words, min_size=1, max_size=30).map("".join)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asked=st.lists(st.tuples(st.one_of(st.just(""), phrases), phrases), min_size=2, max_size=7),
    family=st.sampled_from(FAMILIES),
    rows=st.integers(1, 5),
)
def test_scores_of_a_batch_are_those_of_single_requests(
    pairs: dict[str, Pair], asked: list[tuple[str, str]], family: str, rows: int
) -> None:
    """In request order, whatever stands beside a request and however the rows are cut into batches."""
    mine = pairs[family][1]
    asked = [pair for pair in asked if pair[0].strip() or not pair[0]]
    alone = [mine.loglikelihood(instances("loglikelihood", [pair]), disable_tqdm=True)[0] for pair in asked]
    before, mine.batch_size = mine.batch_size, rows
    try:
        together = mine.loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)
        rolled = mine.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for _, text in asked]))
    finally:
        mine.batch_size = before
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], abs=TOLERANCE)
    singly = [mine.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))[0] for _, text in asked]
    assert rolled == pytest.approx(singly, abs=TOLERANCE)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asked=st.lists(
        st.tuples(phrases, st.sampled_from(["e", " the", "7", "\n\n"]), st.integers(1, 9)), min_size=2, max_size=6
    ),
    family=st.sampled_from(FAMILIES),
)
def test_answers_of_a_batch_are_those_of_single_requests(
    pairs: dict[str, Pair], asked: list[tuple[str, str, int]], family: str
) -> None:
    """Each row with its own stop and length."""
    mine = pairs[family][1]
    requests = [told([prompt], until=[stop], max_gen_toks=length)[0] for prompt, stop, length in asked]
    alone = [mine.generate_until([request])[0] for request in requests]
    assert mine.generate_until(requests) == alone


def test_each_finished_request_is_reported_once(folders: dict[str, tuple[Path, Path | None]]) -> None:
    """What evals/cache.py keeps: lm-eval's own arguments, untouched, and the answer that is returned."""
    heard: list[tuple[str, Any, Any]] = []

    class Hook:
        def add_partial(self, kind: str, arguments: Any, answer: Any) -> None:
            heard.append((kind, arguments, answer))

    done: list[int] = []
    lm = ours(folders["qwen2"][0], progress=done.append)
    lm.set_cache_hook(Hook())  # type: ignore[arg-type]
    asked = {
        "loglikelihood": [("Tom", " a"), ("Tom", " b"), ("Tom has", " a b c"), ("", "Tom"), ("Tom", " a")],
        "loglikelihood_rolling": [("Tom has 12 apples",), ("",), ("The heron",)],
        "generate_until": [(prompt, {"until": ["e"], "max_gen_toks": 3}) for prompt in PROMPTS],
    }
    before = json.dumps(asked)
    for kind, arguments in asked.items():
        answers = getattr(lm, kind)(instances(kind, arguments))
        expected = [(kind, a, answer) for a, answer in zip(arguments, answers, strict=True)]
        assert sorted(map(repr, heard)) == sorted(map(repr, expected))
        heard.clear()
    assert json.dumps(asked) == before
    assert sum(done) == sum(map(len, asked.values()))
