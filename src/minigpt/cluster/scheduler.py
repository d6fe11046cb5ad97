"""The scheduler process: looks, decides by `policy`, starts and stops. Holds no state of its own.

Everything it knows is in the store or with the executor, so that it may be killed between any two
lines; its successor sees running jobs, half-started ones and unfinished stops, and goes on.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from minigpt.cluster.attempt import AttemptResult
from minigpt.cluster.config import JobConfig, QueueConfig
from minigpt.cluster.executor import Executor, Observation
from minigpt.cluster.policy import Plan, RunningJob, WaitingJob, make_plan
from minigpt.cluster.records import Attempt, Job, Lease
from minigpt.cluster.resources import Resources
from minigpt.cluster.store import JobStore, LeaseLostError
from minigpt.cluster.timeline import Gang, Node
from minigpt.core.errors import JobError, StorageError
from minigpt.core.telemetry import get_logger

_MOST_LOSSES = 10
_LONGEST_BACKOFF = 300.0
_KILL_AFTER = 10.0  # beyond the grace period, which the supervisor should have kept


class Scheduler:
    """Serves one queue.

    Args:
        config: Teams, policy, pace.
        store: The queue.
        executor: Where jobs run.
        directory: Under which the jobs' directories go.
    """

    def __init__(
        self, config: QueueConfig, store: JobStore, executor: Executor, directory: Path
    ) -> None:
        self._config = config
        self._store = store
        self._executor = executor
        self._directory = directory
        self._published: Sequence[Node] = []
        self._log = get_logger("jobs")

    def run(self, stop: threading.Event, *, until_empty: bool = False) -> None:
        """Schedule until told to stop, or until no job waits or runs; jobs outlive it.

        Raises:
            JobError: Another scheduler serves the queue, or took over from this one.
        """
        lease = self._wait_for_lease(stop)
        if lease is None:
            return
        self._log.info("scheduling", isolation=self._executor.isolation)
        try:
            while not stop.is_set():
                if not self._try_tick(lease) and until_empty:
                    break
                stop.wait(self._config.poll_seconds)
        finally:
            self._store.release(lease)
            self._executor.close()

    def _try_tick(self, lease: Lease) -> bool:
        """Tick; a full disk or a database that is away is waited out."""
        try:
            return self.tick(lease)
        except LeaseLostError:
            raise
        except (JobError, StorageError) as error:
            self._log.error("can't schedule, trying again", error=str(error))
            return True

    def tick(self, lease: Lease) -> bool:
        """Look and act once; return whether any job waits or runs."""
        now = self._store.renew(lease, self._config.lease_seconds)
        running = []
        for job, attempt in self._store.running():
            seen = self._executor.observe(attempt)
            if seen.state == "alive":
                running.append(self._keep(lease, job, attempt, seen, now))
            else:
                self._settle(lease, job, attempt, seen)
        waiting = self._store.jobs(["queued"])
        ready = [_waiting(job, now) for job in waiting if job.eligible_at <= now]
        nodes = self._executor.nodes()
        if nodes != self._published:
            self._store.publish_nodes(lease, nodes, self._executor.isolation)
            self._published = nodes
        config = self._config
        usage = self._store.usage(now, config.policy.half_life_seconds)
        plan = make_plan(now, nodes, ready, running, usage, config.teams, config.policy)
        self._carry_out(lease, plan, nodes)
        self._explain(lease, plan, waiting, now)
        return bool(waiting or running)

    def _wait_for_lease(self, stop: threading.Event) -> Lease | None:
        holder = f"{socket.gethostname()}:{os.getpid()}"
        patience = time.monotonic() + 2 * self._config.lease_seconds
        while not stop.is_set():
            lease = self._store.acquire(holder, self._config.lease_seconds)
            if lease is not None:
                return lease
            if time.monotonic() > patience:
                raise JobError(
                    f"{self._store.holder()} schedules this queue already",
                    remedy="one `minigpt jobs run` is enough; stop it first to replace it",
                )
            stop.wait(self._config.poll_seconds)
        return None

    def _keep(
        self, lease: Lease, job: Job, attempt: Attempt, seen: Observation, now: float
    ) -> RunningJob:
        """See to a live attempt: stop it where that was asked, describe it to the policy."""
        grace = job.config.grace_seconds
        if job.cancel_requested and not attempt.stop_reason:
            attempt = self._store.stop(lease, attempt, "cancel", grace)
        if attempt.stop_at is not None:
            if now > attempt.stop_at + _KILL_AFTER:
                self._executor.kill(attempt)
            else:
                self._executor.stop(attempt)
        limit = attempt.started_at + job.config.max_seconds + grace
        status = seen.status
        return RunningJob(
            id=job.id,
            gang=_gang(job.config),
            placement=attempt.placement,
            level=attempt.level,
            ends_by=limit if attempt.stop_at is None else min(limit, attempt.stop_at),
            evictable=job.config.evictable,
            grace_seconds=grace,
            unsaved_seconds=(now - attempt.started_at)
            if status is None
            else status.unsaved_seconds(time.time()),
            safe_in=None if status is None else status.safe_in(time.time()),
            stopping=attempt.stop_at is not None,
        )

    def _settle(self, lease: Lease, job: Job, attempt: Attempt, seen: Observation) -> None:
        """Record the end of an attempt: the job ends or waits again."""
        log = self._log.bind(job=job.id, attempt=attempt.number)
        store, result = self._store, seen.result
        # Stopped with exit code 0 is no success: many programs answer SIGTERM so.
        if result is not None and result.ended == "finished" and not any(result.exit_codes):
            store.end(lease, attempt, "succeeded", "")
            log.info("succeeded")
        elif attempt.stop_reason == "cancel" or job.cancel_requested:
            store.end(lease, attempt, "cancelled", "cancelled while it ran")
            log.info("cancelled")
        elif seen.state == "never began":
            store.requeue(lease, attempt, "not started", "its scheduler died before it began")
            log.warning("not started, queued again")
        elif attempt.stop_reason == "evict":
            store.requeue(lease, attempt, "evicted", "evicted for a job of higher priority")
            log.info("evicted, queued again")
        elif result is None or (result.ended == "stopped" and not result.error):
            self._settle_loss(lease, job, attempt, "stopped" if result else "killed")
        elif job.failures < job.config.retries:
            delay = min(_LONGEST_BACKOFF, 2.0**job.failures)
            store.requeue(lease, attempt, "failed", _describe_failure(job, result), delay)
            log.warning("failed, queued again", reason=_describe_failure(job, result))
        else:
            store.end(lease, attempt, "failed", _describe_failure(job, result))
            log.warning("failed", reason=_describe_failure(job, result))

    def _settle_loss(self, lease: Lease, job: Job, attempt: Attempt, how: str) -> None:
        reason = f"attempt {attempt.number} was {how} from outside"
        self._log.warning("lost", job=job.id, attempt=attempt.number, reason=reason)
        if job.losses < _MOST_LOSSES:
            delay = min(_LONGEST_BACKOFF, 2.0**job.losses - 1)
            self._store.requeue(lease, attempt, "lost", reason, delay)
        else:
            self._store.end(lease, attempt, "failed", f"{reason}, as {_MOST_LOSSES} before it")

    def _carry_out(self, lease: Lease, plan: Plan, nodes: Sequence[Node]) -> None:
        total = Resources.zero()
        for node in nodes:
            total = total + node.total
        for start in plan.starts:
            job = self._store.get(start.job)
            share = job.config.total().share_of(total)
            attempt = self._store.start(
                lease, start.job, start.placement, start.level, share, self._directory
            )
            if attempt is None:  # cancelled since we looked
                continue
            self._executor.start(attempt, job.config)
            self._log.info(
                "started", job=job.id, attempt=attempt.number, nodes=",".join(attempt.placement)
            )
        # Those that will be safe to evict soon are looked at again until they are.
        due = [eviction for eviction in plan.evictions if eviction.after_seconds <= 0]
        running = {job.id: (job, attempt) for job, attempt in self._store.running()} if due else {}
        for eviction in due:
            job, attempt = running[eviction.job]
            stopped = self._store.stop(lease, attempt, "evict", job.config.grace_seconds)
            self._executor.stop(stopped)
            self._log.info("evicting", job=eviction.job, beneficiary=eviction.beneficiary)

    def _explain(self, lease: Lease, plan: Plan, waiting: Sequence[Job], now: float) -> None:
        """Note why each job waits, where that has changed."""
        expected = {r.job: _expectation(r.at) for r in plan.reservations}
        started = {start.job for start in plan.starts}
        reasons = {}
        for job in waiting:
            if job.id in plan.impossible:
                reason = "asks for more than the nodes or its team's quota have in all"
            elif job.eligible_at > now:
                reason = job.reason  # of the failure that it pauses after
            else:
                reason = expected.get(job.id, "others are before it")
            if job.id not in started and reason != job.reason:
                reasons[job.id] = reason
        if reasons:
            self._store.explain(lease, reasons)


def run_until_signalled(scheduler: Scheduler, *, until_empty: bool) -> None:
    """Run a scheduler in the main thread until SIGTERM or SIGINT."""
    stop = threading.Event()
    previous = {
        signum: signal.signal(signum, lambda *_: stop.set())
        for signum in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        scheduler.run(stop, until_empty=until_empty)
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _gang(config: JobConfig) -> Gang:
    return Gang(
        team=config.team,
        workers=config.workers,
        per_worker=config.resources.amount(),
        seconds=config.max_seconds + config.grace_seconds,
        strict_pack=config.placement == "strict-pack",
    )


def _waiting(job: Job, now: float) -> WaitingJob:
    config = job.config
    return WaitingJob(job.id, _gang(config), config.priority, job.submitted_at, job.waited_at(now))


def _expectation(at: float) -> str:
    return f"waits for room, by {datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC at the latest"


def _describe_failure(job: Job, result: AttemptResult) -> str:
    if result.error:
        return result.error
    if result.ended == "time limit":
        return f"stopped at its time limit of {job.config.max_seconds:g} s"
    rank = result.first_failure or 0
    code = result.exit_codes[rank]
    if code < 0:
        return f"worker {rank} was killed by {signal.Signals(-code).name}"
    return f"worker {rank} exited with code {code}"
