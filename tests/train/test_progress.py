from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minigpt.core.clock import SystemClock
from minigpt.model.decoder import Decoder
from minigpt.train.progress import PHASES, Progress, process_start, read_beacon

CHILD = """
import os, signal, sys, time
from pathlib import Path
from minigpt.train.progress import Progress
progress = Progress(Path(sys.argv[1]))
progress.step = 5
progress.enter("forward")
time.sleep(0.05)
progress.enter("backward", 3)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def no_space() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_the_phases_add_up_to_the_life_of_the_process() -> None:
    began = time.time() - 10
    progress = Progress(began=began)
    for phase in ("data", "forward", "backward", "reduce", "update"):
        progress.enter(phase)
        time.sleep(0.01)
    seconds = progress.seconds()
    assert sum(seconds.values()) == pytest.approx(time.time() - began, abs=0.05)
    assert seconds["start"] == pytest.approx(10, abs=0.1)
    assert all(seconds[phase] >= 0.01 for phase in ("data", "forward", "backward", "reduce"))


def test_a_beacon_outlives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "ranks" / "beacon"
    child = subprocess.run([sys.executable, "-c", CHILD, str(path)])
    assert child.returncode == -signal.SIGKILL
    beacon = read_beacon(path)
    assert beacon is not None
    assert (beacon.step, beacon.micro_batch, beacon.phase) == (5, 3, "backward")
    assert beacon.seconds["forward"] >= 0.05
    later = beacon.seconds_until(beacon.entered + 2)
    assert later["backward"] == pytest.approx(2) and later["forward"] == beacon.seconds["forward"]


def test_what_is_no_beacon_is_none(tmp_path: Path) -> None:
    assert read_beacon(tmp_path / "nothing") is None
    for content in (b"", b"x" * 40, bytes(400)):
        (tmp_path / "beacon").write_bytes(content)
        assert read_beacon(tmp_path / "beacon") is None


@pytest.mark.usefixtures("no_space")
def test_a_full_disk_costs_the_beacon_and_nothing_else(tmp_path: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    progress = Progress(tmp_path / "beacon")
    progress.enter("forward")
    assert progress.phase == "forward"


def test_a_model_tells_its_own_phases(small_decoder: Decoder) -> None:
    from minigpt.model.attention import CausalAttention

    progress, seen = Progress(), []
    progress.listeners.append(lambda phase, step, micro: seen.append((phase, micro)))
    progress.follow(small_decoder)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    positions = torch.arange(8)[None]
    progress.enter("data")
    for _ in range(2):
        hidden = small_decoder(tokens, positions, CausalAttention(None, None))
        small_decoder.logits(hidden).sum().backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():  # a validation is none of its phases
        small_decoder(tokens, positions, CausalAttention(None, None))
    step = [("forward", 0), ("backward", 0), ("reduce", 0)]
    assert seen == [("data", 0), *step, *[(phase, 1) for phase, _ in step]]


def test_a_process_knows_when_it_began() -> None:
    code = (
        "import time; time.sleep(0.3)\n"
        "from minigpt.core.clock import SystemClock\n"
        "from minigpt.train.progress import process_start\n"
        "print(process_start(SystemClock()))"
    )
    before = time.time()
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert float(child.stdout) == pytest.approx(before, abs=0.25)
    assert process_start(SystemClock()) < before


def test_the_phases_are_known_by_number() -> None:
    assert len(set(PHASES)) == len(PHASES) and PHASES[0] == "start"
