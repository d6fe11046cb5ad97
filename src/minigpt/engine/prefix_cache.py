"""What a block of the KV cache is known by: a hash of its tokens and of all that came before.

Keys and values depend on the weights, the adapter and every token up to their own. So the hash
of a full block chains: digest(parent's digest, the block's token ids), and the first parent
stands for the weights and the adapter. It is BLAKE2b (RFC 7693) with 256 bits, for a collision
would hand one client's context to another. No torch here.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence

_DIGEST_BYTES = 32


def prefix_root(weights_digest: str, adapter: str | None = None) -> bytes:
    """Return the digest that the first block of every sequence under these weights chains to."""
    return _digest(json.dumps([weights_digest, adapter]).encode())


def extend_hashes(
    hashes: list[bytes], root: bytes, token_ids: Sequence[int], block_size: int
) -> None:
    """Append the digests of the full blocks of `token_ids` that `hashes` lacks.

    Args:
        hashes: Digests of the first blocks, in order; extended in place.
        root: From `prefix_root`.
        token_ids: All known tokens; those of hashed blocks never change.
        block_size: Tokens in a block.
    """
    first, last = len(hashes), len(token_ids) // block_size
    if first == last:
        return
    # 32 bits hold any vocabulary; a larger id raises rather than wraps.
    data = array("I", token_ids[first * block_size : last * block_size]).tobytes()
    width = len(data) // (last - first)
    parent = hashes[-1] if hashes else root
    for begin in range(0, len(data), width):
        parent = _digest(parent + data[begin : begin + width])
        hashes.append(parent)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()
