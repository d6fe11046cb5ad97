"""Limits that the kernel enforces, on this machine with the means that it has."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minigpt.cluster.attempt import TOKEN_VARIABLE, AttemptSpec, WorkerSpec
from minigpt.cluster.isolation import (
    CGROUP_ROOT,
    Isolation,
    detect_isolation,
    kill_all,
    least_used,
    processes_of,
)


def make_spec(token: str, memory: int = 1 << 30, cores: tuple[int, ...] = ()) -> AttemptSpec:
    return AttemptSpec(token, ["true"], "/", [WorkerSpec({}, list(cores))], 0.5, memory, {}, 60, 5)


def run_limited(
    isolation: Isolation, spec: AttemptSpec, source: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", source],
        preexec_fn=isolation.prepare(spec, 0),
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {TOKEN_VARIABLE: spec.token},
    )


def test_memory_beyond_the_limit_is_refused_by_the_kernel() -> None:
    isolation = Isolation(None)
    assert "RLIMIT_DATA" in isolation.description
    spec = make_spec("t-memory", memory=300 << 20)
    assert run_limited(isolation, spec, "x = bytearray(100 << 20)").returncode == 0
    failed = run_limited(isolation, spec, "x = bytearray(400 << 20)")
    assert failed.returncode == 1 and "MemoryError" in failed.stderr


def test_a_worker_runs_on_its_cores() -> None:
    core = max(os.sched_getaffinity(0))
    done = run_limited(
        Isolation(None),
        make_spec("t-cores", cores=(core,)),
        "import os; print(os.sched_getaffinity(0))",
    )
    assert done.stdout.strip() == str({core})


def test_cgroup_limits_are_written_where_the_kernel_reads_them(tmp_path: Path) -> None:
    """The files of cgroup v2; a directory stands for it where the machine has none."""
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids")
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory")
    (tmp_path / "minigpt").mkdir()
    (tmp_path / "minigpt" / "cgroup.subtree_control").write_text("cpu memory")
    isolation = detect_isolation(tmp_path)
    assert isolation.parent == tmp_path / "minigpt"
    isolation.prepare(make_spec("t-cgroup", memory=12345), 0)
    group = tmp_path / "minigpt" / "t-cgroup-0"
    assert (group / "cpu.max").read_text() == "50000 100000"
    assert (group / "memory.max").read_text() == "12345"


def test_without_controllers_there_is_no_cgroup(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("hugetlb")
    assert detect_isolation(tmp_path) == Isolation(None)
    assert detect_isolation(tmp_path / "nowhere") == Isolation(None)


def test_real_cgroups_where_this_machine_lets_us() -> None:
    isolation = detect_isolation(CGROUP_ROOT)
    if isolation.parent is None:
        pytest.skip("no writable cgroup v2 with cpu and memory controllers here")
    spec = make_spec("t-real", memory=300 << 20)
    try:
        killed = run_limited(isolation, spec, "x = b'x' * (600 << 20)")
        assert killed.returncode != 0
    finally:
        isolation.clean_up(spec)
    assert not (isolation.parent / "t-real-0").exists()


def test_kill_all_finds_processes_by_their_token_and_no_others() -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    ours = subprocess.Popen(
        sleeper, env=os.environ | {TOKEN_VARIABLE: "t-1"}, start_new_session=True
    )
    other = subprocess.Popen(sleeper, env=os.environ | {TOKEN_VARIABLE: "t-10"})
    try:
        deadline = time.monotonic() + 30
        while list(processes_of("t-1")) != [ours.pid]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        kill_all("t-1")
        assert ours.wait(10) == -9 and other.poll() is None
    finally:
        for process in (ours, other):
            process.kill()
            process.wait()


def test_least_used_cores_come_first() -> None:
    assert least_used([0, 1, 2, 3], [0, 0, 1, 3], 2) == [2, 1]
