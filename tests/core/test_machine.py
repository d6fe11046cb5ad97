import os
import shutil
import subprocess
from pathlib import Path

import psutil
import pytest

from minigpt.core import machine
from minigpt.core.machine import describe_machine, free_gpu_memory, usable_cores


def test_description_agrees_with_another_reader() -> None:
    found = describe_machine()
    assert 1 <= found.cores <= len(os.sched_getaffinity(0))
    assert 0 < found.memory_available <= found.memory_total <= psutil.virtual_memory().total
    assert found.processor and found.architecture


def test_affinity_limits_the_cores() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("flags", "fast"), [("avx2 avx512f", False), ("avx512_bf16", True), ("asimd bf16", True)]
)
def test_fast_bfloat16_follows_the_flags(
    monkeypatch: pytest.MonkeyPatch, flags: str, fast: bool
) -> None:
    texts = {"/proc/cpuinfo": f"model name : Test\nflags : {flags}\n"}
    monkeypatch.setattr(machine, "_read", lambda path: texts.get(path, ""))
    found = describe_machine()
    assert found.fast_bfloat16 is fast
    assert found.processor == "Test"
    assert found.memory_total == 0


def test_a_cgroup_limits_memory_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "/proc/meminfo": "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n",
        "/sys/fs/cgroup/memory.max": str(1 << 30),
        "/sys/fs/cgroup/memory.current": str(3 << 28),
        "/sys/fs/cgroup/cpu.max": "100000 100000",
    }
    monkeypatch.setattr(machine, "_read", lambda path: texts.get(path, ""))
    found = describe_machine()
    assert (found.memory_total, found.memory_available) == (1 << 30, 1 << 28)
    assert found.cores == 1


def test_no_compiler_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    machine._compiler.cache_clear()
    try:
        assert describe_machine().compiler is None
    finally:
        machine._compiler.cache_clear()


_FAKE_NVML = """
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **d) {
    *d = (void *)(unsigned long)(0x7f0000000000 + i);
    return i > 1;
}
int nvmlDeviceGetMemoryInfo(void *d, unsigned long long *m) {
    m[0] = 100; m[1] = 40 + ((unsigned long)d & 1); m[2] = 60;
    return (unsigned long)d >> 40 != 0x7f;
}
"""


@pytest.mark.parametrize(("visible", "free"), [("0", 40), ("1,0", 41), ("2", None), ("", None)])
def test_free_gpu_memory_comes_from_the_drivers_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, free: int | None
) -> None:
    """Against a library with the driver's interface, as no GPU is here."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    (tmp_path / "nvml.c").write_text(_FAKE_NVML)
    library = tmp_path / "nvml.so"
    source = str(tmp_path / "nvml.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), source], check=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert free_gpu_memory(str(library)) == free
    assert free_gpu_memory("libno-such.so.1") is None
