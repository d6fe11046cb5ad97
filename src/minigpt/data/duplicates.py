"""Near-duplicates by MinHash and locality-sensitive hashing (Broder, 1997)."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from datasketch import MinHash

_WORDS = 5
_CHARACTERS = 12
_LONG_WORD = 24  # mean bytes a word above which spaces do not part words
_CHUNK = 4096  # shingles hashed at once: the (shingles, permutations) matrix stays in cache


class NearDuplicates:
    """Remembers texts and finds earlier ones that share most of their word 5-grams.

    Every hash is keyed by constants, so that all processes agree. Memory grows by one signature
    (4 bytes a permutation) and its buckets a text: about 4 KB at 128 permutations.
    """

    def __init__(self, threshold: float, permutations: int) -> None:
        """Start empty.

        Args:
            threshold: Estimated Jaccard similarity from which two texts are near-duplicates.
            permutations: Hash functions a signature.
        """
        from datasketch import MinHash, MinHashLSH

        self._threshold = threshold
        self._index = MinHashLSH(threshold=threshold, num_perm=permutations)
        self._template = MinHash(num_perm=permutations, seed=1, hashfunc=int)
        self._signatures: list[MinHash] = []

    def sign(self, text: str) -> bytes:
        """Return a text's signature, which any process may compute beforehand."""
        signature = self._template.copy()
        hashes = shingle_hashes(text).tolist()
        for start in range(0, len(hashes), _CHUNK):
            signature.update_batch(hashes[start : start + _CHUNK])
        return np.asarray(signature.hashvalues, "<u8").tobytes()

    def add(self, text: str, signed: bytes | None = None) -> bool:
        """Remember `text` unless it is a near-duplicate; tell whether it is new.

        The buckets only propose candidates; the whole signatures decide.

        Args:
            text: The document.
            signed: Its `sign`, where that is known.
        """
        signature = self._template.copy()
        hashes = np.frombuffer(signed or self.sign(text), "<u8")
        signature.hashvalues = hashes.astype(signature.hashvalues.dtype)
        for candidate in self._index.query(signature):
            if signature.jaccard(self._signatures[candidate]) >= self._threshold:
                return False
        self._index.insert(len(self._signatures), signature, check_duplication=False)
        self._signatures.append(signature)
        return True


def shingle_hashes(text: str) -> npt.NDArray[np.uint32]:
    """Return the distinct hashes of a text's runs of five words (or of all, where fewer).

    Scripts that put no spaces between words count by runs of twelve characters instead.
    """
    data = text.encode()
    words = data.split()
    if len(words) * _LONG_WORD >= len(data):
        units, size = np.fromiter(map(zlib.crc32, words), np.uint64), _WORDS
    else:
        units, size = np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.uint64), _CHARACTERS
    size = min(size, len(units))
    count = len(units) - size + 1
    mixed = np.zeros(count, np.uint64)
    for place in range(size):
        # An odd multiplier with a spread of bits makes the sum depend on the order.
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + units[place : place + count]
        mixed ^= mixed >> np.uint64(29)
    return np.unique((mixed >> np.uint64(16)).astype(np.uint32))
