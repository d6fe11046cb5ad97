"""What this machine is: processor, memory, compiler. Read from the system, no torch."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

# Instruction sets that change what runs fast, in the kernel's spelling.
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
ARM_INSTRUCTION_SETS = ("asimd", "bf16", "i8mm", "sve")


@dataclass(frozen=True)
class Machine:
    """A machine as the operating system describes it; `memory_*` in bytes."""

    system: str
    processor: str
    architecture: str
    cores: int
    instruction_sets: tuple[str, ...]
    memory_total: int
    memory_available: int
    compiler: str | None

    @property
    def fast_bfloat16(self) -> bool:
        """Whether the processor multiplies bfloat16 in hardware."""
        return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(self.instruction_sets))


def describe_machine() -> Machine:
    """Read the machine's description; never raises, unknown texts are "unknown"."""
    processor, flags = _processor()
    total, available = _memory()
    wanted = INSTRUCTION_SETS + ARM_INSTRUCTION_SETS
    return Machine(
        system=platform.platform(terse=True),
        processor=processor,
        architecture=platform.machine(),
        cores=usable_cores(),
        instruction_sets=tuple(name for name in wanted if name in flags),
        memory_total=total,
        memory_available=available,
        compiler=_compiler(),
    )


def usable_cores() -> int:
    """Return how many cores this process may use: affinity and cgroup quota considered."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def free_gpu_memory(library: str = "libnvidia-ml.so.1") -> int | None:
    """Return the free bytes of the first NVIDIA GPU that may be used, None where there is none.

    Args:
        library: NVIDIA's management library, which its driver installs.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if not first.isdigit():  # none, or one named by its UUID, which the driver resolves
        return None
    try:
        nvml = ctypes.CDLL(library)
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return None
    try:
        device, memory = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()  # total, free, used
        if nvml.nvmlDeviceGetHandleByIndex_v2(int(first), ctypes.byref(device)) != 0:
            return None
        if nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) != 0:
            return None
        return memory[1]
    finally:
        nvml.nvmlShutdown()


def _processor() -> tuple[str, set[str]]:
    fields: dict[str, str] = {}
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name") or platform.processor() or "unknown", flags


def _memory() -> tuple[int, int]:
    """Return (total, available) bytes: the machine's, or the cgroup's where that is less."""
    info = {}
    for line in _read("/proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        info[key] = int(value.split()[0]) * 1024
    total, available = info.get("MemTotal", 0), info.get("MemAvailable", 0)
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit() and int(limit) < total:
        used = int(_read("/sys/fs/cgroup/memory.current").strip() or 0)
        total, available = int(limit), min(available, max(0, int(limit) - used))
    return total, available


@lru_cache(maxsize=1)
def _compiler() -> str | None:
    """Return the C++ compiler's own first line, or None without one."""
    path = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if path is None:
        return None
    try:
        output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return output.stdout.partition("\n")[0] or None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
