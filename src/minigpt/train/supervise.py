"""The supervisor: starts the ranks of a run on this machine and restarts them when one fails.

It holds the run's lock, passes signals on, reads the ranks' beacons, and after a failure starts
all ranks again, which resume from the last good checkpoint. A restart budget and a growing pause
keep a run that can't work from failing for ever.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from minigpt.core.errors import MinigptError, StorageError, TrainingError
from minigpt.core.telemetry import get_logger
from minigpt.train.config import RecoveryConfig
from minigpt.train.emergency import DEFAULT_GRACE_SECONDS
from minigpt.train.interrupt import TrainingInterruptedError
from minigpt.train.metrics import append_line
from minigpt.train.progress import Beacon, beacon_path, read_beacon
from minigpt.train.sessions import EVENTS_FILE, STARTED_VARIABLE, close_session
from minigpt.train.watchdog import HangDetector
from minigpt.train.worker import LOST_PEER, LOST_STORAGE, STACK_SIGNAL, rank_file
from minigpt.train.world import SUPERVISED_VARIABLE

_POLL_SECONDS = 0.05
_SETTLE_SECONDS = 1.0
"""Time for the ranks that a dead one takes along to fail too, so that the first is known."""
_STACK_SECONDS = 1.0
_HOUR = 3600.0
_MOST_BACKOFF_SECONDS = 60.0


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended."""

    ranks: tuple[int, ...]
    """Those at fault."""
    cause: str
    step: int
    """Steps done by the first of them."""
    phase: str


