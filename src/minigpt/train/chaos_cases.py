"""The faults of `minigpt chaos train`, each with what brings it about."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from minigpt.core.errors import ConfigError
from minigpt.train.chaos_storage import BUCKET, ChaosStorage, check_installed
from minigpt.train.metrics import read_metrics
from minigpt.train.progress import beacon_path, read_beacon
from minigpt.train.sessions import EVENTS_FILE

_POLL_SECONDS = 0.01
_RUN_SECONDS = 600.0
_DISK_CHECKPOINTS = 5
_DISK_EXTRA_BYTES = 4 << 20
_KILLED = ("failure", "recovered")


@dataclass
class ChaosRun:
    """A run of the command line under a fault."""

    directory: Path
    command: list[str]
    environment: dict[str, str]
    steps: int
    checkpoint_bytes: int
    """Size of one of its checkpoints."""
    process: subprocess.Popen[str] | None = None
    seconds: float = 0.0
    """Its wall time, starts included; set at the end."""
    storage: ChaosStorage | None = None
    """Where its checkpoints are, for the fault that takes that away."""

    def start(self) -> None:
        """Start it, or start it again."""
        self.process = subprocess.Popen(
            self.command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def logged_steps(self) -> int:
        """Return how many steps its metrics file has."""
        with suppress(OSError):
            return (self.directory / "metrics.jsonl").read_bytes().count(b"\n")
        return 0

    def checkpoints(self) -> list[Path]:
        """Return its checkpoints, the newest last."""
        return sorted((self.directory / "checkpoints").glob("step-*"))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for a moment in the run; a run that has ended is not waited for."""
        assert self.process is not None
        deadline = time.monotonic() + _RUN_SECONDS
        while not condition() and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)


@dataclass(frozen=True)
class Case:
    """How a fault is brought about."""

    what: str
    faults: str = ""
    """For `MINIGPT_FAULTS`; {last} is the last rank, {step} a step in the middle, {late} one after
    three quarters."""
    overrides: tuple[str, ...] = ()
    """Settings; {sixth} is a sixth of the steps."""
    meddle: Callable[[ChaosRun], None] | None = None
    """Interferes from outside while the run is going."""
    prepare: Callable[[ChaosRun], Callable[[], None]] | None = None
    """Sets the scene; returns what clears it away."""
    shows: tuple[str, ...] = ()
    """Kinds of events without which it has not come about."""
    check: Callable[[], None] | None = None
    """Raises a ConfigError where it can't be brought about here."""


def _flip_newest_checkpoint(run: ChaosRun) -> None:
    """Kill the run in its middle, flip a bit of its newest checkpoint and start it again."""
    assert run.process is not None
    run.wait_until(lambda: len(run.checkpoints()) > 1 and run.logged_steps() >= run.steps // 2)
    run.process.kill()
    run.process.communicate()
    _wait_for_ranks(run)
    newest = run.checkpoints()[-1]
    target = max(newest.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    with target.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    run.start()


def _wait_for_ranks(run: ChaosRun) -> None:
    """Wait until the ranks of a dead supervisor have saved and left: the lock is free then."""
    descriptor = os.open(run.directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)


def _resume_when_stopped(run: ChaosRun) -> None:
    """Wait for the run to stop by itself, and start it again as a scheduler would."""
    assert run.process is not None
    run.process.communicate(timeout=_RUN_SECONDS)
    if run.process.returncode != 0:
        run.start()


def _fill_disk(run: ChaosRun) -> None:
    """Fill the run's file system after its first save, and free it when the next one is over."""
    run.wait_until(lambda: bool(run.checkpoints()))
    every = int(run.checkpoints()[0].name.removeprefix("step-"))
    filler = run.directory / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))

    def missed_a_save() -> bool:
        # The beacon, for the metrics file has no room either.
        beacon = read_beacon(beacon_path(run.directory, 0))
        return beacon is not None and beacon.step > 2 * every

    run.wait_until(missed_a_save)
    filler.unlink()


