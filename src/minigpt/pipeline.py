"""The composition root: stages wired together, each handing the next an artifact."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from minigpt.cluster.ray_train import RayTrainConfig, train_on_ray
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


def train_recipe_on_ray(
    recipe: str | Path, run_dir: str | Path, overrides: Sequence[str], ray: RayTrainConfig
) -> None:
    """Do as `train_recipe` on the workers of a Ray cluster.

    Args:
        recipe: As `train_recipe`.
        run_dir: As `train_recipe`; the same place on every node.
        overrides: As `train_recipe`.
        ray: Workers and failures.

    Raises:
        JobError: The workers failed more often than allowed.
    """
    recipe, run_dir = Path(recipe).absolute(), Path(run_dir).absolute()
    config = _with_data_config(load_config(TrainConfig, recipe, overrides), recipe.parent)
    open_dataset(config.data)  # once, rather than by every worker
    work = functools.partial(_train_worker, recipe, run_dir, list(overrides))
    train_on_ray(work, run_dir, ray)


def _train_worker(recipe: Path, run_dir: Path, overrides: list[str]) -> None:
    train_recipe(recipe, run_dir, overrides)


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
