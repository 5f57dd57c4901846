"""What several test files share: no network, configs made in memory, and models converted once per session."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: a test that reaches for the hub must fail

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rl import config, models

SMALL = config.TinyModel(hidden=32, layers=2, heads=4, intermediate=64)


def _make_config(base: str, root: Path = Path(), seed: int = 0, **model: Any) -> config.Config:
    return config.Config(
        path=root / "config.toml",
        run=config.Run(name="test", seed=seed),
        model=config.Model(base=base, **model),
        data=config.Data(source="arithmetic", train_size=8),
        trainer=config.Trainer(algorithm="sft"),
    )


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch on one thread: products of tiny models end sooner than threads meet, on a busy machine ten times so."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_config() -> Callable[..., config.Config]:
    """`make_config(base, seed=0, **model)`: a config whose `[model]` table is given, the rest as small as can be."""
    return _make_config


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> models.Base:
    """The packaged SmolLM2-135M-Instruct, converted once for the whole session; do not change its files."""
    return models.resolve_base(_make_config(models.PACKAGED), tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> models.Base:
    """A random character-level Llama of 2 layers and width 32; do not change its files (see `tiny_copy`)."""
    return models.resolve_base(_make_config("tiny", tiny=SMALL), tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny_copy(tiny_base: models.Base, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder, free to be damaged."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in tiny_base.path.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder
