"""Runs of several processes, started from one by the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from minigpt.core.artifact import open_artifact
from minigpt.core.config import from_mapping, to_yaml
from minigpt.train.config import TrainConfig
from minigpt.train.run import read_final, stored_config, train


def test_two_ranks_train_for_some_minutes_and_measuring_leaves_no_trace(
    make_config: Callable[..., TrainConfig], tiny_dataset: Path, tmp_path: Path
) -> None:
    """As many steps as fitted, counted out in one process, end in the same bits."""
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "timed"
    # A budget that is spent by the time of the measurement leaves one step.
    recipe.write_text(to_yaml(make_config(steps="auto", minutes=0.06, mesh={"reduce": "tree"})))
    command = [sys.executable, "-m", "minigpt", "train", str(recipe), "--run-dir", str(run)]
    done = subprocess.run(
        [*command, "--set", "mesh.dp=2", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    stored = stored_config(run)
    assert stored is not None and isinstance(stored.steps, int) and stored.mesh.dp == 2
    assert json.loads(done.stdout)["steps"] == stored.steps == read_final(run)["steps"]
    tree = stored.model_dump() | {"minutes": None, "mesh": {"reduce": "tree"}}
    counted = from_mapping(TrainConfig, tree)
    train(counted, open_artifact(tiny_dataset), tmp_path / "counted")
    assert read_final(run)["weights_sha256"] == read_final(tmp_path / "counted")["weights_sha256"]
