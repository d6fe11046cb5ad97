"""Operators of attention over the paged cache; see `attention_reference` for what they compute."""

from __future__ import annotations

import torch
from torch import Tensor

from minigpt.kernels import attention_reference as reference
from minigpt.kernels import library
from minigpt.kernels.kv_layout import KVLayout
from minigpt.kernels.ops import DTYPES, address, register


def _qkv(
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
    kernels = library.loaded()
    if kernels is None or qkv.dtype not in DTYPES:
        reference.qkv(qkv, cache, slots, query_norm, key_norm, cos, sin, layout, eps)
        return
    shape = KVLayout.from_numbers(layout)
    heads = qkv.shape[1] // shape.head_dim - 2 * shape.kv_heads
    assert shape.fits(heads) and qkv.is_contiguous() and slots.dtype == torch.int32
    kernels.functions.mg_qkv(
        DTYPES[qkv.dtype],
        *layout,
        qkv.data_ptr(),
        cache.data_ptr(),
        slots.data_ptr(),
        address(query_norm),
        address(key_norm),
        address(cos),
        address(sin),
        qkv.shape[0],
        heads,
        eps,
    )


def _paged_attention(
    query: Tensor,
    cache: Tensor,
    chunks: Tensor,
    tables: Tensor,
    layout: list[int],
    window: int,
    scale: float,
) -> Tensor:
    kernels = library.loaded()
    if kernels is None or query.dtype not in DTYPES:
        return reference.paged_attention(query, cache, chunks, tables, layout, window, scale)
    shape = KVLayout.from_numbers(layout)
    assert shape.fits(query.shape[1]) and query[0].is_contiguous()
    assert chunks.dtype == tables.dtype == torch.int32 and chunks.is_contiguous()
    output = torch.empty(query.shape, dtype=query.dtype)
    kernels.functions.mg_paged_attention(
        DTYPES[query.dtype],
        *layout,
        query.data_ptr(),
        query.stride(0),
        output.data_ptr(),
        cache.data_ptr(),
        chunks.data_ptr(),
        chunks.shape[0],
        tables.data_ptr(),
        query.shape[1],
        window,
        scale,
    )
    return output


register(
    "qkv(Tensor(a!) qkv, Tensor(b!) cache, Tensor slots, Tensor? query_norm, Tensor? key_norm, "
    "Tensor? cos, Tensor? sin, int[] layout, float eps) -> ()",
    _qkv,
    reference.qkv,
)
register(
    "paged_attention(Tensor query, Tensor cache, Tensor chunks, Tensor tables, int[] layout, "
    "int window, float scale) -> Tensor",
    _paged_attention,
    reference.paged_attention,
)


def qkv(
    qkv: Tensor,
    cache: Tensor,
    slots: Tensor,
    layout: KVLayout,
    *,
    norms: tuple[Tensor, Tensor] | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> None:
    """See `attention_reference.qkv`; norms are of queries and keys, rotation is (cos, sin)."""
    query_norm, key_norm = norms or (None, None)
    cos, sin = rotation or (None, None)
    torch.ops.minigpt.qkv(qkv, cache, slots, query_norm, key_norm, cos, sin, layout.numbers(), eps)


def paged_attention(
    query: Tensor,
    cache: Tensor,
    chunks: Tensor,
    tables: Tensor,
    layout: KVLayout,
    *,
    window: int | None = None,
) -> Tensor:
    """See `attention_reference.paged_attention`; the scale is 1 / sqrt(head_dim)."""
    return torch.ops.minigpt.paged_attention(  # type: ignore[no-any-return]
        query, cache, chunks, tables, layout.numbers(), window or 0, layout.head_dim**-0.5
    )
