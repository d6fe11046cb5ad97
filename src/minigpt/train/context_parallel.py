"""Context parallel: the ranks of a group hold different parts of the same rows.

A row is cut into 2 R pieces and rank r has pieces r and 2 R - 1 - r: what it saves on the early
piece, whose queries see few keys, it spends on the late one, so that all ranks work alike. Keys
and values are gathered (as Llama 3 was trained, https://arxiv.org/abs/2407.21783), their gradients
added up and returned to their owners. Everything else in a layer acts on each token alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minigpt.model.attention import Attention, CausalAttention
from minigpt.train.attention import MatmulAttention

# Longer rows on a CPU would spend their time and memory on the upper triangle.
_MATMUL_ATTENTION_TOKENS = 1024


def own_columns(tensor: Tensor, rank: int, size: int) -> Tensor:
    """Take a rank's two pieces out of whole rows.

    Args:
        tensor: (B, T, ...), T a multiple of 2 x `size`.
        rank: Place in the group.
        size: Ranks in the group.

    Returns:
        (B, T / size, ...): the early piece, then the late one.
    """
    assert tensor.shape[1] % (2 * size) == 0, (tensor.shape, size)
    pieces = tensor.chunk(2 * size, dim=1)
    return torch.cat((pieces[rank], pieces[-1 - rank]), dim=1)


def choose_attention(
    documents: Tensor, sliding_window: int | None, context: dist.ProcessGroup | None
) -> Attention:
    """Return the fastest attention for training on packed documents.

    Args:
        documents: (B, T) integers of whole rows; equal numbers in a row are one document.
        sliding_window: A token sees this many latest tokens, itself included; None is all.
        context: The ranks over which rows are cut, None where each has whole rows.
    """
    if context is not None:
        return ContextParallelAttention(documents, sliding_window, context)
    if documents.device.type == "cpu" and documents.shape[1] <= _MATMUL_ATTENTION_TOKENS:
        return MatmulAttention(documents, sliding_window)
    if bool((documents == documents[:, :1]).all()):
        return CausalAttention(None, sliding_window)  # the causal kernel needs no mask
    return CausalAttention(documents, sliding_window)


class ContextParallelAttention:
    """Causal attention within documents, for queries, keys and values of this rank's columns.

    Equal to attention over the whole rows, in value and gradient, but for the order of sums.

    Args:
        documents: (B, T) integers of the whole rows; equal numbers in a row are one document.
        sliding_window: A token sees this many latest tokens, itself included; None is all.
        group: The ranks that share the rows.
    """

    def __init__(
        self, documents: Tensor, sliding_window: int | None, group: dist.ProcessGroup
    ) -> None:
        self._group = group
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        length = documents.shape[1] // (2 * size)
        self._pieces = [
            _visible(documents, piece * length, length, sliding_window)
            for piece in (rank, 2 * size - 1 - rank)
        ]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `model.attention.Attention`; T is this rank's share of the row."""
        gathered: Tensor = _Gather.apply(torch.stack((key, value)), self._group)  # type: ignore[no-untyped-call]
        keys, values = gathered.transpose(2, 3)  # (B, K, T of the whole row, D)
        outputs = [
            F.scaled_dot_product_attention(
                part.transpose(1, 2),
                keys[:, :, seen],
                values[:, :, seen],
                attn_mask=mask,
                enable_gqa=query.shape[2] != key.shape[2],
            )
            for part, (seen, mask) in zip(query.chunk(2, dim=1), self._pieces, strict=True)
        ]
        return torch.cat(outputs, dim=2).transpose(1, 2)


def _visible(
    documents: Tensor, start: int, length: int, window: int | None
) -> tuple[slice, Tensor]:
    """Find what the queries of columns [start, start + length) see.

    Returns:
        The columns that any of them can see, and of those a mask (B, 1, length, columns).
    """
    stop = start + length
    seen = slice(0 if window is None else max(0, start - window + 1), stop)
    position = torch.arange(stop, device=documents.device)
    distance = position[start:stop, None] - position[None, seen]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    same = documents[:, start:stop, None] == documents[:, None, seen]
    return seen, (same & visible)[:, None]


class _Gather(torch.autograd.Function):
    """All ranks' (2, B, T / R, K, D) as (2, B, T, K, D); gradients are summed by the owner."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        shares = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(shares, own.contiguous(), group=group)
        halves = [share.chunk(2, dim=2) for share in shares]
        return torch.cat([h[0] for h in halves] + [h[1] for h in reversed(halves)], dim=2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        size = dist.get_world_size(ctx.group)
        # Summed in float32 at least, as if one process had computed it.
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        pieces: Sequence[Tensor] = wide.chunk(2 * size, dim=2)
        shares = [torch.cat((pieces[r], pieces[-1 - r]), dim=2) for r in range(size)]
        own = torch.empty_like(shares[0])
        dist.reduce_scatter(own, shares, group=ctx.group)
        return own.to(gradient.dtype), None
