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


def register(schema: str, kernel: Callable[..., object], fallback: Callable[..., object]) -> None:
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


def _layer_norm(
    inputs: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    kernels = _takes(inputs, residual, weight, bias)
    if kernels is None:
        return reference.layer_norm(inputs, residual, weight, bias, eps)
    width = inputs.shape[-1]
    output = torch.empty_like(inputs)
    kernels.functions.mg_layer_norm(
        DTYPES[inputs.dtype],
        inputs.data_ptr(),
        address(residual),
        weight.data_ptr(),
        address(bias),
        output.data_ptr(),
        inputs.numel() // width,
        width,
        eps,
    )
    return output


def _activation(inputs: Tensor, gated: bool) -> Tensor:
    kernels = _takes(inputs)
    if kernels is None:
        return reference.silu_times(inputs) if gated else reference.gelu(inputs)
    width = inputs.shape[-1]
    inner = width // 2 if gated else width
    output = inputs.new_empty(*inputs.shape[:-1], inner)
    rows = inputs.numel() // width
    kernels.functions.mg_activation(
        DTYPES[inputs.dtype], inputs.data_ptr(), output.data_ptr(), rows, inner, gated
    )
    return output


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    kernels = _takes(logits)
    if kernels is None or logits.dtype != torch.float32:
        return reference.largest(logits)
    rows, width = logits.shape
    best, log_sum = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    kernels.functions.mg_largest(
        logits.data_ptr(), best.data_ptr(), log_sum.data_ptr(), rows, width
    )
    return best, log_sum


def _top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    kernels = _takes(logits)
    assert 0 < count <= logits.shape[-1], count
    if kernels is None or logits.dtype != torch.float32:
        return reference.top(logits, count)
    rows, width = logits.shape
    values, places = torch.empty(rows, count), torch.empty(rows, count, dtype=torch.int64)
    kernels.functions.mg_top(
        logits.data_ptr(), values.data_ptr(), places.data_ptr(), rows, width, count
    )
    return values, places


register(
    "rms_norm(Tensor x, Tensor(a!)? residual, Tensor weight, float eps) -> Tensor",
    _rms_norm,
    reference.rms_norm,
)
register(
    "layer_norm(Tensor x, Tensor(a!)? residual, Tensor weight, Tensor? bias, float eps) -> Tensor",
    _layer_norm,
    reference.layer_norm,
)
register(
    "silu_times(Tensor gate_up) -> Tensor",
    lambda gate_up: _activation(gate_up, True),
    reference.silu_times,
)
register("gelu(Tensor x) -> Tensor", lambda x: _activation(x, False), reference.gelu)
register("largest(Tensor logits) -> (Tensor, Tensor)", _largest, reference.largest)
register("top(Tensor logits, int count) -> (Tensor, Tensor)", _top, reference.top)


def rms_norm(inputs: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    return torch.ops.minigpt.rms_norm(inputs, residual, weight, eps)  # type: ignore[no-any-return]


def layer_norm(
    inputs: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """See `reference.layer_norm`."""
    return torch.ops.minigpt.layer_norm(  # type: ignore[no-any-return]
        inputs, residual, weight, bias, eps
    )


def silu_times(gate_up: Tensor) -> Tensor:
    """See `reference.silu_times`."""
    return torch.ops.minigpt.silu_times(gate_up)  # type: ignore[no-any-return]


def gelu(inputs: Tensor) -> Tensor:
    """See `reference.gelu`."""
    return torch.ops.minigpt.gelu(inputs)  # type: ignore[no-any-return]


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.largest`."""
    return torch.ops.minigpt.largest(logits)  # type: ignore[no-any-return]


def top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """See `reference.top`."""
    return torch.ops.minigpt.top(logits, count)  # type: ignore[no-any-return]
