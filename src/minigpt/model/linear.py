"""Weight-only layers: weights stored in int8 or int4, activations and results in floating point.

Int8 is symmetric, one scale per output channel: w[o, i] = weight[o, i] * scale[o]. Int4 is
asymmetric, a scale and a zero point per group of inputs of an output channel:
w[o, i] = (code[o, i] - zero[o, g]) * scale[o, g]. A decode step reads every weight once, so fewer
bytes than bf16 make it faster for a few sequences at a time; what is here is torch's way and the
reference of the kernels, which serve on a CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.core.errors import ModelError
from minigpt.kernels.linear import INT4_GROUPS

# Up to this many rows the packed kernel beats converting the weight and multiplying in bf16:
# 1024 x 4096 on 2 cores takes 0.10 against 0.69 ms at 1 row, 0.48 / 0.72 at 8, 0.79 / 0.68 at 16.
_PACKED_ROWS = 12

# Weights are converted this many elements at a time: 768 x 50257 at 16 rows takes 7 ms so, 32 ms
# at once, since memory that large comes fresh from the system at every call.
_BLOCK_ELEMENTS = 1 << 22

# Shares of a group's range that int4 steps are tried for: cutting the largest off makes all other
# steps smaller. Against the whole range alone they and the least squares after them take 7 % of
# the squared error of normal weights in groups of 32, 10 % in groups of 128.
_RANGES = tuple(1 - 0.05 * i for i in range(8))


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight to int8, each row by its largest magnitude.

    The scale is rounded to bf16 first, so that every kernel and dtype sees the same weights.

    Args:
        weight: (O, I), floating point.

    Returns:
        (O, I) int8 in -127..127, and (O,) scales in the weight's dtype, each a number that bf16
        has too; a row of zeros has scale 1.
    """
    wide = weight.detach().float()
    largest = wide.abs().amax(dim=1)
    scale = (largest / 127).bfloat16().to(weight.dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    rounded = (wide / scale.float()[:, None]).round().clamp(-127, 127)
    return rounded.to(torch.int8), scale


def quantize_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round a weight to int4, each group of inputs by the step that errs least.

    Steps are tried for several shares of the group's range, zero included; each is then fitted
    to its codes by least squares.

    Args:
        weight: (O, I), floating point.
        group_size: Inputs in a group; it divides I.

    Returns:
        (O, I) uint8 codes in 0..15, (O, I / group_size) bf16 scales and uint8 zero points in
        0..15; a group of zeros has scale 1.
    """
    rows = max(1, _BLOCK_ELEMENTS // weight.shape[1])
    parts = [_quantize_groups(block, group_size) for block in torch.split(weight.detach(), rows)]
    codes, scales, zeros = (torch.cat(each) for each in zip(*parts, strict=True))
    return codes, scales, zeros


def _quantize_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = weight.float().view(len(weight), -1, group_size)
    low = groups.amin(2, keepdim=True).clamp(max=0)
    high = groups.amax(2, keepdim=True).clamp(min=0)
    best: list[Tensor] = []
    for share in _RANGES:
        scale = _step((high - low) * (share / 15))
        zero = (-low * share / scale).round().clamp(0, 15)
        codes = ((groups / scale).round() + zero).clamp(0, 15)
        steps = codes - zero
        squares = steps.square().sum(2, keepdim=True)
        fitted = _step((groups * steps).sum(2, keepdim=True) / squares.clamp(min=1))
        scale = torch.where(squares > 0, fitted, scale)
        error = (steps * scale - groups).square().sum(2, keepdim=True)
        found = [error, codes, scale, zero]
        if best:
            found = [torch.where(error < best[0], *pair) for pair in zip(found, best, strict=True)]
        best = found
    _, codes, scale, zero = best
    return codes.flatten(1).byte(), scale.squeeze(2).bfloat16(), zero.squeeze(2).byte()


def _step(wanted: Tensor) -> Tensor:
    """Return steps that bf16 has too; 1 where that would be 0."""
    step = wanted.bfloat16().float()
    return torch.where(step == 0, 1.0, step)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack (O, I) uint8 codes in 0..15 two to a byte, even inputs in the low half; (O, I / 2)."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Undo `pack_nibbles`."""
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)


