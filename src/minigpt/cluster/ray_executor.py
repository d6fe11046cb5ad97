"""Jobs on a Ray cluster: Ray holds the resources and starts the workers, the policy decides where.

What `attempt.py` does with files, the cluster's key-value store does here: an attempt is claimed
once, by its supervisor or by a scheduler that found no trace of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minigpt.cluster.attempt import AttemptSpec, WorkerSpec
from minigpt.cluster.config import GIB, JobConfig
from minigpt.cluster.executor import Observation
from minigpt.cluster.local import worker_env
from minigpt.cluster.records import Attempt
from minigpt.cluster.resources import Resources
from minigpt.cluster.timeline import Node
from minigpt.core.errors import JobError
from minigpt.core.job_status import JobStatus

_FENCED = "scheduler"
_ANSWER_SECONDS = 5.0


class RayExecutor:
    """Executor on a Ray cluster.

    Args:
        address: Of the cluster; `auto` finds the one on this machine.

    Raises:
        JobError: Ray is not installed, or no cluster answers.
    """

    def __init__(self, address: str) -> None:
        try:
            import ray
        except ImportError:
            raise JobError("ray is not installed", remedy="install minigpt[cluster]") from None
        from minigpt.cluster import ray_actors

        self._ray: Any = ray
        self._actors: Any = ray_actors
        try:
            ray.init(
                address=address,
                namespace=ray_actors.NAMESPACE,
                log_to_driver=False,
                ignore_reinit_error=True,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            line = " ".join(str(error).split())[:160]
            raise JobError(
                f"no Ray cluster at {address}: {line}", remedy="start one: ray start --head"
            ) from None

    @property
    def isolation(self) -> str:
        return "Ray resources in a placement group for each job; RLIMIT_DATA or cgroup per worker"

    def nodes(self) -> Sequence[Node]:
        return [
            Node(
                node["NodeID"],
                Resources(
                    round(node["Resources"].get("CPU", 0) * 1000),
                    round(node["Resources"].get("memory", 0)),
                    round(node["Resources"].get("GPU", 0)),
                ),
            )
            for node in self._ray.nodes()
            if node["Alive"]
        ]

    def start(self, attempt: Attempt, config: JobConfig) -> None:
        spec = _make_spec(attempt, config)
        self._actors.SupervisorActor.options(
            name=_token(attempt), namespace=self._actors.NAMESPACE, lifetime="detached"
        ).remote(spec, attempt.placement, attempt.directory)

    def observe(self, attempt: Attempt) -> Observation:
        token = _token(attempt)
        actor = self._find(attempt)
        result = self._actors.read_result(token)  # after the look: what is dead has written it
        if result is not None:
            return Observation("ended", result)
        if actor is not None:
            return Observation("alive", status=self._status(actor))
        if self._actors.claim(token, _FENCED) or self._actors.claimed_by(token) == _FENCED:
            return Observation("never began")
        return Observation("lost")

    def stop(self, attempt: Attempt) -> None:
        actor = self._find(attempt)
        if actor is not None:
            actor.stop.remote()

    def kill(self, attempt: Attempt) -> None:
        actor = self._find(attempt)
        if actor is not None:
            self._ray.kill(actor)

    def close(self) -> None:
        self._ray.shutdown()

    def _find(self, attempt: Attempt) -> Any:
        """Return the attempt's supervisor, None where it is dead or was never made."""
        try:
            return self._ray.get_actor(_token(attempt), namespace=self._actors.NAMESPACE)
        except ValueError:
            return None

    def _status(self, actor: Any) -> JobStatus | None:
        try:
            status: JobStatus | None = self._ray.get(actor.status.remote(), timeout=_ANSWER_SECONDS)
        except self._ray.exceptions.RayError:
            return None  # it is starting, or has just died, which the next look will show
        return status


def _token(attempt: Attempt) -> str:
    return f"{attempt.directory.parent.name}-{attempt.directory.name}"


def _make_spec(attempt: Attempt, config: JobConfig) -> AttemptSpec:
    placement = attempt.placement
    return AttemptSpec(
        token=_token(attempt),
        command=config.command,
        workdir=config.workdir,
        workers=[
            WorkerSpec(worker_env(config, placement, rank), []) for rank in range(config.workers)
        ],
        cpus=config.resources.cpus,
        memory=round(config.resources.memory_gib * GIB),
        gpus={node: [0] * config.resources.gpus for node in placement},
        max_seconds=config.max_seconds,
        grace_seconds=config.grace_seconds,
    )
