"""Small artifacts to register: the registry never looks inside the weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from minigpt.core.artifact import Artifact, create_artifact
from minigpt.core.clock import ManualClock
from minigpt.release.registry import Registry

MakeModel = Callable[..., Artifact]
MakeReport = Callable[..., Artifact]


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's migrations take seconds: they are run once and the file is copied."""
    path = tmp_path_factory.mktemp("registry") / "mlflow.db"
    assert Registry(f"sqlite:///{path}").models() == {}
    return path


@pytest.fixture
def database(empty_database: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(empty_database, tmp_path / "mlflow.db"))


@pytest.fixture
def registry(database: Path) -> Registry:
    return Registry(f"sqlite:///{database}", clock=ManualClock())


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """Write a model as a training run does: data beside it, the run's mark above it."""
    with create_artifact(tmp_path / "data", kind="dataset") as draft:
        (draft.path / "train.tokens").write_bytes(b"tokens")
    data = draft.artifact
    assert data is not None

    def make(name: str = "model", content: str | None = None) -> Artifact:
        run = tmp_path / "runs" / name
        run.mkdir(parents=True, exist_ok=True)
        (run / "metrics.jsonl").write_text("")
        with create_artifact(run / "model", kind="model", parents=[data]) as draft:
            (draft.path / "config.json").write_text("{}")
            (draft.path / "model.safetensors.txt").write_text(content or name)
        assert draft.artifact is not None
        return draft.artifact

    return make


@pytest.fixture
def make_report(tmp_path: Path) -> MakeReport:
    def make(model: Artifact, verdict: str | None = "pass", name: str = "report") -> Artifact:
        path = tmp_path / f"{name}-{model.id[:8]}"
        with create_artifact(path, kind="report", parents=[model]) as draft:
            (draft.path / "report.json").write_text("{}")
            if verdict is not None:
                draft.metrics["verdict"] = verdict
            if verdict == "fail":
                draft.metrics["broken_rules"] = "mean_kl is 0.2, must be at most 0.1"
        assert draft.artifact is not None
        return draft.artifact

    return make
