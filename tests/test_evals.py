"""Measuring runs, on a tiny random Llama that the test writes itself; tasks and targets are in test_evals_tasks.py."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from evals_checkout import ALPHABET, QUESTIONS, put_llama, put_run, put_tokenizer

from evals import __main__ as cli
from evals import catalog, harness, measure, runs, table
from rl.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A checkout after `python -m evals`: results and tables of both runs and their base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("checkout")
    base = root / "models" / "base" / "random"
    put_llama(base, seed=0)
    put_llama(put_run(root, "full", "random"), seed=1)
    # a folder may ship settings that are not greedy decoding, and no EOS
    (root / "models/final/full/generation_config.json").write_text('{"repetition_penalty": 3.0}')
    adapter = put_run(root, "lora", "random")
    torch.manual_seed(2)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False),
    )
    model.peft_config["default"].base_model_name_or_path = "models/base/random"
    model.save_pretrained(adapter, save_embedding_layers=False)
    put_tokenizer(adapter)
    cli.main(["--batch-size", "5", "--device", "cpu"], root)
    return root


@pytest.fixture
def checkout(measured: Path, tmp_path: Path) -> Path:
    """A copy of the measured checkout that a test may break."""
    return Path(shutil.copytree(measured, tmp_path / "checkout"))


def _samples(path: Path) -> list[dict]:
    lines = path.with_name(f"{path.stem}.samples.jsonl").read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])


def _greedy(model: Path, adapter: Path | None, prompts: list[str]) -> list[str]:
    """Greedy completions of 6 tokens, one prompt at a time without a cache: what lm-eval should have generated."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model)
    if adapter:
        network = PeftModel.from_pretrained(network, str(adapter))
    tokens = ["<pad>", "<eos>", *ALPHABET]
    texts = []
    for prompt in prompts:
        ids = [tokens.index(character) for character in prompt]
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 1:
                break
        texts.append("".join(tokens[i] for i in ids[len(prompt) :] if i > 1))
    return texts


@pytest.mark.parametrize(("run", "role"), [("full", "run"), ("full", "base"), ("lora", "run"), ("lora", "base")])
def test_batched_completions_equal_single_ones(measured: Path, run: str, role: str) -> None:
    """Traps: wrong positions under left padding; text after EOS in a batch; an adapter that was never applied."""
    base = measured / "models" / "base" / "random"
    final = measured / "models" / "final" / run
    model, adapter = {
        ("full", "run"): (final, None),
        ("lora", "run"): (base, final),
    }.get((run, role), (base, None))
    samples = _samples(measure.result_path(measured, run, role, "heldout"))
    prompts = [sample["arguments"][0][0] for sample in samples]
    assert prompts == [f"{a}+{b}=" for a, b in QUESTIONS]
    assert [sample["resps"][0][0] for sample in samples] == _greedy(model, adapter, prompts)


def test_the_models_differ_and_some_completions_end_early(measured: Path) -> None:
    """Without this the comparison above could pass on four equal models, or on none that stops."""
    texts = {
        (run, role): [s["resps"][0][0] for s in _samples(measure.result_path(measured, run, role, "heldout"))]
        for run in ("full", "lora")
        for role in ("run", "base")
    }
    assert texts["full", "base"] == texts["lora", "base"]
    assert len({tuple(value) for value in texts.values()}) == 3
    lengths = {len(text) for value in texts.values() for text in value}
    assert min(lengths) < 6 <= max(lengths)


def test_result_is_lm_evals_own_with_error_and_version(measured: Path) -> None:
    path = measure.result_path(measured, "full", "run", "heldout")
    result = json.loads(path.read_text())
    strict = [sample["strict"] for sample in _samples(path)]
    assert result["results"]["heldout"]["strict,none"] == pytest.approx(sum(strict) / len(strict))
    assert result["versions"]["heldout"] == 1.0
    assert result["n-samples"]["heldout"] == {"original": 12, "effective": 12}
    assert result["config"]["model_dtype"] == "torch.float32"
    assert str(measured.resolve()) not in path.read_text()


