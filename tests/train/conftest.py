"""A run small enough to take a second, and the pieces that tests of one part need."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt.core.artifact import Artifact, open_artifact
from minigpt.core.config import from_mapping
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.train.config import TrainConfig
from minigpt.train.processes import Ranks

ConfigFactory = Callable[..., TrainConfig]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_config(tiny_dataset: Path) -> ConfigFactory:
    """Build a config of a tiny run; keyword arguments replace whole sections."""

    def make(**changes: Any) -> TrainConfig:
        tree: dict[str, Any] = {
            "name": "test",
            "data": str(tiny_dataset),
            "size": 2,
            "model": {"hidden_size": 32, "head_dim": 16},
            "steps": 12,
            "batch": {"sequence_length": 64, "tokens_per_step": 512, "micro_batch_size": 4},
            "validation": {"every": 4, "tokens": 2048, "sample_tokens": 4},
            "checkpoint": {"every": 4},
            "trackers": {"mlflow": False},
            "precision": "float32",
            "compile": False,
            "threads": 1,
        }
        return from_mapping(TrainConfig, tree | changes)

    return make


@pytest.fixture
def dataset(tiny_dataset: Path) -> Artifact:
    """The dataset of `make_config`, opened."""
    return open_artifact(tiny_dataset, kind="dataset")


@pytest.fixture
def small_decoder() -> Decoder:
    """A float64 decoder, for gradients that can be compared closely."""
    config = ModelConfig(
        vocab_size=257,
        num_layers=2,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=64,
        context_length=64,
        tie_embeddings=False,
    )
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(1))
    return model.double()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    """Two processes in a gloo group, started once for all tests."""
    with Ranks(2, timeout=120) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    """Four processes in a gloo group, started once for all tests."""
    with Ranks(4, timeout=120) as ranks:
        yield ranks


@pytest.fixture
def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
