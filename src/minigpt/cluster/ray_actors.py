"""A job on a Ray cluster: a detached supervisor that owns the placement group and its workers.

Both are actors. When the supervisor dies, Ray removes the group and the workers with it; when a
worker dies, its command dies too (the kernel sees to that). Imported only where Ray is used.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from minigpt.cluster.attempt import (
    STATUS_FILE,
    TOKEN_VARIABLE,
    AttemptResult,
    AttemptSpec,
    Ending,
    log_path,
)
from minigpt.cluster.isolation import detect_isolation
from minigpt.core.job_status import STATUS_VARIABLE, JobStatus, read_status

NAMESPACE = "minigpt-jobs"
_ray: Any = ray  # its annotations know neither actor options nor most of `ray.util`
_NODE_LABEL = "ray.io/node-id"
_PLACEMENT_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1


def claim(token: str, who: str) -> bool:
    """Take the right to decide about an attempt, as `attempt.claim` does with a file."""
    existed = _internal_kv_put(f"claim/{token}", who, overwrite=False, namespace=NAMESPACE)
    return not existed


def claimed_by(token: str) -> str | None:
    """Return who claimed the attempt."""
    value = _internal_kv_get(f"claim/{token}", namespace=NAMESPACE)
    return None if value is None else value.decode()


def read_result(token: str) -> AttemptResult | None:
    """Return how the attempt ended, None before it did."""
    value = _internal_kv_get(f"result/{token}", namespace=NAMESPACE)
    return None if value is None else AttemptResult(**json.loads(value))


class Worker:
    """Runs one rank's command inside its bundle."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def describe(self) -> tuple[str, int, list[int]]:
        """Return this node's address, a port that is free there, and the GPUs of the bundle."""
        address = str(_ray.util.get_node_ip_address())
        with socket.socket() as probe:
            probe.bind((address, 0))
            port = int(probe.getsockname()[1])
        return address, port, [int(gpu) for gpu in ray.get_gpu_ids()]

    def run(self, spec: AttemptSpec, rank: int, env: dict[str, str], directory: Path) -> int | str:
        """Run the command to its end; return its exit code, or why it could not start."""
        directory.mkdir(parents=True, exist_ok=True)
        env = env | {
            TOKEN_VARIABLE: spec.token,
            STATUS_VARIABLE: str(directory / STATUS_FILE),
        }
        isolation = detect_isolation()
        try:
            with log_path(directory, rank).open("ab") as log:
                self._process = subprocess.Popen(
                    spec.command,
                    cwd=spec.workdir,
                    env=os.environ | env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_die_with_parent(isolation.prepare(spec, rank)),
                )
        except (OSError, subprocess.SubprocessError) as error:
            return f"can't start {spec.command[0]!r}: {error}"
        if self._stopped:
            self.stop(signal.SIGTERM)
        code = self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return code

    def stop(self, signum: int) -> None:
        """Signal the command's process group."""
        self._stopped = True
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signum)

    def status(self, directory: Path) -> JobStatus | None:
        """Return the job's own word."""
        return read_status(directory / STATUS_FILE)


def _die_with_parent(prepare: Callable[[], None]) -> Callable[[], None]:
    libc = ctypes.CDLL(None)

    def enter() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        prepare()

    return enter


