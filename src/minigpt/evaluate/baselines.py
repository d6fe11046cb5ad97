"""What general-purpose compressors make of the same bytes: a floor that a model should beat.

The compressors see all documents as one stream and so learn from one to the next, while the
model is given each alone; the model was trained before, the compressors were not. No torch.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterable
from typing import NamedTuple

_LEVEL = 9
_LARGEST_WINDOW = 64 << 20
"""The dictionary of xz at level 9; a smaller stream needs none larger than itself."""


class CompressorScores(NamedTuple):
    """Bits of compressed output, headers included, over bytes of input."""

    gzip: float
    xz: float


def compressor_bits_per_byte(documents: Iterable[bytes], total_bytes: int) -> CompressorScores:
    """Compress the concatenation of `documents` with gzip and xz, both at level 9.

    Args:
        documents: The texts, read once and not kept.
        total_bytes: Their bytes in all, at least 1; bounds the memory that xz takes.
    """
    assert total_bytes > 0, total_bytes
    window = min(_LARGEST_WINDOW, max(4096, 1 << (total_bytes - 1).bit_length()))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": _LEVEL, "dict_size": window}]
    gzip = zlib.compressobj(_LEVEL, wbits=31)
    xz = lzma.LZMACompressor(filters=filters)
    gzip_bytes = xz_bytes = seen = 0
    for document in documents:
        gzip_bytes += len(gzip.compress(document))
        xz_bytes += len(xz.compress(document))
        seen += len(document)
    assert seen == total_bytes, (seen, total_bytes)
    gzip_bytes += len(gzip.flush())
    xz_bytes += len(xz.flush())
    return CompressorScores(8 * gzip_bytes / total_bytes, 8 * xz_bytes / total_bytes)
