"""Exports open in the tools they are for and say what the run says; what cannot be exported is refused whole."""

import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import run_helper
import torch
from mlx_model_helper import write as write_family
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl import convert, finished, models, record, report
from rl.errors import RunFailed, UserError
from rl.export import command, gguf_file, hub
from rl.export.command import Asked
from rl.rewards import Score
from rl.rollouts import quantized
from rl.rollouts.parity import trainer_logprobs

NAME = "tiny-adapter"
CONFIG = {
    "model": {"base": "tiny", "lora": {"rank": 4, "alpha": 12.0}, "quantization": {"bits": 4, "group_size": 32}},
    "data": {"source": "arithmetic", "form": "char", "train_size": 64},
    "trainer": {"algorithm": "grpo", "learning_rate": 1e-4},
}


def finish(root: Path, folder: Path, **changes: Any) -> None:
    """What a finished run's folder holds beside its weights."""
    run = run_helper.fresh(root, name=folder.name, command="nox -s train -- x.toml", **changes)
    scores = [Score(i % 2 == 0, True, True) for i in range(4)]
    run.config |= CONFIG
    run = replace(run, status="finished", result=report.result("strict", scores, [Score(True, True, True)] * 4))
    record.save(run, folder)
    rows = [{"id": f"{i}", "prompt": f"{i}+{i}=", "answer": f"{2 * i}"} for i in range(4)]
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = [{"id": row["id"], "after": row["answer"]} for row in rows]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "curves.png").write_bytes(b"png")


