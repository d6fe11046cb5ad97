"""Attention over the paged KV cache, with torch's own operators.

Of a step's flat batch (1, N) the decode rows come first, then the rows of each prefill chunk.
Everything that does not depend on the layer (slots, block ids, masks) is made once a step.
Head counts: H query heads, K key and value heads, D the width of a head; B blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.engine.batch import Span
from minigpt.model.config import ModelConfig

_GROUP_TOKENS = 2048
"""Most cached tokens that one group of decode rows gathers. Measured at 12 heads of 64 in
bfloat16: 15-25 % faster than row by row with 16 or 32 rows; larger groups gain no more, and
what they gather leaves the processor's cache before it is read."""


class KVCache:
    """Keys and values of all cached tokens, two tensors a layer, each (B, block_size, K, D).

    Memory is zero at first and on a CPU only taken as blocks are written. Zero matters: a
    masked entry still enters the product with weight 0, which a stray NaN would survive.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_blocks, block_size, model.num_kv_heads, model.head_dim)
        self.block_size = block_size
        self.dtype = dtype
        self.keys = [_zeros(shape, dtype, device) for _ in range(model.num_layers)]
        self.values = [_zeros(shape, dtype, device) for _ in range(model.num_layers)]

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store (N, K, D) keys and values at (N,) slots; slot = block * block_size + offset."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, key)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, value)

    def gather(self, layer: int, blocks: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Copy `rows` equally long runs of blocks; returns keys and values (rows, K, S, D)."""
        key = self.keys[layer].index_select(0, blocks)
        value = self.values[layer].index_select(0, blocks)
        shape = (rows, -1, key.shape[2], key.shape[3])
        return key.view(shape).transpose(1, 2), value.view(shape).transpose(1, 2)

    def copy(self, source: int, destination: int) -> None:
        """Copy one block's keys and values to another, in all layers."""
        for tensor in (*self.keys, *self.values):
            tensor[destination] = tensor[source]

    def clear(self, blocks: SequenceOf[int]) -> None:
        """Zero blocks that may hold NaNs, before others use them."""
        for tensor in (*self.keys, *self.values):
            tensor[list(blocks)] = 0


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of the flat batch that attend together.

    Decode: `count` sequences with one query each. Prefill: one sequence with `count` queries.
    """

    start: int
    count: int
    decode: bool
    blocks: Tensor | None
    """Flat block ids to gather, or None where the chunk sees nothing but itself."""
    length: int
    """Gathered tokens of a sequence that are read."""
    mask: Tensor | None
    """Additive, broadcast to (rows, H, queries, length); None: all is seen, or causal."""


class PagedAttention:
    """`model.attention.Attention` for one step's batch.

    Args:
        cache: Where this step's keys and values go and the earlier ones are.
        chunks: The batch; decode chunks (length 1) before the others, in the order of the rows.
        sliding_window: As in `ModelConfig`.
    """

    def __init__(
        self, cache: KVCache, chunks: SequenceOf[Span], sliding_window: int | None
    ) -> None:
        self._cache = cache
        self._window = sliding_window
        self._dtype = cache.keys[0].dtype
        self._device = cache.keys[0].device
        self._slots = torch.tensor(
            [slot for chunk in chunks for slot in _slots(chunk, cache.block_size)],
            device=self._device,
        )
        decode = [chunk for chunk in chunks if chunk.length == 1]
        assert all(chunk.length == 1 for chunk in chunks[: len(decode)]), "decode comes first"
        self._parts: list[_Rows] = []
        start = 0
        for group in self._group(decode):
            self._parts.append(self._decode_rows(start, group))
            start += len(group)
        for chunk in chunks[len(decode) :]:
            self._parts.append(self._prefill_rows(start, chunk))
            start += chunk.length

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store (1, N, K, D) keys and values and attend; returns (1, N, H, D)."""
        self._cache.write(layer, self._slots, key[0], value[0])
        outputs = []
        for part in self._parts:
            rows = slice(part.start, part.start + part.count)
            if part.decode:
                outputs.append(self._decode(layer, part, query[0, rows]))
            else:
                outputs.append(
                    self._prefill(layer, part, query[:, rows], key[:, rows], value[:, rows])
                )
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).unsqueeze(0)

    def _decode(self, layer: int, part: _Rows, query: Tensor) -> Tensor:
        """(rows, H, D) queries, one a sequence: the heads of a group act as its queries."""
        assert part.blocks is not None
        keys, values = self._cache.gather(layer, part.blocks, part.count)
        grouped = query.view(part.count, keys.shape[1], -1, query.shape[-1])
        output = F.scaled_dot_product_attention(
            grouped, keys[:, :, : part.length], values[:, :, : part.length], attn_mask=part.mask
        )
        return output.reshape(query.shape)

    def _prefill(
        self, layer: int, part: _Rows, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """(1, T, H, D) queries of one sequence, over the cache or over the chunk alone."""
        if part.blocks is None:
            keys, values = key.transpose(1, 2), value.transpose(1, 2)
        else:
            keys, values = self._cache.gather(layer, part.blocks, 1)
            keys, values = keys[:, :, : part.length], values[:, :, : part.length]
        output = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            keys,
            values,
            attn_mask=part.mask,
            is_causal=part.mask is None,
            enable_gqa=query.shape[2] != keys.shape[1],
        )
        return output.transpose(1, 2)[0]

    def _group(self, chunks: SequenceOf[Span]) -> list[list[Span]]:
        """Cut decode chunks, sorted by length, into groups that gather together."""
        groups: list[list[Span]] = []
        for chunk in chunks:
            width = self._num_blocks(chunk)
            if groups:
                first = self._num_blocks(groups[-1][0])
                padded = max(width, first) * (len(groups[-1]) + 1) * self._cache.block_size
                if padded <= _GROUP_TOKENS and abs(width - first) * 4 <= max(width, first, 4):
                    groups[-1].append(chunk)
                    continue
            groups.append([chunk])
        return groups

    def _decode_rows(self, start: int, chunks: list[Span]) -> _Rows:
        """Pad the shorter block tables with their own last block and mask that out."""
        width = max(self._num_blocks(chunk) for chunk in chunks)
        table = np.empty((len(chunks), width), dtype=np.int64)
        first = np.empty((len(chunks), 1), dtype=np.int64)
        for row, chunk in enumerate(chunks):
            begin, end = self._block_range(chunk)
            blocks = chunk.block_table[begin:end]
            table[row] = blocks + blocks[-1:] * (width - len(blocks))
            first[row] = begin * self._cache.block_size
        newest = np.array([[chunk.start] for chunk in chunks])
        length = int((newest - first).max()) + 1
        position = first + np.arange(length)
        hidden = position > newest
        if self._window is not None:
            hidden |= position <= newest - self._window
        mask = self._mask(hidden)[:, None, None, :] if hidden.any() else None
        return _Rows(start, len(chunks), True, self._to_device(table), length, mask)

    def _prefill_rows(self, start: int, chunk: Span) -> _Rows:
        window = self._window
        if chunk.start == 0 and (window is None or chunk.length <= window):
            return _Rows(start, chunk.length, False, None, chunk.length, None)
        begin, end = self._block_range(chunk)
        first = begin * self._cache.block_size
        query = np.arange(chunk.start, chunk.stop)[:, None]
        position = np.arange(first, chunk.stop)[None, :]
        hidden = position > query
        if window is not None:
            hidden |= position <= query - window
        blocks = self._to_device(np.array(chunk.block_table[begin:end]))
        return _Rows(start, chunk.length, False, blocks, chunk.stop - first, self._mask(hidden))

    def _block_range(self, chunk: Span) -> tuple[int, int]:
        """Return the blocks, as a range of the block table, that a chunk's queries can see."""
        oldest = 0 if self._window is None else max(chunk.start + 1 - self._window, 0)
        block_size = self._cache.block_size
        return oldest // block_size, -(-chunk.stop // block_size)

    def _num_blocks(self, chunk: Span) -> int:
        begin, end = self._block_range(chunk)
        return end - begin

    def _to_device(self, array: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Tensor:
        return torch.from_numpy(array.reshape(-1)).to(self._device)

    def _mask(self, hidden: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> Tensor:
        where = torch.from_numpy(hidden).to(self._device)
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(where, -math.inf)


def _slots(chunk: Span, block_size: int) -> list[int]:
    """Return where each of a chunk's tokens lies in the cache."""
    table = chunk.block_table
    return [
        table[token // block_size] * block_size + token % block_size
        for token in range(chunk.start, chunk.stop)
    ]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros; on a CPU numpy's, whose pages the kernel supplies when first touched."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
