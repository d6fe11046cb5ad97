"""An attempt's directory: how a scheduler and a supervisor agree without ever meeting.

`begun` is created by whoever comes first: the supervisor, which then runs the job, or a scheduler
that found no trace of one, after which no supervisor can begin. The supervisor holds a lock on
`lock` as long as it lives, so that a death of any kind shows. `result.json` appears whole. Nothing
here imports more than the standard library, because each attempt starts a process that does.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

SPEC_FILE, RESULT_FILE, STATUS_FILE = "spec.json", "result.json", "status.json"
BEGUN_FILE, LOCK_FILE = "begun", "lock"
TOKEN_VARIABLE = "MINIGPT_JOB_TOKEN"

Ending = Literal["finished", "stopped", "time limit"]


@dataclass(frozen=True)
class WorkerSpec:
    """One process of the gang."""

    env: dict[str, str]
    cores: list[int]
    """Those it may run on."""


@dataclass(frozen=True)
class AttemptSpec:
    """What a supervisor is to run."""

    token: str
    """In the environment of every process of the attempt, by which strays are found."""
    command: list[str]
    workdir: str
    workers: list[WorkerSpec]
    cpus: float
    """Of each worker."""
    memory: int
    """Of each worker, in bytes."""
    gpus: dict[str, list[int]]
    """The GPUs taken, by node."""
    max_seconds: float
    grace_seconds: float


@dataclass(frozen=True)
class AttemptResult:
    """How an attempt ended."""

    ended: Ending
    exit_codes: list[int]
    """By rank; negative is the signal that ended it."""
    first_failure: int | None
    """The rank that failed first, if one did."""
    error: str = ""
    """Why it could not even start."""


def write_json(directory: Path, name: str, content: AttemptSpec | AttemptResult) -> None:
    """Write a file that appears whole and is on disk when this returns."""
    temporary = directory / f".{name}.tmp"
    with temporary.open("w") as file:
        json.dump(asdict(content), file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(directory / name)


def read_spec(directory: Path) -> AttemptSpec | None:
    """Return what was to run, None before it was written."""
    try:
        content = json.loads((directory / SPEC_FILE).read_bytes())
    except FileNotFoundError:
        return None
    workers = [WorkerSpec(**worker) for worker in content.pop("workers")]
    return AttemptSpec(workers=workers, **content)


def read_result(directory: Path) -> AttemptResult | None:
    """Return how the attempt ended, None before it did."""
    try:
        return AttemptResult(**json.loads((directory / RESULT_FILE).read_bytes()))
    except FileNotFoundError:
        return None


def claim(directory: Path, who: str) -> bool:
    """Take the right to decide about an attempt; False where somebody has it."""
    try:
        descriptor = os.open(directory / BEGUN_FILE, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w") as file:
        file.write(who)
        file.flush()
        os.fsync(file.fileno())
    return True


def claimed_by(directory: Path) -> str | None:
    """Return who claimed the attempt, None before anybody did."""
    try:
        return (directory / BEGUN_FILE).read_text()
    except FileNotFoundError:
        return None


def hold_lock(directory: Path) -> int:
    """Take the supervisor's lock; it is let go of when this process dies."""
    descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def is_locked(directory: Path) -> bool:
    """Tell whether a supervisor lives."""
    try:
        descriptor = os.open(directory / LOCK_FILE, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def log_path(directory: Path, rank: int) -> Path:
    """Return where a worker's output goes."""
    return directory / f"worker-{rank}.log"
