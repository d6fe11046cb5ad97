"""Keeps the pages of freed tensors, so that each step does not fault them in again.

glibc returns large blocks to the kernel as soon as they are freed. A training step allocates
and frees the same hundreds of megabytes every time, and on virtual machines the page faults and
zeroing cost a fifth of the step. Here the heap keeps what it has, in huge pages.
"""

from __future__ import annotations

import ctypes
import platform
import sys

# glibc's malloc.h and Linux's mman-common.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
_MADV_HUGEPAGE = 14
_HUGE_PAGE = 2 << 20


def keep_freed_memory(reserve: int) -> bool:
    """Let this process's heap keep freed memory; call before the large allocations.

    Process-wide and for good, so it is for a program's own process, not for a library call.
    Resident memory then stays at its peak. Other C libraries than glibc are left alone.

    Args:
        reserve: Bytes of address space to back by huge pages where the kernel lets programs
            ask for them; uses no memory before it is written to.

    Returns:
        Whether this is glibc and it took the settings.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = (ctypes.c_size_t,)
    libc.free.argtypes = (ctypes.c_void_p,)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    # One arena: the backward pass runs in a thread of its own, whose arena could not serve
    # blocks of over 64 MB and would keep a second copy of the pages.
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))
    if not all(libc.mallopt(name, value) for name, value in settings):
        return False
    address = libc.malloc(reserve)  # grows the heap; nothing is touched
    if address:
        first = -(-address // _HUGE_PAGE) * _HUGE_PAGE
        length = address + reserve - first
        # Refused where transparent huge pages are off: then the pages are small, but kept.
        libc.madvise(first, length // _HUGE_PAGE * _HUGE_PAGE, _MADV_HUGEPAGE)
        libc.free(address)
    return True
