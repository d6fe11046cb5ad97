"""Find, load and describe the kernel library: a shared object of C functions over raw pointers.

The package's build makes it (`csrc/CMakeLists.txt`); without a C++ compiler there is none, and
torch's own operators serve, slower. It holds one set of kernels for each instruction set
("level"); the fastest that the machine runs is taken, or the one that MINIGPT_KERNELS names.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from minigpt.core.errors import ConfigError

ENVIRONMENT = "MINIGPT_KERNELS"
OFF = "off"
# Every level of any build; which of them this build has is asked of the library.
LEVELS = ("scalar", "avx2", "avx512", "amx", "neon")

_PATH = Path(__file__).parent / "lib" / "libminigpt_kernels.so"
# `mg_interface` in csrc/dispatch.cpp: a library built from other sources is not used.
_INTERFACE = 2

# Arguments of each exported function; those listed here return nothing.
_KERNELS: dict[str, list[Any]] = {
    "mg_use_level": [c_int32],
    # dtype, layout (format, block_size, kv_heads, head_dim); qkv, cache, slots, query_norm,
    # key_norm, cos, sin; rows, heads, epsilon
    "mg_qkv": [*[c_int32] * 5, *[c_void_p] * 7, c_int64, c_int32, c_float],
    # dtype, layout; query, query_stride, output, cache, chunks, num_chunks, tables, heads, window,
    # scale
    "mg_paged_attention": [
        *[c_int32] * 5,
        *[c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_void_p],
        *[c_int32, c_int32, c_float],
    ],
    # dtype, input, residual, weight, bias, output, rows, width, epsilon
    "mg_layer_norm": [c_int32, *[c_void_p] * 5, c_int64, c_int64, c_float],
    # dtype, input, output, rows, width, gated
    "mg_activation": [c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int32],
    # logits, best, log_sum, rows, width
    "mg_largest": [*[c_void_p] * 3, c_int64, c_int64],
    # logits, values, places, rows, width, count
    "mg_top": [*[c_void_p] * 3, *[c_int64] * 3],
    # weight, packed, columns, units
    "mg_pack": [c_void_p, c_void_p, c_int64, c_int64],
    "mg_advise_huge": [c_void_p, c_int64],
    # begin, bytes
    "mg_read": [c_void_p, c_int64],
    # dtype, input, residual, weight, output, rows, width, epsilon
    "mg_rms_norm": [c_int32, *[c_void_p] * 4, c_int64, c_int64, c_float],
}
_QUERIES: dict[str, tuple[list[Any], Any]] = {
    "mg_interface": ([], c_int32),
    "mg_levels": ([], c_int32),
    "mg_level_name": ([c_int32], c_char_p),
    "mg_level_runs": ([c_int32], c_int32),
    "mg_level_in_use": ([], c_int32),
    "mg_threads": ([], c_int32),
    # arithmetic, steps
    "mg_peak": ([c_int32, c_int64], c_int64),
    # plan, batch
    "mg_step": ([c_void_p, c_void_p], c_int32),
    # weight, input dtype, output dtype, input, output, rows, digits
    "mg_linear": ([c_void_p, c_int32, c_int32, c_void_p, c_void_p, c_int64, c_int32], c_int32),
}


@dataclass(frozen=True)
class Kernels:
    """The loaded library.

    Attributes:
        functions: The exported functions; each takes raw addresses and checks nothing.
        levels: Names of the levels that this machine runs, slowest first.
    """

    functions: ctypes.CDLL
    levels: tuple[str, ...]

    @property
    def level(self) -> str:
        """The level in use."""
        return _names(self.functions)[int(self.functions.mg_level_in_use())]

    def use_level(self, level: str) -> None:
        """Use the kernels of another level, one of `levels`; weights already packed stay good."""
        assert level in self.levels, level
        self.functions.mg_use_level(_names(self.functions).index(level))


@dataclass(frozen=True)
class Absence:
    """Why there is no library to use, and what would mend that."""

    reason: str
    remedy: str


@lru_cache(maxsize=1)
def find() -> Kernels | Absence:
    """Load the library once and choose its level.

    Raises:
        ConfigError: MINIGPT_KERNELS names no level, or one that cannot run here.
    """
    wanted = os.environ.get(ENVIRONMENT, "")
    if wanted and wanted not in (*LEVELS, OFF):
        choices = ", ".join((*LEVELS, OFF))
        raise ConfigError(
            f"{ENVIRONMENT}={wanted}: no such level of kernels", remedy=f"one of {choices}"
        )
    if wanted == OFF:
        return Absence(f"{ENVIRONMENT}=off", remedy=f"unset {ENVIRONMENT}")
    opened = _open()
    if isinstance(opened, Absence):
        return opened
    levels = _levels(opened)
    level = wanted or levels[-1]
    if level not in levels:
        raise ConfigError(
            f"{ENVIRONMENT}={wanted}: this machine runs the levels {', '.join(levels)} alone",
            remedy=f"unset {ENVIRONMENT}",
        )
    kernels = Kernels(opened, levels)
    kernels.use_level(level)
    return kernels


def loaded() -> Kernels | None:
    """Return the library, or None where there is none to use."""
    found = find()
    return found if isinstance(found, Kernels) else None


def _open() -> ctypes.CDLL | Absence:
    if not _PATH.exists():
        return Absence(
            "the package was built without its kernels",
            remedy="install g++ and install minigpt anew, or `make kernels` in a checkout",
        )
    # torch first: the library then finds torch's OpenMP runtime loaded and shares its threads.
    import torch  # noqa: F401

    try:
        library = ctypes.CDLL(str(_PATH))
        signatures = _QUERIES | {name: (types, None) for name, types in _KERNELS.items()}
        for name, (arguments, result) in signatures.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, result
    except (OSError, AttributeError) as error:
        return Absence(str(error), remedy="build it anew: `make kernels`")
    if library.mg_interface() != _INTERFACE:
        return Absence(f"{_PATH} is of another version", remedy="build it anew: `make kernels`")
    return library


def _levels(library: ctypes.CDLL) -> tuple[str, ...]:
    names = _names(library)
    return tuple(name for i, name in enumerate(names) if library.mg_level_runs(i))


def _names(library: ctypes.CDLL) -> list[str]:
    return [library.mg_level_name(i).decode() for i in range(library.mg_levels())]
