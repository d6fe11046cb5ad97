"""The kernels of another processor compile, and give the scalar level's results in emulation."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "src/minigpt/kernels/csrc"
COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64-static"


@pytest.mark.soak
@pytest.mark.skipif(not shutil.which(COMPILER), reason=f"no {COMPILER}")
@pytest.mark.skipif(not shutil.which(EMULATOR), reason=f"no {EMULATOR}")
def test_neon_gives_what_scalar_gives(tmp_path: Path) -> None:
    run("cmake", "-S", str(SOURCES), "-B", str(tmp_path), "-G", "Ninja",
        "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={COMPILER}", "-DSKBUILD_STATE=wheel")  # fmt: skip
    run("cmake", "--build", str(tmp_path))
    program = tmp_path / "levels"
    source = Path(__file__).with_name("levels.cpp")
    run(COMPILER, "-std=c++17", f"-I{SOURCES}", str(source), "-o", str(program), "-ldl")
    library = str(tmp_path / "libminigpt_kernels.so")
    root = "/usr/aarch64-linux-gnu"
    shown = run(EMULATOR, "-cpu", "max", "-L", root, str(program), library)
    assert "neon differs by" in shown, shown


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout
