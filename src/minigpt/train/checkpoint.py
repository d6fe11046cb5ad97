"""Checkpoints: everything a run needs to go on bit for bit, saved whole or not at all.

A checkpoint is an artifact (kind `checkpoint`) at `checkpoints/step-00000100`: the ranks' shards
of weights, optimizer state and random generators, `state.json`, and what else makes the weights a
model. See `checkpoint_storage` for the files, `checkpoint_location` for the places.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from minigpt.core.artifact import Artifact, make_manifest, open_artifact, verify_artifact
from minigpt.core.errors import ArtifactError, StorageError
from minigpt.core.manifest import FileEntry, Manifest, Parent
from minigpt.core.telemetry import get_logger
from minigpt.train.checkpoint_chunks import Chunk, Stage, State, view
from minigpt.train.checkpoint_load import load_tensors
from minigpt.train.checkpoint_location import open_location
from minigpt.train.checkpoint_storage import INDEX, Sealed, save_chunks
from minigpt.train.rng import capture_generators, restore_generators
from minigpt.train.world import World

STATE = "state.json"
MODEL_DIRECTORY = "model"
_TIMEOUT = timedelta(minutes=10)


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
    loss_scale: dict[str, float] = field(default_factory=dict)
    """Of float16, see `train.precision.LossScale`; {} with any other precision."""
    dataset_sha256: str = ""
    """Fingerprint of the dataset's files."""
    environment: dict[str, Any] = field(default_factory=dict)
    """What besides the config decides the bits: library and instruction set."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded, verified checkpoint, as this rank holds it."""

    artifact: Artifact
    state: TrainState
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]


@dataclass(frozen=True)
class _Record:
    """What rank 0 writes besides tensors; taken when the save began."""

    state: dict[str, Any]
    parents: tuple[Parent, ...]
    metrics: dict[str, Any]


class PendingSave:
    """A save that goes on in the background."""

    def __init__(self, state: TrainState, stall_seconds: float, future: Future[Artifact]) -> None:
        self.state = state
        """What is being saved."""
        self.stall_seconds = stall_seconds
        """How long training stood still for it."""
        self._future = future

    @property
    def step(self) -> int:
        """The step that is being saved."""
        return self.state.step

    @property
    def done(self) -> bool:
        """Whether `result` would return, or raise, at once."""
        return self._future.done()

    def result(self) -> Artifact:
        """Wait for the end of the save.

        Raises:
            StorageError: Full disk or the like; no other checkpoint has been touched.
        """
        return self._future.result()


