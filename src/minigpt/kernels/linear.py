"""Linear layers over weights packed for the kernels: bf16, int8 per channel, int4 per group.

A weight is packed once, at load. Its layout is the same at every level (`csrc/args_linear.h`),
so that it can be read back (`unpack`), and computed with where the library is not.

With integer weights the inputs are rounded to integers as well, by the largest of each group of
a row: to 16 bits, which costs no more accuracy than bf16 inputs have (a group's small numbers
keep 16 bits below its largest), or to 8, which is faster where a step has many rows.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.core.errors import ModelError
from minigpt.kernels import library
from minigpt.kernels.ops import DTYPES, address

PANEL = 64
INT4_GROUPS = (32, 64, 128)

# Inputs of a group: any count for bf16; for int8 as many as sums of 32 bits allow.
_BFLOAT16_GROUP = 32
_INT8_GROUP = 128


class WeightKind(IntEnum):
    """What a packed weight holds; numbers of `WeightKind` in csrc/args_linear.h."""

    BFLOAT16 = 0
    INT8 = 1
    INT4 = 2


class _Structure(ctypes.Structure):
    _fields_ = (
        ("kind", c_int32),
        ("group", c_int32),
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("data", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("bias", c_void_p),
    )


@dataclass(frozen=True)
class PackedWeight:
    """A weight in the kernels' layout.

    Attributes:
        kind: What it holds.
        in_features, out_features: I and O.
        group: Inputs that share a scale, or are padded together.
        data: Flat uint8, in panels of 64 output columns.
        scale: int8: (columns,) fp32. int4: (panels, I / group, 64) bfloat16.
        zero: int4: (panels, I / group, 64) uint8, or None where all are 8.
        bias: (columns,) fp32, or None. Columns are O rounded up to whole panels.
    """

    kind: WeightKind
    in_features: int
    out_features: int
    group: int
    data: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    bias: Tensor | None = None

    @cached_property
    def address(self) -> int:
        """Where its `PackedWeight` of csrc/args_linear.h lies."""
        return ctypes.addressof(self._structure)

    @cached_property
    def _structure(self) -> _Structure:
        return _Structure(
            self.kind,
            self.group,
            self.in_features,
            self.out_features,
            self.data.data_ptr(),
            address(self.scale),
            address(self.zero),
            address(self.bias),
        )

    @property
    def nbytes(self) -> int:
        """Bytes read by one product."""
        held = (self.data, self.scale, self.zero, self.bias)
        return sum(tensor.nbytes for tensor in held if tensor is not None)


def pack_bfloat16(weight: Tensor, bias: Tensor | None = None) -> PackedWeight:
    """Pack a (O, I) bfloat16 weight."""
    padded = _pad_inputs(weight.detach(), _BFLOAT16_GROUP)
    data = _pack_units(padded.view(torch.int32))
    rows, columns = weight.shape
    return PackedWeight(
        WeightKind.BFLOAT16, columns, rows, _BFLOAT16_GROUP, data, bias=_by_column(bias)
    )


def pack_int8(weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> PackedWeight:
    """Pack a (O, I) int8 weight in -127..127 with one scale for each row, (O,)."""
    shifted = _pad_inputs(weight.detach(), _INT8_GROUP).view(torch.uint8) ^ 128
    data = _pack_units(shifted.view(torch.int32))
    rows, columns = weight.shape
    return PackedWeight(
        WeightKind.INT8,
        columns,
        rows,
        _INT8_GROUP,
        data,
        scale=_by_column(scale),
        bias=_by_column(bias),
    )


def pack_int4(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None = None
) -> PackedWeight:
    """Pack a 4-bit weight: weight[o, i] = (codes[o, i] - zero[o, g]) * scale[o, g].

    Args:
        codes: (O, I) uint8 in 0..15.
        scale: (O, G) bfloat16; the I inputs are G equal groups of 32, 64 or 128.
        zero: (O, G) uint8 in 0..15, or None for 8 everywhere.
        bias: (O,) or None.

    Raises:
        ModelError: I is not G groups of a size that the kernels take.
    """
    rows, columns = codes.shape
    groups = scale.shape[1]
    group = columns // groups
    if group * groups != columns or group not in INT4_GROUPS:
        raise ModelError(
            f"int4 groups of {columns} / {groups} inputs", remedy="groups of 32, 64 or 128"
        )
    eights = codes.detach().view(rows, columns // 8, 2, 4)
    halves = (eights[:, :, 0] | eights[:, :, 1] << 4).reshape(rows, columns // 2)
    return PackedWeight(
        WeightKind.INT4,
        columns,
        rows,
        group,
        _pack_units(halves.view(torch.int32)),
        scale=_by_panel(scale.bfloat16()),
        zero=None if zero is None else _by_panel(zero),
        bias=_by_column(bias),
    )


def unpack(packed: PackedWeight) -> Tensor:
    """Return the (O, I) weight in float32, as the kernels see it, scaled."""
    panels = -(-packed.out_features // PANEL)
    units = packed.data.view(panels, -1, PANEL, 4).transpose(1, 2)  # (panel, column, unit, 4)
    columns = panels * PANEL
    if packed.kind is WeightKind.BFLOAT16:
        wide = units.reshape(columns, -1).view(torch.bfloat16).float()
    elif packed.kind is WeightKind.INT8:
        assert packed.scale is not None
        wide = (units.reshape(columns, -1).float() - 128) * packed.scale[:, None]
    else:
        assert packed.scale is not None
        codes = torch.stack((units & 15, units >> 4), dim=3).reshape(columns, -1, packed.group)
        zero = 8 if packed.zero is None else _by_row(packed.zero)[..., None].float()
        wide = ((codes.float() - zero) * _by_row(packed.scale)[..., None].float()).flatten(1)
    return wide[: packed.out_features, : packed.in_features]


def linear(
    inputs: Tensor,
    weight: PackedWeight,
    activation_bits: int = 16,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply (..., I) inputs by a packed weight; returns (..., O).

    Args:
        inputs: bfloat16 or float32, on the CPU.
        weight: Packed by one of this module's functions.
        activation_bits: To what the inputs of a product with integer weights are rounded: 16
            or 8.
        dtype: Of the result, float32 or bfloat16; None: the inputs'.
    """
    assert activation_bits in (8, 16), activation_bits
    assert inputs.shape[-1] == weight.in_features, inputs.shape
    shape = (*inputs.shape[:-1], weight.out_features)
    kernels = library.loaded()
    if kernels is None or inputs.dtype not in DTYPES:
        flat = inputs.reshape(-1, weight.in_features)
        product = reference_linear(flat, weight, activation_bits)
        return product.to(dtype or inputs.dtype).view(shape)
    inputs = inputs.contiguous()
    output = inputs.new_empty(shape, dtype=dtype)
    rows = inputs.numel() // weight.in_features
    failed = kernels.functions.mg_linear(
        weight.address,
        DTYPES[inputs.dtype],
        DTYPES[output.dtype],
        inputs.data_ptr(),
        output.data_ptr(),
        rows,
        1 if weight.kind is WeightKind.BFLOAT16 else activation_bits // 8,
    )
    if failed:
        raise MemoryError(f"no memory for {rows} rows of inputs")
    return output


