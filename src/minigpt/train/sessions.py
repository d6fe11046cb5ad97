"""Sessions: the processes that a run has had one after another, in `events.jsonl`.

A `session` line says when one began, at which step and with how many ranks; a `session_end` line
when and how it ended and how long rank 0 was in each phase. For a killed process the next one (or
the supervisor, who saw it die) writes that from its beacon.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from minigpt.core.errors import StorageError
from minigpt.core.telemetry import get_logger
from minigpt.train.metrics import append_line, read_metrics
from minigpt.train.progress import Beacon, beacon_path, read_beacon

EVENTS_FILE = "events.jsonl"
STARTED_VARIABLE = "MINIGPT_RUN_STARTED"
"""Unix time at which the supervisor began, for the first session's beginning."""
FAILED = ("killed", "failed")


@dataclass(frozen=True)
class History:
    """What the sessions before came to."""

    sessions: int
    failures: int
    """Sessions that ended without having been asked to."""
    hours: float
    """Their time in all."""
    failed_at: float | None
    """Unix time at which the last one failed; None where it did not."""
    save_seconds: float | None
    """The last save's duration."""


class EndedSession(NamedTuple):
    """A session's lines."""

    begin: Mapping[str, Any]
    end: Mapping[str, Any]
    marks: list[Mapping[str, Any]]
    """Its saves and rollbacks, in order."""


def ended_sessions(events: Iterable[Mapping[str, Any]]) -> list[EndedSession]:
    """Return the sessions that have both begun and ended, in order."""
    found: list[EndedSession] = []
    begin: Mapping[str, Any] | None = None
    marks: list[Mapping[str, Any]] = []
    for line in events:
        if line["kind"] == "session":
            begin, marks = line, []
        elif line["kind"] == "session_end" and begin is not None:
            found.append(EndedSession(begin, line, marks))
            begin = None
        elif line["kind"] in ("checkpoint", "rollback") and "phases" in line:
            marks.append(line)
    return found


def read_history(events: Sequence[Mapping[str, Any]]) -> History:
    """Sum up the sessions of a run; all of them have ended."""
    ends = [session.end for session in ended_sessions(events)]
    saves = [line["seconds"] for line in events if line["kind"] == "checkpoint"]
    failed = bool(ends) and ends[-1]["status"] in FAILED
    return History(
        sessions=len(ends),
        failures=sum(line["status"] in FAILED for line in ends),
        hours=sum(sum(line["phases"].values()) for line in ends) / 3600,
        failed_at=ends[-1]["time"] if failed else None,
        save_seconds=saves[-1] if saves else None,
    )


def session_start(number: int, began: float) -> float:
    """Return when a session began: the first one with the supervisor, where there is one."""
    return min(began, float(os.environ.get(STARTED_VARIABLE, began))) if number == 0 else began


def begin_line(number: int, step: int, ranks: int, began: float) -> dict[str, Any]:
    """Return the line of a session that begins after `step`."""
    return {"kind": "session", "step": step, "session": number, "ranks": ranks, "time": began}


def end_line(step: int, status: str, at: float, phases: Mapping[str, float]) -> dict[str, Any]:
    """Return the line of a session's end: finished, interrupted, failed or killed."""
    kind = "session_end"
    return {"kind": kind, "step": step, "status": status, "time": at, "phases": dict(phases)}


def close_session(run_dir: Path, died_at: float | None = None) -> None:
    """Write the end of a session that could not do so itself; nothing where none is open.

    Args:
        run_dir: The run's directory, with no rank alive.
        died_at: Unix time at which its processes were found dead; None is when its rank 0 last
            entered a phase.
    """
    path = run_dir / EVENTS_FILE
    events = list(read_metrics(path))
    if not _is_open(events):
        return
    beacon = read_beacon(beacon_path(run_dir, 0))
    line = _dead_line(events, beacon, died_at)
    try:
        append_line(path, line)
    except StorageError as error:
        get_logger("train").warning("a session's end is not recorded", reason=str(error))


def _is_open(events: Iterable[Mapping[str, Any]]) -> bool:
    kinds = [line["kind"] for line in events if line["kind"] in ("session", "session_end")]
    return bool(kinds) and kinds[-1] == "session"


def _dead_line(
    events: Sequence[Mapping[str, Any]], beacon: Beacon | None, died_at: float | None
) -> dict[str, Any]:
    if beacon is None:
        began = [line for line in events if line["kind"] == "session"][-1]
        return end_line(began["step"], "killed", began["time"], {})
    ended = beacon.began + sum(beacon.seconds.values())
    phases = dict(beacon.seconds)
    if died_at is not None and died_at > ended:
        phases = beacon.seconds_until(time.monotonic() - (time.time() - died_at))
        ended = died_at
    return end_line(beacon.step, "killed", ended, phases)


def until_now(run_dir: Path, events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the events with an end for a session that is still going, as of its beacon."""
    if not _is_open(events):
        return list(events)
    return [*events, _dead_line(events, read_beacon(beacon_path(run_dir, 0)), None)]
