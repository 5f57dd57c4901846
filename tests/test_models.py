"""Base models: local folders, hub ids, loading and LoRA. See also test_convert.py and test_tiny.py."""

import hashlib
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rl import config, hf_folder, models
from rl.errors import UserError


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# --- conversions are kept, checked, and written whole


def test_a_made_folder_is_reused_and_made_again_when_damaged(make_config, tmp_path):
    wanted = make_config("tiny", tiny=config.TinyModel(hidden=8, layers=1, heads=1, intermediate=8))
    first = models.resolve_base(wanted, tmp_path)
    weights = first.path / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert models.resolve_base(wanted, tmp_path) == first
    assert weights.stat().st_mtime_ns == written
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert models.resolve_base(wanted, tmp_path).sha256 == first.sha256
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == first.sha256
    assert [path.name for path in first.path.parent.iterdir()] == [first.path.name]


def test_of_two_conversions_at_once_the_first_is_kept(tmp_path):
    folder, source = tmp_path / "base", {"file": "x"}

    def write(target: Path, value: float) -> None:
        target.mkdir()
        save_file({"w": torch.tensor([value])}, target / "model.safetensors")

    def second(target: Path) -> None:
        if not folder.exists():  # another process finishes while this one converts
            temporary = target.with_name("other")
            write(temporary, 1.0)
            sha = hf_folder.weights_sha256([temporary / "model.safetensors"])
            record = {"made_from": {"recipe": models.RECIPE, **source}, "weights_sha256": sha}
            (temporary / "base.json").write_text(json.dumps(record))
            temporary.rename(folder)
        write(target, 2.0)

    sha = models._made_once(folder, source, second)
    assert load_file(folder / "model.safetensors")["w"].item() == 1.0
    assert sha == hf_folder.weights_sha256([folder / "model.safetensors"])
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    def write(target: Path) -> None:
        target.mkdir()
        (target / "part").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="disk is full") as error:
        models._made_once(tmp_path / "base", {}, write)
    assert str(tmp_path / "base") in one_line(error)
    assert not list(tmp_path.iterdir())


# --- local folders


def test_a_local_folder_is_taken_as_it_is(make_config, tiny_base, tiny_copy, tmp_path):
    base = models.resolve_base(make_config("copy"), tmp_path)
    assert base == models.Base("copy", tmp_path / "copy", tiny_base.sha256)
    assert models.resolve_base(make_config(str(tiny_copy)), Path("elsewhere")).sha256 == tiny_base.sha256


@pytest.mark.parametrize("lost", [1, 1000])
def test_truncated_weights_name_the_file_and_both_sizes(make_config, tiny_copy, tmp_path, lost):
    weights = tiny_copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-lost])
    with pytest.raises(UserError) as error:
        models.resolve_base(make_config("copy"), tmp_path)
    assert f"{weights}: truncated: expected {len(whole)} bytes, found {len(whole) - lost}" in one_line(error)


@given(st.data())
def test_any_cut_of_a_safetensors_file_is_found(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    path = folder / "w.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}, path)
    hf_folder.check_safetensors(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(UserError, match="truncated"):
        hf_folder.check_safetensors(path)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda raw: raw + b"\0", "too long"),
        (lambda raw: b"\xff" * 8 + raw[8:], "announce"),
        (lambda raw: raw[:8] + b"[" + raw[9:], "corrupt safetensors header"),
        (lambda raw: raw.replace(b'"F32"', b'"F16"', 1), "corrupt safetensors header: tensor"),
        (lambda raw: b"<html>not found</html>" * 9, "announce"),
    ],
)
def test_corrupt_weights_are_found(tiny_copy, change, found):
    weights = tiny_copy / "model.safetensors"
    weights.write_bytes(change(weights.read_bytes()))
    with pytest.raises(UserError, match=found) as error:
        hf_folder.check_safetensors(weights)
    assert str(weights) in one_line(error)