@pytest.fixture(scope="module")
def made(tiny_base: models.Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with one finished run: an adapter of a shared 4-bit base; do not change its files (see `root`)."""
    root = tmp_path_factory.mktemp("export")
    base = root / "models" / "base" / "tiny-q4g32"
    base.parent.mkdir(parents=True)
    quantized.build(tiny_base.path, None, 4, 32, base, source="test")
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.7)
    model.peft_config["default"].base_model_name_or_path = "models/base/tiny-q4g32"
    folder = root / "models" / "final" / NAME
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    finish(root, folder)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that root, and the working directory."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def export(to: Any, out: str | None = None, dtype: str = "float16", bits: int | None = None, **more: Any) -> int:
    return command.main(NAME, Asked(to, dtype, bits), None if out is None else Path(out), **more)


def run_logprobs(root: Path, rows: list[list[int]]) -> np.ndarray:
    """By peft, base and adapter apart."""
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(root / "models" / "base" / "tiny-q4g32")
    policy = PeftModel.from_pretrained(base, root / "models" / "final" / NAME).eval()
    return np.concatenate(trainer_logprobs(policy, rows))


def mean_difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())


ROWS = [[5, 12, 3, 16, 7, 1], [9, 2, 12, 4]]


def test_mlx_folder_holds_base_plus_adapter_and_is_not_quantized_again(root: Path, capsys: Any) -> None:
    """Trap: `mlx_lm.fuse` quantizes the sum again and can erase a small adapter."""
    from rl.rollouts.export import logprobs

    assert export("mlx") == 0
    out = root / "models" / "exports" / f"{NAME}-mlx"
    told = json.loads((out / "config.json").read_text())
    assert "quantization" not in told
    assert told["rope_theta"] == 10000.0
    ours = np.concatenate(logprobs(out, ROWS))  # through mlx_lm.load
    assert mean_difference(ours, run_logprobs(root, ROWS)) < 2e-3
    base = AutoModelForCausalLM.from_pretrained("models/base/tiny-q4g32").eval()
    assert mean_difference(ours, np.concatenate(trainer_logprobs(base, ROWS))) > 2e-2  # without the adapter
    assert "mean |Δlogp| to the run" in capsys.readouterr().out
    # mlx-lm and LM Studio probe a tokenizer with any text
    assert (
        AutoTokenizer.from_pretrained(out)("a ,1+2")["input_ids"]
        == models.load_tokenizer(models.Base("", root / "models" / "final" / NAME, ""))(" 1+2")["input_ids"]
    )


def test_quantizing_happens_on_request_and_its_cost_is_said(root: Path, capsys: Any) -> None:
    from rl.rollouts.export import logprobs

    assert export("mlx", "four", bits=4) == 0
    assert json.loads(Path("four/config.json").read_text())["quantization"]["bits"] == 4
    rows = command.probe_rows(root / "models" / "final" / NAME, AutoTokenizer.from_pretrained("four"))
    cost = mean_difference(np.concatenate(logprobs(Path("four"), rows)), run_logprobs(root, rows))
    assert cost > 2e-3
    assert f"mean |Δlogp| to the run {cost:.1e}" in capsys.readouterr().out
    assert f"mean |Δlogp| {cost:.1e}" in Path("four/README.md").read_text()


def test_safetensors_opens_in_transformers_alone(root: Path) -> None:
    assert export("safetensors", "whole", "float32") == 0
    assert not list(Path("whole").glob("adapter*"))
    model = AutoModelForCausalLM.from_pretrained("whole").eval()
    assert mean_difference(np.concatenate(trainer_logprobs(model, ROWS)), run_logprobs(root, ROWS)) < 1e-5


@pytest.mark.parametrize(("dtype", "bits", "limit"), [("float32", None, 1e-5), ("float16", None, 2e-3), ("", 8, 0.1)])
def test_gguf_of_the_tiny_model_opens_in_transformers(root: Path, dtype: str, bits: int | None, limit: float) -> None:
    assert export("gguf", "g", dtype or "float16", bits) == 0
    (file,) = Path("g").glob("*.gguf")
    assert Path("g/Modelfile").read_text() == f'FROM ./{file.name}\nTEMPLATE "{{{{ .Prompt }}}}"\n'
    model = AutoModelForCausalLM.from_pretrained("g", gguf_file=file.name, dtype=torch.float32).eval()
    found = mean_difference(np.concatenate(trainer_logprobs(model, ROWS)), run_logprobs(root, ROWS))
    assert found < limit
    if bits:
        assert found > 1e-5


def test_wrong_weights_are_found_and_nothing_is_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: q and k rows in the wrong order load without a word everywhere."""
    monkeypatch.setattr(convert, "permute", lambda rows, heads: rows)
    with pytest.raises(RunFailed, match=r"not the run's policy: mean \|Δlogp\|"):
        export("gguf", "out/g", "float32")
    assert not list(Path("out").iterdir())


def test_permute_undoes_unpermute() -> None:
    rows = np.arange(24 * 3.0).reshape(24, 3)
    assert (convert.permute(convert.unpermute(rows, 3), 3) == rows).all()
    # llama.cpp's order, written out: row 2j + s of a head of 8 holds row 4s + j
    assert convert.permute(rows, 3)[:8, 0].tolist() == [rows[4 * s + j, 0] for j in range(4) for s in range(2)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_gguf_families(family: str, tmp_path: Path) -> None:
    """Biases, norms and tied heads of each find their place, and the text is cut as the run cuts it."""
    folder = write_family(tmp_path / family, family, steps=2)
    told = json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    gguf_file.write(tmp_path / "x.gguf", told, model.named_parameters(), tokenizer, "float32", "x")
    rows = tokenizer(["Tom has 12 apples", "The cork floats"])["input_ids"]
    after = command._from_gguf(tmp_path / "x.gguf", folder, tokenizer, rows)
    assert mean_difference(np.concatenate(after), np.concatenate(trainer_logprobs(model, rows))) < 1e-4
    _, metadata = _metadata(tmp_path / "x.gguf")
    assert metadata["tokenizer.ggml.add_bos_token"] == (family == "llama")
    assert metadata["tokenizer.chat_template"] == tokenizer.chat_template


def _metadata(path: Path) -> tuple[Any, dict[str, Any]]:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    return reader, {name: field.contents() for name, field in reader.fields.items()}


@pytest.mark.parametrize("name", convert.PRE_TOKENIZERS)
def test_pre_tokenizers_are_told_apart(name: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_family(tmp_path / "m", "llama", steps=1))
    tokenizer.backend_tokenizer.pre_tokenizer = convert.pre_tokenizer(name)
    assert gguf_file.vocabulary(tokenizer, "x")[0] == name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gemma3_text"}, "of the 'gemma3_text' family, valid for gguf: llama, qwen2, qwen3"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "has RoPE of type 'llama3', which is not written as gguf"),
        ({"attention_bias": True}, "has biases in its attention"),
    ],
)
def test_what_gguf_has_no_rule_for_is_refused_by_name(root: Path, changes: dict[str, Any], said: str) -> None:
    path = root / "models" / "base" / "tiny-q4g32" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=said):
        export("gguf", "out/g")
    assert not Path("out").exists()


