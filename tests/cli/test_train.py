"""`minigpt train` as a user meets it: real processes, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.cli.main import run


def minigpt(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "minigpt", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"COLUMNS": "200"},
    )


@pytest.fixture
def recipe(tiny_dataset: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"name: cli\ndata: {tiny_dataset}\nsize: 1\nmodel: {{hidden_size: 32}}\nsteps: 4\n"
        "batch: {sequence_length: 32, tokens_per_step: 128}\n"
        "trackers: {mlflow: false}\ncompile: false\nthreads: 1\n"
    )
    return path


def test_train_prints_a_result_and_then_prints_it_again(recipe: Path, tmp_path: Path) -> None:
    first = minigpt("train", str(recipe), "--run-dir", str(tmp_path / "run"))
    assert first.returncode == 0, first.stderr
    assert "loss over 4 steps" in first.stdout and "bits per byte" in first.stdout
    assert "optimizer.lr" in first.stderr  # what was derived is printed
    again = minigpt("train", str(recipe), "--run-dir", str(tmp_path / "run"), "--json")
    final = json.loads(again.stdout)
    assert final == json.loads((tmp_path / "run" / "final.json").read_text())
    assert final["weights_sha256"] in first.stdout
    verified = minigpt("artifact", "verify", final["model"])
    assert verified.returncode == 0, verified.stderr


def test_size_is_the_dial(recipe: Path, tmp_path: Path) -> None:
    done = minigpt("train", str(recipe), "--run-dir", str(tmp_path / "run"), "--size", "2")
    assert done.returncode == 0, done.stderr
    assert "num_layers: 2" in (tmp_path / "run" / "config.yaml").read_text()
    refused = minigpt("train", str(recipe), "--run-dir", str(tmp_path / "none"), "--size", "0")
    assert refused.returncode == 2
    assert "size = 0" in refused.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=high", "optimizer.lr = 'high'"),
        ("optimiser.lr=0.1", "did you mean 'optimizer'"),
        ("model.num_heads=3", "model.hidden_size = 32 is not a multiple of model.num_heads = 3"),
        ("batch={sequence_length: 1000000}", "fewer than one batch"),
        ("data=nowhere", "no artifact at"),
    ],
)
def test_bad_values_are_one_line_and_leave_nothing(
    recipe: Path,
    tmp_path: Path,
    override: str,
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    code = run(["train", str(recipe), "--run-dir", str(tmp_path / "run"), "--set", override])
    errors = capfd.readouterr().err
    assert code == 2
    assert message in errors
    assert errors.count("\n") == 1 and errors.startswith("minigpt: ")
    assert not (tmp_path / "run").exists()


def test_help_describes_every_key() -> None:
    text = minigpt("train", "--help").stdout
    for expected in ("--run-dir", "--set", "schedule.warmup_steps", "Decides the initial weights"):
        assert expected in text
