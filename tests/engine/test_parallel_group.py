"""What ranks add up and put together has the same bits everywhere and at every repetition."""

from __future__ import annotations

import multiprocessing
import socket
from typing import Any

import pytest
import torch
from torch import Tensor

from minigpt.engine.parallel_group import RankGroup
from minigpt.model.sharding import Shard

LENGTH = 101
"""Of gathered rows: no number of ranks here divides it."""


def values(rank: int, rows: int, width: int = 96) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rank))


def exchange(
    shard: Shard, port: int, listener: socket.socket | None = None
) -> dict[str, list[Any]]:
    """Do what one rank does; return it as lists, in float32's own bits."""
    torch.set_num_threads(1)
    group = RankGroup(shard, "cpu", port, 20, listener=listener)
    found: dict[str, list[Any]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 3, 64):
            for repetition in range(3):
                total = group.sum(values(shard.rank, rows).to(dtype))
                found[f"{dtype} {rows} {repetition}"] = total.float().tolist()
    first, stop = shard.bounds(LENGTH)
    part = values(7, 2, LENGTH)[:, first:stop]
    found["gathered"] = group.gather(part, LENGTH).tolist()
    return found


def run_rank(shard: Shard, port: int, queue: Any) -> None:
    queue.put((shard.rank, exchange(shard, port)))


@pytest.mark.parametrize("ranks", [2, 3])
def test_exchanges(ranks: int) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    others = [
        context.Process(target=run_rank, args=(Shard(rank, ranks), port, queue), daemon=True)
        for rank in range(1, ranks)
    ]
    for process in others:
        process.start()
    found = {0: exchange(Shard(0, ranks), port, listener)}
    found |= dict(queue.get(timeout=60) for _ in others)
    for process in others:
        process.join()
    assert found[0].pop("gathered") == values(7, 2, LENGTH).tolist()
    for rank in range(1, ranks):
        first, stop = Shard(rank, ranks).bounds(LENGTH)
        assert found[rank].pop("gathered") == values(7, 2, LENGTH)[:, first:stop].tolist()
        assert found[rank] == found[0]
    for name, total in found[0].items():
        assert total == found[0][f"{name[:-1]}0"]
    exact = torch.stack([values(rank, 64).double() for rank in range(ranks)]).sum(0)
    assert torch.allclose(torch.tensor(found[0]["torch.float32 64 0"]).double(), exact, atol=1e-6)
    if ranks == 2:  # of a and b there is one sum: rows don't depend on those beside them
        assert found[0]["torch.float32 3 0"] == found[0]["torch.float32 64 0"][:3]