class Supervisor:
    """Runs one attempt and leaves its result in the cluster's key-value store."""

    def __init__(self, spec: AttemptSpec, placement: tuple[str, ...], directory: Path) -> None:
        self._spec = spec
        self._placement = placement
        self._directory = directory
        self._stop = threading.Event()
        self._workers: list[Any] = []
        threading.Thread(target=self._main, daemon=True).start()

    def stop(self) -> None:
        """Ask the workers to end, within the grace period."""
        self._stop.set()

    def status(self) -> JobStatus | None:
        """Return the job's own word, from the worker of rank 0."""
        if not self._workers:
            return None
        status: JobStatus | None = ray.get(self._workers[0].status.remote(self._directory))
        return status

    def _main(self) -> None:
        token = self._spec.token
        if claim(token, "supervisor"):
            try:
                result = self._run()
            except Exception as error:  # whatever Ray raises: the scheduler must hear of it
                result = AttemptResult("stopped", [-signal.SIGKILL], None, "")
                print(f"{token}: {error!r}", flush=True)
            _internal_kv_put(f"result/{token}", json.dumps(asdict(result)), namespace=NAMESPACE)
        ray.kill(ray.get_runtime_context().current_actor)

    def _run(self) -> AttemptResult:
        spec = self._spec
        gang = placement_group(
            [_bundle(spec) for _ in self._placement],
            strategy="PACK",
            bundle_label_selector=[{_NODE_LABEL: node} for node in self._placement],
        )
        if not gang.wait(_PLACEMENT_SECONDS):
            return AttemptResult("stopped", [-signal.SIGKILL], None)
        for rank in range(len(self._placement)):
            strategy = PlacementGroupSchedulingStrategy(gang, placement_group_bundle_index=rank)
            worker = WorkerActor.options(
                num_gpus=_gpus(spec), scheduling_strategy=strategy
            ).remote()
            self._workers.append(worker)
        facts = ray.get([worker.describe.remote() for worker in self._workers])
        calls = [
            worker.run.remote(spec, rank, self._env(rank, facts), self._directory)
            for rank, worker in enumerate(self._workers)
        ]
        return self._wait(calls)

    def _env(self, rank: int, facts: list[tuple[str, int, list[int]]]) -> dict[str, str]:
        node = self._placement[rank]
        shared = [
            str(gpu)
            for other, (_, _, gpus) in zip(self._placement, facts, strict=True)
            if other == node
            for gpu in gpus
        ]
        address, port, _ = facts[0]
        return self._spec.workers[rank].env | {
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "CUDA_VISIBLE_DEVICES": ",".join(shared),
        }

    def _wait(self, calls: list[Any]) -> AttemptResult:
        deadline = time.monotonic() + self._spec.max_seconds
        ended: Ending = "finished"
        codes: dict[int, int | str] = {}
        while len(codes) < len(calls) and not any(codes.values()):
            if self._stop.is_set() or time.monotonic() > deadline:
                ended = "stopped" if self._stop.is_set() else "time limit"
                break
            self._collect(calls, codes)
        first = next((rank for rank, code in codes.items() if code), None)
        self._end_all(calls, codes)
        lost = any(code == "lost" for code in codes.values())
        errors = [code for code in codes.values() if isinstance(code, str) and code != "lost"]
        exit_codes = [
            code if isinstance(code := codes.get(rank, -signal.SIGKILL), int) else 127
            for rank in range(len(calls))
        ]
        return AttemptResult(
            "stopped" if lost else ended, exit_codes, first, errors[0] if errors else ""
        )

    def _collect(self, calls: list[Any], codes: dict[int, int | str]) -> None:
        """Note the workers that have ended; waits a little where none has."""
        open_calls = [call for rank, call in enumerate(calls) if rank not in codes]
        for call in ray.wait(open_calls, timeout=0.2)[0]:
            try:
                codes[calls.index(call)] = ray.get(call)
            except ray.exceptions.RayError:
                codes[calls.index(call)] = "lost"

    def _end_all(self, calls: list[Any], codes: dict[int, int | str]) -> None:
        for signum, seconds in ((signal.SIGTERM, self._spec.grace_seconds), (signal.SIGKILL, 10)):
            deadline = time.monotonic() + seconds
            for rank, worker in enumerate(self._workers):
                if rank not in codes:
                    worker.stop.remote(signum)
            while len(codes) < len(calls) and time.monotonic() < deadline:
                self._collect(calls, codes)


def _bundle(spec: AttemptSpec) -> dict[str, float]:
    amounts = {"CPU": spec.cpus, "memory": float(spec.memory), "GPU": float(_gpus(spec))}
    return {name: amount for name, amount in amounts.items() if amount}


def _gpus(spec: AttemptSpec) -> int:
    """Return the GPUs of one worker; which they are, Ray decides."""
    return len(next(iter(spec.gpus.values()), []))


# Two threads for a worker, so that it can be stopped while its command runs.
WorkerActor = _ray.remote(num_cpus=0, max_restarts=0, max_concurrency=2)(Worker)
SupervisorActor = _ray.remote(num_cpus=0, max_restarts=0)(Supervisor)