class Supervisor:
    """Runs all ranks of a run until it is finished, stopped or past its restart budget."""

    def __init__(
        self,
        command: Sequence[str],
        ranks: int,
        config: RecoveryConfig,
        run_dir: Path,
        *,
        began: float,
        inherited: Sequence[int] = (),
    ) -> None:
        """Prepare.

        Args:
            command: Starts one rank, given torchrun's variables.
            ranks: How many.
            config: Budget, pauses and limits.
            run_dir: The run's directory, which the caller holds.
            began: Unix time at which work on the run began.
            inherited: Descriptors that the ranks keep open: the run's lock.
        """
        self._command = list(command)
        self._ranks = ranks
        self._config = config
        self._run_dir = run_dir
        self._began = began
        self._inherited = tuple(inherited)
        self._log = get_logger("train")
        self._signum = 0
        self._failures: deque[float] = deque()
        self._streak = 0
        self._newest = self._newest_checkpoint()

    def run(self) -> None:
        """Run to the end of the training.

        Raises:
            TrainingInterruptedError: A signal stopped the run; its state is saved.
            TrainingError: More failures within an hour than the budget allows.
            MinigptError: A rank ended with an error that a restart can't mend.
        """
        with self._signals():
            while True:
                failure = self._attempt()
                if failure is None:
                    return
                self._recover(failure)

    def _attempt(self) -> Failure | None:
        """Start all ranks and watch them; None where they finished."""
        workers = self._start()
        try:
            return self._watch(workers)
        finally:
            for worker in workers:
                worker.kill()
            for worker in workers:
                worker.wait()

    def _start(self) -> list[subprocess.Popen[bytes]]:
        rank_file(self._run_dir, 0, "log").parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "WORLD_SIZE": str(self._ranks),
            "LOCAL_WORLD_SIZE": str(self._ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            SUPERVISED_VARIABLE: str(os.getpid()),
            STARTED_VARIABLE: str(self._began),
        }
        workers = []
        for rank in range(self._ranks):
            rank_file(self._run_dir, rank, "error").unlink(missing_ok=True)
            with rank_file(self._run_dir, rank, "log").open("ab") as log:
                worker = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=sys.stderr if rank == 0 else log,
                    stderr=None if rank == 0 else log,
                    env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    pass_fds=self._inherited,
                    start_new_session=True,  # Ctrl-C comes here alone, and is passed on
                )
            workers.append(worker)
        return workers

    def _watch(self, workers: Sequence[subprocess.Popen[bytes]]) -> Failure | None:
        detector, started = HangDetector(self._config), time.monotonic()
        while True:
            codes = {rank: worker.poll() for rank, worker in enumerate(workers)}
            if self._signum:
                self._stop(workers)
            if all(code == 0 for code in codes.values()):
                return None
            if any(code for code in codes.values()):
                return self._judge(workers)
            failure = self._hang(workers, detector, started)
            if failure is not None:
                return failure
            time.sleep(_POLL_SECONDS)

    def _stop(self, workers: Sequence[subprocess.Popen[bytes]]) -> None:
        """Pass the signal on and give the ranks their grace."""
        signum = self._signum
        for worker in workers:
            with suppress(ProcessLookupError):
                worker.send_signal(signum)
        grace = self._config.grace_seconds or DEFAULT_GRACE_SECONDS
        deadline = time.monotonic() + grace
        while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        if all(worker.poll() == 0 for worker in workers):
            return  # it was finished
        saved = workers[0].poll() == 128 + signum
        note = "saved" if saved else f"not saved within {grace:g} s: the last checkpoint stands"
        raise TrainingInterruptedError(signum, f"stopped by signal {signum}, {note}")

    def _judge(self, workers: Sequence[subprocess.Popen[bytes]]) -> Failure:
        """Find out who failed first, and whether a restart can help.

        Raises:
            MinigptError: It can't.
        """
        deadline = time.monotonic() + _SETTLE_SECONDS
        while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        codes = {rank: worker.poll() for rank, worker in enumerate(workers)}
        failed = {rank: code for rank, code in codes.items() if code}
        stops = [
            c - 128 for c in failed.values() if c in (128 + signal.SIGTERM, 128 + signal.SIGINT)
        ]
        if stops:
            raise TrainingInterruptedError(stops[0], f"stopped by signal {stops[0]}, saved")
        first = {rank: code for rank, code in failed.items() if code != LOST_PEER} or failed
        killed = {rank: code for rank, code in first.items() if code < 0}
        first = killed or first
        rank, code = next(iter(first.items()))
        beacon = self._beacon(rank, workers[rank])
        step, phase = (beacon.step, beacon.phase) if beacon is not None else (0, "start")
        hopeless = [r for r, c in first.items() if c == MinigptError.exit_code]
        # Storage may come back; where it was never there, the mistake is in the config.
        if code == LOST_STORAGE and step == 0 and not self._failures:
            hopeless.append(rank)
        if hopeless:
            raise self._error(hopeless[0])
        return Failure(tuple(first), self._cause(rank, code), step, phase)

    def _beacon(self, rank: int, worker: subprocess.Popen[bytes]) -> Beacon | None:
        """Return a rank's beacon; None where this process has not lit one yet."""
        beacon = read_beacon(beacon_path(self._run_dir, rank))
        return beacon if beacon is not None and beacon.pid == worker.pid else None

    def _cause(self, rank: int, code: int) -> str:
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exit code {code}: {self._error(rank).message}"

    def _error(self, rank: int) -> TrainingError:
        path = rank_file(self._run_dir, rank, "error")
        try:
            content = json.loads(path.read_text())
            return TrainingError(content["message"], remedy=content["remedy"])
        except (OSError, ValueError, KeyError):
            return TrainingError(f"no reason is recorded; see {path.with_suffix('.log')}")

    def _hang(
        self,
        workers: Sequence[subprocess.Popen[bytes]],
        detector: HangDetector,
        started: float,
    ) -> Failure | None:
        beacons: dict[int, Beacon] = {}
        for rank, worker in enumerate(workers):
            beacon = self._beacon(rank, worker)
            if beacon is not None:
                beacons[rank] = beacon
        missing = tuple(rank for rank in range(self._ranks) if rank not in beacons)
        if missing:
            waited = time.monotonic() - started
            if waited <= self._config.start_seconds:
                return None
            return Failure(missing, f"hang: did not start within {waited:.0f} s", 0, "start")
        states = {rank: _process_state(worker.pid) for rank, worker in enumerate(workers)}
        hang = detector.check(beacons, time.monotonic(), states)
        if hang is None:
            return None
        beacon = beacons[hang.ranks[0]]
        cause = f"hang: {hang.reason}; nothing moved for {hang.seconds:.1f} s"
        self._event(
            "hang",
            beacon.step,
            ranks=list(hang.ranks),
            reason=hang.reason,
            seconds=hang.seconds,
            phases={str(rank): beacon.phase for rank, beacon in beacons.items()},
            states={str(rank): state for rank, state in states.items()},
            stacks=self._dump_stacks(workers),
        )
        return Failure(hang.ranks, cause, beacon.step, beacon.phase)

    def _dump_stacks(self, workers: Sequence[subprocess.Popen[bytes]]) -> dict[str, str]:
        """Have every rank write its Python stack; return the innermost lines by rank.

        A stopped process can't: it has none.
        """
        for worker in workers:
            with suppress(ProcessLookupError):
                worker.send_signal(STACK_SIGNAL)
        time.sleep(_STACK_SECONDS)
        stacks = {}
        for rank in range(self._ranks):
            with suppress(OSError):
                dump = rank_file(self._run_dir, rank, "stack").read_text()
                stacks[str(rank)] = _main_thread(dump)
        return stacks

    def _recover(self, failure: Failure) -> None:
        """Record a failure and wait before the restart.

        Raises:
            TrainingError: The budget is used up.
            TrainingInterruptedError: A signal came instead of the restart.
        """
        now = time.time()
        close_session(self._run_dir, died_at=now)
        self._failures.append(now)
        while self._failures[0] < now - _HOUR:
            self._failures.popleft()
        newest = self._newest_checkpoint()
        self._streak = 0 if newest != self._newest else self._streak + 1
        self._newest = newest
        who = f"rank {failure.ranks[0]}" if len(failure.ranks) == 1 else f"ranks {failure.ranks}"
        what = f"{who}: {failure.cause} (in {failure.phase} of step {failure.step + 1})"
        self._event(
            "failure",
            failure.step,
            ranks=list(failure.ranks),
            cause=failure.cause,
            phase=failure.phase,
            time=now,
        )
        budget = self._config.restarts_per_hour
        if len(self._failures) > budget:
            raise TrainingError(
                f"{what}; {len(self._failures)} failures within an hour, "
                f"recovery.restarts_per_hour = {budget}",
                remedy=f"see {self._run_dir / 'ranks'} and {EVENTS_FILE}; the same command resumes",
            )
        pause = min(_MOST_BACKOFF_SECONDS, self._config.backoff_seconds * 2**self._streak)
        self._log.warning(
            "restarting all ranks",
            reason=what,
            checkpoint=newest or "none",
            pause_seconds=pause,
            restarts=f"{len(self._failures)} of {budget} within an hour",
        )
        deadline = time.monotonic() + pause
        while time.monotonic() < deadline and not self._signum:
            time.sleep(min(_POLL_SECONDS, pause))
        if self._signum:
            raise TrainingInterruptedError(self._signum, f"stopped by signal {self._signum}")

    def _newest_checkpoint(self) -> str:
        names = sorted(path.name for path in (self._run_dir / "checkpoints").glob("step-*"))
        return names[-1] if names else ""

    def _event(self, kind: str, step: int, **fields: object) -> None:
        try:
            append_line(self._run_dir / EVENTS_FILE, {"kind": kind, "step": step, **fields})
        except StorageError as error:
            self._log.warning("an event is not recorded", kind=kind, reason=str(error))

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def note(signum: int, frame: FrameType | None) -> None:
            self._signum = self._signum or signum

        previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)


def free_port() -> int:
    """Return a TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _process_state(pid: int) -> str:
    """Return a process's state as `/proc` names it: R, S, D, T; "" where it can't be told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _main_thread(dump: str) -> str:
    """Return the innermost lines of the main thread, which faulthandler prints last."""
    threads = dump.strip().split("\n\n")
    return "\n".join(threads[-1].splitlines()[:6]) if threads else ""
