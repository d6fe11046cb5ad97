"""The queue's transactions, on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from minigpt.cluster.config import JobConfig
from minigpt.cluster.database import schema_table
from minigpt.cluster.records import Attempt, Lease
from minigpt.cluster.resources import Resources
from minigpt.cluster.store import JobStore, LeaseLostError
from minigpt.cluster.timeline import Node
from minigpt.core.errors import JobError


@pytest.fixture
def store(queue_url: str) -> JobStore:
    return JobStore(queue_url)


@pytest.fixture
def lease(store: JobStore) -> Lease:
    lease = store.acquire("test", 60)
    assert lease is not None
    return lease


def start(store: JobStore, lease: Lease, job: int, share: float = 0.5) -> Attempt:
    attempt = store.start(lease, job, ("a",), 0, share, Path("/jobs"))
    assert attempt is not None
    return attempt


def test_a_job_goes_through_its_states(
    store: JobStore, lease: Lease, make_job: Callable[..., JobConfig]
) -> None:
    config = make_job(name="first", priority=3)
    job = store.submit(config)
    assert job.state == "queued" and job.config == config
    attempt = start(store, lease, job.id)
    assert attempt.number == 1 and str(attempt.directory).startswith(f"/jobs/{job.id}/attempt-1-")
    assert [pair[1] for pair in store.running()] == [attempt]
    assert store.start(lease, job.id, ("a",), 0, 0.5, Path("/jobs")) is None  # it runs already
    store.requeue(lease, attempt, "failed", "worker 0 exited with code 1", delay=5)
    waiting = store.get(job.id)
    assert waiting.state == "queued" and waiting.failures == 1
    assert 4 < waiting.eligible_at - waiting.queued_at < 6
    second = start(store, lease, job.id)
    assert second.number == 2 and second.directory != attempt.directory
    store.end(lease, second, "succeeded", "")
    assert store.get(job.id).state == "succeeded" and not store.running()
    assert [a.outcome for a in store.attempts(job.id)] == ["failed", "succeeded"]
    assert store.jobs(["queued"]) == [] and len(store.jobs()) == 1


def test_cancel(store: JobStore, lease: Lease, make_job: Callable[..., JobConfig]) -> None:
    first, second = store.submit(make_job()), store.submit(make_job())
    assert store.request_cancel(first.id).state == "cancelled"
    assert store.start(lease, first.id, ("a",), 0, 0.5, Path("/jobs")) is None
    assert store.request_cancel(first.id).state == "cancelled"  # twice is no error
    attempt = start(store, lease, second.id)
    running = store.request_cancel(second.id)
    assert running.state == "running" and running.cancel_requested
    store.end(lease, attempt, "succeeded", "")
    with pytest.raises(JobError, match="has succeeded already"):
        store.request_cancel(second.id)
    with pytest.raises(JobError, match="no job 99"):
        store.request_cancel(99)


def test_one_lease_at_a_time_and_a_lost_one_changes_nothing(
    store: JobStore, queue_url: str, make_job: Callable[..., JobConfig]
) -> None:
    other = JobStore(queue_url)
    old = store.acquire("old", 0.5)
    assert old is not None and other.acquire("new", 60) is None
    assert store.holder() == "old"
    store.renew(old, 0.3)
    job = store.submit(make_job())
    attempt = start(store, old, job.id)
    time.sleep(0.5)
    new = other.acquire("new", 60)
    assert new is not None and new.token == old.token + 1
    for change in (
        lambda: store.renew(old, 60),
        lambda: start(store, old, job.id),
        lambda: store.stop(old, attempt, "evict", 1),
        lambda: store.end(old, attempt, "failed", "stale"),
        lambda: store.requeue(old, attempt, "lost", "stale"),
        lambda: store.publish_nodes(old, [], ""),
        lambda: store.explain(old, {job.id: "stale"}),
    ):
        with pytest.raises(LeaseLostError, match="new has it"):
            change()
    assert store.get(job.id).state == "running"
    other.release(new)
    assert store.acquire("next", 60) is not None


def test_many_clients_at_once_lose_nothing(
    queue_url: str, make_job: Callable[..., JobConfig]
) -> None:
    """Submissions, cancellations and starts from 6 threads with an engine each."""
    lease = JobStore(queue_url).acquire("test", 60)
    assert lease is not None
    errors: list[BaseException] = []
    started: list[int] = []

    def client() -> None:
        try:
            store = JobStore(queue_url)
            for _ in range(5):
                store.submit(make_job())
            started.extend(
                job.id
                for job in store.jobs(["queued"])
                if store.start(lease, job.id, ("a",), 0, 0.1, Path("/jobs"))
            )
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=client) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(JobStore(queue_url).jobs()) == 30
    assert len(started) == len(set(started)) == 30


def test_usage_is_the_decayed_share(
    store: JobStore, lease: Lease, make_job: Callable[..., JobConfig]
) -> None:
    attempt = start(store, lease, store.submit(make_job(team="x")).id, share=0.25)
    now = attempt.started_at + 1000
    assert math.isclose(store.usage(now, 1000)["x"], 0.25 * (1 - 0.5), rel_tol=1e-6)
    store.end(lease, attempt, "succeeded", "")
    later = store.attempts(attempt.job)[0]
    assert later.ended_at is not None
    ran = later.ended_at - later.started_at
    expected = 0.25 * (2 ** (-(1000 - ran) / 1000) - 0.5)
    assert math.isclose(store.usage(now, 1000)["x"], expected, abs_tol=1e-6)
    assert store.usage(now + 1e9, 1000) == {}


def test_nodes_are_replaced(store: JobStore, lease: Lease) -> None:
    nodes = [Node("a", Resources(2000, 1 << 40, 8)), Node("b", Resources(1000, 5, 0))]
    store.publish_nodes(lease, nodes, "none")
    store.publish_nodes(lease, nodes[1:], "cgroups")
    assert store.nodes() == [(nodes[1], "cgroups")]


def test_a_newer_schema_is_refused(store: JobStore, queue_url: str) -> None:
    store.jobs()
    url = queue_url.replace("postgresql://", "postgresql+psycopg://")
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(schema_table.update().values(version=2))
    engine.dispose()
    with pytest.raises(JobError, match="schema 2, newer than 1"):
        JobStore(queue_url).jobs()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://host/name", "mysql is not supported"),
        ("nonsense", "can't open the queue nonsense"),
        ("postgresql://user:secret@127.0.0.1:9/name", "can't open the queue postgresql://user:"),
    ],
)
def test_bad_urls_are_one_line_without_the_password(url: str, message: str) -> None:
    with pytest.raises(JobError, match=message) as caught:
        JobStore(url).jobs()
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