def sharded(folder: Path) -> dict[str, Path]:
    """Split a folder's weights into two files with an index, as the hub's larger models come."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, placed = sorted(tensors), {}
    for part, chosen in (("b", names[::2]), ("a", names[1::2])):
        save_file({name: tensors[name] for name in chosen}, folder / f"{part}.safetensors", metadata={"format": "pt"})
        placed |= dict.fromkeys(chosen, f"{part}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return {part: folder / f"{part}.safetensors" for part in "ab"}


def test_several_weight_files_have_one_hash_over_names_and_digests(make_config, tiny_copy, tiny_base, tmp_path):
    parts = sharded(tiny_copy)
    base = models.resolve_base(make_config("copy"), tmp_path)
    a, b = (hashlib.sha256(parts[part].read_bytes()).hexdigest() for part in "ab")
    text = f'{{"a.safetensors":"{a}","b.safetensors":"{b}"}}'
    assert base.sha256 == hashlib.sha256(text.encode()).hexdigest()
    whole, split = (models.load_policy(each, "float32", "cpu").state_dict() for each in (tiny_base, base))
    assert all(torch.equal(whole[name], split[name]) for name in whole)


def damage(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif how == "no weights":
        weights.unlink()
    elif how == "shard":
        sharded(folder)["a"].unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "bad config":
        (folder / "config.json").write_text("{")
    elif how == "no kind":
        (folder / "config.json").write_text("{}")
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif how == "adapter":
        (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("how", "found"),
    [
        ("pickle", "only pickled weights there (pytorch_model.bin)"),
        ("no weights", "no weights in"),
        ("shard", "1 of the 2 weight files that model.safetensors.index.json lists are missing, a.safetensors first"),
        ("no config", "no config.json in"),
        ("bad config", "config.json: not a JSON object"),
        ("no kind", "config.json: no model_type"),
        ("no tokenizer", "no tokenizer in"),
        ("adapter", "holds a LoRA adapter, not a model: to build on a run, name its config in [model] from"),
    ],
)
def test_incomplete_folders_say_what_is_missing(make_config, tiny_copy, tmp_path, how, found):
    damage(tiny_copy, how)
    with pytest.raises(UserError) as error:
        models.resolve_base(make_config("copy"), tmp_path)
    assert found in one_line(error)


def test_a_tokenizer_without_eos_says_what_to_set(tiny_copy):
    path = tiny_copy / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["eos_token"]
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match='set "eos_token"') as error:
        models.load_tokenizer(models.Base("copy", tiny_copy, ""))
    assert str(path) in one_line(error)


def test_a_tokenizer_without_pad_pads_with_eos(tiny_copy):
    path = tiny_copy / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["pad_token"]
    path.write_text(json.dumps(settings))
    assert models.load_tokenizer(models.Base("copy", tiny_copy, "")).pad_token_id == 1


def test_a_broken_tokenizer_file_is_one_line(tiny_copy):
    (tiny_copy / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match="tokenizer cannot be read") as error:
        models.load_tokenizer(models.Base("copy", tiny_copy, ""))
    one_line(error)


def test_chat_needs_a_template(tiny_base):
    tokenizer = models.load_tokenizer(tiny_base)
    with pytest.raises(UserError, match="no chat template: set form = 'plain'") as error:
        models.require_chat_template(tokenizer, "c.toml")
    assert one_line(error).startswith("c.toml: [data] form = 'chat'")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    models.require_chat_template(tokenizer, "c.toml")


def test_a_missing_tensor_is_refused_not_drawn_at_random(tiny_copy):
    """transformers fills what the files lack with random numbers, and only warns."""
    weights = tiny_copy / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=re.escape("1 weights of LlamaForCausalLM are not in its files")) as error:
        models.load_policy(models.Base("copy", tiny_copy, ""), "float32", "cpu")
    assert "model.layers.1.mlp.up_proj.weight" in one_line(error)


@pytest.mark.parametrize(("dtype", "value"), [("float32", math.nan), ("float16", 1e6)])
def test_a_weight_that_is_not_finite_is_named(tiny_copy, dtype, value):
    weights = tiny_copy / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] = value
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"weight model\.norm\.weight holds values that are not finite"):
        models.load_policy(models.Base("copy", tiny_copy, ""), dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, "bfloat16"])
def test_policy_has_the_dtype_sdpa_and_the_files_values(tiny_base, dtype):
    model = models.load_policy(tiny_base, dtype, torch.device("cpu"))
    wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    assert model.config._attn_implementation == "sdpa"
    assert not model.training
    stored = load_file(tiny_base.path / "model.safetensors")
    assert len(stored) == len(dict(model.named_parameters())) == 20
    for name, weight in model.named_parameters():
        assert torch.equal(weight, stored[name].to(wanted))


# --- names of bases and the hub


def test_an_unknown_base_lists_what_is_valid(make_config, tmp_path):
    with pytest.raises(UserError) as error:
        models.resolve_base(make_config("smollm"), tmp_path)
    assert "'smollm2-135m-instruct', 'tiny', a model folder, a .gguf file, or a hub id 'org/name'" in one_line(error)
    with pytest.raises(UserError, match="no such file"):
        models.resolve_base(make_config("absent.gguf"), tmp_path)


def test_a_hub_id_without_network_fails_at_once_and_says_how_to_get_it(make_config, tmp_path):
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        models.resolve_base(make_config("some-org/some-model"), tmp_path)
    assert time.monotonic() - started < 5
    text = one_line(error)
    assert "[model] base = 'some-org/some-model'" in text
    assert "config.json, *.safetensors and the tokenizer files" in text
    assert "`hf download some-org/some-model --local-dir models/base/some-model`" in text
    assert "base = 'models/base/some-model'" in text


def test_a_silent_network_is_given_up_after_seconds(make_config, tmp_path, monkeypatch):
    """The hub client's download has no limit of its own on the first answer: ours must be passed."""
    from huggingface_hub import HfApi

    limits = []

    def model_info(self: HfApi, repo_id: str, *, timeout: float | None = None) -> None:
        limits.append(timeout)
        raise TimeoutError("no answer")

    monkeypatch.setattr(HfApi, "model_info", model_info)
    with pytest.raises(UserError, match="TimeoutError: no answer"):
        models.resolve_base(make_config("some-org/some-model"), tmp_path)
    assert limits == [5.0]


