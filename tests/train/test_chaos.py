"""Chaos as a user meets it; the quick form here, every fault in the soak."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minigpt.core.artifact import open_artifact
from minigpt.train.chaos import Certificate, FaultReport
from minigpt.train.chaos_cases import CASES


@pytest.fixture
def recipe(tiny_dataset: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"name: chaos\ndata: {tiny_dataset}\nsize: 2\nmodel: {{hidden_size: 32, head_dim: 16}}\n"
        "steps: 24\nbatch: {sequence_length: 64, tokens_per_step: 512, micro_batch_size: 4}\n"
        "validation: {every: 8, tokens: 1024, sample_tokens: 0}\ncheckpoint: {every: 4}\n"
        "trackers: {mlflow: false}\ncompile: false\nthreads: 1\nprecision: float32\n"
        "recovery: {backoff_seconds: 0.1, restarts_per_hour: 20}\n"
    )
    return path


def _chaos(recipe: Path, out: Path, faults: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "minigpt", "chaos", "train", str(recipe), "--json"]
    done = subprocess.run(
        [*command, "--out", str(out), "--faults", faults],
        capture_output=True,
        text=True,
        timeout=2400,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.timeout(900)
def test_a_kill_and_a_corrupt_checkpoint_are_certified(recipe: Path, tmp_path: Path) -> None:
    certificate = _chaos(recipe, tmp_path / "report", "kill,bitflip")
    assert [fault["fault"] for fault in certificate["faults"]] == ["kill", "bitflip"]
    for fault in certificate["faults"]:
        assert fault["happened"] and fault["finished"] and fault["equal"]
        assert fault["weights_sha256"] == certificate["weights_sha256"]
        assert 0 < fault["goodput"] < 1
    assert certificate["faults"][0]["recovery_seconds"] > 0
    assert "failure" in certificate["faults"][0]["noticed"]
    assert "corrupt_checkpoint" in certificate["faults"][1]["noticed"]
    runs = tmp_path / "report-runs"
    assert list((runs / "bitflip" / "checkpoints").glob("corrupt-*"))
    report = open_artifact(tmp_path / "report", kind="report")
    assert report.manifest.metrics == {"holds": True, "faults": 2}
    assert json.loads((report.path / "certificate.json").read_text()) == certificate


def test_an_unknown_fault_is_refused_before_anything_is_trained(
    recipe: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "minigpt", "chaos", "train", str(recipe)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "r"), "--faults", "lunch"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "unknown fault 'lunch' (choose from kill" in done.stderr
    assert not (tmp_path / "r-runs").exists()


def test_a_fault_that_never_struck_proves_nothing() -> None:
    report = FaultReport(
        fault="kill",
        what="kill -9",
        happened=True,
        finished=True,
        equal=True,
        losses_sha256="a",
        weights_sha256="b",
        noticed=[],
        recovery_seconds=None,
        unsaved_seconds=None,
        wall_seconds=1.0,
        goodput=None,
    )
    whole = {"ranks": 2, "steps": 24, "losses_sha256": "a", "weights_sha256": "b"}
    assert Certificate(**whole, faults=[report]).holds
    assert not Certificate(**whole, faults=[report, report.replace(happened=False)]).holds
    assert not Certificate(**whole, faults=[report.replace(equal=False)]).holds


@pytest.mark.soak
@pytest.mark.timeout(2500)
def test_every_fault_leaves_the_same_bits(recipe: Path, tmp_path: Path) -> None:
    certificate = _chaos(recipe, tmp_path / "report", "all")
    assert {fault["fault"] for fault in certificate["faults"]} == set(CASES)
    assert all(fault["happened"] and fault["equal"] for fault in certificate["faults"])
    lost = next(fault for fault in certificate["faults"] if fault["fault"] == "lost-s3")
    assert lost["unsaved_seconds"] > 0