def reference_linear(inputs: Tensor, weight: PackedWeight, activation_bits: int) -> Tensor:
    """Compute what the kernels do with (N, I) inputs, in torch, sums in fp32; returns (N, O)."""
    wide = inputs.float()
    if weight.kind is not WeightKind.BFLOAT16:
        wide = rounded_inputs(wide, weight.group, activation_bits)
    product = F.linear(wide, unpack(weight))
    return product if weight.bias is None else product + weight.bias[: weight.out_features]


def rounded_inputs(inputs: Tensor, group: int, bits: int) -> Tensor:
    """Return (N, I) float32 inputs as the integer kernels see them: by each group's largest.

    Sixteen bits are two signed bytes, so that the largest integer is 127 * 256 + 127.
    """
    groups = _pad_inputs(inputs, group).view(len(inputs), -1, group)
    largest = groups.abs().amax(2, keepdim=True)
    step = torch.where(largest > 1e-30, largest / (127 if bits == 8 else 32639), 0.0)
    inverse = torch.where(step > 0, 1 / step, 0.0)
    rounded: Tensor = (groups * inverse).round() * step
    return rounded.flatten(1)[:, : inputs.shape[1]]


def _pack_units(units: Tensor) -> Tensor:
    """Rearrange (O, U) int32 units into (panels, U, 64), as flat bytes."""
    rows, count = units.shape
    panels = -(-rows // PANEL)
    packed = torch.empty(panels * PANEL * count * 4, dtype=torch.uint8)
    kernels = library.loaded()
    if kernels is not None:
        units = units.contiguous()
        kernels.functions.mg_advise_huge(packed.data_ptr(), packed.nbytes)
        kernels.functions.mg_pack(units.data_ptr(), packed.data_ptr(), rows, count)
        return packed
    padded = F.pad(units, (0, 0, 0, panels * PANEL - rows))
    packed.view(torch.int32).view(panels, count, PANEL).copy_(
        padded.view(panels, PANEL, count).transpose(1, 2)
    )
    return packed


def _pad_inputs(weight: Tensor, group: int) -> Tensor:
    missing = -weight.shape[1] % group
    return F.pad(weight, (0, missing)) if missing else weight.contiguous()


def _by_column(values: Tensor | None) -> Tensor | None:
    """Return (O,) values in float32, padded with zeros to whole panels."""
    if values is None:
        return None
    return F.pad(values.detach().float(), (0, -len(values) % PANEL)).contiguous()


def _by_panel(values: Tensor) -> Tensor:
    """Rearrange (O, G) values as (panels, G, 64), padded with zeros."""
    padded = F.pad(values.detach(), (0, 0, 0, -len(values) % PANEL))
    return padded.view(-1, PANEL, values.shape[1]).transpose(1, 2).contiguous()


def _by_row(values: Tensor) -> Tensor:
    """Undo `_by_panel`, padding left in."""
    return values.transpose(1, 2).reshape(-1, values.shape[1])
