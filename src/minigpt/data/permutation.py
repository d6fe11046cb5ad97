"""A shuffle of any length that is computed, not stored.

A keyed Feistel network permutes the next power of four; values that fall outside the range walk
on along their cycle until they fall inside (Black and Rogaway, "Ciphers with arbitrary finite
domains", 2002). Any element of the shuffled order costs O(1) time and memory.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_ROUNDS = 6


class Permutation:
    """A pseudo-random permutation of `range(length)`, the same for the same key everywhere."""

    def __init__(self, length: int, key: str) -> None:
        """Derive the round keys.

        Args:
            length: Number of elements, 1 to 2**62.
            key: Any text; other keys give unrelated orders.
        """
        assert 1 <= length <= 1 << 62, length
        self.length = length
        half = max(1, ((length - 1).bit_length() + 1) // 2)
        self._half = np.uint64(half)
        self._mask = np.uint64((1 << half) - 1)
        digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, "<u8")

    def __call__(self, ranks: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the elements at `ranks` of the shuffled order, same shape.

        The domain is less than four times the range, so about four rounds of walking are
        expected at most.
        """
        values = np.array(ranks, np.uint64, ndmin=1)
        assert values.size == 0 or values.max() < self.length
        values = self._encrypt(values)
        outside = values >= self.length
        while outside.any():
            values[outside] = self._encrypt(values[outside])
            outside = values >= self.length
        return values.astype(np.int64)

    def _encrypt(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return np.asarray((left << self._half) | right, np.uint64)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64 bits: the finalizer of SplitMix64 (Steele et al., 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)), np.uint64)
