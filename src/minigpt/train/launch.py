"""Starting a run of several processes from one: who supervises, and what the ranks are told."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from minigpt.core.artifact import Artifact
from minigpt.core.config import to_yaml
from minigpt.core.storage import write_atomic
from minigpt.train.config import TrainConfig
from minigpt.train.finish import open_result
from minigpt.train.run import check_same, hold_run, stored_config
from minigpt.train.supervise import Supervisor
from minigpt.train.worker import WorkerSpec
from minigpt.train.world import is_rank


def needs_supervisor(config: TrainConfig) -> bool:
    """Tell whether this process should start the run's ranks rather than be one."""
    if is_rank():
        return False  # a launcher has already started them
    return config.mesh.size > 1 or config.recovery.supervise


def supervise(
    config: TrainConfig, dataset: Artifact, run_dir: Path, *, began: float, json_logs: bool = False
) -> Artifact:
    """Run all ranks on this machine, through failures, to the end.

    Args:
        config: The recipe.
        dataset: What it trains on.
        run_dir: The run's directory.
        began: Unix time at which work on the run began.
        json_logs: Whether the ranks log as JSON.

    Returns:
        The model artifact.

    Raises:
        MinigptError: As `train.run.train` and `Supervisor.run`.
    """
    run_dir = run_dir.absolute()
    with hold_run(run_dir) as lock:
        stored = stored_config(run_dir)
        if stored is not None:
            check_same(config, stored, run_dir)
        asked, spec_file = run_dir / "ranks" / "config.yaml", run_dir / "ranks" / "spec.json"
        write_atomic(asked, to_yaml(config).encode())
        spec = WorkerSpec(
            config=str(asked),
            dataset=dataset.uri,
            run_dir=str(run_dir),
            json_logs=json_logs,
            supervisor=os.getpid(),
        )
        write_atomic(spec_file, spec.model_dump_json().encode())
        command = [sys.executable, "-m", "minigpt.train.worker", str(spec_file)]
        Supervisor(
            command, config.mesh.size, config.recovery, run_dir, began=began, inherited=[lock]
        ).run()
        return open_result(run_dir, config)
