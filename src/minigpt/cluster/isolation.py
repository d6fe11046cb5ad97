"""Keeping a job within its processors and memory, and ending all of it.

Where cgroup v2 is writable with the cpu and memory controllers, each worker gets a cgroup: a CPU
quota and a memory limit for all its processes together. Elsewhere a worker is pinned to its cores
and each of its processes limited by RLIMIT_DATA, which is weaker: several processes of a worker
may take that much each. Nothing beyond the standard library, as in `attempt.py`.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from minigpt.cluster.attempt import TOKEN_VARIABLE, AttemptSpec

CGROUP_ROOT = Path("/sys/fs/cgroup")
_PERIOD = 100_000  # microseconds over which the kernel enforces a CPU quota


@dataclass(frozen=True)
class Isolation:
    """The means that are in force on this machine.

    Args:
        parent: The cgroup under which those of the jobs go, None where there can be none.
    """

    parent: Path | None

    @property
    def description(self) -> str:
        """One line for people."""
        if self.parent is not None:
            return f"cgroup v2 under {self.parent}: CPU quota and memory limit per worker"
        return "cores by affinity, memory by RLIMIT_DATA per process (no writable cgroup v2)"

    def prepare(self, spec: AttemptSpec, rank: int) -> Callable[[], None]:
        """Return what a worker's process does between fork and exec."""
        cores = spec.workers[rank].cores
        group = self._make_group(spec, rank)

        def enter() -> None:
            if cores:
                os.sched_setaffinity(0, cores)
            if group is not None:
                (group / "cgroup.procs").write_text("0")
            else:
                resource.setrlimit(resource.RLIMIT_DATA, (spec.memory, spec.memory))

        return enter

    def clean_up(self, spec: AttemptSpec) -> None:
        """Kill whatever is left of an attempt, and remove its cgroups."""
        kill_all(spec.token)
        if self.parent is not None:
            for group in self.parent.glob(f"{spec.token}-*"):
                with contextlib.suppress(OSError):
                    (group / "cgroup.kill").write_text("1")
                for _ in range(50):
                    with contextlib.suppress(OSError):
                        group.rmdir()
                    if not group.exists():
                        break
                    time.sleep(0.02)

    def _make_group(self, spec: AttemptSpec, rank: int) -> Path | None:
        if self.parent is None:
            return None
        group = self.parent / f"{spec.token}-{rank}"
        group.mkdir(exist_ok=True)
        (group / "cpu.max").write_text(f"{round(spec.cpus * _PERIOD)} {_PERIOD}")
        (group / "memory.max").write_text(str(spec.memory))
        return group


def detect_isolation(root: Path = CGROUP_ROOT) -> Isolation:
    """Find out what this process may use; makes the cgroup `minigpt` where it may."""
    controllers = _words(root / "cgroup.controllers")
    if not {"cpu", "memory"} <= controllers:
        return Isolation(None)
    parent = root / "minigpt"
    try:
        parent.mkdir(exist_ok=True)
        for group in (root, parent):
            if not {"cpu", "memory"} <= _words(group / "cgroup.subtree_control"):
                (group / "cgroup.subtree_control").write_text("+cpu +memory")
    except OSError:
        return Isolation(None)
    return Isolation(parent)


def kill_all(token: str, timeout: float = 10.0) -> None:
    """Kill every process that has the attempt's token in its environment, however it was started.

    Looks again until none is left, so that one that forks meanwhile does not get away.
    """
    deadline = time.monotonic() + timeout
    while found := list(processes_of(token)):
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)


def processes_of(token: str) -> Iterator[int]:
    """Yield the ids of an attempt's live processes (Linux: by /proc)."""
    mark = f"{TOKEN_VARIABLE}={token}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0") and not _is_zombie(entry):
                yield int(entry.name)
        except OSError:
            continue  # gone, or another user's


def least_used(cores: Sequence[int], uses: Sequence[int], count: int) -> list[int]:
    """Return `count` of `cores` that occur least often in `uses`."""
    return sorted(cores, key=lambda core: (uses.count(core), core))[:count]


def _is_zombie(entry: Path) -> bool:
    return (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _words(path: Path) -> set[str]:
    try:
        return set(path.read_text().split())
    except OSError:
        return set()