def test_a_cached_hub_model_needs_no_network(make_config, tiny_base, tmp_path, monkeypatch):
    cache = tmp_path / "hub" / "models--some-org--some-model"
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    for path in tiny_base.path.iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    base = models.resolve_base(make_config("some-org/some-model"), tmp_path)
    assert base == models.Base("some-org/some-model", snapshot, tiny_base.sha256)
    (snapshot / "model.safetensors").unlink()  # half a download is not a model
    with pytest.raises(UserError, match="hf download"):
        models.resolve_base(make_config("some-org/some-model"), tmp_path)


# --- LoRA


def test_lora_starts_at_the_base_and_adds_alpha_over_rank(tiny_base):
    ids = torch.tensor([[3, 4, 12, 5, 15]])
    lora = config.Lora(rank=4, alpha=6.0, targets=("q_proj",))
    before = models.load_policy(tiny_base, "float32", "cpu")(ids).logits
    model = models.add_lora(models.load_policy(tiny_base, "float32", "cpu"), lora)
    assert torch.equal(model(ids).logits, before)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (a.shape, b.shape) == ((4, 32), (32, 4))
    assert a.abs().sum() > 0
    with torch.no_grad():
        b.copy_(torch.randn(32, 4))
    x = torch.randn(7, 32)
    expected = x @ (layer.base_layer.weight + 6.0 / 4 * b @ a).T
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_lora_adapts_the_top_layers_and_only_these_train(tiny_base):
    lora = config.Lora(rank=2, layers=1)
    model = models.add_lora(models.load_policy(tiny_base, "float32", "cpu"), lora)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert all(".layers.1." in name and "lora_" in name for name in trained)
    # rank × (inputs + outputs) of q, k, v, o and of gate, up, down
    assert sum(trained.values()) == 2 * (4 * (32 + 32) + 3 * (32 + 64))
    assert model.peft_config["default"].layers_to_transform == [1]


def test_lora_is_repeatable_under_the_seed_and_float32_over_a_half_base(tiny_base):
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = models.add_lora(models.load_policy(tiny_base, "bfloat16", "cpu"), config.Lora())
        drawn.append({name: p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name})
    assert len(drawn[0]) == 14
    assert all(p.dtype == torch.float32 for p in drawn[0].values())
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert not any(torch.equal(drawn[0][name], drawn[2][name]) for name in drawn[0])


def test_lora_dropout_acts_in_training_only(tiny_base):
    model = models.add_lora(models.load_policy(tiny_base, "float32", "cpu"), config.Lora(dropout=0.5))
    dropped = model.base_model.model.model.layers[0].mlp.up_proj.lora_dropout["default"]
    assert dropped.p == 0.5


@pytest.mark.parametrize(
    ("lora", "found"),
    [
        (
            config.Lora(targets=("q_proj", "gate_prj")),
            "targets: gate_prj is not a linear module of LlamaForCausalLM, which has "
            "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        ),
        (config.Lora(targets=()), "targets: none is not"),
        (config.Lora(layers=3), "layers = 3: the model has 2"),
    ],
)
def test_lora_on_modules_that_are_not_there_is_refused(tiny_base, lora, found):
    """PEFT passes over a target that matches nothing when another one matches."""
    with pytest.raises(UserError) as error:
        models.add_lora(models.load_policy(tiny_base, "float32", "cpu"), lora)
    assert found in one_line(error)


def test_importing_the_modules_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'mlx', 'trl', 'peft', 'gguf', 'huggingface_hub', 'numpy'}"
    code = "import sys, rl.models, rl.device, rl.tiny, rl.convert, rl.hf_folder; "
    code += f"print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["./absent", "-a/b", "a/b.", "a/b--c", "a/..b", "a/b/c", "a"])
def test_what_can_be_no_hub_id_is_never_asked_of_the_hub(make_config, tmp_path, name):
    """Trap: the hub's client raises its own error for such a name, which reached the user as a traceback."""
    with pytest.raises(UserError, match=r"no folder of that name; valid are 'smollm2-135m-instruct', 'tiny', a model"):
        models.resolve_base(make_config(name), tmp_path)
    assert models.HUB_ID.fullmatch("HuggingFaceTB/SmolLM2-135M.v2_1")
