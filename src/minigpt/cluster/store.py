"""Jobs and their attempts: every change is one transaction, a scheduler's fenced by its lease.

An attempt is begun at most once: `start` gives it a number that no other start of the job has,
and the executor refuses to begin a number twice (see `attempt.py`). A scheduler that lost its
lease, asleep or cut off, can change nothing any more.
"""

from __future__ import annotations

import getpass
import json
import math
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import sqlalchemy as sa

from minigpt.cluster.config import JobConfig
from minigpt.cluster.database import (
    Database,
    attempts_table,
    jobs_table,
    lease_table,
    nodes_table,
)
from minigpt.cluster.records import (
    Attempt,
    Job,
    Lease,
    State,
    StopReason,
    to_attempt,
    to_job,
)
from minigpt.cluster.resources import Resources
from minigpt.cluster.timeline import Node, Placement
from minigpt.core.errors import JobError


class LeaseLostError(JobError):
    """Another scheduler has taken over this queue."""


class JobStore:
    """The queue's state behind a database URL."""

    def __init__(self, url: str) -> None:
        self._database = Database(url)

    def submit(self, config: JobConfig) -> Job:
        """Add a job; it is stored when this returns."""
        with self._database.transaction("submit a job") as connection:
            now = self._database.now(connection)
            values = {
                "config": json.dumps(config.model_dump(mode="json")),
                "state": "queued",
                "submitted_by": f"{getpass.getuser()}@{socket.gethostname()}",
                "submitted_at": now,
                "queued_at": now,
                "eligible_at": now,
            }
            made = connection.execute(jobs_table.insert().values(values)).inserted_primary_key
            assert made is not None
            return _read_job(connection, made[0])

    def get(self, job: int) -> Job:
        """Return a job.

        Raises:
            JobError: No such job.
        """
        with self._database.transaction("read a job") as connection:
            return _read_job(connection, job)

    def jobs(self, states: Sequence[State] = ()) -> list[Job]:
        """Return jobs in the order of submission; those in any of `states`, or all."""
        query = sa.select(jobs_table).order_by(jobs_table.c.id)
        if states:
            query = query.where(jobs_table.c.state.in_(states))
        with self._database.transaction("list jobs") as connection:
            return [to_job(row) for row in connection.execute(query)]

    def attempts(self, job: int) -> list[Attempt]:
        """Return a job's attempts, oldest first."""
        query = sa.select(attempts_table).where(attempts_table.c.job == job)
        with self._database.transaction("read attempts") as connection:
            rows = connection.execute(query.order_by(attempts_table.c.number))
            return [to_attempt(row) for row in rows]

    def request_cancel(self, job: int) -> Job:
        """End a waiting job at once; ask the scheduler to stop a running one.

        Raises:
            JobError: No such job, or it has ended.
        """
        with self._database.transaction("cancel a job") as connection:
            now = self._database.now(connection)
            ended = {"state": "cancelled", "reason": "cancelled before it ran", "ended_at": now}
            marked = connection.execute(
                _where(job, "queued").values(ended | {"cancel_requested": 1})
            ).rowcount
            marked += connection.execute(_where(job, "running").values(cancel_requested=1)).rowcount
            found = _read_job(connection, job)
            if not marked and found.state != "cancelled":
                raise JobError(f"job {job} has {found.state} already", remedy="nothing to cancel")
            return found

    # What follows is for the scheduler that holds the lease.

    def acquire(self, holder: str, seconds: float) -> Lease | None:
        """Take the lease if it is free or has run out; None while another holds it."""
        with self._database.transaction("take the lease") as connection:
            now = self._database.now(connection)
            row = self._database.lock_lease(connection)
            if row.expires_at > now:
                return None
            lease = Lease(holder, row.token + 1)
            values = {"holder": holder, "token": lease.token, "expires_at": now + seconds}
            connection.execute(lease_table.update().values(values))
            return lease

    def holder(self) -> str | None:
        """Return who holds the lease now, None if nobody does."""
        with self._database.transaction("read the lease") as connection:
            row = self._database.lock_lease(connection)
            return str(row.holder) if row.expires_at > self._database.now(connection) else None

    def renew(self, lease: Lease, seconds: float) -> float:
        """Prolong the lease; return the database's time.

        Raises:
            LeaseLostError: Somebody else has it.
        """
        with self._fenced(lease, "renew the lease") as connection:
            now = self._database.now(connection)
            connection.execute(lease_table.update().values(expires_at=now + seconds))
            return now

    def release(self, lease: Lease) -> None:
        """Give the lease back, so that a successor need not wait for its end."""
        with self._database.transaction("release the lease") as connection:
            held = lease_table.c.token == lease.token
            connection.execute(lease_table.update().where(held).values(expires_at=0.0))

    def start(
        self,
        lease: Lease,
        job: int,
        placement: Placement,
        level: int,
        share: float,
        directory: Path,
    ) -> Attempt | None:
        """Turn a queued job into a running one; None where it is queued no longer.

        Args:
            lease: Of the caller.
            job: The job.
            placement: The node of each worker.
            level: The priority level that it starts at.
            share: Its dominant share of the cluster.
            directory: Where the jobs' directories go.
        """
        with self._fenced(lease, "start a job") as connection:
            now = self._database.now(connection)
            found = _read_job(connection, job)
            number = found.attempt + 1
            changed = connection.execute(
                _where(job, "queued").values(
                    state="running", reason="", attempt=number, waited=found.waited_at(now)
                )
            ).rowcount
            if not changed:
                return None
            # A name of its own: a queue made anew must not find what an older one left.
            place = directory / str(job) / f"attempt-{number}-{uuid.uuid4().hex[:8]}"
            attempt = Attempt(
                job, number, found.config.team, placement, level, share, now, None, "", "", None,
                place,
            )  # fmt: skip
            values = {name: getattr(attempt, name) for name in Attempt.__dataclass_fields__}
            values |= {"placement": json.dumps(placement), "directory": str(attempt.directory)}
            connection.execute(attempts_table.insert().values(values))
            return attempt

    def running(self) -> list[tuple[Job, Attempt]]:
        """Return the running jobs, each with its current attempt."""
        query = (
            sa.select(jobs_table, attempts_table)
            .join(
                attempts_table,
                (attempts_table.c.job == jobs_table.c.id)
                & (attempts_table.c.number == jobs_table.c.attempt),
            )
            .where(jobs_table.c.state == "running")
            .order_by(jobs_table.c.id)
        )
        split = len(jobs_table.c)
        with self._database.transaction("list running jobs") as connection:
            return [
                (
                    to_job(_named(jobs_table, row[:split])),
                    to_attempt(_named(attempts_table, row[split:])),
                )
                for row in connection.execute(query)
            ]

    def stop(self, lease: Lease, attempt: Attempt, reason: StopReason, grace: float) -> Attempt:
        """Record that an attempt is being stopped and why, before it is."""
        with self._fenced(lease, "stop a job") as connection:
            stop_at = self._database.now(connection) + grace
            query = _where_attempt(attempt).values(stop_reason=reason, stop_at=stop_at)
            connection.execute(query)
            return _read_attempt(connection, attempt)

    def end(self, lease: Lease, attempt: Attempt, state: State, reason: str) -> None:
        """Record the end of an attempt that ends its job."""
        with self._fenced(lease, "end a job") as connection:
            now = self._database.now(connection)
            self._close(connection, attempt, state, now)
            changed = connection.execute(
                _where(attempt.job, "running").values(state=state, reason=reason, ended_at=now)
            ).rowcount
            assert changed == 1, attempt

    def requeue(
        self,
        lease: Lease,
        attempt: Attempt,
        outcome: Literal["failed", "lost", "evicted", "not started"],
        reason: str,
        delay: float = 0.0,
    ) -> None:
        """Record the end of an attempt after which the job waits for the next."""
        counters = {"failed": "failures", "lost": "losses", "evicted": "evictions"}
        with self._fenced(lease, "requeue a job") as connection:
            now = self._database.now(connection)
            self._close(connection, attempt, outcome, now)
            values: dict[Any, Any] = {"queued_at": now, "eligible_at": now + delay}
            if outcome in counters:
                column = jobs_table.c[counters[outcome]]
                values[column.name] = column + 1
            changed = connection.execute(
                _where(attempt.job, "running").values(state="queued", reason=reason, **values)
            ).rowcount
            assert changed == 1, attempt

    def explain(self, lease: Lease, reasons: Mapping[int, str]) -> None:
        """Note why waiting jobs wait."""
        with self._fenced(lease, "note reasons") as connection:
            for job, reason in reasons.items():
                connection.execute(_where(job, "queued").values(reason=reason))

    def usage(self, now: float, half_life: float) -> dict[str, float]:
        """Return each team's past use: its mean dominant share, weighted by 2^(-age/half-life).

        The integral over an attempt from `a` to `b` is (2^-(now-b)/h - 2^-(now-a)/h) x share.
        """
        horizon = now - 20 * half_life  # older use weighs less than a millionth
        table = attempts_table
        query = sa.select(table.c.team, table.c.share, table.c.started_at, table.c.ended_at).where(
            sa.or_(table.c.ended_at.is_(None), table.c.ended_at > horizon)
        )
        used: dict[str, float] = {}
        with self._database.transaction("read usage") as connection:
            for team, share, started_at, ended_at in connection.execute(query):
                end = now if ended_at is None else min(ended_at, now)
                weight = math.exp2((end - now) / half_life) - math.exp2(
                    (min(started_at, end) - now) / half_life
                )
                used[team] = used.get(team, 0.0) + share * weight
        return used

    def publish_nodes(self, lease: Lease, nodes: Sequence[Node], isolation: str) -> None:
        """Record the nodes that the scheduler sees."""
        with self._fenced(lease, "record the nodes") as connection:
            connection.execute(nodes_table.delete())
            for node in nodes:
                amount = node.total
                values = {"millicpus": amount.millicpus, "memory": amount.memory}
                connection.execute(
                    nodes_table.insert().values(
                        values | {"name": node.name, "gpus": amount.gpus, "isolation": isolation}
                    )
                )

    def nodes(self) -> list[tuple[Node, str]]:
        """Return the nodes that the scheduler saw last, each with its isolation."""
        query = sa.select(nodes_table).order_by(nodes_table.c.name)
        with self._database.transaction("list nodes") as connection:
            return [
                (Node(row.name, Resources(row.millicpus, row.memory, row.gpus)), row.isolation)
                for row in connection.execute(query)
            ]

    @contextmanager
    def _fenced(self, lease: Lease, action: str) -> Iterator[sa.Connection]:
        """A transaction that holds the lease's row, so that no successor can begin meanwhile."""
        with self._database.transaction(action) as connection:
            row = self._database.lock_lease(connection)
            if row.token != lease.token:
                raise LeaseLostError(
                    f"this scheduler lost its lease, {row.holder} has it",
                    remedy="only one `minigpt jobs run` serves a queue; start it again if need be",
                )
            yield connection

    def _close(self, connection: sa.Connection, attempt: Attempt, outcome: str, now: float) -> None:
        query = _where_attempt(attempt).where(attempts_table.c.ended_at.is_(None))
        changed = connection.execute(query.values(ended_at=now, outcome=outcome)).rowcount
        assert changed == 1, attempt


def _where(job: int, state: State) -> sa.Update:
    return jobs_table.update().where(jobs_table.c.id == job, jobs_table.c.state == state)


def _where_attempt(attempt: Attempt) -> sa.Update:
    table = attempts_table
    return table.update().where(table.c.job == attempt.job, table.c.number == attempt.number)


def _read_job(connection: sa.Connection, job: int) -> Job:
    row = connection.execute(sa.select(jobs_table).where(jobs_table.c.id == job)).one_or_none()
    if row is None:
        raise JobError(f"no job {job} in this queue", remedy="see `minigpt jobs list --all`")
    return to_job(row)


def _read_attempt(connection: sa.Connection, attempt: Attempt) -> Attempt:
    table = attempts_table
    query = sa.select(table).where(table.c.job == attempt.job, table.c.number == attempt.number)
    return to_attempt(connection.execute(query).one())


def _named(table: sa.Table, values: Sequence[Any]) -> Any:
    return SimpleNamespace(**dict(zip(table.c.keys(), values, strict=True)))
