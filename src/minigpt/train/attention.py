"""Attention for training on a CPU: matrix products of whole heads, probabilities kept.

torch's flash kernel computes the scores again in its backward pass, in blocks too small for
this processor's matrix units: 20-70 ms a layer where these products take 8 (16 rows of 256
tokens, 6 heads of 64). The price is memory, see `probabilities_bytes`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class MatmulAttention:
    """Causal attention within documents, for rows short enough to hold all probabilities.

    The mask is built here, once a batch, as a bias that is added to the scores: comparing
    positions in each layer would cost as much as the softmax.

    Args:
        documents: (B, T) integers; equal numbers in a row are one document.
        sliding_window: A token sees this many latest tokens, itself included; None is all.
    """

    def __init__(self, documents: Tensor, sliding_window: int | None = None) -> None:
        assert sliding_window is None or sliding_window >= 1, sliding_window
        position = torch.arange(documents.shape[1], device=documents.device)
        distance = position[:, None] - position[None, :]
        visible = (distance >= 0) & (documents[:, :, None] == documents[:, None, :])
        if sliding_window is not None:
            visible &= distance < sliding_window
        bias = torch.zeros(visible.shape, device=documents.device)
        self._bias = bias.masked_fill_(~visible, -torch.inf)[:, None]  # (B, 1, T, T)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `model.attention.Attention`."""
        groups = query.shape[2] // key.shape[2]
        if groups > 1:
            key, value = (t.repeat_interleave(groups, dim=2) for t in (key, value))
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        output: Tensor = _Attend.apply(query, key, value, self._bias)  # type: ignore[no-untyped-call]
        return output.transpose(1, 2)


class _Attend(torch.autograd.Function):
    """softmax(q k^T / sqrt(D) + bias) v over (B, H, T, D), softmax in float32 at least."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        accurate = torch.promote_types(query.dtype, torch.float32)
        scores = (query @ key.transpose(-1, -2)).to(accurate) * query.shape[-1] ** -0.5
        probabilities = (scores + bias).softmax(-1).to(query.dtype)
        output: Tensor = probabilities @ value
        ctx.save_for_backward(query, key, value, probabilities, output)
        return output

    @staticmethod
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, probabilities, output = ctx.saved_tensors
        accurate = torch.promote_types(query.dtype, torch.float32)
        value_grad = probabilities.transpose(-1, -2) @ output_grad
        # Through the softmax: ds = p (dp - sum(p dp)), and sum(p dp) is sum(o do), D long, not T.
        mean = (output_grad.to(accurate) * output.to(accurate)).sum(-1, keepdim=True)
        weighted = (output_grad @ value.transpose(-1, -2)).to(accurate) - mean
        scores_grad = probabilities.to(accurate) * weighted * query.shape[-1] ** -0.5
        scores_grad = scores_grad.to(query.dtype)
        return scores_grad @ key, scores_grad.transpose(-1, -2) @ query, value_grad, None
