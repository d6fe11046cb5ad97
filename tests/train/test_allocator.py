"""The heap keeps what it has, measured in page faults of a fresh process."""

import platform
import subprocess
import sys

import pytest

_PROGRAM = """
import resource, sys, torch
from minigpt.train.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory(1 << 30)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):  # until the heap has found its size
    torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
before = faults()
for _ in range(8):
    torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_blocks_are_reused_without_page_faults() -> None:
    def faults(mode: str) -> int:
        command = [sys.executable, "-c", _PROGRAM, mode]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        return int(done.stdout)

    assert faults("keep") < 100 < faults("leave")
