from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench.memory_growth.footprint import Footprint, parse_smaps

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")

MIB = 2**20
PROGRAM = """
import sys
held = []
for line in sys.stdin:
    held.append(bytearray(b"x" * (64 << 20)))
    held.append(open("/dev/null"))
    print("done", flush=True)
"""


def test_fields_of_smaps_are_bytes() -> None:
    text = "55-7f ---p 00000000 00:00 0  [rollup]\nRss:   1744 kB\nAnonymous:    12 kB\n"
    assert parse_smaps(text) == {"Rss": 1744 * 1024, "Anonymous": 12 * 1024}


def test_what_a_process_takes_is_seen() -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=pipe, stdout=pipe) as child:
        assert child.stdin is not None
        assert child.stdout is not None

        def hold_more() -> Footprint:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(b"\n")
            child.stdin.flush()
            assert child.stdout.readline() == b"done\n"
            return Footprint.of(child.pid)

        first, second = hold_more(), hold_more()
        child.stdin.close()
    gained = second.anonymous - first.anonymous
    assert gained == pytest.approx(64 * MIB, abs=MIB)
    assert second.files == first.files + 1
    assert second.threads == 1
    assert second.rss >= second.pss >= second.anonymous


def test_own_process() -> None:
    own = Footprint.of(os.getpid())
    assert own.threads >= 1
    assert own.files == pytest.approx(len(list(Path("/proc/self/fd").iterdir())), abs=2)
