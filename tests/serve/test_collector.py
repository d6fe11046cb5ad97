"""In a process of its own: the collector's settings are the whole process's."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc
from minigpt.serve.collector import spare_what_is_loaded
loaded = [[] for _ in range(200_000)]
spare_what_is_loaded()
assert gc.get_freeze_count() >= 200_000
before, held = gc.get_stats()[2]["collections"], []
for number in range(20_000):
    cycle = []
    cycle.append(cycle)
    held = [*held[-3_000:], cycle]
print(gc.get_stats()[2]["collections"] - before)
"""


def test_full_collections_come_though_much_is_loaded() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, check=True
    )
    assert int(done.stdout) >= 1  # 0 where what is loaded is merely frozen
