from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minigpt.core.artifact import Artifact, create_artifact, open_artifact
from minigpt.core.errors import ArtifactError, ModelError, StorageError
from minigpt.core.manifest import MANIFEST
from minigpt.train import checkpoint_storage
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


def _contents(dataset: Artifact, width: int = 64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width, width, generator=generator)
    return {"model": {"w": weight}, "optimizer": {"w/exp_avg": weight / 3}, "parents": [dataset]}


class Gate:
    """Holds back the writing of files until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        real = checkpoint_storage.write_safetensors

        def gated(*arguments: Any) -> Any:
            assert self.opened.wait(60)
            return real(*arguments)

        monkeypatch.setattr(checkpoint_storage, "write_safetensors", gated)


def test_a_save_in_the_background_has_the_values_of_its_step(
    tmp_path: Path, dataset: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    store = CheckpointStore(tmp_path / "c", keep=2)
    contents = _contents(dataset)
    expected = {n: t.clone() for n, t in (contents["model"] | contents["optimizer"]).items()}
    state = TrainState(step=1, cursor={"next_sample": 8})
    torch.manual_seed(3)
    pending = store.save_async(state, **contents)
    assert not pending.done and store.steps() == []
    state.step, state.cursor["next_sample"] = 2, 9
    contents["model"]["w"].zero_()
    contents["optimizer"]["w/exp_avg"].add_(1)
    drawn = torch.rand(3)
    gate.opened.set()
    assert pending.result().manifest.config["step"] == 1
    assert pending.done and pending.step == 1 and store.steps() == [1]
    assert store.save_seconds[0] > 0 and 0 < pending.stall_seconds < 60
    found = store.load_latest()
    assert found is not None and found.state.cursor == {"next_sample": 8}
    assert torch.equal(found.model["w"], expected["w"])
    assert torch.equal(found.optimizer["w/exp_avg"], expected["w/exp_avg"])
    restore_rng(found)
    assert torch.equal(torch.rand(3), drawn)


def test_one_save_at_a_time_and_a_failed_one_harms_no_other(
    tmp_path: Path, dataset: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    store = CheckpointStore(tmp_path / "c", keep=9)
    first = store.save_async(TrainState(step=1), **_contents(dataset))
    threading.Timer(0.3, gate.opened.set).start()
    second = store.save_async(TrainState(step=2), **_contents(dataset))
    assert first.done and second.stall_seconds > 0.2
    store.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        failed = store.save_async(TrainState(step=3), **_contents(dataset))
        with pytest.raises(StorageError, match="size limit"):
            store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.save_async(TrainState(step=4), **_contents(dataset)).result() is not None
    with pytest.raises(StorageError):
        failed.result()
    assert store.steps() == [1, 2, 4]
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        store.path(step).name for step in (1, 2, 4)
    ]
    store.close()


PROGRAM = """
import sys, torch
from minigpt.train.checkpoint import CheckpointStore, TrainState
store = CheckpointStore(sys.argv[1], keep=2)
weights = {"w": torch.randn(1000, 2000)}
store.save_async(TrainState(step=1), model=weights, optimizer={}, parents=[])
weights["w"].zero_()
print("begun", store.steps())
"""


def test_the_end_of_the_process_waits_for_the_save(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("begun")
    assert done.stderr == ""
    found = CheckpointStore(tmp_path, keep=2).load_latest()
    assert found is not None and 0.9 < float(found.model["w"].std()) < 1.1


def test_every_so_manieth_is_kept_for_good(tmp_path: Path, dataset: Artifact) -> None:
    store = CheckpointStore(tmp_path, keep=1, keep_every=4)
    for step in range(1, 11):
        _save(store, dataset, step, best=2)
    assert store.steps() == [2, 4, 8, 10]


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path, dataset: Artifact) -> None:
    (tmp_path / "file").write_text("")
    store = CheckpointStore(tmp_path / "file" / "c", keep=2)
    with pytest.raises(StorageError, match="can't write"):
        _save(store, dataset, 1)
    pending = store.save_async(TrainState(step=2), **_contents(dataset))
    with pytest.raises(StorageError, match="can't write"):
        pending.result()
    assert store.save_seconds == []


def test_what_there_is_is_never_overwritten(tmp_path: Path, dataset: Artifact) -> None:
    store = CheckpointStore(tmp_path / "c", keep=2)
    _save(store, dataset, 1)
    before = open_artifact(store.path(1)).id
    with pytest.raises(ArtifactError, match="exists"):
        _save(store, dataset, 1)
    assert open_artifact(store.path(1)).id == before


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"w": (4, 5)}, r"w has shape \(4, 5\) here.*has shape \(4, 4\)"),
        ({"w": (4, 4), "v": (2,)}, "has no such tensor"),
        ({}, "has model/w, but the model here has no such tensor"),
    ],
)
def test_another_model_is_refused_and_the_checkpoint_stays(
    tmp_path: Path, dataset: Artifact, layout: dict[str, tuple[int, ...]], message: str
) -> None:
    store = CheckpointStore(tmp_path / "c", keep=2)
    _save(store, dataset, 1)
    with pytest.raises(ModelError, match=message):
        store.load_latest({name: torch.empty(shape) for name, shape in layout.items()})
    assert store.steps() == [1]


def test_values_that_are_not_those_saved_are_refused(
    tmp_path: Path, dataset: Artifact, capfd: pytest.CaptureFixture[str]
) -> None:
    """The files are what the manifest says, and yet a tensor is not: swapped before the hash."""
    store = CheckpointStore(tmp_path / "c", keep=3)
    _save(store, dataset, 1)
    _save(store, dataset, 2)
    path = store.path(2) / MANIFEST
    manifest = open_artifact(store.path(2)).manifest
    other = open_artifact(store.path(1)).manifest.tensors["model/w"]
    forged = manifest.model_copy(update={"tensors": manifest.tensors | {"model/w": other}})
    path.write_bytes(forged.model_copy(update={"id": forged.computed_id()}).to_json())
    found = store.load_latest()
    assert found is not None and found.state.step == 1
    captured = capfd.readouterr()
    assert "model/w was loaded with other values" in captured.out + captured.err


def test_the_files_are_plain_safetensors_and_json(tmp_path: Path, dataset: Artifact) -> None:
    files = {"config.json": b"{}", "tokenizer.json": b"{}"}
    store = CheckpointStore(tmp_path / "c", keep=3, model_files=files)
    contents = _contents(dataset)
    contents["model"] |= {
        "half": torch.randn(3).bfloat16(),
        "flag": torch.tensor([True, False, True]),
        "count": torch.tensor(7),
        "none": torch.empty(0, 3),
    }
    artifact = store.save(TrainState(step=1), **contents)
    found = {str(p.relative_to(artifact.path)) for p in artifact.path.rglob("*") if p.is_file()}
    assert found == {
        *("model.safetensors", "optimizer.safetensors", "rng.safetensors"),
        *("index.json", "state.json", "manifest.json"),
        *("model/config.json", "model/tokenizer.json"),
    }
    plain = load_file(artifact.path / "model.safetensors")
    loaded = store.load_latest()
    assert loaded is not None
    for name, tensor in contents["model"].items():
        assert torch.equal(plain[name], tensor) and plain[name].dtype == tensor.dtype
        assert torch.equal(loaded.model[name], tensor)
        assert loaded.model[name].data_ptr() % 16 == 0 or tensor.numel() == 0
    assert json.loads((artifact.path / "state.json").read_text())["state"]["step"] == 1


def test_a_tensor_that_safetensors_does_not_know_is_an_error(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    with pytest.raises(StorageError, match="complex128"):
        model = {"w": torch.zeros(2, dtype=torch.complex128)}
        store.save(TrainState(step=1), model=model, optimizer={}, parents=[])
    assert list(tmp_path.iterdir()) == []
