"""A hash of a logical tensor that its sharding cannot change, because the hash is a sum.

Element i of the flattened tensor contributes key(i) * bits(i) modulo 2**64, in two lanes with
keys of their own; `bits` is the element's raw bits as an integer below 2**32 (an 8-byte element
is two of them) and `key` an odd pseudo-random 64-bit number. Each rank sums over its own part and
the parts add up, whatever they are: rows, columns, blocks. That is multilinear hashing (Carter and
Wegman 1979; Lemire and Kaser, https://arxiv.org/abs/1202.4961).

What it finds, the keys being random: one changed element always (an odd key times a difference
below 2**32 is never 0 modulo 2**64), any other change but for a chance of at most 2**-64 (at most
2**-32 in each lane: the worst is a difference in the highest bit alone, which leaves 32 random
bits). It guards against bad disks and bad resharding, not against an adversary: the keys are
public. SHA-256 of the files does that.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Sums = tuple[int, int]
"""A part's two lanes, each modulo 2**64."""

_MODULUS = 1 << 64
_SEEDS = (0x243F6A8885A308D3, 0x13198A2E03707344)  # digits of pi
_STRIDE = 0x9E3779B97F4A7C15
_BLOCK = 1 << 16  # words at a time: the arrays of one block stay in the cache


def partial_sums(part: Tensor, shape: Sequence[int], offset: Sequence[int]) -> Sums:
    """Sum over one part of a tensor.

    Args:
        part: Contiguous, on the host; any dtype. A box of the whole.
        shape: Of the whole tensor.
        offset: Where the box begins in it, one number a dimension.
    """
    if part.numel() == 0:
        return 0, 0
    words, per_element = _words(part)
    starts, length = _runs(part.shape, shape, offset)
    starts, length = starts * np.uint64(per_element), length * per_element
    table = words.reshape(len(starts), length)
    rows = max(1, _BLOCK // length)
    lanes = [0, 0]
    for row in range(0, len(starts), rows):
        for column in range(0, length, _BLOCK):
            values = table[row : row + rows, column : column + _BLOCK].astype(np.uint64)
            columns = np.arange(column, column + values.shape[1], dtype=np.uint64)
            index = starts[row : row + rows, None] + columns
            index *= np.uint64(_STRIDE)
            for lane, seed in enumerate(_SEEDS):
                keys = _keys(index, seed)
                keys *= values
                lanes[lane] += int(keys.sum(dtype=np.uint64))
    return lanes[0] % _MODULUS, lanes[1] % _MODULUS


def fingerprint(dtype: str, shape: Sequence[int], parts: Iterable[Sums]) -> str:
    """Return the hash of a whole tensor as 32 hexadecimal digits.

    Args:
        dtype: Its name in safetensors' terms, for example F32.
        shape: Of the whole tensor.
        parts: The sums of parts that hold each element once.
    """
    lanes = [0, 0]
    for first, second in parts:
        lanes = [lanes[0] + first, lanes[1] + second]
    text = f"{dtype}{list(shape)}:{lanes[0] % _MODULUS:016x}{lanes[1] % _MODULUS:016x}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _words(part: Tensor) -> tuple[NDArray[np.unsignedinteger], int]:
    """View a tensor's bytes as integers of at most 32 bits; return also how many an element has."""
    size = min(part.element_size(), 4)
    flat = part.detach().reshape(-1).view(torch.uint8).numpy()
    return flat.view(f"<u{size}"), part.element_size() // size


def _runs(
    box: Sequence[int], shape: Sequence[int], offset: Sequence[int]
) -> tuple[NDArray[np.uint64], int]:
    """Cut a box into runs that are contiguous in the whole: their flat beginnings, their length."""
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    outer, length = len(shape), 1
    while outer > 0:
        outer -= 1
        length *= box[outer]
        if box[outer] != shape[outer]:
            break
    begin = sum(o * s for o, s in zip(offset, strides, strict=True))
    starts = np.array([begin], dtype=np.uint64)
    for size, stride in zip(box[:outer], strides[:outer], strict=True):
        steps = np.arange(size, dtype=np.uint64) * np.uint64(stride)
        starts = (starts[:, None] + steps).reshape(-1)
    return starts, length


def _keys(index: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Return an odd pseudo-random number for each index times `_STRIDE`.

    SplitMix64 (Steele, Lea and Flood 2014).
    """
    z = index + np.uint64(seed)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    z |= np.uint64(1)
    return z
