"""What each kernel computes, in torch: the tests' measure, and what runs without the library.

Arithmetic is fp32 whatever the dtype of the operands; results are rounded once, at the end.
"""

from __future__ import annotations

import torch
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
