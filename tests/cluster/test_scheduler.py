"""Whole queues: real schedulers, real jobs, kill -9 of whatever there is."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from minigpt.cluster.attempt import claimed_by
from minigpt.cluster.config import JobConfig, QueueConfig
from minigpt.cluster.local import LocalExecutor
from minigpt.cluster.records import ENDED, Job
from minigpt.cluster.scheduler import Scheduler
from minigpt.cluster.store import JobStore, LeaseLostError
from minigpt.core.config import to_yaml
from minigpt.core.errors import JobError

# Notes each start and end in one file; every write is a line of its own and atomic.
TRACED = """
import os, sys, time
def note(what):
    file = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{sys.argv[2]} {what} {time.monotonic():.4f} {os.environ['RANK']}\\n".encode())
    os.close(file)
note("start")
time.sleep(float(sys.argv[3]))
note("end")
"""


class Queue:
    """A queue with a scheduler in this process."""

    def __init__(self, url: str, config: QueueConfig, directory: Path) -> None:
        self.store = JobStore(url)
        self.scheduler = Scheduler(config, self.store, LocalExecutor(config.nodes), directory)
        lease = self.store.acquire("test", 600)
        assert lease is not None
        self.lease = lease

    def until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 90
        while not done():
            assert time.monotonic() < deadline, self.store.jobs()
            self.scheduler.tick(self.lease)
            time.sleep(0.03)

    def state(self, job: Job) -> str:
        return self.store.get(job.id).state

    def finish(self, *jobs: Job) -> list[Job]:
        self.until(lambda: all(self.state(job) in ENDED for job in jobs))
        return [self.store.get(job.id) for job in jobs]


@pytest.fixture
def queue(queue_config: QueueConfig, tmp_path: Path) -> Queue:
    return Queue(f"sqlite:///{tmp_path / 'jobs.db'}", queue_config, tmp_path / "jobs")


def test_success_failure_and_retries(queue: Queue, make_job: Callable[..., JobConfig]) -> None:
    flaky = "import os, pathlib\np = pathlib.Path('flag')\nif not p.exists(): p.touch(); exit(4)"
    good, bad, retried = (
        queue.store.submit(job)
        for job in (make_job(), make_job("exit(3)"), make_job(flaky, retries=1))
    )
    good, bad, retried = queue.finish(good, bad, retried)
    assert (good.state, good.reason) == ("succeeded", "")
    assert (bad.state, bad.reason) == ("failed", "worker 0 exited with code 3")
    assert (retried.state, retried.failures, retried.attempt) == ("succeeded", 1, 2)


def test_time_limit_and_signal_are_named(queue: Queue, make_job: Callable[..., JobConfig]) -> None:
    slow = queue.store.submit(make_job("import time; time.sleep(600)", max_seconds=0.5))
    killed = queue.store.submit(make_job("import os; os.kill(os.getpid(), 11)"))
    slow, killed = queue.finish(slow, killed)
    assert (slow.state, slow.reason) == ("failed", "stopped at its time limit of 0.5 s")
    assert (killed.state, killed.reason) == ("failed", "worker 0 was killed by SIGSEGV")


def test_cancel_stops_a_running_job(queue: Queue, make_job: Callable[..., JobConfig]) -> None:
    job = queue.store.submit(make_job("import time; time.sleep(600)", retries=5))
    queue.until(lambda: queue.state(job) == "running")
    queue.store.request_cancel(job.id)
    assert queue.finish(job)[0].state == "cancelled"


def test_reasons_for_waiting(queue: Queue, make_job: Callable[..., JobConfig]) -> None:
    whole = make_job("import time; time.sleep(600)", workers=4, evictable=False)
    job, head, later = (queue.store.submit(whole) for _ in range(3))
    huge = queue.store.submit(make_job(workers=5))
    queue.until(lambda: "waits for room" in queue.store.get(head.id).reason)
    assert "waits for room" in queue.store.get(later.id).reason
    assert "more than the nodes" in queue.store.get(huge.id).reason
    for each in (job, head, later, huge):
        queue.store.request_cancel(each.id)
    queue.finish(job, head, later, huge)


def test_eviction_saves_and_the_job_goes_on_where_it_was(
    queue: Queue, make_job: Callable[..., JobConfig]
) -> None:
    """A counter that saves at SIGTERM, evicted for an urgent job, counts every number once."""
    counting = """
import pathlib, signal, sys, time
saved = pathlib.Path("saved"); n = int(saved.read_text()) if saved.exists() else 0
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
while n < 40:
    n += 1; print(n, flush=True); time.sleep(0.05)
    if stop: saved.write_text(str(n)); sys.exit(0)
