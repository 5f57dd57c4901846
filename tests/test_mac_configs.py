"""configs/mac: each recipe checks, fits the memory in its name, and trains a tiny model of its architecture one step.

Nothing here says that a recipe works on a Mac: that has not been tried.
"""

import json
import re
from pathlib import Path

import pytest

from rl import config as configs
from rl.plan import architecture, machine, verdict

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "configs" / "mac"
RECIPES = sorted(FOLDER.glob("*.toml"))
NAMES = [path.stem for path in RECIPES]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
# as the hub's rows become ours: question -> prompt, what follows #### -> answer
ROWS = [
    {"prompt": f"Ann has {n} pens and buys {n + 1}. How many has she?", "answer": str(2 * n + 1)} for n in range(12)
]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512}


def memory_of(path: Path) -> str:
    found = re.fullmatch(r".*-(\d+)gb", path.stem)
    assert found
    return f"{found.group(1)}GB"


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_recipe_fits_the_memory_in_its_name(path: Path) -> None:
    config = configs.load(path)
    assert config.run.name == re.sub(r"-(\d+gb)$", r"-gsm8k-\1", path.stem)
    assert config.data.name == "openai/gsm8k:main"
    text = path.read_text()
    assert "nothing here was run on a Mac" in text.split("\n", 1)[0]
    command = re.search(r"^# nox -s plan -- (\S+) --chip (\S+) --memory (\S+)$", text, re.MULTILINE)
    assert command
    assert command.group(1) == f"configs/mac/{path.name}"
    assert command.group(3) == memory_of(path)
    plan = verdict.make(config, machine.named(command.group(2), memory_of(path)), ROOT)
    assert plan.fits
    # a recipe that would fit the next smaller Mac in every way is sized wrongly
    assert plan.needed > 0.3 * plan.machine.usable


def test_every_model_asked_for_has_a_recipe_and_a_place_in_the_readme() -> None:
    models = {re.sub(r"-\d+gb$", "", name) for name in NAMES}
    assert models == {
        *("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "llama-3.2-1b", "llama-3.2-3b"),
        *("smollm3-3b", "gemma-3-1b", "gemma-3-4b"),
    }
    told = (FOLDER / "README.md").read_text()
    cells = sum(line.count("LoRA") + line.count("all weights") for line in told.split("\n") if line.startswith("| "))
    assert cells == len(RECIPES)
    assert "None of these was run on a Mac" in told


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random model of each family, with a character tokenizer that has a chat template."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from rl.tiny import char_tokenizer

    characters = "\n" + "".join(chr(c) for c in range(32, 127))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=char_tokenizer(characters), pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE
    )
    made = {}
    for family in {architecture.find(configs.load(path), ROOT).family for path in RECIPES}:
        folder = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        sizes = SIZES | {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[family] = folder
    (tmp_path_factory.getbasetemp() / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return made


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_recipe_trains_a_tiny_model_of_its_architecture(
    path: Path, bases: dict[str, Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import torch

    from rl import data, models, rewards, start
    from rl.algorithms import base as algorithms
    from rl.algorithms import grpo, seam

    recipe = configs.load(path)
    family = architecture.find(recipe, ROOT).family
    # the recipe's own text, with the tables of model and data that need a network put in place
    text = re.sub(r'base = "[^"]+"', f'base = "{bases[family]}"', path.read_text())
    rows = tmp_path_factory.getbasetemp() / "rows.jsonl"
    text = text.replace('source = "hub"\nname = "openai/gsm8k:main"', f'source = "jsonl"\npath = "{rows}"')
    (tmp_path / path.name).write_text(text)
    config = configs.load(
        tmp_path / path.name,
        [
            *("run.device=cpu", "trainer.max_steps=1", "rollout.max_completion_length=4", "eval.size=4"),
            *("trainer.per_device_train_batch_size=2", "trainer.num_generations=2", "trainer.save_strategy=no"),
            "trainer.gradient_accumulation_steps=2",
        ],
    )
    device = torch.device("cpu")
    begin = start.find(config, tmp_path, None)
    policy = start.load_policy(config, begin, device)
    tokenizer = models.load_tokenizer(begin.base)
    stop_ids = seam.stop_ids(tokenizer, config.rollout.stop)
    job = algorithms.Job(
        config=config,
        folder=tmp_path / "run",
        device=device,
        model=policy,
        tokenizer=tokenizer,
        train=data.build(config).train,
        rewards=rewards.build(config.rewards),
        sampler=start.load_sampler(config, begin, policy, tokenizer, stop_ids),
        stop_ids=stop_ids,
        fresh_adapter=config.model.lora is not None,
    )
    logged: list[dict[str, float]] = []
    job.hooks.metrics = lambda step, values: logged.append(values)
    outcome = grpo.train(job)
    assert (outcome.steps, outcome.skipped, outcome.failure) == (1, 0, None)
    assert logged[0]["sampling/sampling_logp_difference/mean"] < 1e-3  # sampler and trainer are one policy
    assert job.tokens["completion"] > 0


def test_the_text_part_of_a_model_that_sees_is_taken_out_as_the_readme_says(tmp_path: Path) -> None:
    """Trap: `Gemma3ForCausalLM.from_pretrained` of such a folder finds no name and goes on with random weights."""
    import torch
    from transformers import AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedTokenizerFast

    from rl.models import Base, load_policy
    from rl.tiny import char_tokenizer

    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=char_tokenizer("01234"), pad_token="<pad>", eos_token="<eos>")
    text = SIZES | {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1}
    whole = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision)).eval()
    whole.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    told = re.search(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    assert told
    code = told.group(1).replace("google/gemma-3-4b-it", str(tmp_path / "whole"), 1)
    code = code.replace("models/base/gemma-3-4b-it-text", str(tmp_path / "text")).replace("bfloat16", "float32")
    exec(code, {})
    policy = load_policy(Base("text", tmp_path / "text", ""), torch.float32, "cpu")
    ids = torch.tensor([[2, 3, 4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(policy(input_ids=ids).logits, whole(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "text").get_vocab() == tokenizer.get_vocab()