def test_scores_strict_and_lenient() -> None:
    """Trap: lm-eval's exact match on raw text would mark a right answer followed by anything as wrong."""
    from evals.tasks import heldout

    doc = {"row": json.dumps({"prompt": "7+5=", "answer": "12"}), "rewards": '[{"name": "exact", "options": {}}]'}
    marks = {text: tuple(heldout.process_results(doc, [text]).values()) for text in ("12", " 12", "=12", "112", "")}
    assert marks == {
        "12": (1, 1, 1),
        " 12": (1, 1, 1),
        "=12": (0, 1, 0),
        "112": (0, 0, 1),
        "": (0, 0, 0),
    }


@pytest.mark.parametrize("run", ["full", "lora"])
def test_mlx_answers_as_hf_does(checkout: Path, run: str) -> None:
    """The same greedy completions and marks; which backend made a result is part of what it depends on."""
    path = measure.result_path(checkout, run, "run", "heldout")
    before = _samples(path)
    cli.main([run, "--backend", "mlx"], checkout)
    made = json.loads(path.read_text())["duet"]
    assert made["backend"] == "mlx"
    assert [(s["resps"], s["strict"]) for s in _samples(path)] == [(s["resps"], s["strict"]) for s in before]
    assert made["tokens_per_s"] > 0
    assert made["peak_memory_bytes"] > 1e6
    assert {
        "run",
        "role",
        "device",
        "dtype",
        "model_sha256",
        "task_sha256",
        "settings",
        "commit",
        "lm_eval",
        "seconds",
    } <= (made.keys())


# --- the command line


