"""The library is found, chooses its level and shares torch's threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minigpt.core.machine import describe_machine
from minigpt.kernels import library

PROGRAM = """
from minigpt.kernels import library
found = library.find()
print(getattr(found, "level", None) or found.reason)
"""


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def kernels() -> library.Kernels:
    found = library.loaded()
    if found is None:
        pytest.skip("no kernels here")
    return found


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_a_compiler_means_kernels() -> None:
    found = library.find()
    assert isinstance(found, library.Kernels), found


def test_the_fastest_level_is_taken() -> None:
    found = kernels()
    has = set(describe_machine().instruction_sets)
    assert found.levels[0] == "scalar"
    assert ("avx2" in found.levels) == ("avx2" in has)
    wide = {"avx512f", "avx512_vnni", "avx512_bf16"} <= has
    assert ("avx512" in found.levels) == wide
    assert ("amx" in found.levels) == (wide and {"amx_bf16", "amx_int8"} <= has)
    assert python(PROGRAM, MINIGPT_KERNELS="").stdout.strip() == found.levels[-1]


def test_the_environment_chooses_the_level() -> None:
    for level in kernels().levels:
        assert python(PROGRAM, MINIGPT_KERNELS=level).stdout.strip() == level


def test_the_environment_switches_kernels_off() -> None:
    assert python(PROGRAM, MINIGPT_KERNELS="off").stdout.strip() == "MINIGPT_KERNELS=off"


def test_an_unknown_level_is_refused() -> None:
    done = python(PROGRAM, MINIGPT_KERNELS="sse9")
    assert "MINIGPT_KERNELS=sse9: no such level of kernels (one of scalar, " in done.stderr


def test_a_level_that_cannot_run_is_refused() -> None:
    absent = next(level for level in library.LEVELS if level not in kernels().levels)
    done = python(PROGRAM, MINIGPT_KERNELS=absent)
    assert f"MINIGPT_KERNELS={absent}: this machine runs the levels scalar" in done.stderr


@pytest.mark.parametrize("content", [b"not a library", b""])
def test_a_broken_library_is_an_absence_with_a_remedy(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "lib.so"
    broken.write_bytes(content)
    monkeypatch.setattr(library, "_PATH", broken)
    library.find.cache_clear()
    try:
        found = library.find()
    finally:
        library.find.cache_clear()
    assert isinstance(found, library.Absence) and "make kernels" in found.remedy


@pytest.mark.usefixtures("threads")
def test_threads_are_torchs() -> None:
    found = kernels()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert found.functions.mg_threads() == threads


def test_the_level_changes_while_loaded() -> None:
    found, before = kernels(), kernels().level
    for level in found.levels:
        found.use_level(level)
        assert found.level == kernels().level == level
    found.use_level(before)


def test_one_openmp_runtime_is_loaded() -> None:
    """Two would each keep a pool of threads that spin against each other."""
    kernels()
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line}
    assert len(loaded) == 1, loaded
