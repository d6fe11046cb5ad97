"""A job, its attempts and the right to schedule, as the queue has them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minigpt.cluster.config import JobConfig
from minigpt.cluster.timeline import Placement
from minigpt.core.config import from_mapping

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
ENDED: tuple[State, ...] = ("succeeded", "failed", "cancelled")
StopReason = Literal["", "cancel", "evict"]


@dataclass(frozen=True)
class Lease:
    """The right to schedule; `token` grows with each holder."""

    holder: str
    token: int


@dataclass(frozen=True)
class Attempt:
    """One start of a job."""

    job: int
    number: int
    team: str
    placement: Placement
    level: int
    share: float
    """Dominant share of the cluster when it started."""
    started_at: float
    ended_at: float | None
    outcome: str
    stop_reason: StopReason
    stop_at: float | None
    """When it is stopped at the latest: the stop and the grace period."""
    directory: Path


@dataclass(frozen=True)
class Job:
    """A job as the queue has it; times in seconds since the epoch, by the database's clock."""

    id: int
    config: JobConfig
    state: State
    reason: str
    """Why it is in this state, for people."""
    submitted_by: str
    submitted_at: float
    queued_at: float
    eligible_at: float
    waited: float
    ended_at: float | None
    attempt: int
    failures: int
    losses: int
    evictions: int
    cancel_requested: bool

    def waited_at(self, now: float) -> float:
        """Return the seconds spent in the queue, over all attempts."""
        return self.waited + (max(0.0, now - self.queued_at) if self.state == "queued" else 0.0)


def to_job(row: Any) -> Job:
    """Read a row of the jobs' table."""
    values = {name: getattr(row, name) for name in Job.__dataclass_fields__}
    values["config"] = from_mapping(JobConfig, json.loads(row.config))
    values["cancel_requested"] = bool(row.cancel_requested)
    return Job(**values)


def to_attempt(row: Any) -> Attempt:
    """Read a row of the attempts' table."""
    values = {name: getattr(row, name) for name in Attempt.__dataclass_fields__}
    values["placement"] = tuple(json.loads(row.placement))
    values["directory"] = Path(row.directory)
    return Attempt(**values)
