"""What each kernel computes, in torch: the tests' measure, and what runs without the library.

Arithmetic is fp32 whatever the dtype of the operands; results are rounded once, at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(inputs: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Divide each row by its root mean square (https://arxiv.org/abs/1910.07467).

    Args:
        inputs: (..., C), float32 or bfloat16.
        residual: (..., C) of the inputs' dtype, or None. The inputs are added to it in place,
            and the norm is taken of that sum, as it was rounded.
        weight: (C,).
        eps: Added to the mean square.

    Returns:
        (..., C) in the inputs' dtype.
    """
    if residual is not None:
        residual.copy_(residual.float() + inputs.float())
        inputs = residual
    wide = inputs.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(inputs.dtype)


def layer_norm(
    inputs: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """Shift and scale each row to mean 0 and variance 1 (https://arxiv.org/abs/1607.06450).

    Args:
        inputs: (..., C), float32 or bfloat16.
        residual: As in `rms_norm`.
        weight: (C,).
        bias: (C,) or None.
        eps: Added to the variance.

    Returns:
        (..., C) in the inputs' dtype.
    """
    if residual is not None:
        residual.copy_(residual.float() + inputs.float())
        inputs = residual
    wide_bias = None if bias is None else bias.float()
    normed = F.layer_norm(inputs.float(), weight.shape, weight.float(), wide_bias, eps)
    return normed.to(inputs.dtype)


def silu_times(gate_up: Tensor) -> Tensor:
    """Map (..., 2 * I), gates first, to (..., I): SiLU(gate) * up."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def gelu(inputs: Tensor) -> Tensor:
    """Map (...) to (...): GELU in its tanh form."""
    return F.gelu(inputs.float(), approximate="tanh").to(inputs.dtype)


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Find the largest logit of each row.

    Args:
        logits: (N, V) float32.

    Returns:
        (N,) int64 places, -1 where a number of the row is not finite, else the first largest's;
        and (N,) float32 logarithms of the sums of exponentials, of finite rows.
    """
    finite = logits.isfinite().all(-1)
    best = torch.where(finite, logits.argmax(-1), -1)
    return best, logits.logsumexp(-1)


def top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the largest logits of each row, in falling order, of equals the first first.

    Args:
        logits: (N, V) float32, of finite numbers.
        count: How many, at most V; meant for a few dozen.

    Returns:
        (N, count) float32 logits and int64 places.
    """
    values, places = logits.sort(dim=-1, descending=True, stable=True)
    return values[:, :count].contiguous(), places[:, :count].contiguous()
