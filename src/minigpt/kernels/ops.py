"""Torch operators `minigpt::*` over the kernel library: one name, whatever computes it.

On the CPU an operator calls the library where there is one and its operands are of a kind that
the kernels take; everywhere else it is the torch reference. For inference: no gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minigpt.kernels import library, reference

# Numbers of `DType` in csrc/types.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1}

_operators = torch.library.Library("minigpt", "DEF")  # type: ignore[no-untyped-call]


def _register(schema: str, kernel: Callable[..., object], fallback: Callable[..., object]) -> None:
    """Make an operator that runs `kernel` on the CPU and `fallback` on other devices."""
    name = schema.partition("(")[0]
    _operators.define(schema)  # type: ignore[no-untyped-call]
    _operators.impl(name, kernel, "CPU")  # type: ignore[no-untyped-call]
    _operators.impl(name, fallback, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


def _takes(*tensors: Tensor | None) -> library.Kernels | None:
    """Return the library if it takes these: plain contiguous CPU tensors of one known dtype."""
    kernels = library.loaded()
    present = [tensor for tensor in tensors if tensor is not None]
    fits = all(
        tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.dtype == present[0].dtype
        for tensor in present
    )
    return kernels if fits and present[0].dtype in DTYPES else None


def address(tensor: Tensor | None) -> int | None:
    """Return where a tensor's data lies, None for no tensor."""
    return None if tensor is None else tensor.data_ptr()


def _rms_norm(inputs: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    kernels = _takes(inputs, residual, weight)
    if kernels is None:
        return reference.rms_norm(inputs, residual, weight, eps)
    width = inputs.shape[-1]
    output = torch.empty_like(inputs)
    kernels.functions.mg_rms_norm(
        DTYPES[inputs.dtype],
        inputs.data_ptr(),
        address(residual),
        weight.data_ptr(),
        output.data_ptr(),
        inputs.numel() // width,
        width,
        eps,
    )
    return output


_register(
    "rms_norm(Tensor x, Tensor(a!)? residual, Tensor weight, float eps) -> Tensor",
    _rms_norm,
    reference.rms_norm,
)


def rms_norm(inputs: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    return torch.ops.minigpt.rms_norm(inputs, residual, weight, eps)  # type: ignore[no-any-return]
