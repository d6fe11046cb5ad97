"""A training function on Ray Train workers, started again from its checkpoint when one dies.

What a worker runs finds RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as under
torchrun, and for several workers the process group that Ray Train has set up.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from minigpt.core.config import Config
from minigpt.core.errors import JobError

_COLLECTIVE_SECONDS = 7200  # a rank that saves or evaluates keeps the others waiting


class RayTrainConfig(Config):
    """Workers and what becomes of failures."""

    workers: int = 1
    """Processes; the size of the recipe's mesh."""
    cpus_per_worker: float = 1.0
    """Cores that each reserves."""
    gpus_per_worker: int = 0
    """GPUs that each reserves."""
    max_failures: int = 3
    """How often the workers are started again after one of them died."""
    address: str | None = None
    """Ray cluster; null is that of RAY_ADDRESS, one that runs here, or a new one."""


def train_on_ray(train: Callable[[], None], run_dir: Path, config: RayTrainConfig) -> None:
    """Run `train` on every worker until all have returned.

    Args:
        train: What each worker calls; it must resume by itself from what it has saved in
            `run_dir`, and be picklable.
        run_dir: The run's directory; every node must see it under this path. Ray Train keeps its
            own state beside it.
        config: Workers and failures.

    Raises:
        JobError: Ray is not there, or the workers failed more often than `max_failures`.
    """
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise JobError(
            f"Ray Train can't be used: {error}", remedy="install minigpt[cluster]"
        ) from None
    ray.init(address=config.address, ignore_reinit_error=True)
    resources = {"CPU": config.cpus_per_worker, "GPU": float(config.gpus_per_worker)}
    trainer = TorchTrainer(
        train,
        # Votes and small facts go over the CPU, whatever the device.
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if config.gpus_per_worker else "gloo",
            timeout_s=_COLLECTIVE_SECONDS,
        ),
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker={name: count for name, count in resources.items() if count},
        ),
        run_config=RunConfig(
            name=f".{run_dir.name}.ray",
            storage_path=str(run_dir.parent),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        failures = getattr(error, "worker_failures", {})
        first = next((str(f) for f in failures.values()), str(error))
        line = first.strip().splitlines()[-1] if first.strip() else "no reason given"
        raise JobError(
            f"training on Ray failed {config.max_failures + 1} times, last: {line[:200]}",
            remedy="see the workers' logs; the same command resumes",
        ) from None
