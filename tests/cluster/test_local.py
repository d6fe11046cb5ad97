"""Real processes under real supervisors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minigpt.cluster.attempt import claim, claimed_by, log_path, read_spec
from minigpt.cluster.config import JobConfig, NodeConfig
from minigpt.cluster.executor import Observation
from minigpt.cluster.isolation import processes_of
from minigpt.cluster.local import LocalExecutor
from minigpt.cluster.records import Attempt

NODES = {name: NodeConfig(cpus=2, memory_gib=8, gpus=2) for name in ("a", "b")}


@pytest.fixture
def executor() -> LocalExecutor:
    return LocalExecutor(NODES)


@pytest.fixture
def attempt(tmp_path: Path) -> Iterator[Callable[..., Attempt]]:
    made: list[Attempt] = []

    def make(*nodes: str) -> Attempt:
        number = len(made) + 1
        directory = tmp_path / "jobs" / "7" / f"attempt-{number}-{tmp_path.name}"
        made.append(
            Attempt(7, number, "t", nodes, 0, 0.1, time.time(), None, "", "", None, directory)
        )
        return made[-1]

    yield make
    leftovers = [
        pid for a in made if (s := read_spec(a.directory)) for pid in processes_of(s.token)
    ]
    assert not leftovers


def wait_for(
    executor: LocalExecutor, attempt: Attempt, done: Callable[[Observation], bool]
) -> Observation:
    deadline = time.monotonic() + 60
    while not done(seen := executor.observe(attempt)):
        assert time.monotonic() < deadline, seen
        time.sleep(0.03)
    return seen


def ended(seen: Observation) -> bool:
    return seen.state == "ended"


def logged(attempt: Attempt, rank: int = 0) -> str:
    path = log_path(attempt.directory, rank)
    return path.read_text() if path.exists() else ""


def wait_for_log(attempt: Attempt, text: str, rank: int = 0) -> None:
    deadline = time.monotonic() + 60
    while text not in logged(attempt, rank):
        assert time.monotonic() < deadline, logged(attempt, rank)
        time.sleep(0.03)


def test_a_gang_gets_what_torchrun_sets(
    executor: LocalExecutor, attempt: Callable[..., Attempt], make_job: Callable[..., JobConfig]
) -> None:
    source = "import os, json; print(json.dumps(dict(os.environ)))"
    job = make_job(
        source,
        workers=3,
        env={"MINE": "1"},
        resources={"cpus": 0.5, "memory_gib": 1, "gpus": 1},
    )
    one = attempt("a", "b", "a")
    executor.start(one, job)
    result = wait_for(executor, one, ended).result
    assert result is not None and result.exit_codes == [0, 0, 0]
    seen = [json.loads(logged(one, rank)) for rank in range(3)]
    assert [s["RANK"] for s in seen] == ["0", "1", "2"]
    assert [s["LOCAL_RANK"] for s in seen] == ["0", "0", "1"]
    assert [s["GROUP_RANK"] for s in seen] == ["0", "1", "0"]
    assert [s["CUDA_VISIBLE_DEVICES"] for s in seen] == ["0,1", "2", "0,1"]
    assert {s["WORLD_SIZE"] for s in seen} == {"3"} and {s["MINE"] for s in seen} == {"1"}
    assert len({(s["MASTER_ADDR"], s["MASTER_PORT"]) for s in seen}) == 1
    assert {s["OMP_NUM_THREADS"] for s in seen} == {"1"}


def test_one_dead_worker_ends_the_gang(
    executor: LocalExecutor, attempt: Callable[..., Attempt], make_job: Callable[..., JobConfig]
) -> None:
    source = "import os, time; os.environ['RANK'] == '1' and exit(3); time.sleep(600)"
    one = attempt("a", "b")
    executor.start(one, make_job(source, workers=2))
    result = wait_for(executor, one, ended).result
    assert result is not None and result.ended == "finished"
    assert result.first_failure == 1 and result.exit_codes == [-signal.SIGTERM, 3]


def test_a_stop_gives_grace_and_then_none(
    executor: LocalExecutor, attempt: Callable[..., Attempt], make_job: Callable[..., JobConfig]
) -> None:
    polite = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(143)))\n"
        "print('up', flush=True)\ntime.sleep(600)"
    )
    one = attempt("a")
    executor.start(one, make_job(polite))
    wait_for_log(one, "up")
    executor.stop(one)
    executor.stop(one)  # asking again changes nothing
    result = wait_for(executor, one, ended).result
    assert result is not None and result.ended == "stopped" and result.exit_codes == [143]
    assert "saved" in logged(one)
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True)\n"
    two = attempt("a")
    executor.start(two, make_job(deaf + "time.sleep(600)", grace_seconds=0.3))
    wait_for_log(two, "up")
    executor.stop(two)
    result = wait_for(executor, two, ended).result
    assert result is not None and result.exit_codes == [-signal.SIGKILL]


def test_the_time_limit_is_kept_and_strays_are_caught(
    executor: LocalExecutor, attempt: Callable[..., Attempt], make_job: Callable[..., JobConfig]
) -> None:
    """A child in a session of its own is not in the worker's process group; it ends as well."""
    source = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " start_new_session=True)\nprint('up', flush=True)\ntime.sleep(600)"
    )
    one = attempt("a")
    executor.start(one, make_job(source, max_seconds=3))
    wait_for_log(one, "up")
    spec = read_spec(one.directory)
    assert spec is not None and len(list(processes_of(spec.token))) == 2
    result = wait_for(executor, one, ended).result
    assert result is not None and result.ended == "time limit"


