"""kill -9 of a rank on every axis of a mesh, and three axes at once: recovery, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minigpt.train.metrics import read_metrics

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]

AXES: dict[str, dict[str, Any]] = {
    "fsdp": {"mesh": {"fsdp": 2}},
    "tp": {"mesh": {"tp": 2}},
    "pp": {"mesh": {"pp": 2}},
    "pp-zero-bubble": {"mesh": {"pp": 2, "schedule": "zero-bubble"}},
    "cp": {"mesh": {"cp": 2}},
    "ep": {"mesh": {"ep": 2}, "model": {"num_experts": 4}},
}
THREE: dict[str, dict[str, int]] = {
    "dp-tp-pp": {"dp": 2, "tp": 2, "pp": 2},
    "fsdp-tp-cp": {"fsdp": 2, "tp": 2, "cp": 2},
}


def _write(dataset: Path, directory: Path, mesh: dict[str, Any], model: dict[str, Any]) -> Path:
    tree = {
        "name": "mesh",
        "data": str(dataset),
        "size": 2,
        # Bytes and the end of a document, and one more for what tensor parallel ranks divide.
        "model": {"hidden_size": 32, "head_dim": 16, "vocab_size": 258, **model},
        "steps": 12,
        "batch": {"sequence_length": 32, "tokens_per_step": 512, "micro_batch_size": 4},
        "validation": {"every": 4, "tokens": 512, "sample_tokens": 0},
        "checkpoint": {"every": 3},
        "trackers": {"mlflow": False},
        "precision": "float32",
        "compile": False,
        "threads": 1,
        "mesh": mesh,
        "recovery": {"backoff_seconds": 0.1, "restarts_per_hour": 20},
    }
    path = directory / "recipe.yaml"
    path.write_text(json.dumps(tree))
    return path


def _minigpt(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "minigpt", *arguments],
        capture_output=True,
        text=True,
        timeout=1100,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("axis", AXES)
def test_a_killed_rank_on_any_axis_changes_no_bit(
    axis: str, tiny_dataset: Path, tmp_path: Path
) -> None:
    given = AXES[axis]
    recipe = _write(tiny_dataset, tmp_path, given["mesh"], given.get("model", {}))
    faults = "kill,kill-save" if axis == "fsdp" else "kill"
    out = tmp_path / "report"
    chaos = ("chaos", "train", str(recipe), "--out", str(out), "--faults", faults, "--json")
    certificate = json.loads(_minigpt(*chaos))
    assert certificate["ranks"] == 2
    for fault in certificate["faults"]:
        assert fault["happened"] and fault["finished"] and fault["equal"], fault
        assert fault["recovery_seconds"] > 0


@pytest.mark.parametrize("axes", THREE)
def test_three_axes_at_once_train_and_equal_one_process(
    axes: str, tiny_dataset: Path, tmp_path: Path
) -> None:
    recipe = _write(tiny_dataset, tmp_path, THREE[axes], {"num_kv_heads": 2})
    proof = json.loads(_minigpt("train", "verify-parallel", str(recipe), "--json"))
    assert proof["ok"] and proof["mesh"].count("=2") == 3
    losses = {}
    for name, overrides in {"spread": [], "alone": _single(THREE[axes])}.items():
        run = tmp_path / name
        _minigpt("train", str(recipe), "--run-dir", str(run), "--json", *overrides)
        losses[name] = [line["loss"] for line in read_metrics(run / "metrics.jsonl")]
    assert len(losses["spread"]) == 12
    assert losses["spread"] == pytest.approx(losses["alone"], rel=1e-3)


def _single(mesh: dict[str, int]) -> list[str]:
    return [word for axis in mesh for word in ("--set", f"mesh.{axis}=1")]