class CheckpointStore:
    """The checkpoints of one run; the caller holds the run's lock.

    With a process group every rank makes one, and makes the same calls in the same order.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int,
        keep_every: int = 0,
        model_files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Open the place and clear what a killed writer left there.

        Args:
            directory: A directory that all ranks share, or any fsspec URL.
            keep: Latest checkpoints to keep; the best is kept besides.
            keep_every: Keep each checkpoint whose step is a multiple for good; 0 keeps none so.
            model_files: Content of config.json and the tokenizer's files, by name, put into each
                checkpoint so that its weights can be exported from it alone.
        """
        self._world = World.apart(timeout=_TIMEOUT)
        self._location = open_location(directory)
        self._keep = keep
        self._keep_every = keep_every
        self._model_files = dict(model_files or {})
        self._log = get_logger("train")
        self._stage = Stage()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Artifact] | None = None
        self._last: tuple[int, Artifact] | None = None
        self.save_seconds: list[float] = []
        """How long each save took that succeeded, waiting in the background included."""
        self.corrupt: dict[int, str] = {}
        """Why the last `load_latest` set checkpoints aside, by step."""
        # Nobody else can be at work here.
        self._world.from_first(self._location.clean)

    def steps(self) -> list[int]:
        """List the steps that have a checkpoint, ascending."""
        return self._location.steps()

    def path(self, step: int) -> Path:
        """Return where a step's checkpoint is or would be; a remote one while it is loaded."""
        return self._location.path(step)

    def open(self, step: int) -> Artifact:
        """Open a step's checkpoint without hashing it again."""
        if self._last is not None and self._last[0] == step:
            return self._last[1]
        return open_artifact(self._location.uri(step), kind="checkpoint", verify=False)

    def save(
        self,
        state: TrainState,
        *,
        model: State,
        optimizer: State,
        parents: Iterable[Artifact | Parent],
    ) -> Artifact:
        """Write the checkpoint of `state.step` with the current RNG states, then drop old ones.

        Waits for a save in the background first. Tensors on the host are written as they lie,
        without a copy.

        Raises:
            StorageError: Full disk or the like; no other checkpoint has been touched.
        """
        self.settle()
        return self._write(view(self._named(model, optimizer)), _record(state, parents))

    def save_async(
        self,
        state: TrainState,
        *,
        model: State,
        optimizer: State,
        parents: Iterable[Artifact | Parent],
    ) -> PendingSave:
        """Like `save`, but return when all is copied: the tensors may change from then on.

        At most one save is under way: waits for the one before, whose error is for its own
        `PendingSave` to raise. The end of the process waits for the last one.
        """
        begin = time.perf_counter()
        self.settle()
        chunks = self._stage.copy(self._named(model, optimizer))
        self._pending = self._executor.submit(self._write, chunks, _record(state, parents))
        # A copy: the run goes on changing its state.
        return PendingSave(replace(state), time.perf_counter() - begin, self._pending)

    def wait(self) -> None:
        """Wait for the save under way.

        Raises:
            StorageError: It failed.
        """
        if self._pending is not None:
            self._pending.result()

    def settle(self) -> None:
        """Wait for the save under way, however it ends; `PendingSave.result` tells."""
        if self._pending is not None:
            wait([self._pending])

    def close(self) -> None:
        """Wait for the save under way, however it ends; call before the process group goes."""
        self.settle()
        self._executor.shutdown()

    def together(self, action: Callable[[], None]) -> None:
        """Run `action` on every rank, with no save under way.

        Raises:
            MinigptError: What the lowest rank raised that failed; on every rank.
        """
        self.settle()
        self._world.together(action)

    def load_latest(self, layout: State | None = None) -> Checkpoint | None:
        """Load the newest checkpoint that is whole; set corrupt ones aside with a warning.

        All ranks agree on which that is. Every file and every tensor, as loaded, is compared
        with its hash. With the number of ranks that saved, each rank gets its own random
        generators back; with another, rank r those of saved rank r modulo that number.

        Args:
            layout: This rank's tensors of the model: names, shapes and placements to load the
                weights and their optimizer state in. Values are not touched. None loads every
                tensor whole.

        Returns:
            None where the run has no checkpoint yet.

        Raises:
            ArtifactError: There are checkpoints, but every one is corrupt.
            ModelError: The newest one is of another model than `layout`.
        """
        self.settle()
        self.corrupt = {}
        steps = self._world.from_first(self._location.steps)
        for step in reversed(steps):
            try:
                return self._load(step, layout)
            except ArtifactError as error:
                self.corrupt[step] = str(error)
                aside = self._world.from_first(partial(self._location.set_aside, step))
                if self._world.is_first:
                    self._log.warning(
                        "corrupt checkpoint set aside", reason=str(error), moved_to=aside
                    )
        if steps:
            raise ArtifactError(
                f"every checkpoint in {self._location.uri(0).rpartition('/')[0]} is corrupt",
                remedy="restore one from a copy, or run the same command again to start over",
            )
        return None

    def _named(self, model: State, optimizer: State) -> dict[str, Tensor]:
        rng = {f"{self._world.rank:05d}/{k}": v for k, v in capture_generators().items()}
        sections = {"model": model, "optimizer": optimizer, "rng": rng}
        return {f"{s}/{name}": t for s, part in sections.items() for name, t in part.items()}

    def _write(self, chunks: Mapping[str, Chunk], record: _Record) -> Artifact:
        begin, step = time.perf_counter(), record.state["step"]
        manifests: list[Manifest] = []

        def commit(place: str, sealed: Sealed) -> None:
            manifests.append(self._commit(place, sealed, record))

        try:
            save_chunks(chunks, self._location, step, commit, self._world)
            manifest = self._world.from_first(lambda: manifests[0])
        except BaseException as error:
            if self._world.is_first:
                with suppress(StorageError):
                    self._location.clean()
            if isinstance(error, RuntimeError) and self._world.size > 1:
                # gloo's word for a lost connection
                raise StorageError(f"can't save step {step}: a rank is gone: {error}") from error
            raise
        if self._world.is_first:
            self._prune(best=record.state["best_step"])
        artifact = Artifact(self._location.path(step), self._location.uri(step), manifest)
        self._last = step, artifact
        self.save_seconds.append(time.perf_counter() - begin)
        return artifact

    def _commit(self, place: str, sealed: Sealed, record: _Record) -> Manifest:
        step = record.state["step"]
        contents = {
            INDEX: json.dumps(sealed.index.model_dump(mode="json")).encode(),
            STATE: json.dumps({"state": record.state}).encode(),
        }
        contents |= {f"{MODEL_DIRECTORY}/{name}": c for name, c in self._model_files.items()}
        files = dict(sealed.files)
        for name, content in contents.items():
            with self._location.writable(place, name) as file:
                file.write(content)
            files[name] = FileEntry(sha256=sha256(content).hexdigest(), size=len(content))
        manifest = make_manifest(
            "checkpoint",
            self._location.path(step).name,
            files=files,
            tensors=sealed.tensors,
            metrics=record.metrics,
            parents=record.parents,
            config={"step": step, "tokens": record.state["tokens"]},
        )
        self._location.commit(place, step, manifest)
        return manifest

    def _prune(self, *, best: int | None) -> None:
        try:
            for step in self.steps()[: -self._keep]:
                if step != best and not (self._keep_every and step % self._keep_every == 0):
                    self._location.remove(step)
        except StorageError as error:
            self._log.warning("can't remove old checkpoint", reason=str(error))

    def _load(self, step: int, layout: State | None) -> Checkpoint:
        world, location = self._world, self._location
        fetches = world.is_first_on_host
        world.together(lambda: location.fetch(step) if fetches else None)
        try:
            artifact = world.together(lambda: self._verified(step))
            state = world.together(lambda: _read_state(artifact))
            found = load_tensors(artifact, layout, world)
        finally:  # all ranks are done: what ended it for one ended it for all
            if fetches:
                location.release(step)
        self._last = step, artifact
        return Checkpoint(artifact, state, found["model"], found["optimizer"], found["rng"])

    def _verified(self, step: int) -> Artifact:
        found = open_artifact(self.path(step), kind="checkpoint", verify=False)
        verify_artifact(found, part=self._world.rank, parts=self._world.size)
        return Artifact(found.path, self._location.uri(step), found.manifest)


def restore_rng(checkpoint: Checkpoint) -> None:
    """Set torch's, numpy's and Python's global generators as they were at the save."""
    restore_generators(checkpoint.rng)


def _record(state: TrainState, parents: Iterable[Artifact | Parent]) -> _Record:
    metrics = {"loss": state.loss, **state.validation}
    return _Record(
        asdict(state),
        tuple(p.as_parent() if isinstance(p, Artifact) else p for p in parents),
        {key: value for key, value in metrics.items() if value is not None},
    )


def _read_state(artifact: Artifact) -> TrainState:
    path = artifact.path / STATE
    try:
        return TrainState(**json.loads(path.read_bytes())["state"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path} can't be read: {error}") from None