def test_a_killed_supervisor_takes_its_job_with_it(
    executor: LocalExecutor, attempt: Callable[..., Attempt], make_job: Callable[..., JobConfig]
) -> None:
    one = attempt("a")
    executor.start(one, make_job("print('up', flush=True)\nimport time; time.sleep(600)"))
    wait_for_log(one, "up")
    claimant = claimed_by(one.directory)
    assert claimant is not None
    os.kill(int(claimant), signal.SIGKILL)
    seen = wait_for(executor, one, lambda seen: seen.state != "alive")
    assert seen.state == "lost"  # the fixture checks that no process is left


def test_another_executor_finds_the_job_again(
    executor: LocalExecutor, attempt: Callable[..., Attempt], make_job: Callable[..., JobConfig]
) -> None:
    job = make_job(
        "print('up', flush=True)\nimport time; time.sleep(600)",
        resources={"cpus": 1, "memory_gib": 1, "gpus": 1},
    )
    one = attempt("a")
    executor.start(one, job)
    wait_for_log(one, "up")
    heir = LocalExecutor(NODES)
    assert heir.observe(one).state == "alive"
    two = attempt("a")
    heir.start(two, job)  # it knows which GPU and core the first one has
    first, second = read_spec(one.directory), read_spec(two.directory)
    assert first is not None and second is not None
    assert first.gpus == {"a": [0]} and second.gpus == {"a": [1]}
    if len(os.sched_getaffinity(0)) > 1:
        assert first.workers[0].cores != second.workers[0].cores
    for each in (one, two):
        wait_for_log(each, "up")
        heir.stop(each)
        wait_for(heir, each, ended)
    assert executor.observe(one).state == "ended"


def test_what_never_began_never_will(
    executor: LocalExecutor, attempt: Callable[..., Attempt], make_job: Callable[..., JobConfig]
) -> None:
    """A scheduler died between its transaction and the start; then the late start comes."""
    one = attempt("a")
    assert executor.observe(one).state == "never began"
    assert executor.observe(one).state == "never began"
    late = LocalExecutor(NODES)
    late.start(one, make_job("print('ran', flush=True)"))
    wait_for(late, one, lambda seen: seen.state == "never began")
    assert logged(one) == ""


def test_two_supervisors_of_one_attempt(
    executor: LocalExecutor, attempt: Callable[..., Attempt], make_job: Callable[..., JobConfig]
) -> None:
    one = attempt("a")
    executor.start(one, make_job("print('ran', flush=True)"))
    second = subprocess.run(
        [sys.executable, "-m", "minigpt.cluster.supervisor", str(one.directory)], timeout=60
    )
    assert second.returncode == 0
    wait_for(executor, one, ended)
    assert logged(one) == "ran\n" and not claim(one.directory, "me")


def test_a_program_that_is_not_there(
    executor: LocalExecutor, attempt: Callable[..., Attempt], make_job: Callable[..., JobConfig]
) -> None:
    one = attempt("a")
    executor.start(one, make_job(command=["no-such-program"]))
    result = wait_for(executor, one, ended).result
    assert result is not None and result.exit_codes == [127]
    assert result.error == "can't start 'no-such-program': No such file or directory"


def test_the_jobs_own_word_is_heard(
    executor: LocalExecutor, attempt: Callable[..., Attempt], make_job: Callable[..., JobConfig]
) -> None:
    source = (
        "from minigpt.core.job_status import report_saved\nimport time\n"
        "report_saved(safe_to_evict_in=30)\nprint('up', flush=True)\ntime.sleep(600)"
    )
    one = attempt("a")
    executor.start(one, make_job(source))
    wait_for_log(one, "up")
    status = executor.observe(one).status
    assert status is not None
    now = time.time()
    assert status.unsaved_seconds(now) < 20 and 10 < (status.safe_in(now) or 0) <= 30
    executor.kill(one)
    assert wait_for(executor, one, lambda seen: seen.state != "alive").state == "lost"
