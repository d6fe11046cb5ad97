"""Recipes with mixtures, packing and skip lists, from the YAML to the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from minigpt.cli.main import run as minigpt
from minigpt.core.artifact import lineage, open_artifact
from minigpt.core.errors import ConfigError, DataError
from minigpt.core.manifest import MANIFEST
from minigpt.core.storage import upload_directory
from minigpt.data.loader import BatchLoader
from minigpt.data.skip_list import SKIP_FILE, SkipList
from minigpt.pipeline import open_run_loader, train_recipe
from minigpt.train.metrics import read_metrics

STEPS, ROWS = 8, 8


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Path:
    """A recipe of 8 steps that mixes two datasets by a schedule, packed best-fit."""
    directory = tmp_path_factory.mktemp("recipe")
    shutil.copytree(tiny_dataset, directory / "other")
    sources: list[dict[str, Any]] = [
        {"name": "web", "dataset": str(tiny_dataset), "weight": 3},
        {
            "name": "code",
            "dataset": str(directory / "other"),
            "schedule": [{"at": 4, "weight": 6, "ramp": True}],
        },
    ]
    (directory / "mixture.yaml").write_text(yaml.safe_dump({"mixture": sources}))
    tree = {
        "data": "mixture.yaml",
        "size": 2,
        "model": {"hidden_size": 32, "head_dim": 16},
        "steps": STEPS,
        "batch": {
            "sequence_length": 64,
            "tokens_per_step": 64 * ROWS,
            "micro_batch_size": 4,
            "packing": "best-fit",
        },
        "validation": {"every": 8, "tokens": 1024, "sample_tokens": 0},
        "checkpoint": {"every": 4, "keep": 5},
        "trackers": {"mlflow": False},
        "precision": "float32",
        "compile": False,
        "threads": 1,
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return directory / "recipe.yaml"


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    train_recipe(recipe, run)
    return run


@pytest.fixture
def half(finished: Path, tmp_path: Path) -> Path:
    """The run as it was after its checkpoint of step 4 and a kill later on."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in ("model", f"checkpoints/step-{STEPS:08d}"):
        shutil.rmtree(run / name)
    (run / "final.json").unlink()
    return run


def losses(run: Path) -> list[str]:
    return [line["loss_hex"] for line in read_metrics(run / "metrics.jsonl")]


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert minigpt([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_mixture_trains_and_all_its_datasets_are_parents(finished: Path) -> None:
    assert len(losses(finished)) == STEPS
    tree = lineage(open_artifact(finished / "model"))
    uris = [node.parent.uri for node in tree.ancestors if node.parent.kind == "dataset"]
    assert len(uris) == 2 and uris[1].endswith("/other")
    config, loader = open_run_loader(finished)
    assert isinstance(loader, BatchLoader)
    first = loader.locate(0, STEPS * ROWS).sources
    ramp, rest = first[: 4 * ROWS], first[4 * ROWS :]
    assert 10 <= (ramp == 1).sum() <= 17  # from 1/4 to 2/3
    assert 20 <= (rest == 1).sum() <= 22
    assert config.batch.packing == "best-fit"


def test_it_resumes_bit_for_bit(recipe: Path, finished: Path, half: Path) -> None:
    train_recipe(recipe, half)
    assert losses(half) == losses(finished)
    weights = [
        json.loads((run / "final.json").read_text())["weights_sha256"] for run in (half, finished)
    ]
    assert weights[0] == weights[1]


def test_skipped_steps_change_what_follows_and_are_kept(
    recipe: Path, finished: Path, half: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = output(capsys, "data", "explain", "--run", str(half), "--step", "7")
    after = output(capsys, "data", "explain", "--run", str(half), "--step", "8")
    listed = output(capsys, "data", "skip", "--run", str(half), "--step", "7", "--reason", "spike")
    assert listed["samples"] == [{"first": 6 * ROWS, "count": ROWS, "reason": "spike"}]
    moved = output(capsys, "data", "explain", "--run", str(half), "--step", "7")

    def fed(result: Any) -> list[tuple[str, int, int]]:
        return [(d["source"], d["document"], d["start"]) for d in result["documents"]]

    assert fed(moved) == fed(after) != fed(before)
    train_recipe(recipe, half)
    assert losses(half)[:6] == losses(finished)[:6]
    assert losses(half)[6] != losses(finished)[6]
    state = json.loads((half / f"checkpoints/step-{STEPS:08d}/state.json").read_text())["state"]
    assert len(state["cursor"]["skip_sha256"]) == 64
    # What the run has learned can't be unlearned by a line in a file.
    assert minigpt(["data", "skip", "--run", str(half), "--step", "3"]) == 2
    assert "the checkpoint of step 8 has learned the data of step 3" in capsys.readouterr().err
    (half / SKIP_FILE).unlink()
    (half / "final.json").unlink()
    with pytest.raises(DataError, match="skip_sha256 was"):
        train_recipe(recipe, half)


def test_a_document_is_skipped_from_the_next_step_on(
    half: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = output(capsys, "data", "explain", "--run", str(half), "--step", "8")["documents"]
    name = f"{shown[0]['source']}:{shown[0]['document']}"
    listed = output(capsys, "data", "skip", "--run", str(half), "--document", name)
    assert [entry["since"] for entry in listed["documents"]] == [STEPS * ROWS]
    again = output(capsys, "data", "skip", "--run", str(half))
    assert again == listed
    assert minigpt(["data", "skip", "--run", str(half)]) == 0
    assert f"from sample {STEPS * ROWS}" in capsys.readouterr().out
    assert minigpt(["data", "explain", "--run", str(half), "--step", "1"]) == 0
    assert "step 1: 2 micro-batches of 4 rows\n  0.0  " in capsys.readouterr().out
    assert minigpt(["data", "skip", "--run", str(half), "--document", "web:x"]) == 2
    assert "no document 'web:x' here, only web:0-" in capsys.readouterr().err


def test_a_recipes_skip_list_becomes_the_runs(recipe: Path, tmp_path: Path) -> None:
    SkipList.add_steps(recipe.parent / "skips.json", [1], samples_per_step=ROWS)
    run = tmp_path / "run"
    train_recipe(recipe, run, ["skip_list=skips.json", "steps=2"])
    assert SkipList.read(run / SKIP_FILE).samples[0].first == ROWS
    config, loader = open_run_loader(run)
    assert config.skip_list == loader.skip_list == SkipList.read(run / SKIP_FILE)
    model = open_artifact(run / "model")
    assert model.manifest.config["skip_list"]["samples"][0]["count"] == ROWS
    with pytest.raises(ConfigError, match=r"skip_list: no such file: .*/none.json"):
        train_recipe(recipe, tmp_path / "other", ["skip_list=none.json"])


def test_a_dataset_behind_a_url_trains_as_the_local_one(
    recipe: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    url = "memory://corpus/tiny"
    upload_directory(tiny_dataset, url, last=MANIFEST)
    for name, data in (("local", str(tiny_dataset)), ("remote", url)):
        train_recipe(recipe, tmp_path / name, [f"data={data}", "steps=2"])
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    model = open_artifact(tmp_path / "remote" / "model")
    assert model.manifest.parents[0].uri == url


def test_mistakes_are_named(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data: unknown key 'mixture.0.wieght'"):
        train_recipe(recipe, tmp_path / "x", ["data={mixture: [{name: a, dataset: x, wieght: 1}]}"])
    with pytest.raises(ConfigError, match="holds no run"):
        open_run_loader(tmp_path)
