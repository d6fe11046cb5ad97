"""Int8 weight-only layers: weights stored in int8, activations and results in floating point.

Symmetric, one scale per output channel: w[o, i] = weight[o, i] * scale[o]. A decode step reads
every weight once, so halving their bytes against bf16 makes it faster for a few sequences at a
time; from about 8 rows on bf16 weights are faster on a CPU with bf16 matrix units.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Up to this many rows the packed kernel beats converting the weight and multiplying in bf16:
# 1024 x 4096 on 2 cores takes 0.10 against 0.69 ms at 1 row, 0.48 / 0.72 at 8, 0.79 / 0.68 at 16.
_PACKED_ROWS = 12

# Weights are converted this many elements at a time: 768 x 50257 at 16 rows takes 7 ms so, 32 ms
# at once, since memory that large comes fresh from the system at every call.
_BLOCK_ELEMENTS = 1 << 22


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


def quantize_module(module: nn.Module) -> None:
    """Replace every linear layer and token embedding below `module` by its int8 form.

    Learned positions stay as they are: they are small, and added, not multiplied.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear.from_linear(child))
        elif isinstance(child, nn.Embedding) and name == "embed_tokens":
            setattr(module, name, Int8Embedding.from_embedding(child))
        else:
            quantize_module(child)
