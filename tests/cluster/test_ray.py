"""Jobs and training on a Ray cluster of two raylets on this machine."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minigpt.cluster.config import JobConfig, QueueConfig
from minigpt.cluster.ray_executor import RayExecutor
from minigpt.cluster.records import ENDED, Attempt, Job
from minigpt.cluster.scheduler import Scheduler
from minigpt.cluster.store import JobStore
from minigpt.core.config import from_mapping

pytestmark = pytest.mark.soak  # a cluster takes seconds to start and stop


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    ray: Any = pytest.importorskip("ray")
    utilities: Any = pytest.importorskip("ray.cluster_utils")
    made = utilities.Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1})
    try:
        made.add_node(num_cpus=2)
        yield made.address
    finally:
        ray.shutdown()
        made.shutdown()


class RayQueue:
    """A queue served on the cluster by a scheduler in this process."""

    def __init__(self, address: str, directory: Path) -> None:
        config = from_mapping(QueueConfig, {"executor": "ray", "poll_seconds": 0.1})
        self.store = JobStore(f"sqlite:///{directory / 'jobs.db'}")
        self.executor = RayExecutor(address)
        self.scheduler = Scheduler(config, self.store, self.executor, directory / "jobs")
        lease = self.store.acquire("test", 600)
        assert lease is not None
        self.lease = lease

    def until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not done():
            assert time.monotonic() < deadline, self.store.jobs()
            self.scheduler.tick(self.lease)
            time.sleep(0.1)

    def finish(self, *jobs: Job) -> list[Job]:
        self.until(lambda: all(self.store.get(job.id).state in ENDED for job in jobs))
        return [self.store.get(job.id) for job in jobs]

    def attempt(self, job: Job) -> Attempt:
        return self.store.attempts(job.id)[-1]

    def log(self, job: Job, rank: int = 0) -> str:
        attempts = self.store.attempts(job.id)
        if not attempts:
            return ""
        path = attempts[-1].directory / f"worker-{rank}.log"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def queue(cluster: str, tmp_path: Path) -> RayQueue:
    return RayQueue(cluster, tmp_path)


SMALL = {"cpus": 1, "memory_gib": 0.1}


def test_a_gang_over_two_nodes_and_never_a_part_of_one(
    queue: RayQueue, make_job: Callable[..., JobConfig]
) -> None:
    source = "import os, json, time; print(json.dumps(dict(os.environ)), flush=True); time.sleep(1)"
    job = queue.store.submit(make_job(source, workers=4, resources=SMALL))
    second = queue.store.submit(make_job(source, workers=3, resources=SMALL))
    queue.until(lambda: queue.store.get(job.id).state == "running")
    assert queue.store.get(second.id).state == "queued"
    job, second = queue.finish(job, second)
    assert job.state == second.state == "succeeded"
    assert sorted(Counter(queue.attempt(job).placement).values()) == [2, 2]
    seen = [json.loads(queue.log(job, rank)) for rank in range(4)]
    assert [s["RANK"] for s in seen] == ["0", "1", "2", "3"]
    assert [s["LOCAL_RANK"] for s in seen] == ["0", "1", "0", "1"]
    assert len({(s["MASTER_ADDR"], s["MASTER_PORT"]) for s in seen}) == 1
    first = queue.attempt(job)
    assert first.ended_at is not None and queue.attempt(second).started_at >= first.ended_at


def test_a_gpu_is_given_to_one_job_at_a_time(
    queue: RayQueue, make_job: Callable[..., JobConfig]
) -> None:
    source = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(1)"
    jobs = [queue.store.submit(make_job(source, resources=SMALL | {"gpus": 1})) for _ in range(2)]
    plain = queue.store.submit(make_job(source, resources=SMALL))
    done = queue.finish(*jobs, plain)
    assert [job.state for job in done] == ["succeeded"] * 3
    assert [queue.log(job).strip() for job in jobs] == ["0", "0"]
    assert queue.log(plain).strip() == ""
    ended = queue.attempt(jobs[0]).ended_at
    assert ended is not None and queue.attempt(jobs[1]).started_at >= ended


def test_failure_cancel_and_a_deaf_worker(
    queue: RayQueue, make_job: Callable[..., JobConfig]
) -> None:
    bad = queue.store.submit(make_job("exit(3)", resources=SMALL))
    missing = queue.store.submit(make_job(command=["no-such-program"], resources=SMALL))
    bad, missing = queue.finish(bad, missing)
    assert (bad.state, bad.reason) == ("failed", "worker 0 exited with code 3")
    assert missing.state == "failed" and "can't start 'no-such-program'" in missing.reason
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True)\n"
    job = queue.store.submit(
        make_job(deaf + "time.sleep(600)", workers=2, resources=SMALL, grace_seconds=0.5)
    )
    queue.until(lambda: "up" in queue.log(job, 0) and "up" in queue.log(job, 1))
    queue.store.request_cancel(job.id)
    assert queue.finish(job)[0].state == "cancelled"


def test_another_scheduler_finds_the_job_again(
    queue: RayQueue, make_job: Callable[..., JobConfig], tmp_path: Path
) -> None:
    job = queue.store.submit(make_job("import time; time.sleep(3)", resources=SMALL))
    queue.until(lambda: queue.store.get(job.id).state == "running")
    queue.scheduler._executor = RayExecutor("auto")  # all that a scheduler knows of itself
    done = queue.finish(job)[0]
    assert done.state == "succeeded" and done.attempt == 1


def test_a_start_that_never_came_is_fenced(
    queue: RayQueue, make_job: Callable[..., JobConfig], tmp_path: Path
) -> None:
    job = queue.store.submit(make_job("print('ran', flush=True)", resources=SMALL))
    node = queue.executor.nodes()[0].name
    stale = queue.store.start(queue.lease, job.id, (node,), 0, 0.1, tmp_path / "jobs")
    assert stale is not None  # and here its scheduler died
    done = queue.finish(job)[0]
    assert done.state == "succeeded" and done.attempt == 2
    queue.executor.start(stale, job.config)  # the late start does nothing
    time.sleep(3)
    assert not (stale.directory / "worker-0.log").exists()


def test_a_lost_supervisor_frees_all_and_the_job_runs_again(
    queue: RayQueue, make_job: Callable[..., JobConfig]
) -> None:
    once = (
        "import os, pathlib, time\np = pathlib.Path('flag')\n"
        "if not p.exists():\n p.write_text(str(os.getpid())); time.sleep(600)"
    )
    job = queue.store.submit(make_job(once, resources=SMALL))
    flag = Path(job.config.workdir) / "flag"
    queue.until(lambda: flag.exists() and flag.read_text() != "")
    queue.executor.kill(queue.attempt(job))
    done = queue.finish(job)[0]
    assert done.state == "succeeded" and done.losses == 1
    deadline = time.monotonic() + 20
    while Path(f"/proc/{flag.read_text()}").exists():
        assert time.monotonic() < deadline, "the command outlived its supervisor"
        time.sleep(0.1)


def write_recipe(directory: Path, dataset: Path, steps: int) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(
        f"name: ray\ndata: {dataset}\nsize: 1\nmodel: {{hidden_size: 32}}\nsteps: {steps}\n"
        "batch: {sequence_length: 32, tokens_per_step: 128}\n"
        "trackers: {mlflow: false}\ncompile: false\nthreads: 1\n"
        "checkpoint: {every: 5}\nvalidation: {every: 0, sample_tokens: 0}\n"
    )
    return path


def read_final(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "final.json").read_text())
    return content


def test_training_on_ray_equals_training_here(
    cluster: str, tiny_dataset: Path, tmp_path: Path
) -> None:
    from minigpt.cluster.ray_train import RayTrainConfig
    from minigpt.pipeline import train_recipe, train_recipe_on_ray

    recipe = write_recipe(tmp_path, tiny_dataset, steps=8)
    ray = RayTrainConfig(workers=1, address=cluster)
    train_recipe_on_ray(recipe, tmp_path / "ray", [], ray)
    train_recipe(recipe, tmp_path / "here")
    there, here = read_final(tmp_path / "ray"), read_final(tmp_path / "here")
    assert there["weights_sha256"] == here["weights_sha256"]


def test_a_killed_ray_worker_goes_on_from_its_checkpoint(
    cluster: str, tiny_dataset: Path, tmp_path: Path
) -> None:
    """kill -9 of the worker in the middle; the run ends with the weights of an unbroken one."""
    import threading

    from minigpt.cluster.ray_train import RayTrainConfig
    from minigpt.pipeline import train_recipe, train_recipe_on_ray

    recipe = write_recipe(tmp_path, tiny_dataset, steps=400)
    killed: list[int] = []

    def kill_when_it_has_saved() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not killed:
            if any((tmp_path / "ray" / "checkpoints").glob("step-*")):
                for entry in Path("/proc").glob("[0-9]*"):
                    try:
                        files = [link.readlink() for link in (entry / "fd").iterdir()]
                    except OSError:
                        continue
                    if tmp_path / "ray" in files and int(entry.name) != os.getpid():
                        os.kill(int(entry.name), signal.SIGKILL)
                        killed.append(int(entry.name))
            time.sleep(0.01)

    killer = threading.Thread(target=kill_when_it_has_saved)
    killer.start()
    train_recipe_on_ray(
        recipe, tmp_path / "ray", [], RayTrainConfig(workers=1, address=cluster, max_failures=2)
    )
    killer.join()
    assert killed, sys.argv
    train_recipe(recipe, tmp_path / "here")
    there, here = read_final(tmp_path / "ray"), read_final(tmp_path / "here")
    assert there["weights_sha256"] == here["weights_sha256"]


def test_two_ray_workers_train_one_model(cluster: str, tiny_dataset: Path, tmp_path: Path) -> None:
    """Data parallel over the process group that Ray Train sets up: losses as of one process."""
    from minigpt.cluster.ray_train import RayTrainConfig
    from minigpt.pipeline import train_recipe, train_recipe_on_ray
    from minigpt.train.metrics import read_metrics

    recipe = write_recipe(tmp_path, tiny_dataset, steps=6)
    cut = ["batch.micro_batch_size=1"]
    ray = RayTrainConfig(workers=2, address=cluster)
    train_recipe_on_ray(recipe, tmp_path / "ray", [*cut, "mesh.dp=2"], ray)
    train_recipe(recipe, tmp_path / "here", cut)
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("ray", "here")
    ]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.timeout(900)
def test_a_killed_worker_of_two_changes_no_bit(
    cluster: str, tiny_dataset: Path, tmp_path: Path
) -> None:
    """kill -9 of rank 1, as its beacon names it; the unbroken run is one of supervised ranks."""
    import threading

    from minigpt.cluster.ray_train import RayTrainConfig
    from minigpt.pipeline import train_recipe, train_recipe_on_ray
    from minigpt.train.metrics import read_metrics
    from minigpt.train.progress import beacon_path, read_beacon

    recipe, run = write_recipe(tmp_path, tiny_dataset, steps=100), tmp_path / "ray"
    overrides = ["batch.micro_batch_size=1", "mesh.dp=2"]
    killed: list[int] = []

    def kill_rank_1_after_a_save() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not killed:
            beacon = read_beacon(beacon_path(run, 1))
            if beacon is not None and any((run / "checkpoints").glob("step-*")):
                os.kill(beacon.pid, signal.SIGKILL)
                killed.append(beacon.step)
            time.sleep(0.01)

    killer = threading.Thread(target=kill_rank_1_after_a_save)
    killer.start()
    ray = RayTrainConfig(workers=2, address=cluster, max_failures=2)
    train_recipe_on_ray(recipe, run, overrides, ray)
    killer.join()
    assert killed and 0 < killed[0] < 100
    train_recipe(recipe, tmp_path / "here", overrides)
    there, here = read_final(run), read_final(tmp_path / "here")
    assert there["weights_sha256"] == here["weights_sha256"]
    assert there["losses"]["sha256"] == here["losses"]["sha256"]
    events = list(read_metrics(run / "events.jsonl"))
    sessions = [line["step"] for line in events if line["kind"] == "session"]
    assert sessions[0] == 0 and len(sessions) == 2 and 0 < sessions[1] <= killed[0]
    assert [line["seconds"] for line in events if line["kind"] == "recovered"]
