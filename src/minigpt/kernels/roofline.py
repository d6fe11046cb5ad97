"""Measure the machine's limits with the kernels' own instructions: memory read, arithmetic.

Each figure is the best of several short runs, since other processes can only slow a run down.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import IntEnum

import torch

from minigpt.kernels.library import Kernels

_READ_BYTES = 4 << 20
_PEAK_STEPS = 20_000


class Arithmetic(IntEnum):
    """What is multiplied; numbers of `Arithmetic` in csrc/args_roofline.h."""

    FLOAT32 = 0
    """Fused multiply-add of fp32: what products with bf16 weights use."""
    BFLOAT16 = 1
    """Dot products of bf16 pairs, where the level has them; else as FLOAT32."""
    INT8 = 2
    """Dot products of four bytes, where the level has them."""


def read_bandwidth(kernels: Kernels, span: int = 512 << 20, repeat: int = 3) -> float:
    """Return bytes a second that torch's threads read together from memory.

    Args:
        kernels: The loaded library.
        span: Bytes that are walked through; more than the caches hold.
        repeat: How often.
    """
    memory = torch.empty(span, dtype=torch.uint8)
    kernels.functions.mg_advise_huge(memory.data_ptr(), span)
    memory.fill_(1)
    starts = range(memory.data_ptr(), memory.data_ptr() + span - _READ_BYTES + 1, _READ_BYTES)
    read = kernels.functions.mg_read
    return _READ_BYTES / min(
        _seconds(read, start, _READ_BYTES) for _ in range(repeat) for start in starts
    )


def peak(kernels: Kernels, arithmetic: Arithmetic, repeat: int = 50) -> float:
    """Return operations a second of torch's threads together; a multiply-add counts two."""
    done = kernels.functions.mg_peak(arithmetic, _PEAK_STEPS)
    run = kernels.functions.mg_peak
    return float(done / min(_seconds(run, arithmetic, _PEAK_STEPS) for _ in range(repeat)))


def _seconds(run: Callable[..., object], *arguments: int) -> float:
    begun = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - begun
