"""Datasets of one tokenizer that can be mixed, and one of another that can't."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from minigpt.core.config import from_mapping
from minigpt.data.config import DataConfig
from minigpt.data.prepare import prepare
from minigpt.data.shards import TokenDataset

MakeDataset = Callable[..., Path]


@pytest.fixture(scope="session")
def make_dataset(tmp_path_factory: pytest.TempPathFactory) -> MakeDataset:
    """Prepare a dataset of random words in bytes; `lengths` are the documents' characters."""

    def make(lengths: list[int], *, seed: int = 0, **changes: object) -> Path:
        directory = tmp_path_factory.mktemp("made")
        rng = random.Random(seed)
        (directory / "text").mkdir()
        for number, length in enumerate(lengths):
            words = "".join(f"{rng.getrandbits(20):05x} " for _ in range(length // 6 + 1))
            (directory / "text" / f"{number:04}.txt").write_text(words[:length])
        tree = {
            "source": {"paths": [str(directory / "text")]},
            "tokenizer": {"kind": "bytes"},
            "clean": {"min_characters": 1, "near_duplicates": None, "max_compression": 1000},
            "val_fraction": 0,
        }
        return prepare(from_mapping(DataConfig, tree | changes), directory / "dataset").path

    return make


@pytest.fixture(scope="session")
def three_datasets(make_dataset: MakeDataset) -> dict[str, TokenDataset]:
    """Three training splits of very different sizes."""
    lengths = {"web": [200, 90, 333] * 12, "code": [700, 64] * 5, "wiki": [150] * 4}
    return {
        name: TokenDataset.open(make_dataset(sizes, seed=len(sizes)), "train")
        for name, sizes in lengths.items()
    }
