"""Weights alone, out of any checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.rank_processes import launch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from minigpt.cli.main import run
from minigpt.core.artifact import open_artifact
from minigpt.core.errors import ArtifactError
from minigpt.model.weights import load_model
from minigpt.train.checkpoint import CheckpointStore, TrainState
from minigpt.train.config import TrainConfig
from minigpt.train.export_weights import export_weights, model_files
from minigpt.train.run import train


def test_a_runs_checkpoint_gives_the_model_of_its_step(
    make_config: Callable[..., TrainConfig],
    tiny_dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained = train(make_config(steps=4), open_artifact(tiny_dataset), tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    assert (
        run(["artifact", "export-weights", str(checkpoint), str(tmp_path / "out"), "--json"]) == 0
    )
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["model"] == str(tmp_path / "out")
    exported = open_artifact(tmp_path / "out", kind="model")
    assert exported.manifest.parents[0].uri == str(checkpoint)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert exported.manifest.files[name] == trained.manifest.files[name]


def _save_sharded(rank: int, world: int, directory: str, source: str) -> None:
    loaded = load_model(source)
    mesh = init_device_mesh("cpu", (world,))
    model = {
        name: distribute_tensor(tensor, mesh, [Shard(tensor.ndim - 1)])
        for name, tensor in loaded.model.state_dict().items()
    }
    files = model_files(loaded.config, Path(source))
    store = CheckpointStore(directory, keep=1, model_files=files)
    store.save(TrainState(step=1), model=model, optimizer={}, parents=[])


def test_a_sharded_checkpoint_gives_the_whole_model(tiny_model: Path, tmp_path: Path) -> None:
    launch(_save_sharded, 2, directory=str(tmp_path / "c"), source=str(tiny_model))
    exported = export_weights(tmp_path / "c" / "step-00000001", tmp_path / "out")
    expected, found = load_model(tiny_model).model, load_model(exported.path).model
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    weights: dict[str, Any] = {"model": {"w": torch.ones(2)}, "optimizer": {}, "parents": []}
    CheckpointStore(tmp_path / "c", keep=1).save(TrainState(step=1), **weights)
    with pytest.raises(ArtifactError, match="not known what model"):
        export_weights(tmp_path / "c" / "step-00000001", tmp_path / "out")
    with pytest.raises(ArtifactError, match="no artifact at"):
        export_weights(tmp_path / "c" / "step-00000002", tmp_path / "out")
    assert not (tmp_path / "out").exists()
