"""The composition root: stages wired together, each handing the next an artifact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from minigpt.core.artifact import Artifact, is_artifact, open_artifact
from minigpt.core.config import load_config
from minigpt.core.storage import home
from minigpt.data.config import DataConfig
from minigpt.train.config import TrainConfig


def train_recipe(
    recipe: str | Path, run_dir: str | Path, overrides: Sequence[str] = ()
) -> Artifact:
    """Start or resume the training run of a recipe; prepare its data first where needed.

    Args:
        recipe: A YAML file of `TrainConfig`.
        run_dir: The run's directory.
        overrides: Assignments such as `optimizer.lr=3e-4`.

    Returns:
        The model artifact.
    """
    from minigpt.train.run import find_finished, train

    config = _with_data_config(load_config(TrainConfig, recipe, overrides), Path(recipe).parent)
    finished = find_finished(config, Path(run_dir))
    return finished or train(config, open_dataset(config.data), Path(run_dir))


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
