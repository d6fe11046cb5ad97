"""Jobs as processes of this machine, under a supervisor of their own each."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from minigpt.cluster.attempt import (
    SPEC_FILE,
    STATUS_FILE,
    AttemptSpec,
    WorkerSpec,
    claim,
    claimed_by,
    is_locked,
    read_result,
    read_spec,
    write_json,
)
from minigpt.cluster.config import GIB, JobConfig, NodeConfig
from minigpt.cluster.executor import Observation
from minigpt.cluster.isolation import detect_isolation, least_used
from minigpt.cluster.records import Attempt
from minigpt.cluster.timeline import Node, Placement
from minigpt.core.job_status import read_status
from minigpt.core.machine import describe_machine
from minigpt.core.storage import storage_errors

_FENCED = "scheduler"


class LocalExecutor:
    """Executor on this machine.

    Args:
        nodes: How to divide the machine into nodes; empty is one node, `local`, with all of it.
            The numbers are believed: nodes may promise more than the machine has.
    """

    def __init__(self, nodes: Mapping[str, NodeConfig]) -> None:
        self._nodes = dict(nodes) or {"local": _this_machine()}
        self._cores, self._gpus = _divide(self._nodes)
        self._isolation = detect_isolation()
        self._children: dict[Path, subprocess.Popen[bytes]] = {}
        self._specs: dict[Path, AttemptSpec] = {}

    @property
    def isolation(self) -> str:
        return self._isolation.description

    def nodes(self) -> Sequence[Node]:
        return [Node(name, config.amount()) for name, config in self._nodes.items()]

    def start(self, attempt: Attempt, config: JobConfig) -> None:
        directory = attempt.directory
        with storage_errors(f"write {directory}"):
            directory.mkdir(parents=True, exist_ok=True)
            spec = self._make_spec(attempt, config)
            write_json(directory, SPEC_FILE, spec)
            with (directory / "supervisor.log").open("ab") as log:
                child = subprocess.Popen(
                    [sys.executable, "-m", "minigpt.cluster.supervisor", str(directory)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that no signal to the scheduler reaches it
                )
        self._children[directory], self._specs[directory] = child, spec

    def observe(self, attempt: Attempt) -> Observation:
        directory = attempt.directory
        child = self._children.get(directory)
        # The order matters: what is dead now has written all that it ever will.
        alive = is_locked(directory) or (child is not None and child.poll() is None)
        result = read_result(directory)
        if result is not None:
            self._forget(directory)
            return Observation("ended", result)
        if alive:
            if directory not in self._specs and (spec := read_spec(directory)) is not None:
                self._specs[directory] = spec
            return Observation("alive", status=read_status(directory / STATUS_FILE))
        with storage_errors(f"write {directory}"):
            directory.mkdir(parents=True, exist_ok=True)
            never_began = claim(directory, _FENCED) or claimed_by(directory) == _FENCED
        if not never_began and (spec := read_spec(directory)) is not None:
            self._isolation.clean_up(spec)
        self._forget(directory)
        return Observation("never began" if never_began else "lost")

    def stop(self, attempt: Attempt) -> None:
        self._signal(attempt.directory, signal.SIGTERM)

    def kill(self, attempt: Attempt) -> None:
        self._signal(attempt.directory, signal.SIGKILL)
        if (spec := read_spec(attempt.directory)) is not None:
            self._isolation.clean_up(spec)

    def close(self) -> None:
        pass  # supervisors live on

    def _signal(self, directory: Path, signum: signal.Signals) -> None:
        """Signal the supervisor; its number is its own as long as the lock is held."""
        claimant = claimed_by(directory)
        if claimant and claimant.isdecimal() and is_locked(directory):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(claimant), signum)

    def _forget(self, directory: Path) -> None:
        child = self._children.pop(directory, None)
        if child is not None:
            child.wait()
        self._specs.pop(directory, None)

    def _make_spec(self, attempt: Attempt, config: JobConfig) -> AttemptSpec:
        placement = attempt.placement
        gpus = {name: self._free_gpus(name, placement, config) for name in set(placement)}
        used = [core for s in self._specs.values() for worker in s.workers for core in worker.cores]
        workers = []
        for rank, node in enumerate(placement):
            cores = least_used(self._cores[node], used, math.ceil(config.resources.cpus))
            used += cores
            visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus[node]))}
            workers.append(WorkerSpec(worker_env(config, placement, rank) | visible, cores))
        return AttemptSpec(
            token=f"{attempt.directory.parent.name}-{attempt.directory.name}",
            command=config.command,
            workdir=config.workdir,
            workers=workers,
            cpus=config.resources.cpus,
            memory=round(config.resources.memory_gib * GIB),
            gpus=gpus,
            max_seconds=config.max_seconds,
            grace_seconds=config.grace_seconds,
        )

    def _free_gpus(self, node: str, placement: Placement, config: JobConfig) -> list[int]:
        taken = {gpu for spec in self._specs.values() for gpu in spec.gpus.get(node, [])}
        free = [gpu for gpu in self._gpus[node] if gpu not in taken]
        needed = config.resources.gpus * placement.count(node)
        assert len(free) >= needed, (node, free, needed)
        return free[:needed]


def worker_env(config: JobConfig, placement: Placement, rank: int) -> dict[str, str]:
    """Return what torchrun would set for a worker, but for the rendezvous."""
    node = placement[rank]
    hosts = list(dict.fromkeys(placement))
    threads = {"OMP_NUM_THREADS": str(max(1, int(config.resources.cpus)))}
    ranks = {
        "RANK": rank,
        "WORLD_SIZE": config.workers,
        "LOCAL_RANK": placement[:rank].count(node),
        "LOCAL_WORLD_SIZE": placement.count(node),
        "GROUP_RANK": hosts.index(node),
    }
    return threads | config.env | {name: str(value) for name, value in ranks.items()}


def _this_machine() -> NodeConfig:
    machine = describe_machine()
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    # A tenth of the memory is left to the system and the queue itself.
    return NodeConfig(cpus=machine.cores, memory_gib=machine.memory_total * 0.9 / GIB, gpus=gpus)


def _divide(
    nodes: Mapping[str, NodeConfig],
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Give each node cores and GPUs, in order; cores in turn where the nodes promise more."""
    machine = sorted(os.sched_getaffinity(0))
    cores: dict[str, list[int]] = {}
    gpus: dict[str, list[int]] = {}
    first_core = first_gpu = 0
    for name, config in nodes.items():
        count = math.ceil(config.cpus)
        chosen = [machine[(first_core + i) % len(machine)] for i in range(count)]
        cores[name] = list(dict.fromkeys(chosen))
        gpus[name] = list(range(first_gpu, first_gpu + config.gpus))
        first_core, first_gpu = first_core + count, first_gpu + config.gpus
    return cores, gpus
