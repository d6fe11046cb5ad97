"""Sums in one canonical order: the same bits on 1, 2, 4, ... data parallel ranks.

Floating-point addition is not associative, so that a sum over ranks depends on how many there
are. Here the micro-batches of a step are the leaves of one full binary tree, in their global
order, and every inner node is (left + right), wherever its two halves were computed. A rank sums
the subtree of its own contiguous block, and then the ranks climb the rest of the tree together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from minigpt.core.errors import ConfigError

_BUCKET_BYTES = 32 << 20


class TreeSum:
    """Sums equally shaped lists of tensors as a full binary tree over their order.

    A binary counter: two sums of equally many leaves are merged as soon as both are there, so
    that at most log2(leaves) + 1 lists are held at once.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[int, list[Tensor]]] = []  # (leaves, their sum)

    def add(self, leaf: list[Tensor]) -> None:
        """Add the next leaf; the tree keeps and overwrites its tensors."""
        leaves = 1
        while self._pending and self._pending[-1][0] == leaves:
            _, left = self._pending.pop()
            torch._foreach_add_(left, leaf)
            leaf, leaves = left, 2 * leaves
        self._pending.append((leaves, leaf))

    def total(self) -> list[Tensor]:
        """Return the sum; the number of leaves must have been a power of two."""
        assert len(self._pending) == 1, [leaves for leaves, _ in self._pending]
        return self._pending.pop()[1]


def butterfly_sum(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Add up the ranks' tensors in place, pair by pair, then pairs of pairs.

    Rank r and r XOR 1 exchange what they have and both form the same sum, then r and r XOR 2,
    and so on: log2(ranks) rounds, after which all ranks have the root of the tree.

    Args:
        tensors: Equally shaped on all ranks.
        group: A power of two of ranks; None is this process alone.
    """
    if group is None:
        return
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    for bucket in _buckets(tensors):
        mine = torch.cat([tensor.reshape(-1) for tensor in bucket])
        theirs = torch.empty_like(mine)
        stride = 1
        while stride < ranks:
            partner = dist.get_global_rank(group, rank ^ stride)
            exchange = [
                dist.P2POp(dist.isend, mine, partner, group),
                dist.P2POp(dist.irecv, theirs, partner, group),
            ]
            for work in dist.batch_isend_irecv(exchange):
                work.wait()
            mine += theirs  # a + b and b + a are the same bits
            stride *= 2
        parts = torch.split(mine, [tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def check_tree(micro_batches: int, ranks: int) -> None:
    """Refuse numbers that make no full binary tree.

    Raises:
        ConfigError: `micro_batches` or `ranks` is no power of two.
    """
    for name, value in (("micro-batches of a step", micro_batches), ("data ranks", ranks)):
        if value & (value - 1):
            raise ConfigError(
                f"mesh.reduce = tree needs a power of two of {name}, not {value}",
                remedy="change batch.tokens_per_step or batch.micro_batch_size, or the mesh",
            )


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group neighbours of one type into exchanges large enough to be worth a message."""
    buckets: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        if not buckets or size >= _BUCKET_BYTES or buckets[-1][0].dtype != tensor.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += tensor.numel() * tensor.element_size()
    return buckets
