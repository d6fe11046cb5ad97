from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from minigpt.core.config import from_mapping
from minigpt.core.errors import ConfigError
from minigpt.model.config import ModelConfig
from minigpt.train.config import MeshConfig
from minigpt.train.mesh import AXES, DATA_AXES, Mesh, check_model, check_world, open_mesh
from minigpt.train.processes import Ranks


def _model(**changes: Any) -> ModelConfig:
    sizes = {
        "vocab_size": 64,
        "num_layers": 4,
        "hidden_size": 32,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 8,
        "intermediate_size": 64,
        "context_length": 64,
    }
    return ModelConfig.model_validate(sizes | changes)


def _place(config: MeshConfig) -> tuple[dict[str, int], int, int, dict[str, list[int]]]:
    mesh = Mesh(config)
    rank = dist.get_rank()
    seen = {}
    for axes in (*((axis,) for axis in AXES), DATA_AXES, AXES):
        value = torch.zeros(dist.get_world_size(), dtype=torch.int64)
        value[rank] = 1
        seen["_".join(axes)] = mesh.sum(value, *axes).nonzero().flatten().tolist()
    places = {axis: mesh.rank(axis) for axis in AXES}
    return places, mesh.data_rank, mesh.data_size, seen


def test_coordinates_and_groups_are_those_of_the_axes_in_order(four_ranks: Ranks) -> None:
    places = four_ranks.run(_place, MeshConfig(dp=2, tp=2))
    coordinates = [(place["dp"], place["tp"]) for place, *_ in places]
    assert coordinates == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [data_rank for _, data_rank, _, _ in places] == [0, 0, 1, 1]
    assert all(size == 2 for _, _, size, _ in places)
    assert [seen["tp"] for *_, seen in places] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [seen["dp"] for *_, seen in places] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert all(seen["_".join(AXES)] == [0, 1, 2, 3] for *_, seen in places)
    assert [seen["fsdp"] for *_, seen in places] == [[0], [1], [2], [3]]


def test_hybrid_data_axes_count_as_one(four_ranks: Ranks) -> None:
    places = four_ranks.run(_place, MeshConfig(dp=2, fsdp=2))
    assert [data_rank for _, data_rank, _, _ in places] == [0, 1, 2, 3]
    assert all(seen["_".join(DATA_AXES)] == [0, 1, 2, 3] for *_, seen in places)


def test_one_process_needs_no_group() -> None:
    mesh = Mesh(MeshConfig())
    assert mesh.is_single and mesh.data_size == 1 and mesh.data_rank == 0
    assert mesh.group("dp") is None and mesh.submesh("dp", "tp") is None
    assert mesh.sum(torch.tensor(3), *AXES) == 3
    assert mesh.micro_batches(4) == range(4)


@given(st.integers(0, 3), st.integers(0, 3), st.integers(1, 5))
def test_blocks_of_micro_batches_cover_all_once(dp_power: int, fsdp_power: int, share: int) -> None:
    config = MeshConfig(dp=2**dp_power, fsdp=2**fsdp_power)
    count = share * config.data_size
    seen = []
    for rank in range(config.data_size):
        mesh = Mesh(MeshConfig())
        mesh._sizes = {axis: getattr(config, axis) for axis in AXES}
        mesh.rank = lambda *axes, here=rank: here  # type: ignore[method-assign]
        seen += list(mesh.micro_batches(count))
    assert seen == list(range(count))


def test_a_mesh_without_torchrun_says_how_to_start() -> None:
    with pytest.raises(ConfigError, match=r"dp=2 x tp=2 needs 4 .*WORLD_SIZE.*torchrun"):
        check_world(MeshConfig(dp=2, tp=2), {})
    with pytest.raises(ConfigError, match=r"needs 1 processes, but WORLD_SIZE = 3.*mesh.dp=3"):
        check_world(MeshConfig(), {"WORLD_SIZE": "3"})
    with pytest.raises(ConfigError, match="MASTER_ADDR, MASTER_PORT"):
        check_world(MeshConfig(dp=2), {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"})
    check_world(MeshConfig(), {})


def _open_by_environment(port: int) -> int:
    dist.destroy_process_group()  # the pool's own
    rank = int(os.environ["RANK"])
    with open_mesh(MeshConfig(dp=2), "cpu") as mesh:
        return int(mesh.sum(torch.tensor(rank + 1), "dp"))


def test_torchruns_variables_start_the_group(free_port: int) -> None:
    with Ranks(2) as ranks:
        ranks.run(_set_environment, free_port)
        assert ranks.run(_open_by_environment, free_port) == [3, 3]


def _set_environment(port: int) -> None:
    rank = str(dist.get_rank())
    world = str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@pytest.mark.parametrize(
    ("mesh", "model", "message"),
    [
        ({"tp": 3}, {}, "num_heads = 8 is not a multiple of mesh.tp = 3"),
        ({"tp": 8}, {}, "num_kv_heads = 4 is not a multiple of mesh.tp = 8"),
        ({"tp": 4}, {"vocab_size": 66}, "vocab_size = 66 is not a multiple of mesh.tp = 4"),
        ({"tp": 4}, {"intermediate_size": 66}, "intermediate_size = 66"),
        ({"cp": 3}, {}, "sequence_length = 32 is not a multiple of mesh.tp x mesh.cp = 3"),
        ({"pp": 8}, {}, "num_layers = 4 is fewer than .* = 8"),
        (
            {"pp": 4, "virtual_stages": 2, "schedule": "interleaved"},
            {},
            "num_layers = 4 is fewer than .* = 8",
        ),
        ({"ep": 2}, {}, "no experts"),
        ({"dp": 3}, {}, "= 8 is not a multiple of data ranks .* = 3"),
        ({"dp": 4, "fsdp": 4}, {}, "= 8 is not a multiple of data ranks .* = 16"),
    ],
)
def test_impossible_meshes_are_refused_with_the_reason(
    mesh: dict[str, Any], model: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_model(
            from_mapping(MeshConfig, mesh), _model(**model), micro_batches=8, sequence_length=32
        )


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"reduce": "tree", "fsdp": 2}, "tree with mesh.fsdp = 2"),
        ({"reduce": "tree", "dp": 3}, "not a power of two"),
        ({"compress": "fp16", "tp": 2, "dp": 2}, "needs mesh.dp > 1 alone"),
        ({"virtual_stages": 2, "pp": 2}, "several stages a rank need"),
        ({"dp": 0}, "greater than or equal to 1"),
        ({"ddp": 2}, "did you mean 'dp'"),
    ],
)
def test_contradictions_within_a_mesh_are_refused(mesh: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(MeshConfig, mesh)


def test_possible_meshes_pass() -> None:
    for mesh in (MeshConfig(dp=2, tp=2), MeshConfig(fsdp=4, tp=4), MeshConfig(pp=4, cp=2)):
        check_model(mesh, _model(), micro_batches=8, sequence_length=32)
