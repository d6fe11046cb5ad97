"""Do replicas still hold the same weights, and do the ranks compute at the same speed?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt.train.config import RecoveryConfig
from minigpt.train.mesh import Mesh
from minigpt.train.progress import Progress
from minigpt.train.watchdog import compute_seconds, find_divergent, find_stragglers
from minigpt.train.world import World

_PRIME = 1_000_003
_REPLICATED_OUTSIDE = ("pp", "fsdp", "ep", "tp")
"""Axes along which ranks hold different weights."""


@dataclass(frozen=True)
class RankReport:
    """One comparison of all ranks."""

    divergent: list[int]
    """Ranks whose weights differ from their replicas'."""
    stragglers: list[int]
    """Ranks that compute much longer than the others."""
    compute_seconds: list[float]
    """By rank, since the comparison of speeds before."""


class RankComparison:
    """Compares the ranks of a run now and then; for all ranks at the same point."""

    def __init__(
        self, config: RecoveryConfig, world: World, mesh: Mesh, progress: Progress
    ) -> None:
        self._config = config
        self._world = world
        self._mesh = mesh
        self._progress = progress
        self._computed = 0.0

    def run(self, weights: Iterable[Tensor], *, speeds: bool) -> RankReport:
        """Compare checksums of the weights; with `speeds` also the time since it last did so."""
        total = compute_seconds(self._progress.seconds())
        own = total - self._computed
        checksum = weights_checksum(weights)
        replica = self._mesh.rank(*_REPLICATED_OUTSIDE)
        rows = self._world.gather((checksum, replica, own))
        seconds = [row[2] for row in rows]
        divergent = find_divergent([row[0] for row in rows], [row[1] for row in rows])
        if not speeds:  # too few steps to tell a slow rank from an unlucky one
            return RankReport(divergent, [], seconds)
        self._computed = total
        slow = find_stragglers(seconds, self._config.straggler_ratio)
        return RankReport(divergent, slow, seconds)


@torch.no_grad()
def weights_checksum(weights: Iterable[Tensor]) -> int:
    """Return a 64-bit checksum of this rank's weights that any changed bit changes.

    The words of each tensor are added up as integers, which is exact and free of order, on the
    device they are on and without a copy.
    """
    checksum = 0
    for weight in weights:
        local = weight.to_local() if hasattr(weight, "to_local") else weight
        words = local.detach().contiguous().view(-1).view(_words_of(local))
        checksum = (checksum * _PRIME + int(words.sum(dtype=torch.int64))) % (1 << 64)
    return checksum


def _words_of(tensor: Tensor) -> torch.dtype:
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return sizes[tensor.element_size()]
