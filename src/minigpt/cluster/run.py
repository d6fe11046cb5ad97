"""A queue served from a URL: store, executor and scheduler put together."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from minigpt.cluster.config import QueueConfig
from minigpt.cluster.executor import Executor
from minigpt.cluster.resources import Resources
from minigpt.cluster.scheduler import Scheduler, run_until_signalled
from minigpt.cluster.store import JobStore
from minigpt.core.storage import home


def run_queue(config: QueueConfig, url: str, *, until_empty: bool = False) -> None:
    """Serve the queue at a URL until a signal asks to stop.

    Args:
        config: Executor, teams, policy.
        url: The queue's database.
        until_empty: Return as soon as no job waits or runs.

    Raises:
        JobError: The queue or the Ray cluster can't be used, or is served already.
    """
    scheduler = Scheduler(config, JobStore(url), _make_executor(config), jobs_directory(url))
    run_until_signalled(scheduler, until_empty=until_empty)


def jobs_directory(url: str) -> Path:
    """Return where the jobs of a queue leave logs and results: in minigpt's home, one a queue."""
    return home() / "jobs" / hashlib.sha256(url.encode()).hexdigest()[:12]


def node_table(store: JobStore) -> list[dict[str, Any]]:
    """Return each node's amounts, what of them is free, and the isolation there."""
    used: dict[str, Resources] = {}
    for job, attempt in store.running():
        for node in attempt.placement:
            amount = job.config.resources.amount()
            used[node] = used.get(node, Resources.zero()) + amount
    return [
        {
            "name": node.name,
            "total": _amounts(node.total),
            "free": _amounts(node.total - used.get(node.name, Resources.zero())),
            "isolation": isolation,
        }
        for node, isolation in store.nodes()
    ]


def _amounts(amount: Resources) -> dict[str, float]:
    return {"cpus": amount.millicpus / 1000, "memory": amount.memory, "gpus": amount.gpus}


def _make_executor(config: QueueConfig) -> Executor:
    if config.executor == "ray":
        from minigpt.cluster.ray_executor import RayExecutor

        return RayExecutor(config.ray_address)
    from minigpt.cluster.local import LocalExecutor

    return LocalExecutor(config.nodes)
