"""Checkpoints: everything a run needs to go on bit for bit, saved whole or not at all.

A checkpoint is an artifact (kind `checkpoint`) at `checkpoints/step-00000100` with
`model.safetensors` (float32 weights), `optimizer.safetensors`, `rng.safetensors` and
`state.json`. No pickle: loading runs no code.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minigpt.core.artifact import Artifact, create_artifact, open_artifact
from minigpt.core.errors import ArtifactError, StorageError
from minigpt.core.manifest import Parent
from minigpt.core.telemetry import get_logger

_NAME = re.compile(r"step-(\d{8,})")


@dataclass
class TrainState:
    """The run's position: everything in a checkpoint that is no tensor."""

    step: int = 0
    """Optimizer updates done."""
    tokens: int = 0
    """Valid target tokens seen."""
    cursor: dict[str, Any] = field(default_factory=dict)
    """The data loader's state."""
    validated_step: int = 0
    """The last step whose validation is done and logged."""
    validation: dict[str, float] = field(default_factory=dict)
    """Metrics of that validation."""
    best_step: int | None = None
    """The step with the lowest bits per byte among those saved."""
    best_bits_per_byte: float | None = None
    loss: float | None = None
    """Loss of the last step, nats per token."""
    dataset_sha256: str = ""
    """Fingerprint of the dataset's files."""
    environment: dict[str, Any] = field(default_factory=dict)
    """What besides the config decides the bits: library and instruction set."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded, verified checkpoint."""

    artifact: Artifact
    state: TrainState
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    python_rng: list[Any]


class CheckpointStore:
    """The checkpoints of one run; the caller holds the run's lock."""

    def __init__(self, directory: Path, *, keep: int) -> None:
        """Keep the latest `keep` below `directory`, and the best."""
        self._directory = directory
        self._keep = keep
        self._log = get_logger("train")
        # A killed writer or remover leaves these; nobody else can be at work here.
        for leftover in directory.glob(".step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)

    def steps(self) -> list[int]:
        """List the steps that have a checkpoint, ascending."""
        found = (_NAME.fullmatch(path.name) for path in self._directory.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """Return where a step's checkpoint is or would be."""
        return self._directory / f"step-{step:08d}"

    def open(self, step: int) -> Artifact:
        """Open a step's checkpoint without hashing it again."""
        return open_artifact(self.path(step), kind="checkpoint", verify=False)

    def save(
        self,
        state: TrainState,
        *,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        parents: Iterable[Artifact | Parent],
    ) -> Artifact:
        """Write the checkpoint of `state.step` with the current RNG states, then drop old ones.

        Raises:
            StorageError: Full disk or the like; no other checkpoint has been touched.
        """
        rng, python_rng = _capture_rng()
        metrics = {"loss": state.loss, **state.validation}
        with create_artifact(
            self.path(state.step),
            kind="checkpoint",
            parents=parents,
            config={"step": state.step, "tokens": state.tokens},
        ) as draft:
            _write(draft.path / "model.safetensors", model)
            _write(draft.path / "optimizer.safetensors", optimizer)
            _write(draft.path / "rng.safetensors", rng)
            content = {"state": asdict(state), "python_rng": python_rng}
            (draft.path / "state.json").write_text(json.dumps(content))
            draft.metrics = {key: value for key, value in metrics.items() if value is not None}
        assert draft.artifact is not None
        self._prune(best=state.best_step)
        return draft.artifact

    def load_latest(self) -> Checkpoint | None:
        """Load the newest checkpoint that is whole; set corrupt ones aside with a warning.

        Returns:
            None where the run has no checkpoint yet.

        Raises:
            ArtifactError: There are checkpoints, but every one is corrupt.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return _load(self.path(step))
            except ArtifactError as error:
                aside = self._set_aside(step)
                self._log.warning(
                    "corrupt checkpoint set aside", reason=str(error), moved_to=str(aside)
                )
        if steps:
            raise ArtifactError(
                f"every checkpoint in {self._directory} is corrupt",
                remedy="restore one from a copy, or run the same command again to start over",
            )
        return None

    def _set_aside(self, step: int) -> Path:
        aside = self._directory / f"corrupt-{self.path(step).name}"
        shutil.rmtree(aside, ignore_errors=True)
        return self.path(step).rename(aside)

    def _prune(self, *, best: int | None) -> None:
        for step in self.steps()[: -self._keep]:
            if step == best:
                continue
            # Renamed first: a kill in the middle never leaves half a checkpoint by its name.
            doomed = self._directory / f".{self.path(step).name}.old.tmp"
            try:
                self.path(step).rename(doomed)
            except OSError as error:
                self._log.warning("can't remove old checkpoint", step=step, reason=str(error))
                continue
            shutil.rmtree(doomed, ignore_errors=True)


def restore_rng(checkpoint: Checkpoint) -> None:
    """Set torch's, numpy's and Python's global generators as they were at the save."""
    version, internal, gauss = checkpoint.python_rng
    random.setstate((version, tuple(internal), gauss))
    position, has_gauss = checkpoint.rng["numpy_position"].tolist()
    gauss_value = float(checkpoint.rng["numpy_gauss"])
    keys = checkpoint.rng["numpy_keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, gauss_value))
    torch.set_rng_state(checkpoint.rng["torch_cpu"].clone())
    if torch.cuda.is_available() and "torch_cuda" in checkpoint.rng:
        torch.cuda.set_rng_state(checkpoint.rng["torch_cuda"].clone())


def _capture_rng() -> tuple[dict[str, Tensor], list[Any]]:
    state = np.random.get_state(legacy=True)
    assert isinstance(state, tuple)
    _, keys, position, has_gauss, gauss = state
    rng = {
        "torch_cpu": torch.get_rng_state(),
        "numpy_keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss]),
        "numpy_gauss": torch.tensor(gauss, dtype=torch.float64),
    }
    if torch.cuda.is_available():
        rng["torch_cuda"] = torch.cuda.get_rng_state()
    return rng, list(random.getstate())


def _load(path: Path) -> Checkpoint:
    artifact = open_artifact(path, kind="checkpoint")
    try:
        content = json.loads((path / "state.json").read_text())
        state = TrainState(**content["state"])
        return Checkpoint(
            artifact,
            state,
            load_file(path / "model.safetensors"),
            load_file(path / "optimizer.safetensors"),
            load_file(path / "rng.safetensors"),
            content["python_rng"],
        )
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"{path} can't be read: {error}") from None


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, path)
    except SafetensorError as error:  # what the library makes of a full disk
        raise StorageError(
            f"can't write {path}: {error}", remedy="free space there or choose another directory"
        ) from error