"""
    victim = queue.store.submit(make_job(counting, workers=1, resources={"cpus": 2}))
    other = queue.store.submit(
        make_job("import time; time.sleep(600)", evictable=False, resources={"cpus": 2})
    )
    queue.until(lambda: queue.state(victim) == queue.state(other) == "running")
    attempt = queue.store.attempts(victim.id)[0]
    queue.until(lambda: "5" in _log(attempt.directory))
    urgent = queue.store.submit(
        make_job("import time; time.sleep(0.5)", priority=9, resources={"cpus": 2})
    )
    done, first = queue.finish(victim, urgent)
    assert done.state == first.state == "succeeded"
    assert done.evictions == 1 and done.failures == 0 and done.attempt == 2
    attempts = queue.store.attempts(victim.id)
    assert [a.outcome for a in attempts] == ["evicted", "succeeded"]
    numbers = [int(n) for a in attempts for n in _log(a.directory).split()]
    assert numbers == list(range(1, 41))
    assert first.ended_at is not None and first.ended_at <= attempts[1].started_at + 0.5
    queue.store.request_cancel(other.id)
    queue.finish(other)


def test_a_kill_between_the_record_and_the_start(
    queue: Queue, make_job: Callable[..., JobConfig], tmp_path: Path
) -> None:
    job = queue.store.submit(make_job())
    stale = queue.store.start(queue.lease, job.id, ("a",), 0, 0.1, tmp_path / "jobs")
    assert stale is not None  # and here the scheduler died
    done = queue.finish(job)[0]
    assert done.state == "succeeded" and done.attempt == 2 and done.losses == 0
    assert [a.outcome for a in queue.store.attempts(job.id)] == ["not started", "succeeded"]


def test_a_kill_of_the_supervisor_starts_the_job_again(
    queue: Queue, make_job: Callable[..., JobConfig]
) -> None:
    once = "import pathlib, time\np = pathlib.Path('flag')\nif not p.exists():\n"
    job = queue.store.submit(make_job(once + " p.touch(); time.sleep(600)"))
    queue.until(lambda: queue.state(job) == "running")
    attempt = queue.store.attempts(job.id)[0]
    queue.until(lambda: (claimed_by(attempt.directory) or "").isdecimal())
    queue.until(lambda: (Path(job.config.workdir) / "flag").exists())
    os.kill(int(claimed_by(attempt.directory) or ""), signal.SIGKILL)
    done = queue.finish(job)[0]
    assert done.state == "succeeded" and done.losses == 1 and done.failures == 0


def test_one_scheduler_at_a_time(queue: Queue, queue_config: QueueConfig, tmp_path: Path) -> None:
    config = queue_config.replace(lease_seconds=0.4)
    second = Scheduler(config, queue.store, LocalExecutor({}), tmp_path)
    with pytest.raises(JobError, match="test schedules this queue already"):
        second.run(threading.Event())
    queue.store.release(queue.lease)
    second.run(threading.Event(), until_empty=True)
    with pytest.raises(LeaseLostError):
        queue.scheduler.tick(queue.lease)


def test_kill_9_of_the_scheduler_loses_no_job_and_starts_none_twice(
    queue_url: str,
    queue_config: QueueConfig,
    make_job: Callable[..., JobConfig],
    tmp_path: Path,
) -> None:
    """Schedulers killed at random moments, one after another, while jobs come and end."""
    trace = tmp_path / "trace"
    store = JobStore(queue_url)
    file = tmp_path / "queue.yaml"
    file.write_text(to_yaml(queue_config.replace(lease_seconds=0.4)))
    rng = random.Random(os.getpid())
    jobs: list[Job] = []

    def submit(count: int) -> None:
        for _ in range(count):
            number, seconds = str(len(jobs)), str(rng.uniform(0.1, 1.0))
            command = [sys.executable, "-c", TRACED, str(trace), number, seconds]
            jobs.append(store.submit(make_job(command=command, workers=rng.randint(1, 2))))

    def scheduler(*options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "minigpt", "jobs", "run", str(file), "--queue", queue_url]
        with (tmp_path / "scheduler.log").open("ab") as log:
            return subprocess.Popen([*command, *options], stdout=log, stderr=log)

    submit(4)
    for _ in range(5):
        process = scheduler()
        deadline = time.monotonic() + 60
        while store.holder() is None:  # it has begun
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 0.8))
        process.send_signal(signal.SIGKILL)
        process.wait()
        submit(1)
        while store.holder() is not None:  # so that the next loop sees the next scheduler
            time.sleep(0.05)
    last = scheduler("--until-empty")
    assert last.wait(120) == 0, (tmp_path / "scheduler.log").read_text()
    found = [store.get(job.id) for job in jobs]
    assert [job.state for job in found] == ["succeeded"] * 9
    assert all(job.failures == job.losses == 0 for job in found)
    check_trace(trace, found)


def check_trace(trace: Path, jobs: list[Job]) -> None:
    """Each worker of each job ran once, and the nodes never held more than they have."""
    events = [line.split() for line in trace.read_text().splitlines()]
    counts = Counter((number, what, rank) for number, what, _, rank in events)
    for number, job in enumerate(jobs):
        for rank in range(job.config.workers):
            assert counts[str(number), "start", str(rank)] == 1
            assert counts[str(number), "end", str(rank)] == 1
    running = most = 0
    for _, what, _, _ in sorted(events, key=lambda event: float(event[2])):
        running += 1 if what == "start" else -1
        most = max(most, running)
    assert most <= 4


def _log(directory: Path) -> str:
    path = directory / "worker-0.log"
    return path.read_text() if path.exists() else ""