def test_card_carries_config_data_scores_and_command(root: Path) -> None:
    result = {"results": {"arc_easy": {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.1}}}
    evals = root / "evals" / "results" / NAME
    evals.mkdir(parents=True)
    (evals / "arc_easy.json").write_text(json.dumps(result))
    assert export("hub", "card", repo="me/x", dry_run=True) == 0
    card = Path("card/README.md").read_text()
    front = card.split("---\n")[1]
    assert "library_name: transformers" in front
    config = tomllib.loads(card.split("```toml\n")[1].split("```")[0])
    assert config["model"]["lora"] == {"rank": 4, "alpha": 12.0}
    assert "nox -s train -- x.toml" in card
    assert "| strict (the run’s metric) | 4 | 0.500 ± 0.289 | 1.000 ± 0.000 | +0.500 [-0.066, +1.066] |" in card
    assert "| arc_easy | acc (none) | 0.500 ± 0.196 |" in card
    assert "64 training and 32 held-out rows" in card
    assert "dequantized values of the 4-bit base" in card
    assert "adapter belongs to the quantized base" not in card  # it is merged
    assert Path("card/run.json").is_file()


def test_dry_run_uploads_nothing(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("the hub was asked"))
    assert export("hub", "card", repo="me/x", dry_run=True) == 0
    assert "nothing was uploaded" in capsys.readouterr().out


class Hub:
    """Stands for huggingface_hub.HfApi."""

    def __init__(self, error: Exception | None = None):
        self.error, self.calls = error, []

    def whoami(self) -> dict[str, str]:
        return {"name": "me"}

    def create_repo(self, repo: str, **options: Any) -> None:
        self.calls.append((repo, options))

    def upload_folder(self, **options: Any) -> str:
        if self.error:
            raise self.error
        files = {path.name for path in options["folder_path"].iterdir()}
        self.calls.append((options["repo_id"], files))
        return "done"


def test_hub_uploads_the_checked_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "t")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert export("hub", "up", repo="me/x", private=True) == 0
    assert api.calls[0] == ("me/x", {"private": True, "exist_ok": True})
    assert {"model.safetensors", "README.md", "tokenizer.json", "run.json"} <= api.calls[1][1]
    api.error = ConnectionError("cut\noff")
    with pytest.raises(RunFailed, match=r"me/x: not uploaded \(ConnectionError: cut off\); the files are in again"):
        export("hub", "again", repo="me/x")
    assert Path("again/model.safetensors").is_file()


def test_without_token_or_network_the_hub_is_refused_first(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        export("hub", "up", repo="me/x")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="no token of the hub here: run `hf auth login`"):
        export("hub", "up", repo="me/x")
    assert not Path("up").exists()
    assert hub.TRY


def test_bad_input_is_one_line_and_writes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(str(path) for path in root.rglob("*"))
    Path("there").mkdir()

    def error(*args: Any, name: str = NAME, out: str = "o", **more: Any) -> str:
        with pytest.raises(UserError) as caught:
            command.main(name, Asked(*args), Path(out), **more)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "tiny-adaptr: no such run in models/final; did you mean 'tiny-adapter'?" in error("mlx", name="tiny-adaptr")
    assert "there: is there already; remove it" in error("mlx", out="there")
    assert "--quantize 4 with --to gguf: valid: 8" in error("gguf", "float16", 4)
    assert "valid: none" in error("safetensors", "float16", 8)
    assert "--dtype bfloat16 with --to gguf" in error("gguf", "bfloat16")
    assert "--repo: missing, valid: USER/NAME" in error("hub")
    assert "are of --to hub" in error("mlx", repo="a/b")
    with monkeypatch.context() as patched:
        patched.setattr(command, "free_bytes", lambda path: 1000)
        assert "MB are needed and 0 MB are free" in error("mlx")
    shutil.move("models/base/tiny-q4g32", "gone")
    assert "its base models/base/tiny-q4g32 is gone" in error("mlx")
    shutil.move("gone", "models/base/tiny-q4g32")
    Path("there").rmdir()
    assert sorted(str(path) for path in root.rglob("*")) == before


def test_reward_models_and_unfinished_runs_are_refused(root: Path) -> None:
    folder = root / "models" / "final" / NAME
    run = json.loads((folder / "run.json").read_text())
    run["config"]["trainer"]["algorithm"] = "reward"
    (folder / "run.json").write_text(json.dumps(run))
    with pytest.raises(UserError, match="a reward model scores texts"):
        export("mlx")
    unfinished = root / "models" / "checkpoints" / "half"
    unfinished.mkdir(parents=True)
    (unfinished / "run.json").write_text("{}")
    with pytest.raises(UserError, match="half: that run is not finished"):
        finished.find(root, "half")


def test_a_disk_that_fills_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise RuntimeError("[save_safetensors] Unable to write 32 bytes to file.")  # as MLX says it

    monkeypatch.setattr(command, "compare", full)
    with pytest.raises(RunFailed, match="the disk filled while writing; nothing was kept"):
        export("mlx", "out/m")
    assert not list(Path("out").iterdir())
