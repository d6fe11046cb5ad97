"""How one layer's keys and values lie in memory, for the kernels; `csrc/args_attention.h` in torch.

A cache is (blocks, block_bytes) of bytes: a block is one run of bytes, which can be copied, hashed
or written to disk without knowing what is in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minigpt.kernels import library
from minigpt.kernels.cache_format import CacheFormat, token_bytes

GROUP = 16
"""Tokens that lie together; a block holds whole groups."""
MAX_SHARED = 32
"""Most query heads that share a key and value head."""
MAX_HEAD_DIM = 256

_NUMBERS: dict[CacheFormat, int] = {"float32": 0, "bfloat16": 1, "int8": 2}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


class _Parts(NamedTuple):
    """Views of a cache, each (blocks, heads, block_size / 16, ...)."""

    keys: Tensor
    """(..., head_dim / depth, 16, depth)"""
    values: Tensor
    """(..., 16 / depth, head_dim, depth)"""
    key_scales: Tensor | None
    """(..., 16), of int8 alone."""
    value_scales: Tensor | None


@dataclass(frozen=True)
class KVLayout:
    """Shape and format of a layer's cache.

    Attributes:
        format: What a number is kept in. int8 has an fp32 scale for each token and head.
        block_size: Tokens in a block, a multiple of 16.
        kv_heads: Key and value heads.
        head_dim: Width of a head, a multiple of 16 up to 256.
    """

    format: CacheFormat
    block_size: int
    kv_heads: int
    head_dim: int

    def fits(self, heads: int) -> bool:
        """Whether the kernels can serve this shape with so many query heads."""
        return (
            self.block_size % GROUP == 0
            and self.head_dim % 16 == 0
            and self.head_dim <= MAX_HEAD_DIM
            and heads % self.kv_heads == 0
            and heads // self.kv_heads <= MAX_SHARED
        )

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return token_bytes(self.format, self.kv_heads, self.head_dim)

    def numbers(self) -> list[int]:
        """Return what the C functions take: format, block_size, kv_heads, head_dim."""
        return [_NUMBERS[self.format], self.block_size, self.kv_heads, self.head_dim]

    @classmethod
    def from_numbers(cls, numbers: list[int]) -> KVLayout:
        """Invert `numbers`."""
        names = {number: name for name, number in _NUMBERS.items()}
        return cls(names[numbers[0]], *numbers[1:])

    def allocate(self, num_blocks: int) -> Tensor:
        """Return zeros, (num_blocks, block_bytes) uint8; pages are taken when first written.

        Zero matters: what a row does not see enters with weight 0, which a NaN would survive.
        """
        shape = (num_blocks, self.block_size * self.token_bytes)
        cache = torch.from_numpy(np.zeros(math.prod(shape), dtype=np.uint8)).view(shape)
        kernels = library.loaded()
        if kernels is not None:
            kernels.functions.mg_advise_huge(cache.data_ptr(), cache.nbytes)
        return cache

    def write(self, cache: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store (N, heads, head_dim) keys and values at (N,) slots, block * block_size + place."""
        parts = self._parts(cache)
        depth = parts.keys.shape[-1]
        block, place = slots.long() // self.block_size, slots.long() % self.block_size
        group, lane = place // GROUP, place % GROUP
        if parts.key_scales is not None and parts.value_scales is not None:
            keys, parts.key_scales[block, :, group, lane] = quantize_heads(keys)
            values, parts.value_scales[block, :, group, lane] = quantize_heads(values)
        dtype = parts.keys.dtype
        parts.keys[block, :, group, :, lane] = keys.to(dtype).view(*keys.shape[:2], -1, depth)
        parts.values[block, :, group, lane // depth, :, lane % depth] = values.to(dtype)

    def read(self, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return (tokens, heads, head_dim) float32 keys and values of whole blocks."""
        parts = self._parts(cache[blocks.long()])
        keys = parts.keys.float().transpose(-3, -2).flatten(-2)  # (B, K, groups, 16, D)
        values = parts.values.float().transpose(-2, -1).flatten(-3, -2)
        if parts.key_scales is not None and parts.value_scales is not None:
            keys = keys * parts.key_scales[..., None]
            values = values * parts.value_scales[..., None]
        return tuple(  # type: ignore[return-value]
            part.flatten(2, 3).transpose(1, 2).flatten(0, 1) for part in (keys, values)
        )

    def _parts(self, cache: Tensor) -> _Parts:
        dtype = _DTYPES[self.format]
        depth = 2 if self.format == "bfloat16" else 1
        cells = cache.view(cache.shape[0], self.kv_heads, -1)
        size = self.block_size * self.head_dim * dtype.itemsize
        shape = (*cells.shape[:2], self.block_size // GROUP)
        keys = cells[..., :size].view(dtype)
        values = cells[..., size : 2 * size].view(dtype)
        key_scales = value_scales = None
        if self.format == "int8":
            scales = cells[..., 2 * size :].view(torch.float32)
            key_scales, value_scales = (
                part.view(*shape, GROUP) for part in scales.chunk(2, dim=-1)
            )
        return _Parts(
            keys.view(*shape, self.head_dim // depth, GROUP, depth),
            values.view(*shape, GROUP // depth, self.head_dim, depth),
            key_scales,
            value_scales,
        )


def quantize_heads(heads: Tensor) -> tuple[Tensor, Tensor]:
    """Round (..., D) to int8, each vector by its largest magnitude; returns it and (...) scales."""
    wide = heads.float()
    scale = wide.abs().amax(-1) / 127
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (wide / scale[..., None]).round().clamp(-127, 127).to(torch.int8), scale
