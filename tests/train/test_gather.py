from __future__ import annotations

import torch
import torch.distributed as dist

from minigpt.train.gather import union_over
from minigpt.train.processes import Ranks


def _union() -> dict[str, torch.Tensor]:
    rank = dist.get_rank()
    own = {"shared": torch.tensor([7.0]), f"own.{rank}": torch.full((rank + 1,), rank)}
    if rank != 1:
        own["first and last"] = torch.ones(2, dtype=torch.bfloat16)
    return union_over(own, dist.distributed_c10d._get_default_group())


def test_every_rank_gets_what_any_of_them_has(four_ranks: Ranks) -> None:
    results = four_ranks.run(_union)
    expected = {
        "shared": torch.tensor([7.0]),
        "first and last": torch.ones(2, dtype=torch.bfloat16),
        **{f"own.{rank}": torch.full((rank + 1,), rank) for rank in range(4)},
    }
    for found in results:
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_alone_it_is_what_one_has() -> None:
    own = {"weight": torch.ones(2)}
    assert union_over(own, None) == own
