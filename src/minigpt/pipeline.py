"""The composition root: stages wired together, each handing the next an artifact."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt.cluster.ray_train import RayTrainConfig, train_on_ray
from minigpt.core.artifact import Artifact, is_artifact, open_artifact
from minigpt.core.config import load_config, read_yaml_mapping
from minigpt.core.errors import ConfigError
from minigpt.core.storage import home
from minigpt.data.config import DataConfig, MixtureConfig
from minigpt.data.skip_list import SkipList
from minigpt.train.config import TrainConfig

if TYPE_CHECKING:
    from minigpt.data.loader import SampleLoader


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
    open_dataset(load_recipe(recipe, overrides).data)  # once, rather than by every worker
    work = functools.partial(_train_worker, recipe, run_dir, list(overrides))
    train_on_ray(work, run_dir, ray)


def _train_worker(recipe: Path, run_dir: Path, overrides: list[str]) -> None:
    train_recipe(recipe, run_dir, overrides)


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe, with the content of a data config that it names."""
    return _with_files(load_config(TrainConfig, recipe, overrides), Path(recipe).parent)


def open_run_loader(run_dir: Path) -> tuple[TrainConfig, SampleLoader]:
    """Return a run's resolved config and the loader that fed it, at its first sample.

    Raises:
        ConfigError: The directory holds no run.
    """
    from minigpt.data.training_data import open_training_data
    from minigpt.train.build import build_loader
    from minigpt.train.run import stored_config

    config = stored_config(run_dir)
    if config is None:
        raise ConfigError(f"{run_dir} holds no run", remedy="give the --run-dir of a training run")
    data = open_training_data(config.data, open_dataset(config.data))
    loader = build_loader(config, data)
    loader.use_skip_list(SkipList.of_run(run_dir, loader.skip_list))
    return config, loader


def _with_files(config: TrainConfig, directory: Path) -> TrainConfig:
    """Put the content of files in the place of their paths, so that a run keeps it all."""
    if isinstance(config.data, str) and config.data.endswith((".yaml", ".yml")):
        path = directory / config.data
        is_mixture = "mixture" in read_yaml_mapping(path)
        config = config.replace(data=load_config(MixtureConfig if is_mixture else DataConfig, path))
    if isinstance(config.skip_list, str):
        path = directory / config.skip_list
        if not path.exists():
            raise ConfigError(f"skip_list: no such file: {path}", remedy="check the path")
        config = config.replace(skip_list=SkipList.read(path))
    return config


def open_dataset(data: str | DataConfig | MixtureConfig) -> Artifact:
    """Open a dataset artifact, or prepare it once and keep it in minigpt's home.

    Of a mixture it is the first source's; `open_training_data` opens the others.
    """
    from minigpt.data.training_data import open_dataset_artifact

    if isinstance(data, MixtureConfig):
        data = data.mixture[0].dataset
    if isinstance(data, str):
        return open_dataset_artifact(data)
    from minigpt.data.prepare import prepare

    content = json.dumps(data.model_dump(mode="json"), sort_keys=True)
    cached = home() / "datasets" / hashlib.sha256(content.encode()).hexdigest()[:16]
    if is_artifact(cached):
        return open_artifact(cached, kind="dataset")
    return prepare(data, cached)
