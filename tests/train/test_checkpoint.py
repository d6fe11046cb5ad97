from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt.core.artifact import Artifact, create_artifact
from minigpt.core.errors import ArtifactError
from minigpt.train.checkpoint import CheckpointStore, TrainState, restore_rng


@pytest.fixture
def dataset(tmp_path: Path) -> Artifact:
    with create_artifact(tmp_path / "dataset", kind="dataset") as draft:
        (draft.path / "tokens").write_bytes(b"x")
    assert draft.artifact is not None
    return draft.artifact


def _save(store: CheckpointStore, dataset: Artifact, step: int, best: int | None = None) -> None:
    store.save(
        TrainState(step=step, cursor={"next_sample": step * 8}, best_step=best),
        model={"w": torch.full((4, 4), float(step))},
        optimizer={"w/exp_avg": torch.full((4, 4), step / 3), "w/step": torch.tensor(float(step))},
        parents=[dataset],
    )


def _flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_everything_comes_back(tmp_path: Path, dataset: Artifact) -> None:
    store = CheckpointStore(tmp_path / "c", keep=2)
    assert store.load_latest() is None
    _save(store, dataset, 3)
    found = store.load_latest()
    assert found is not None
    assert found.state == TrainState(step=3, cursor={"next_sample": 24})
    assert torch.equal(found.model["w"], torch.full((4, 4), 3.0))
    assert found.optimizer["w/step"].shape == ()
    assert found.artifact.manifest.parents == (dataset.as_parent(),)
    assert {path.suffix for path in found.artifact.path.iterdir()} == {".safetensors", ".json"}


def test_random_generators_go_on_where_they_were(tmp_path: Path, dataset: Artifact) -> None:
    store = CheckpointStore(tmp_path / "c", keep=2)
    np.random.standard_normal()  # leaves half of a pair of normals behind in the state
    _save(store, dataset, 1)

    def draw() -> tuple[object, ...]:
        return torch.rand(3).tolist(), np.random.standard_normal(3).tolist(), random.random()

    expected = draw()
    draw()
    found = store.load_latest()
    assert found is not None
    restore_rng(found)
    assert draw() == expected


def test_the_latest_and_the_best_are_kept(tmp_path: Path, dataset: Artifact) -> None:
    store = CheckpointStore(tmp_path / "c", keep=2)
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2)):
        _save(store, dataset, step, best)
    assert store.steps() == [2, 4, 5]
    _save(store, dataset, 6, best=6)
    assert store.steps() == [5, 6]
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "step-00000005",
        "step-00000006",
    ]


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json"])
def test_a_corrupt_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, dataset: Artifact, file: str, capfd: pytest.CaptureFixture[str]
) -> None:
    store = CheckpointStore(tmp_path / "c", keep=3)
    for step in (1, 2, 3):
        _save(store, dataset, step)
    _flip_byte(store.path(3) / file)
    (store.path(2) / "rng.safetensors").unlink()
    found = store.load_latest()
    assert found is not None and found.state.step == 1
    captured = capfd.readouterr()
    assert file in captured.out + captured.err
    assert "rng.safetensors" in captured.out + captured.err
    assert store.steps() == [1]
    _save(store, dataset, 3)  # the place is free again
    assert store.steps() == [1, 3]


def test_nothing_but_corrupt_checkpoints_is_an_error(tmp_path: Path, dataset: Artifact) -> None:
    store = CheckpointStore(tmp_path / "c", keep=2)
    _save(store, dataset, 1)
    _flip_byte(store.path(1) / "optimizer.safetensors")
    with pytest.raises(ArtifactError, match="every checkpoint"):
        store.load_latest()


def test_what_a_killed_save_left_is_removed(tmp_path: Path, dataset: Artifact) -> None:
    directory = tmp_path / "c"
    (directory / ".step-00000007.99999.tmp").mkdir(parents=True)
    (directory / ".step-00000007.99999.tmp" / "model.safetensors").write_bytes(b"half")
    store = CheckpointStore(directory, keep=2)
    assert list(directory.iterdir()) == []
    _save(store, dataset, 7)
    assert store.steps() == [7]
