"""What a number of the KV cache is kept in, and what a token takes in it; no torch here."""

from __future__ import annotations

from typing import Literal

CacheFormat = Literal["float32", "bfloat16", "int8"]

_NUMBER_BYTES: dict[CacheFormat, int] = {"float32": 4, "bfloat16": 2, "int8": 1}
_SCALE_BYTES = 4


def token_bytes(cache_format: CacheFormat, kv_heads: int, head_dim: int) -> int:
    """Return the bytes of one token's keys and values in one layer, int8's scales included."""
    scale = _SCALE_BYTES if cache_format == "int8" else 0
    return 2 * kv_heads * (head_dim * _NUMBER_BYTES[cache_format] + scale)
