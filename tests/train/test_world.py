"""What ranks tell each other, among real processes and alone."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from tests.train.rank_processes import launch

from minigpt.core.errors import ConfigError, StorageError
from minigpt.train.world import World

MAKERS: dict[str, Callable[[], World]] = {
    "joined": World.joined,
    "apart": lambda: World.apart(timeout=timedelta(minutes=2)),
}


def _fail(kind: type[Exception], rank: int) -> None:
    raise kind(f"rank {rank} can't")


def _talk(rank: int, size: int, make: str) -> dict[str, Any]:
    world = MAKERS[make]()
    told: dict[str, Any] = {
        "place": [world.rank, world.size, world.is_first],
        "vote": world.vote(rank, -rank),
        "gather": world.gather({"rank": rank, "exact": (1 << 63) + rank}),
        "together": world.together(lambda: rank),
        "from first": world.from_first(lambda: f"of rank {rank}"),
    }
    with pytest.raises(StorageError) as caught:
        world.together(lambda: _fail(StorageError, rank) if rank else None)
    told["failed together"] = str(caught.value)
    for kind in (ConfigError, ValueError):  # a bug too must not leave the others waiting
        with pytest.raises(kind) as failed:
            world.from_first(lambda kind=kind: _fail(kind, rank))  # type: ignore[misc]
        told[kind.__name__] = str(failed.value)
    dist.barrier()  # the ranks are still in step
    return told


@pytest.mark.parametrize("make", MAKERS)
def test_all_ranks_learn_the_same(make: str) -> None:
    results = launch(_talk, 3, make=make)
    assert [found.pop("place") for found in results] == [
        [0, 3, True],
        [1, 3, False],
        [2, 3, False],
    ]
    assert [found.pop("together") for found in results] == [0, 1, 2]
    expected = {
        "vote": [2, 0],
        "gather": [{"rank": rank, "exact": (1 << 63) + rank} for rank in range(3)],
        "from first": "of rank 0",
        "failed together": "rank 1 can't",
        "ConfigError": "rank 0 can't",
        "ValueError": "rank 0 can't",
    }
    assert results == [expected] * 3


@pytest.mark.parametrize("make", [World, *MAKERS.values()])
def test_one_process_is_alone_with_its_vote(make: Callable[[], World]) -> None:
    world = make()
    assert (world.rank, world.size, world.is_first, world.is_first_on_host) == (0, 1, True, True)
    assert world.vote(3, -3) == (3, -3)
    assert world.gather("alone") == ["alone"]
    assert world.together(lambda: 1) == world.from_first(lambda: 1) == 1
    with pytest.raises(StorageError, match="rank 0"):
        world.together(lambda: _fail(StorageError, 0))
    with pytest.raises(ValueError, match="rank 0"):
        world.from_first(lambda: _fail(ValueError, 0))
