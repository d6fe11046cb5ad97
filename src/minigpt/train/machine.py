"""What decides a run's speed and bits: device, number types, compiler, measured matrix peak."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import torch

from minigpt.core.errors import ConfigError, StorageError
from minigpt.core.machine import describe_machine
from minigpt.core.storage import home, write_atomic

_PEAK_SIZE = {"cpu": 2048, "cuda": 8192}
_PEAK_SECONDS = 0.5


def choose_device(device: str) -> str:
    """Return the device to use for "auto", "cpu" or "cuda".

    Raises:
        ConfigError: CUDA is asked for, but torch sees none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = cuda, but torch sees no GPU", remedy="--set device=cpu")
    return device


def has_fast_bfloat16(device: str) -> bool:
    """Tell whether matrix products in bfloat16 run in hardware."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return describe_machine().fast_bfloat16


def has_compiler(device: str) -> bool:
    """Tell whether `torch.compile` finds what it needs: a C++ compiler, for CUDA also triton."""
    compiler = describe_machine().compiler is not None
    return compiler and (device == "cpu" or find_spec("triton") is not None)


def available_memory(device: str) -> int | None:
    """Return the bytes that this rank may use, of the GPU or its share of the machine's.

    None where the system does not say.
    """
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return describe_machine().memory_available // ranks_here or None


def numeric_environment(device: str) -> dict[str, Any]:
    """Return what besides config and threads decides the bits of a result."""
    described = {"torch": torch.__version__}
    if device == "cuda":
        return described | {"gpu": torch.cuda.get_device_name()}
    machine = describe_machine()
    return described | {
        "processor": machine.processor,
        "architecture": machine.architecture,
        "instruction_sets": list(machine.instruction_sets),
    }


def measured_peak(device: str, dtype: torch.dtype) -> float:
    """Measure the dense matrix peak in FLOP/s with torch's current threads.

    A product of two square matrices, the best of half a second's runs and of what was measured
    before, which minigpt's home remembers by machine, library, threads and type: what a busy
    machine measured low is corrected by the next run.
    """
    signature = {
        **numeric_environment(device),
        "dtype": str(dtype),
        "threads": torch.get_num_threads() if device == "cpu" else 0,
    }
    key = hashlib.sha256(json.dumps(signature, sort_keys=True).encode()).hexdigest()[:16]
    cache = home() / "peaks" / f"{key}.json"
    known = 0.0
    with suppress(OSError, ValueError, TypeError, KeyError):
        known = float(json.loads(cache.read_text())["flops_per_second"])
    peak = max(known, _measure(device, dtype))
    with suppress(StorageError):  # without it the next run knows only its own measurement
        write_atomic(cache, json.dumps({"flops_per_second": peak, **signature}).encode())
    return peak


def _measure(device: str, dtype: torch.dtype) -> float:
    size = _PEAK_SIZE[device]
    left = torch.ones(size, size, device=device, dtype=dtype)
    right = torch.ones(size, size, device=device, dtype=dtype)
    best, start, runs = float("inf"), time.perf_counter(), 0
    while runs < 3 or time.perf_counter() - start < _PEAK_SECONDS:
        begin = time.perf_counter()
        torch.mm(left, right)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
        runs += 1
    return float(2 * size**3 / best)
