"""Who attends to whom: the decoder hands queries, keys and values to an `Attention`.

The decoder does not know whether it trains on packed documents or decodes from a paged KV
cache; the caller passes the object that does.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Attention(Protocol):
    """Mixes values over positions, for one forward pass of a decoder.

    H is the number of query heads, K that of key and value heads (K divides H; query head h
    reads key head h // (H / K)), D the width of a head.
    """

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend in one layer.

        Args:
            layer: Index of the layer; the decoder calls each once per pass, in order.
            query: (B, T, H, D), normalised and rotated already. Scores are divided by sqrt(D).
            key: (B, T, K, D), likewise.
            value: (B, T, K, D).

        Returns:
            (B, T, H, D), a tensor of its own: the decoder may keep it.
        """
        ...


class CausalAttention:
    """Whole sequences: a token sees itself and what came before, within its document.

    A mask is built once a batch, not once a layer. Without documents and with a window that
    covers the sequence there is none, which lets the kernel skip the upper triangle.

    Args:
        documents: (B, T) integers; equal numbers in a row are one document. None: a row is one.
        sliding_window: A token sees this many latest tokens, itself included; None is all.
    """

    def __init__(self, documents: Tensor | None = None, sliding_window: int | None = None) -> None:
        assert sliding_window is None or sliding_window >= 1, sliding_window
        self._window = sliding_window
        self._packed: Tensor | None = None  # (B, 1, T, T)
        self._sliding: Tensor | None = None  # (T, T)
        if documents is not None:
            same = documents[:, :, None] == documents[:, None, :]
            visible = _visible(documents.shape[1], sliding_window, documents.device)
            self._packed = (same & visible)[:, None]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = self._mask(query.shape[1], query.device)
        output = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return output.transpose(1, 2)

    def _mask(self, length: int, device: torch.device) -> Tensor | None:
        if self._packed is not None:
            return self._packed
        if self._window is None or length <= self._window:
            return None
        if self._sliding is None or self._sliding.shape[0] != length:
            self._sliding = _visible(length, self._window, device)
        return self._sliding


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """Return a (T, T) mask, true where the query of a row may see the key of a column."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)