def _mount_tmpfs(run: ChaosRun) -> Callable[[], None]:
    """Put the run on a file system of a few checkpoints' size; needs to be root.

    Raises:
        ConfigError: It can't be mounted.
    """
    size = _DISK_CHECKPOINTS * run.checkpoint_bytes + _DISK_EXTRA_BYTES
    run.directory.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(run.directory)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        run.directory.rmdir()
        raise ConfigError(
            f"no small file system can be mounted at {run.directory}",
            remedy="run as root, or leave the fault `disk` out",
        )

    def clear() -> None:
        kept = run.directory.with_name(f"{run.directory.name}-kept")
        shutil.copytree(run.directory, kept)
        subprocess.run(["umount", str(run.directory)], check=True, capture_output=True)
        run.directory.rmdir()
        kept.rename(run.directory)

    return clear


def _serve_storage(run: ChaosRun) -> Callable[[], None]:
    """Start the S3 server that the run's checkpoints go to."""
    run.storage = ChaosStorage()
    run.environment |= run.storage.environment
    return run.storage.close


def _lose_storage(run: ChaosRun) -> None:
    """Cut the server off after the first save, until a save was missed for it."""
    assert run.storage is not None
    run.wait_until(lambda: _has_event(run, "checkpoint"))
    run.storage.link.cut()
    run.wait_until(lambda: _has_event(run, "save_missed"))
    run.storage.link.mend()


def _has_event(run: ChaosRun, kind: str) -> bool:
    return any(line["kind"] == kind for line in read_metrics(run.directory / EVENTS_FILE))


CASES: Mapping[str, Case] = {
    "kill": Case(
        "kill -9 of the last rank in a backward pass",
        "kill:rank={last},step={step},phase=backward",
        shows=_KILLED,
    ),
    "kill-forward": Case(
        "kill -9 of rank 0 in a forward pass",
        "kill:rank=0,step={step},phase=forward",
        shows=_KILLED,
    ),
    "kill-reduce": Case(
        "kill -9 of the last rank as gradients are exchanged",
        "kill:rank={last},step={step},phase=reduce",
        shows=_KILLED,
    ),
    "kill-save": Case(
        "kill -9 of rank 0 in a save", "kill:rank=0,step={step},phase=save", shows=_KILLED
    ),
    "kill-validate": Case(
        "kill -9 of the last rank in a validation",
        "kill:rank={last},step={step},phase=validate",
        shows=_KILLED,
    ),
    "term": Case(
        "SIGTERM to one rank in a forward pass, then a resume",
        "term:rank={last},step={step},phase=forward",
        meddle=_resume_when_stopped,
    ),
    "stop": Case(
        "SIGSTOP of the last rank",
        "stop:rank={last},step={step},phase=forward",
        ("recovery.hang_seconds=5",),
        shows=("hang", *_KILLED),
    ),
    "hang": Case(
        "the last rank blocked for ever in C",
        "hang:rank={last},step={step},phase=backward",
        ("recovery.hang_seconds=5",),
        shows=("hang", *_KILLED),
    ),
    "slow": Case(
        "a slow rank",
        "slow:rank={last},step={step},seconds=0.2,times=20",
        ("recovery.check_every=5",),
    ),
    "nan": Case(
        "NaN in the gradient of one rank",
        "nan:rank={last},step={step},phase=reduce",
        shows=("anomaly",),
    ),
    "diverge": Case(
        "a flipped bit in one replica's weights",
        "flip:rank={last},step={step}",
        ("recovery.check_every=2",),
        shows=("divergence", "rollback"),
    ),
    "bitflip": Case(
        "supervisor killed, then a bit of the newest checkpoint flipped",
        meddle=_flip_newest_checkpoint,
        shows=("corrupt_checkpoint",),
    ),
    "disk": Case(
        "a full disk while a save is due",
        meddle=_fill_disk,
        prepare=_mount_tmpfs,
        shows=("save_missed",),
    ),
    "lost-s3": Case(
        "S3, where the checkpoints are, out of reach while a save is due; then kill -9 of a rank",
        "slow:rank={last},seconds=0.25,times=1000;kill:rank={last},step={late},phase=backward",
        (f"checkpoint.url=s3://{BUCKET}/run", "checkpoint.every={sixth}"),
        meddle=_lose_storage,
        prepare=_serve_storage,
        shows=("save_missed", "save_made_up", *_KILLED),
        check=check_installed,
    ),
    "tracker": Case(
        "a tracking server that is not there",
        overrides=("trackers.mlflow=true", "trackers.mlflow_uri=http://127.0.0.1:9"),
    ),
}
"""Faults by name."""
