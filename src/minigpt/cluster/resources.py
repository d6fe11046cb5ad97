"""Amounts of processors, memory and GPUs, in integers so that sums are exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Resources:
    """An amount: thousandths of a core, bytes, whole GPUs. Differences may be negative."""

    millicpus: int
    memory: int
    gpus: int

    @classmethod
    def zero(cls) -> Self:
        """Return nothing at all."""
        return cls(0, 0, 0)

    @classmethod
    def unlimited(cls) -> Self:
        """Return more than any cluster has."""
        return cls(1 << 60, 1 << 90, 1 << 60)

    def __add__(self, other: Resources) -> Resources:
        return Resources(
            self.millicpus + other.millicpus, self.memory + other.memory, self.gpus + other.gpus
        )

    def __sub__(self, other: Resources) -> Resources:
        return self + other * -1

    def __mul__(self, times: int) -> Resources:
        return Resources(self.millicpus * times, self.memory * times, self.gpus * times)

    def fits_in(self, other: Resources) -> bool:
        """Tell whether no component exceeds that of `other`."""
        return all(a <= b for a, b in zip(self.values, other.values, strict=True))

    def maximum(self, other: Resources) -> Resources:
        """Return the larger of each component."""
        return Resources(*map(max, self.values, other.values))

    def times_in(self, other: Resources) -> int:
        """Return how many of this amount `other` holds; this must not be zero."""
        return max(0, min(b // a for a, b in zip(self.values, other.values, strict=True) if a))

    def share_of(self, total: Resources) -> float:
        """Return the dominant share: the largest fraction of `total` over the components.

        Ghodsi et al., "Dominant Resource Fairness", NSDI 2011.
        """
        shares = [a / b for a, b in zip(self.values, total.values, strict=True) if a and b]
        return max(shares, default=0.0)

    @property
    def values(self) -> tuple[int, int, int]:
        """The components in their order."""
        return self.millicpus, self.memory, self.gpus
