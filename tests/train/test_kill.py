"""`kill -9` of real processes, at random moments and in the middle of a save."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minigpt.core.artifact import open_artifact
from minigpt.core.config import to_yaml
from minigpt.train.config import TrainConfig
from minigpt.train.metrics import read_metrics
from minigpt.train.run import read_final, train


def _start(recipe: Path, run_dir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "minigpt", "train", str(recipe), "--run-dir", str(run_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _kill_when(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Send SIGKILL at a moment when the condition holds.

    The process is frozen before the second look, so that it is killed in the very state that
    was seen, however busy the machine is.
    """
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the moment never came"
        if condition():
            process.send_signal(signal.SIGSTOP)
            if condition():
                break
            process.send_signal(signal.SIGCONT)
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def _lines(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _saving(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob(".step-*.tmp"))


def _exact(run_dir: Path) -> dict[str, Any]:
    final = read_final(run_dir)
    lines = list(read_metrics(run_dir / "metrics.jsonl"))
    steps = [(line["step"], line["loss_hex"]) for line in lines]
    return {"steps": steps, "weights": final["weights_sha256"], "validation": final["validation"]}


def test_kill_9_at_any_moment_changes_no_bit(
    make_config: Callable[..., TrainConfig], tiny_dataset: Path, tmp_path: Path
) -> None:
    config = make_config(
        steps=120, validation={"every": 30, "tokens": 1024}, checkpoint={"every": 5}
    )
    train(config, open_artifact(tiny_dataset), tmp_path / "whole")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(config))
    run = tmp_path / "killed"
    rng = random.Random(os.getpid())
    for kill in range(4):
        goal = _lines(run) + rng.randint(3, 12)
        in_save = kill % 2 == 1
        _kill_when(
            _start(recipe, run),
            lambda goal=goal, in_save=in_save: (  # type: ignore[misc]
                _lines(run) >= goal and _saving(run) >= in_save
            ),
        )
        assert _saving(run) or not in_save
    process = _start(recipe, run)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert json.loads(output)["steps"] == 120
    assert _exact(run) == _exact(tmp_path / "whole")
    assert not _saving(run)
