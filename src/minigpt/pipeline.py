"""The composition root: stages wired together, each handing the next an artifact."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

from minigpt.core.artifact import Artifact, is_artifact, open_artifact
from minigpt.core.config import load_config
from minigpt.core.storage import home
from minigpt.data.config import DataConfig
from minigpt.train.config import TrainConfig


def train_recipe(
    recipe: str | Path,
    run_dir: str | Path,
    overrides: Sequence[str] = (),
    *,
    began: float | None = None,
    json_logs: bool = False,
) -> Artifact:
    """Start or resume the training run of a recipe; prepare its data first where needed.

    A run of several processes is supervised from here, unless this is one of them.

    Args:
        recipe: A YAML file of `TrainConfig`.
        run_dir: The run's directory.
        overrides: Assignments such as `optimizer.lr=3e-4`.
        began: Unix time at which this process began to work on it; None is now.
        json_logs: Whether processes started from here log as JSON.

    Returns:
        The model artifact.
    """
    from minigpt.train.launch import needs_supervisor, supervise
    from minigpt.train.run import find_finished, train

    config = load_recipe(recipe, overrides)
    finished = find_finished(config, Path(run_dir))
    if finished is not None:
        return finished
    began = time.time() if began is None else began
    dataset = open_dataset(config.data)
    if needs_supervisor(config):
        return supervise(config, dataset, Path(run_dir), began=began, json_logs=json_logs)
    return train(config, dataset, Path(run_dir), began=began)


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe, with the content of a data config that it names."""
    return _with_data_config(load_config(TrainConfig, recipe, overrides), Path(recipe).parent)


def _with_data_config(config: TrainConfig, directory: Path) -> TrainConfig:
    """Put the content of a data config in the place of its path, so that a run keeps it all."""
    if isinstance(config.data, str) and config.data.endswith((".yaml", ".yml")):
        path = Path(config.data)
        found = path if path.is_absolute() else directory / path
        return config.replace(data=load_config(DataConfig, found))
    return config


def open_dataset(data: str | DataConfig) -> Artifact:
    """Open a dataset artifact, or prepare it once and keep it in minigpt's home."""
    if isinstance(data, str):
        return open_artifact(data, kind="dataset")
    from minigpt.data.prepare import prepare

    content = json.dumps(data.model_dump(mode="json"), sort_keys=True)
    cached = home() / "datasets" / hashlib.sha256(content.encode()).hexdigest()[:16]
    if is_artifact(cached):
        return open_artifact(cached, kind="dataset")
    return prepare(data, cached)
