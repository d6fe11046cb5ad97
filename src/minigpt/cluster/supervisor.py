"""The process above a job's workers: starts them together, ends them together, says how it went.

`python -m minigpt.cluster.supervisor DIRECTORY`. It belongs to no scheduler: schedulers come and
go, and find it by its directory. It keeps the time limit by itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from minigpt.cluster.attempt import (
    RESULT_FILE,
    STATUS_FILE,
    TOKEN_VARIABLE,
    AttemptResult,
    AttemptSpec,
    Ending,
    claim,
    hold_lock,
    log_path,
    read_spec,
    write_json,
)
from minigpt.cluster.isolation import Isolation, detect_isolation

_POLL_SECONDS = 0.05
_CANNOT_RUN = 127


class Gang:
    """The workers of one attempt."""

    def __init__(
        self, spec: AttemptSpec, directory: Path, isolation: Isolation, stop: threading.Event
    ) -> None:
        self._stop = stop
        self._spec = spec
        self._directory = directory
        self._isolation = isolation
        self._processes: list[subprocess.Popen[bytes]] = []

    def run(self) -> AttemptResult:
        """Run all workers until they have ended, by themselves or not."""
        try:
            for rank in range(len(self._spec.workers)):
                self._processes.append(self._start(rank))
        except (OSError, subprocess.SubprocessError) as error:
            self._end_all(grace=0)
            reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
            message = f"can't start {self._spec.command[0]!r}: {reason}"
            return AttemptResult("finished", [_CANNOT_RUN], None, message)
        deadline = time.monotonic() + self._spec.max_seconds
        ended, failed = self._wait(deadline)
        self._end_all(grace=self._spec.grace_seconds)
        codes = [process.wait() for process in self._processes]
        return AttemptResult(ended, codes, failed)

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        spec = self._spec
        token = {TOKEN_VARIABLE: spec.token}
        with log_path(self._directory, rank).open("ab") as log:
            return subprocess.Popen(
                spec.command,
                cwd=spec.workdir,
                env=os.environ | spec.workers[rank].env | token,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=self._isolation.prepare(spec, rank),
            )

    def _wait(self, deadline: float) -> tuple[Ending, int | None]:
        """Wait for the end of all, the first failure, a request to stop or the time limit."""
        while True:
            codes = [process.poll() for process in self._processes]
            failed = next((rank for rank, code in enumerate(codes) if code), None)
            if failed is not None or None not in codes:
                return "finished", failed
            if self._stop.is_set():
                return "stopped", None
            if time.monotonic() > deadline:
                return "time limit", None
            time.sleep(_POLL_SECONDS)

    def _end_all(self, grace: float) -> None:
        """Ask every worker's process group to end, then make sure of it."""
        deadline = time.monotonic() + grace
        alive = [process for process in self._processes if process.poll() is None]
        for process in alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < deadline and any(p.poll() is None for p in alive):
            time.sleep(_POLL_SECONDS)
        self._isolation.clean_up(self._spec)


def with_rendezvous(spec: AttemptSpec, directory: Path) -> AttemptSpec:
    """Add to each worker's environment what the processes of this machine meet by."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "MINIGPT_JOB_STATUS": str(directory / STATUS_FILE),
    }
    for worker in spec.workers:
        worker.env.update({k: v for k, v in common.items() if k not in worker.env})
    return spec


def main(directory: Path) -> None:
    """Run the attempt in `directory`, unless somebody has decided otherwise."""
    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    hold_lock(directory)  # before the claim, so that a claim without a lock means death
    if not claim(directory, str(os.getpid())):
        return
    spec = read_spec(directory)
    assert spec is not None, directory
    gang = Gang(with_rendezvous(spec, directory), directory, detect_isolation(), stop)
    write_json(directory, RESULT_FILE, gang.run())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
