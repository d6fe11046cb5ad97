"""Checkpoints of several ranks, in real processes: lossless from any layout to any other."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tests.train.rank_processes import launch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from minigpt.core.artifact import open_artifact
from minigpt.core.errors import StorageError
from minigpt.model.attention import CausalAttention
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.train import checkpoint_location, checkpoint_storage
from minigpt.train.checkpoint import CheckpointStore, TrainState, restore_rng
from minigpt.train.checkpoint_location import LocalLocation
from minigpt.train.config import OptimizerConfig
from minigpt.train.optimizer import Optimizer

MESHES: dict[str, Callable[[int], tuple[int, ...]]] = {
    "fsdp": lambda world: (world,),
    "tp": lambda world: (world,),
    "hsdp": lambda world: (world // 2, 2),
    "fsdp+tp": lambda world: (world // 2, 2),
}


def _reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and optimizer state of odd shapes, that no number of ranks divides."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    model = {
        "embed.weight": random(67, 12),
        "layers.0.up.weight": random(12, 21, dtype=torch.bfloat16),
        "layers.1.down.weight": random(21, 12, dtype=torch.float64),
        "norm.weight": random(3),
        "scale": random(),
    }
    optimizer = {}
    for name, tensor in model.items():
        optimizer[f"{name}/exp_avg"] = random(*tensor.shape)
        optimizer[f"{name}/step"] = torch.tensor(7.0)
    return model, optimizer


def _lay_out(kind: str, state: Mapping[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """Shard a state, of which every rank has the whole."""
    if kind == "replicated":
        return {name: tensor.clone() for name, tensor in state.items()}
    if kind == "pp":
        stages = sorted({name.partition("/")[0] for name in state})
        mine = set(stages[rank::world])
        return {name: t.clone() for name, t in state.items() if name.partition("/")[0] in mine}
    mesh = init_device_mesh("cpu", MESHES[kind](world))

    def placements(tensor: Tensor) -> list[Any]:
        columns = Shard(1) if tensor.ndim > 1 else Replicate()
        found: dict[str, list[Any]] = {
            "fsdp": [Shard(0)],
            "tp": [columns],
            "hsdp": [Replicate(), Shard(0)],
            "fsdp+tp": [Shard(0), columns],
        }
        return found[kind]

    return {
        # A plain scalar beside sharded tensors is what torch's optimizers have for their step.
        name: distribute_tensor(t, mesh, placements(t), src_data_rank=None) if t.ndim else t.clone()
        for name, t in state.items()
    }


def _hop(rank: int, world: int, directory: str, kinds: list[str], background: bool) -> None:
    """Load the newest checkpoint in each layout in turn and save it as the next step."""
    store = CheckpointStore(directory, keep=99)
    for kind in kinds:
        model, optimizer = (
            {name: torch.zeros_like(t) for name, t in part.items()} for part in _reference()
        )
        layout = _lay_out(kind, model, rank, world)
        found = store.load_latest(layout)
        assert found is not None
        assert {n: type(t) for n, t in found.model.items()} == {
            n: type(t) for n, t in layout.items()
        }
        assert found.optimizer.keys() == _lay_out(kind, optimizer, rank, world).keys()
        state = TrainState(step=found.state.step + 1)
        contents: Any = {"model": found.model, "optimizer": found.optimizer, "parents": []}
        if background:
            pending = store.save_async(state, **contents)
            for tensor in (*found.model.values(), *found.optimizer.values()):
                tensor.zero_()
            pending.result()
        else:
            store.save(state, **contents)
    store.close()


@pytest.mark.parametrize("background", [True, False])
def test_from_1_to_2_to_4_to_1_ranks_in_any_layout_nothing_is_lost(
    tmp_path: Path, background: bool
) -> None:
    model, optimizer = _reference()
    store = CheckpointStore(tmp_path / "c", keep=99)
    store.save(TrainState(step=1), model=model, optimizer=optimizer, parents=[])
    arguments = {"directory": str(tmp_path / "c"), "background": background}
    launch(_hop, 2, kinds=["fsdp", "tp", "replicated", "pp"], **arguments)
    launch(_hop, 4, kinds=["fsdp", "fsdp+tp", "hsdp", "tp", "pp", "replicated"], **arguments)
    launch(_hop, 2, kinds=["fsdp"], **arguments)
    steps = store.steps()
    assert steps == list(range(1, 13))
    hashes = []
    for step in steps:
        tensors = open_artifact(store.path(step), kind="checkpoint").manifest.tensors
        hashes.append({n: t.fingerprint for n, t in tensors.items() if not n.startswith("rng/")})
    assert all(found == hashes[0] for found in hashes)
    assert len(set(hashes[0].values())) == 2 * len(model) + 1  # the steps are alike
    found = store.load_latest()
    assert found is not None and found.state.step == 12
    for expected, got in ((model, found.model), (optimizer, found.optimizer)):
        assert expected.keys() == got.keys()
        for name, tensor in expected.items():
            assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


def test_a_replicated_state_is_written_once_and_shared_out(tmp_path: Path) -> None:
    model, optimizer = _reference()
    store = CheckpointStore(tmp_path, keep=99)
    store.save(TrainState(step=1), model=model, optimizer=optimizer, parents=[])
    launch(_hop, 2, directory=str(tmp_path), kinds=["replicated"], background=False)
    sizes = {p.name: p.stat().st_size for p in store.path(2).glob("model-*.safetensors")}
    assert set(sizes) == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    content = sum(t.nbytes for t in model.values())
    assert content <= sum(sizes.values()) < content + 2000
    for path in store.path(2).rglob("*"):
        assert path.suffix in {".safetensors", ".json"}


def _train_fsdp(rank: int, world: int, directory: str, truth: str) -> None:
    config = ModelConfig(
        vocab_size=61,
        num_layers=2,
        hidden_size=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        intermediate_size=40,
        context_length=16,
    )
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(1))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = Optimizer(model, OptimizerConfig(kind="adamw", lr=0.01, muon_lr=0.01))
    store = CheckpointStore(directory, keep=9)

    def step(seed: int) -> None:
        tokens = torch.randint(61, (2, 8), generator=torch.Generator().manual_seed(seed + rank))
        positions = torch.arange(8).expand(2, 8)
        model(tokens, positions, CausalAttention()).square().mean().backward()
        optimizer.step(1.0)
        optimizer.zero_grad()

    def whole() -> dict[str, Tensor]:
        tensors = {**model.state_dict(), **optimizer.state_dict()}
        return {
            n: t.full_tensor() if isinstance(t, DTensor) else t.clone() for n, t in tensors.items()
        }

    def save(number: int) -> None:
        pending = store.save_async(
            TrainState(step=number),
            model=model.state_dict(),
            optimizer=optimizer.state_dict(),
            parents=[],
        )
        step(100)  # while it is being written
        pending.result()

    step(0)
    expected = whole()
    save(1)
    found = store.load_latest(model.state_dict())
    assert found is not None
    model.load_state_dict(found.model)
    optimizer.load_state_dict(found.optimizer)
    for name, tensor in whole().items():
        assert torch.equal(tensor, expected[name]), name
    step(1)
    if rank == 0:
        save_file({n: t.contiguous() for n, t in expected.items()}, truth)
    store.close()


def test_a_model_under_fsdp_comes_back_sharded_and_whole(tmp_path: Path) -> None:
    truth = tmp_path / "truth.safetensors"
    launch(_train_fsdp, 2, directory=str(tmp_path / "c"), truth=str(truth))
    found = CheckpointStore(tmp_path / "c", keep=9).load_latest()
    assert found is not None
    expected = load_file(truth)
    assert expected.keys() == {**found.model, **found.optimizer}.keys()
    for name, tensor in {**found.model, **found.optimizer}.items():
        assert torch.equal(tensor, expected[name]), name


def _draw(rank: int, world: int, directory: str, seed: int | None) -> list[float]:
    store = CheckpointStore(directory, keep=9)
    if seed is not None:
        torch.manual_seed(seed + rank)
        store.save(TrainState(step=1), model={}, optimizer={}, parents=[])
        return torch.rand(2).tolist()
    found = store.load_latest()
    assert found is not None
    restore_rng(found)
    return torch.rand(2).tolist()


def test_each_rank_has_its_own_generators_back(tmp_path: Path) -> None:
    first = launch(_draw, 2, directory=str(tmp_path), seed=3)
    assert first[0] != first[1]
    assert launch(_draw, 2, directory=str(tmp_path), seed=None) == first
    assert launch(_draw, 3, directory=str(tmp_path), seed=None) == [*first, first[0]]


def _load_damaged(rank: int, world: int, directory: str) -> int:
    model, _ = _reference()
    store = CheckpointStore(directory, keep=99)
    found = store.load_latest(_lay_out("fsdp", model, rank, world))
    assert found is not None
    return found.state.step


@pytest.mark.parametrize("file", ["model-00002-of-00002.safetensors", "state.json"])
def test_all_ranks_fall_back_to_the_same_whole_checkpoint(tmp_path: Path, file: str) -> None:
    model, optimizer = _reference()
    store = CheckpointStore(tmp_path, keep=99)
    store.save(TrainState(step=1), model=model, optimizer=optimizer, parents=[])
    launch(_hop, 2, directory=str(tmp_path), kinds=["fsdp"], background=False)
    damaged = store.path(2) / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert launch(_load_damaged, 2, directory=str(tmp_path)) == [1, 1]
    assert store.steps() == [1]
    assert (tmp_path / "corrupt-step-00000002" / file).exists()


def _save_and_die(
    rank: int, world: int, directory: str, victim: int, point: str, background: bool
) -> str:
    """Save step 1 and 2, then die in the save of step 3, at a point of the real code."""
    model, optimizer = _reference()
    contents: Any = {
        "model": _lay_out("fsdp", model, rank, world),
        "optimizer": _lay_out("fsdp", optimizer, rank, world),
        "parents": [],
    }
    store = CheckpointStore(directory, keep=2)
    for step in (1, 2):
        store.save(TrainState(step=step), **contents)

    def die(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    def before(owner: Any, name: str) -> None:
        setattr(owner, name, die)

    def after(owner: Any, name: str) -> None:
        real = getattr(owner, name)
        setattr(owner, name, lambda *a, **k: (real(*a, **k), die())[0])

    if rank == victim:
        {
            "before the place is made": lambda: before(LocalLocation, "begin"),
            "when the place is made": lambda: after(LocalLocation, "begin"),
            "in a file": lambda: after(checkpoint_storage, "write_safetensors"),
            "when all is written": lambda: before(checkpoint_storage._Writer, "finish"),
            "before the rename": lambda: before(checkpoint_location, "commit_directory"),
            "after the rename": lambda: after(checkpoint_location, "commit_directory"),
            "in the removal of an old one": lambda: before(shutil, "rmtree"),
        }[point]()
    try:
        if background:
            store.save_async(TrainState(step=3), **contents).result()
        else:
            store.save(TrainState(step=3), **contents)
    except StorageError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(
    ("victim", "point"),
    [
        (0, "before the place is made"),
        (0, "when the place is made"),
        (0, "in a file"),
        (1, "in a file"),
        (0, "when all is written"),
        (0, "before the rename"),
        (0, "after the rename"),
        (0, "in the removal of an old one"),
    ],
)
def test_kill_9_of_a_rank_in_a_save_leaves_whole_checkpoints(
    tmp_path: Path, victim: int, point: str, background: bool
) -> None:
    results = launch(
        _save_and_die,
        2,
        directory=str(tmp_path),
        victim=victim,
        point=point,
        background=background,
    )
    assert results[victim] is None
    survivor = results[1 - victim]
    committed = "after" in point or "old" in point
    assert "a rank is gone" in survivor or (point == "in the removal of an old one")
    store = CheckpointStore(tmp_path, keep=2)  # clears what is left
    assert not list(tmp_path.glob(".*"))
    assert store.steps()[-1] == (3 if committed else 2)
    for step in store.steps():
        open_artifact(store.path(step), kind="checkpoint")
    found = store.load_latest()
    assert found is not None and found.state.step == store.steps()[-1]
    model, _ = _reference()
    assert all(torch.equal(found.model[name], tensor) for name, tensor in model.items())


def _fail_on_one(rank: int, world: int, directory: str) -> list[str]:
    import resource

    model, optimizer = _reference()
    contents: Any = {"model": model, "optimizer": optimizer, "parents": []}
    store = CheckpointStore(directory, keep=2)
    store.save(TrainState(step=1), **contents)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    errors = []
    for save in (store.save, lambda *a, **k: store.save_async(*a, **k).result()):
        with pytest.raises(StorageError) as caught:
            save(TrainState(step=2), **contents)
        errors.append(str(caught.value))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    store.save(TrainState(step=3), **contents)  # the ranks are still in step
    dist.barrier()
    return errors


def test_a_full_disk_on_one_rank_fails_the_save_on_all_and_nothing_else(tmp_path: Path) -> None:
    errors = launch(_fail_on_one, 2, directory=str(tmp_path))
    assert errors[0] == errors[1]
    assert all("-00002-of-00002" in e and "size limit" in e for e in errors[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def _refuse_on_first_then_save(rank: int, world: int, directory: str) -> list[str]:
    store = CheckpointStore(directory, keep=2)
    contents: dict[str, Any] = {"model": {"w": torch.full((4,), 1.0)}, "optimizer": {}}

    def no_room_for_lines() -> None:
        if rank == 0:
            raise StorageError("no room for the lines")

    messages = []
    try:
        store.together(no_room_for_lines)
        store.save_async(TrainState(step=1), parents=[], **contents)
    except StorageError as error:
        messages.append(error.message)
    store.together(lambda: None)
    store.save_async(TrainState(step=2), parents=[], **contents).result()
    store.close()
    return [*messages, *map(str, store.steps())]


def test_what_stops_one_rank_before_a_save_stops_all(tmp_path: Path) -> None:
    """Else the others would wait in that save, and join the next one with old values."""
    found = launch(_refuse_on_first_then_save, 2, directory=str(tmp_path))
    assert found == [["no room for the lines", "2"]] * 2