def int8_linear(inputs: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply (..., I) by an int8 (O, I) weight with (O,) scales; returns (..., O)."""
    dtype = inputs.dtype
    rows = inputs.numel() // inputs.shape[-1]
    if dtype == torch.bfloat16 and rows <= _PACKED_ROWS and _fits_packed_kernel(weight):
        flat = inputs.reshape(rows, -1)
        packed = torch._weight_int8pack_mm(flat, weight, scale.to(dtype))
        outputs = packed.view(*inputs.shape[:-1], -1)
    else:
        blocks = torch.split(weight, max(1, _BLOCK_ELEMENTS // weight.shape[1]))
        products = [F.linear(inputs, block.to(dtype)) for block in blocks]
        outputs = (products[0] if len(products) == 1 else torch.cat(products, -1)) * scale.to(dtype)
    return outputs if bias is None else outputs + bias.to(outputs.dtype)


def int4_linear(
    inputs: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None
) -> Tensor:
    """Multiply (..., I) by an int4 (O, I) weight, a block of outputs at a time; returns (..., O).

    Args:
        inputs: Floating point.
        weight: (O, I / 2) uint8, as `pack_nibbles` packs it.
        scale: (O, G).
        zero: (O, G) uint8.
        bias: (O,) or None.
    """
    rows = max(1, _BLOCK_ELEMENTS // inputs.shape[-1])
    parts = zip(*(torch.split(each, rows) for each in (weight, scale, zero)), strict=True)
    products = [F.linear(inputs, dequantize_groups(w, s, z, inputs.dtype)) for w, s, z in parts]
    outputs = products[0] if len(products) == 1 else torch.cat(products, -1)
    return outputs if bias is None else outputs + bias.to(outputs.dtype)


def dequantize_groups(weight: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the (O, I) weight of `int4_linear`'s parts, rounded once, to `dtype`."""
    codes = unpack_nibbles(weight).view(*scale.shape, -1)
    # Small integers are exact in any of the dtypes.
    steps = codes.to(dtype) - zero[..., None].to(dtype)
    return (steps * scale[..., None].to(dtype)).flatten(1)


def _fits_packed_kernel(weight: Tensor) -> bool:
    """Tell whether torch's packed kernel may touch a weight: it reads whole aligned 16 bytes.

    Elsewhere it crashes the process or reads past the rows (seen with torch 2.13).
    """
    aligned = weight.data_ptr() % 16 == 0 and weight.shape[1] % 16 == 0
    return aligned and weight.device.type == "cpu" and weight.is_contiguous()


class Int8Linear(nn.Module):
    """A linear layer with an int8 weight.

    Buffers: `weight` int8 (O, I), `scale` (O,), `bias` (O,) or None.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(out_features, dtype=torch.bfloat16))
        self.bias: Tensor | None
        self.register_buffer("bias", torch.empty(out_features) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Int8Linear:
        """Quantize a linear layer, round to nearest."""
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, linear.bias is not None)
        made.weight, made.scale = quantize_rows(linear.weight)
        made.bias = None if linear.bias is None else linear.bias.detach()
        return made

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        return int8_linear(inputs, self.weight, self.scale, self.bias)

    def dequantized(self) -> Tensor:
        """Return the (O, I) weight in the scale's dtype."""
        return self.weight.to(self.scale.dtype) * self.scale[:, None]


class Int4Linear(nn.Module):
    """A linear layer with an int4 weight, quantized by groups of inputs.

    Buffers: `weight` uint8 (O, I / 2), two codes to a byte, `scale` (O, G), `zero` uint8 (O, G),
    `bias` (O,) or None.

    Args:
        in_features, out_features: I and O.
        group_size: Inputs that share a scale and a zero point.
        bias: Whether there is one.

    Raises:
        ModelError: The inputs are not whole groups of a size that there is.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(
        self, in_features: int, out_features: int, group_size: int, bias: bool = False
    ) -> None:
        super().__init__()
        if group_size not in INT4_GROUPS or in_features % group_size:
            raise ModelError(
                f"int4 groups of {group_size} of {in_features} inputs",
                remedy=f"whole groups of {', '.join(map(str, INT4_GROUPS))}",
            )
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        groups = in_features // group_size
        self.register_buffer("weight", torch.empty(out_features, in_features // 2).byte())
        self.register_buffer("scale", torch.empty(out_features, groups, dtype=torch.bfloat16))
        self.register_buffer("zero", torch.empty(out_features, groups).byte())
        self.bias: Tensor | None
        self.register_buffer("bias", torch.empty(out_features) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, group_size: int) -> Int4Linear:
        """Quantize a linear layer; see `quantize_groups`."""
        with torch.device("meta"):
            sizes = (linear.in_features, linear.out_features, group_size)
            made = cls(*sizes, bias=linear.bias is not None)
        codes, made.scale, made.zero = quantize_groups(linear.weight, group_size)
        made.weight = pack_nibbles(codes)
        made.bias = None if linear.bias is None else linear.bias.detach()
        return made

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        return int4_linear(inputs, self.weight, self.scale, self.zero, self.bias)

    def dequantized(self) -> Tensor:
        """Return the (O, I) weight in the scale's dtype."""
        return dequantize_groups(self.weight, self.scale, self.zero, self.scale.dtype)


class Int8Embedding(nn.Module):
    """A token embedding with an int8 weight, which can serve as output projection too.

    Buffers: `weight` int8 (V, C), `scale` (V,). A row is a token's vector and, tied, an output
    channel of the projection, so that one scale fits both.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        weight = torch.empty(num_embeddings, embedding_dim, dtype=torch.int8)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", torch.empty(num_embeddings, dtype=torch.bfloat16))

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> Int8Embedding:
        """Quantize an embedding, round to nearest."""
        with torch.device("meta"):
            made = cls(embedding.num_embeddings, embedding.embedding_dim)
        made.weight, made.scale = quantize_rows(embedding.weight)
        return made

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (...) token ids to (..., C)."""
        scale = self.scale[tokens][..., None]
        return self.weight[tokens].to(scale.dtype) * scale

    def project(self, hidden: Tensor) -> Tensor:
        """Map (..., C) hidden states to (..., V) logits."""
        return int8_linear(hidden, self.weight, self.scale, None)

    def dequantized(self) -> Tensor:
        """Return the (V, C) weight in the scale's dtype."""
        return self.weight.to(self.scale.dtype) * self.scale[:, None]


def quantize_module(module: nn.Module, group_size: int | None = None) -> None:
    """Replace every linear layer and token embedding below `module` by its quantized form.

    Learned positions stay as they are: they are small, and added, not multiplied.

    Args:
        module: Changed in place.
        group_size: Of int4 layers; None makes int8 ones. Embedding and output projection are
            int8 always, whose errors every token would meet, and so are layers whose inputs are
            not whole groups.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            whole = group_size is not None and child.in_features % group_size == 0
            if group_size is None or not whole or name == "lm_head":
                setattr(module, name, Int8Linear.from_linear(child))
            else:
                setattr(module, name, Int4Linear.from_linear(child, group_size))
        elif isinstance(child, nn.Embedding) and name == "embed_tokens":
            setattr(module, name, Int8Embedding.from_embedding(child))
        else:
            quantize_module(child, group_size)
