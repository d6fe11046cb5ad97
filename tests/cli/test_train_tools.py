from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.core.errors import TrainingError
from minigpt.train.plots import plot_run


def minigpt(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "minigpt", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"COLUMNS": "200"},
    )


@pytest.fixture(scope="module")
def run_dir(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tools")
    recipe = directory / "recipe.yaml"
    recipe.write_text(
        f"name: tools\ndata: {tiny_dataset}\nsize: 1\nmodel: {{hidden_size: 32}}\nsteps: 6\n"
        "batch: {sequence_length: 32, tokens_per_step: 128}\nvalidation: {every: 2}\n"
        "trackers: {mlflow: false}\ncompile: false\nthreads: 1\n"
    )
    done = minigpt("train", str(recipe), "--run-dir", str(directory / "run"))
    assert done.returncode == 0, done.stderr
    return directory / "run"


def test_goodput_says_where_time_and_money_went(run_dir: Path) -> None:
    account = json.loads(minigpt("train", "goodput", str(run_dir), "--price", "2", "--json").stdout)
    assert abs(account["unaccounted"]) < 0.01 and 0 < account["goodput"] < 1
    assert sum(account["seconds"].values()) == pytest.approx(account["wall_seconds"], rel=0.01)
    assert account["seconds"]["startup"] > 0.5  # importing torch is part of it
    assert account["cost"]["total"] == pytest.approx(2 * account["device_hours"])
    text = minigpt("train", "goodput", str(run_dir)).stdout
    for expected in ("compute", "wall clock", "goodput", "failures an hour 0 (95 %"):
        assert expected in text


def test_plots_are_pictures_and_one_page(run_dir: Path, tmp_path: Path) -> None:
    paths = plot_run(run_dir, tmp_path / "plots")
    assert set(paths) == {"loss", "bits_per_byte", "speed", "time", "page"}
    for name in ("loss", "bits_per_byte", "speed", "time"):
        assert paths[name].read_bytes().startswith(b"\x89PNG")
    page = paths["page"].read_text()
    assert page.count("data:image/png;base64,") == 4 and "step 6" in page


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    done = minigpt("train", "goodput", str(tmp_path))
    assert done.returncode == 2 and "holds no training run" in done.stderr
    with pytest.raises(TrainingError, match="holds no step"):
        plot_run(tmp_path, tmp_path / "plots")


def test_a_recipe_is_still_a_recipe(tmp_path: Path) -> None:
    done = minigpt("train", "goodput.yaml", "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 2 and "no such config file: goodput.yaml" in done.stderr
    assert "goodput" in minigpt("train", "--help").stdout
    assert "minigpt train goodput" in minigpt("train", "goodput", "--help").stdout
