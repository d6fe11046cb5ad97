"""What the kernels around attention compute, in torch; see `reference`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minigpt.kernels import reference
from minigpt.kernels.kv_layout import KVLayout


def qkv(
    qkv: Tensor,
    cache: Tensor,
    slots: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    layout: list[int],
    eps: float,
) -> None:
    """Norm and turn the query and key heads of a fused projection; write the cache.

    Args:
        qkv: (N, (H + 2 K) * D), float32 or bfloat16. The queries are replaced in place, the
            rest is left.
        cache: A layer's, of that layout.
        slots: (N,) int32, block * block_size + place in the block.
        query_norm: (D,) weight of an RMS norm over each head, or None.
        key_norm: The keys' likewise.
        cos: (N, D / 2) float32 cosines of the positions' angles, or None for no rotation. Pairs
            are (i, i + D / 2) (https://arxiv.org/abs/2104.09864).
        sin: The sines.
        layout: `KVLayout.numbers()`.
        eps: Added to the norms' mean squares.
    """
    shape = KVLayout.from_numbers(layout)
    heads = qkv.view(qkv.shape[0], -1, shape.head_dim)
    count = heads.shape[1] - 2 * shape.kv_heads
    query, key, value = heads.float().tensor_split([count, count + shape.kv_heads], dim=1)
    if query_norm is not None:
        query = reference.rms_norm(query, None, query_norm, eps)
    if key_norm is not None:
        key = reference.rms_norm(key, None, key_norm, eps)
    if cos is not None and sin is not None:
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
    heads[:, :count] = query.to(qkv.dtype)
    shape.write(cache, slots, key, value)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def paged_attention(
    query: Tensor,
    cache: Tensor,
    chunks: Tensor,
    tables: Tensor,
    layout: list[int],
    window: int,
    scale: float,
) -> Tensor:
    """Attend from consecutive rows of each of several sequences to what is cached of it.

    Args:
        query: (N, H, D), float32 or bfloat16; rows need not lie together.
        cache: A layer's, of that layout; it holds these rows' keys and values too.
        chunks: (S, 4) int32: first row, rows, position of the first row in its sequence, where
            its block table begins in `tables`. A row sees the tokens up to its own.
        tables: int32 block tables, one after the other.
        layout: `KVLayout.numbers()`.
        window: A row sees this many latest tokens, its own included; 0 is all.
        scale: Factor of the scores.

    Returns:
        (N, H, D) in the query's dtype.
    """
    shape = KVLayout.from_numbers(layout)
    output = torch.empty(query.shape, dtype=query.dtype)
    shared = query.shape[1] // shape.kv_heads
    for row, rows, position, table in chunks.tolist():
        stop = position + rows
        count = -(-stop // shape.block_size)
        keys, values = shape.read(cache, tables[table : table + count])
        keys, values = (x[:stop].repeat_interleave(shared, dim=1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", query[row : row + rows].float(), keys) * scale
        own, seen = torch.arange(position, stop)[:, None], torch.arange(stop)[None]
        hidden = seen > own
        if window:
            hidden |= seen <= own - window
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        output[row : row + rows] = torch.einsum("hqk,khd->qhd", weights, values)
    return output