def test_up_to_date_results_are_kept_and_changed_weights_are_not(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap: a result reused after the run was trained again reports the old model."""
    asked = []
    monkeypatch.setattr(harness, "evaluate", lambda lm, *rest: asked.append(lm) or 1 / 0)
    cli.main(["--batch-size", "3", "--backend", "hf"], checkout)
    assert asked == []
    weights = checkout / "models" / "final" / "full" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x00\x40")
    with pytest.raises(ZeroDivisionError):
        cli.main(["--backend", "hf"], checkout)
    assert len(asked) == 1


def test_second_call_imports_nothing_heavy_and_measures_nothing(checkout: Path) -> None:
    """An up-to-date `nox -s eval` must be instant, so it may not even import what it would measure with."""
    done = _python(
        "import sys; from pathlib import Path; from evals import __main__ as cli\n"
        f"cli.main(['--backend', 'hf'], Path({str(checkout)!r}))\n"
        "print(sorted({'torch', 'transformers', 'lm_eval', 'mlx', 'datasets', 'matplotlib'} & sys.modules.keys()))"
    )
    assert done.stdout.count("up to date:") == 4
    assert done.stdout.endswith("[]\n")


def test_same_weights_under_another_name_are_copied(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both runs start from one base: the second call must find the first's result, and name its own run in it."""
    path = measure.result_path(checkout, "lora", "base", "heldout")
    shutil.rmtree(path.parent)
    monkeypatch.setattr(harness, "evaluate", lambda *_: 1 / 0)
    cli.main(["lora", "--backend", "hf"], checkout)
    other = measure.result_path(checkout, "full", "base", "heldout")
    made, source = (json.loads(file.read_text()) for file in (path, other))
    assert (made["duet"]["run"], made["duet"]["role"]) == ("lora", "base")
    assert made["duet"] | {"run": "full"} == source["duet"]
    assert made["results"] == source["results"]
    assert _samples(path) == _samples(other)


def test_killed_measurement_goes_on_with_the_requests_it_had_not_finished(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Twelve questions, two at a time; the model dies in its fourth batch, and the file loses half its last line."""
    from lm_eval.models.huggingface import HFLM

    path = measure.result_path(checkout, "full", "run", "heldout")
    whole = _samples(path)
    shutil.rmtree(checkout / "evals" / "results")
    shutil.rmtree(checkout / "models" / "base")  # the run alone
    generate, calls = HFLM._model_generate, []

    def dies(self: HFLM, *args, **options):
        calls.append(len(args[0]) if args else len(options["context"]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(self, *args, **options)

    monkeypatch.setattr(HFLM, "_model_generate", dies)
    command = ["full", "--device", "cpu", "--batch-size", "2"]
    with pytest.raises(KeyboardInterrupt):
        cli.main(command, checkout)
    assert not path.exists()
    (partial,) = (checkout / "evals" / "results" / ".partial").iterdir()
    assert len(partial.read_text().splitlines()) == 6
    partial.write_bytes(partial.read_bytes()[:-20])
    cli.main(command, checkout)
    assert sum(calls[4:]) == 7  # 12 less the 5 whole lines
    shown = capsys.readouterr()
    assert "went on, wrote evals/results/full/heldout.json" in shown.out
    assert "Running" not in shown.err  # lm-eval's own bar
    assert _samples(path) == whole
    assert not partial.exists()


def test_truncated_result_is_named_and_not_overwritten(checkout: Path) -> None:
    path = measure.result_path(checkout, "full", "run", "heldout")
    _cut(path, 500)
    with pytest.raises(
        UserError, match=r"full/heldout\.json: not whole JSON .*remove it, or run with --again"
    ) as error:
        cli.main(["full", "--backend", "hf"], checkout)
    assert "\n" not in str(error.value)
    assert path.stat().st_size == 500


def test_limit_of_one_has_no_stderr(checkout: Path) -> None:
    """Trap: lm-eval divides by n − 1 for the error."""
    cli.main(["lora", "--limit", "1", "--device", "cpu"], checkout)
    rows = {row.run: row for result in table.read(checkout) for row in result.rows if row.metric == "strict"}
    assert (rows["lora"].n, rows["full"].n) == (1, 12)
    assert math.isnan(rows["lora"].stderr)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["ful"], ["ful: no such run in models/final", "'full'"]),
        (["--tasks", "heldot"], ["unknown task 'heldot'", "'heldout'"]),
        (["models/final/nothing-near"], ["no such run", "valid: full, lora"]),
    ],
)
def test_wrong_name_is_one_line_with_the_nearest(
    checkout: Path, argv: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "index", lambda _: catalog.Index())  # lm-eval's own names take seconds to read
    with pytest.raises(UserError) as error:
        cli.main(argv, checkout)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def _cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def _long_row(folder: Path) -> None:
    row = {"id": "long", "prompt": "1+" * 30 + "1=", "answer": "31", "task": "arithmetic"}
    (folder / "heldout.jsonl").write_text(json.dumps(row) + "\n")


def _chat_row(folder: Path) -> None:
    row = {"id": "c", "prompt": [{"role": "user", "content": "1+1="}], "answer": "2", "task": "arithmetic"}
    (folder / "heldout.jsonl").write_text(json.dumps(row) + "\n")


def _no_eos(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["eos_token"] = None
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "no model*.safetensors, so there is no model"),
        (lambda f: _cut(f / "model.safetensors", 5000), "model.safetensors: truncated, 5000 bytes of "),
        (lambda f: _cut(f / "model.safetensors", 5), "model.safetensors: truncated or not safetensors (5 bytes)"),
        (lambda f: (f / "heldout.jsonl").unlink(), "heldout.jsonl: missing"),
        (lambda f: (f / "heldout.jsonl").write_text(""), "heldout.jsonl: no rows"),
        (lambda f: _cut(f / "heldout.jsonl", 90), "heldout.jsonl: line 2 is not JSON"),
        (lambda f: (f / "heldout.jsonl").write_text('{"id": 1, "prompt": "2="}\n'), "line 1 lacks answer"),
        (lambda f: _cut(f / "run.json", 90), "run.json: not whole JSON"),
        (_long_row, "row long has 62 tokens, with 6 new ones more than the 64 of the context"),
        (_chat_row, "the tokenizer has no chat template"),
        (_no_eos, "the tokenizer has no EOS token"),
    ],
)
def test_broken_run_is_one_line_and_overwrites_nothing(checkout: Path, breaks, words: str) -> None:
    """Traps: lm-eval cuts the front off a long question; a missing tensor file would give random weights."""
    path = measure.result_path(checkout, "full", "run", "heldout")
    before = path.read_bytes()
    # only the run itself is asked: its start is measured before it
    shutil.rmtree(checkout / "models" / "base")
    breaks(checkout / "models" / "final" / "full")
    with pytest.raises(UserError) as error:
        cli.main(["full", "--device", "cpu", "--again"], checkout)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before


def test_start_of_a_run_is_its_parent(checkout: Path) -> None:
    """Trap: GRPO on top of SFT compared with the raw base would be credited with what SFT taught."""
    final = checkout / "models" / "final"
    record = json.loads((final / "full" / "run.json").read_text())
    record["config"]["model"] = {"from": "sft.toml"}
    record["parents"] = [{"role": "model.from", "name": "lora", "inputs_sha256": "0"}]
    (final / "full" / "run.json").write_text(json.dumps(record))
    start, made = runs.subjects(checkout, runs.load(checkout, "full"))
    assert (start.role, start.adapter) == ("base", final / "lora")
    assert (made.role, made.model, made.adapter) == ("run", final / "full", None)


def test_start_is_found_by_its_weights(checkout: Path) -> None:
    """A packaged base's id is not the name of its folder, and an adapter may name a folder of another checkout."""
    base = checkout / "models" / "base" / "random"
    (base / "base.json").write_text(json.dumps({"weights_sha256": "abc"}))
    record = json.loads((checkout / "models/final/full/run.json").read_text())
    record["base"] = {"id": "packaged-name", "sha256": "abc"}
    (checkout / "models/final/full/run.json").write_text(json.dumps(record))
    adapter = checkout / "models/final/lora/adapter_config.json"
    adapter.write_text(adapter.read_text().replace('"models/base/random"', '"/elsewhere/models/base/random"'))
    assert runs.subjects(checkout, runs.load(checkout, "full"))[0].model == base.resolve()
    assert runs.subjects(checkout, runs.load(checkout, "lora"))[1].model == base.resolve()


def test_a_run_on_a_quantized_base_started_from_that_one(checkout: Path) -> None:
    """Trap: beside the whole base, which has the same id, the loss of quantization would be taken off the gain."""
    base = checkout / "models" / "base" / "random"
    (base / "base.json").write_text(json.dumps({"weights_sha256": "whole"}))
    packed = shutil.copytree(base, checkout / "models" / "base" / "random-q4g32")
    (packed / "base.json").write_text(json.dumps({"source": "whole", "bits": 4, "sha256": "packed"}))
    for name, parents in (("full", []), ("lora", [{"role": "model.from", "name": "full"}])):
        path = checkout / "models" / "final" / name / "run.json"
        for digest, folder in (("packed", packed), ("whole", base)):
            model = {"from": "full.toml"} if parents else {"base": "random"}
            record = json.loads(path.read_text()) | {"base": {"id": "random", "sha256": digest}, "parents": parents}
            record["config"]["model"] = model
            path.write_text(json.dumps(record))
            assert runs.subjects(checkout, runs.load(checkout, name))[0] == runs.Subject("base", folder.resolve())
    path.write_text(json.dumps(record | {"base": {"id": "full", "sha256": "of no base"}}))
    start = runs.subjects(checkout, runs.load(checkout, "lora"))[0]
    assert start == runs.Subject("base", checkout / "models" / "final" / "full")


def test_no_runs_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nox -s train"):
        cli.main([], tmp_path)
    with pytest.raises(UserError, match="evals/results holds no result"):
        cli.main(["table"], tmp_path)


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("argv", "code", "begins"),
    [
        (["no-such-run-anywhere"], 2, "error: no-such-run-anywhere: "),
        (["--tasks", "gym_gdc"], 2, "error: --tasks: unknown task 'gym_gdc', did you mean 'gym_gcd'"),
        (["--help"], 0, ""),
    ],
)
def test_bad_names_and_help_import_nothing_heavy(argv: list[str], code: int, begins: str) -> None:
    done = _python(
        f"import sys, runpy; sys.argv = ['evals', *{argv!r}]\n"
        "try: runpy.run_module('evals', run_name='__main__')\n"
        "except SystemExit as e: print(e.code, sorted({'torch', 'lm_eval', 'mlx'} & sys.modules.keys()))"
    )
    assert done.stdout.endswith(f"{code} []\n")
    assert done.stderr.startswith(begins)
    assert done.stderr.count("\n") == (1 if begins else 0)
