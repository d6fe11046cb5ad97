"""How a checkpoint lies on disk: safetensors shards with a JSON index, no pickle.

Each rank writes `model`, `optimizer` and `rng` files of its own (`model.safetensors` for a single
process, else `model-00001-of-00004.safetensors`). `index.json` says which file holds which box of
which tensor; the manifest has the hash of every file and of every logical tensor.
`torch.distributed.checkpoint` plans who writes and reads what; this is its storage.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from minigpt.core.artifact import Artifact
from minigpt.core.config import Config, from_mapping
from minigpt.core.errors import ArtifactError, ConfigError, MinigptError, StorageError
from minigpt.core.manifest import FileEntry, TensorEntry
from minigpt.core.storage import storage_errors
from minigpt.train.checkpoint_chunks import Chunk, LoadPlanner, SavePlanner
from minigpt.train.checkpoint_location import Location
from minigpt.train.tensor_hash import Sums, fingerprint, partial_sums
from minigpt.train.world import World

INDEX = "index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_WRITE_BYTES = 4 << 20
_ALONE = "torch.distributed is disabled"  # what torch warns of where there is a single process


class StoredBox(Config):
    """A box of a tensor in a file."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class Index(Config):
    """Where every part of every tensor is."""

    world_size: int
    """Ranks that wrote it."""
    tensors: dict[str, tuple[StoredBox, ...]]
    """By `model/<name>`, `optimizer/<parameter>/<state>` and `rng/<rank>/<generator>`."""


@dataclass(frozen=True)
class Sealed:
    """What all ranks wrote, as rank 0 knows it at the end."""

    index: Index
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]


@dataclass(frozen=True)
class _Written:
    """A box in a file, as the rank that wrote it reports it."""

    box: StoredBox
    entry: FileEntry
    dtype: str
    shape: tuple[int, ...]
    sums: Sums


def save_chunks(
    chunks: Mapping[str, Chunk],
    location: Location,
    step: int,
    commit: Callable[[str, Sealed], None],
    world: World,
) -> None:
    """Write every rank's chunks and, when all are safe, `commit(place, sealed)` on rank 0.

    Raises:
        StorageError: Some rank could not write; on every rank.
        RuntimeError: A rank is gone; on every rank that is left.
    """
    warnings.filterwarnings("ignore", message=_ALONE)
    writer = _Writer(location, step, commit, world)
    try:
        save(
            dict(chunks),
            storage_writer=writer,
            planner=SavePlanner(),
            process_group=world.group,
            no_dist=world.group is None,
        )
    except CheckpointException as error:
        raise _first_failure(error, f"save step {step}") from None


def load_chunks(
    chunks: Mapping[str, Chunk], artifact: Artifact, index: Index, world: World
) -> None:
    """Fill every rank's chunks from the files.

    Raises:
        ArtifactError: A file can't be read; on every rank alike.
    """
    warnings.filterwarnings("ignore", message=_ALONE)
    try:
        load(
            dict(chunks),
            storage_reader=_Reader(artifact, index),
            planner=LoadPlanner(),
            process_group=world.group,
            no_dist=world.group is None,
        )
    except CheckpointException as error:
        raise _first_failure(error, f"load {artifact.uri}") from None


def read_index(path: Path) -> Index:
    """Read the index of the checkpoint at `path`.

    Raises:
        ArtifactError: It is missing or malformed.
    """
    try:
        return from_mapping(Index, json.loads((path / INDEX).read_bytes()))
    except FileNotFoundError:
        raise ArtifactError(
            f"{path / INDEX} is missing", remedy="it is no checkpoint of this minigpt: start anew"
        ) from None
    except (OSError, ValueError, ConfigError) as error:
        raise ArtifactError(f"{path / INDEX} is corrupt: {error}") from None


def write_safetensors(file: IO[bytes], tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write tensors in the format of safetensors and return the file's hash.

    Not the library's `save_file`: this one hashes the bytes on their way instead of reading the
    file again, and lets other threads run meanwhile. The largest elements come first, so that
    all are aligned. Format: https://github.com/huggingface/safetensors
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": dtype_name(tensor),
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    head = struct.pack("<Q", len(text)) + text
    for block in _blocks(head, (tensors[name] for name in order)):
        digest.update(block)
        file.write(block)
    return FileEntry(sha256=digest.hexdigest(), size=8 + len(text) + end)


def dtype_name(tensor: Tensor) -> str:
    """Return a tensor's dtype in safetensors' terms.

    Raises:
        StorageError: The format has no such dtype.
    """
    if tensor.dtype not in _DTYPE_NAMES:
        raise StorageError(f"a tensor of {tensor.dtype} can't be saved in safetensors")
    return _DTYPE_NAMES[tensor.dtype]


def _blocks(head: bytes, tensors: Iterable[Tensor]) -> Iterable[bytes | memoryview]:
    yield head
    for tensor in tensors:
        content = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
        for begin in range(0, len(content), _WRITE_BYTES):
            yield content[begin : begin + _WRITE_BYTES]


def _first_failure(error: CheckpointException, action: str) -> BaseException:
    """Return what went wrong on the lowest rank that failed."""
    rank = min(error.failures)
    cause = error.failures[rank][0]
    if isinstance(cause, MinigptError) or not isinstance(cause, Exception):
        return cause  # a Ctrl-C stays one
    return StorageError(f"can't {action}: rank {rank}: {type(cause).__name__}: {cause}")


class _Writer(StorageWriter):
    """Writes one checkpoint; the calls come in the order that `StorageWriter` documents."""

    def __init__(
        self, location: Location, step: int, commit: Callable[[str, Sealed], None], world: World
    ) -> None:
        self._location = location
        self._step = step
        self._commit = commit
        self._world = world
        self._place = ""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a writer is for one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the place is made when the plan is."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Keep the plan."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the place on rank 0, and tell it to all."""
        self._place = self._location.begin(self._step)
        return [replace(plan, storage_data=self._place) for plan in plans]

    def write_data(self, plan: SavePlan, planner: Any) -> Future[list[WriteResult]]:
        """Write this rank's files."""
        sections = defaultdict(list)
        for item in plan.items:
            sections[item.index.fqn.partition("/")[0]].append(item)
        results = []
        for section, items in sections.items():
            name = self._file_name(section)
            tensors = {
                item.index.fqn.partition("/")[2]: planner.resolve_data(item) for item in items
            }
            with self._location.writable(plan.storage_data, name) as file:
                entry = write_safetensors(file, tensors)
            for item, tensor in zip(items, tensors.values(), strict=True):
                assert item.tensor_data is not None and item.index.offset is not None
                offset, shape = tuple(item.index.offset), tuple(item.tensor_data.size)
                box = StoredBox(file=name, offset=offset, shape=tuple(tensor.shape))
                sums = partial_sums(tensor, shape, offset)
                written = _Written(box, entry, dtype_name(tensor), shape, sums)
                results.append(WriteResult(item.index, tensor.nbytes, written))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit, on rank 0, when all ranks have written."""
        parts: dict[str, list[_Written]] = defaultdict(list)
        for result in (result for rank in results for result in rank):
            parts[result.index.fqn].append(result.storage_data)
        tensors = {
            name: TensorEntry(
                fingerprint=fingerprint(some[0].dtype, some[0].shape, (p.sums for p in some)),
                dtype=some[0].dtype,
                shape=some[0].shape,
            )
            for name, some in sorted(parts.items())
        }
        boxes = {name: tuple(part.box for part in some) for name, some in sorted(parts.items())}
        files = {part.box.file: part.entry for some in parts.values() for part in some}
        index = Index(world_size=self._world.size, tensors=boxes)
        self._commit(self._place, Sealed(index, files, tensors))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Take none: the location knows the place."""
        return False

    def _file_name(self, section: str) -> str:
        if self._world.size == 1:
            return f"{section}.safetensors"
        return f"{section}-{self._world.rank + 1:05d}-of-{self._world.size:05d}.safetensors"


class _Reader(StorageReader):
    """Reads one checkpoint; the calls come in the order that `StorageReader` documents."""

    def __init__(self, artifact: Artifact, index: Index) -> None:
        self._artifact = artifact
        self._index = index

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a reader is for one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return which tensors there are and how they are cut."""
        tensors: dict[str, Any] = {}
        for name, boxes in self._index.tensors.items():
            entry = self._artifact.manifest.tensors[name]
            chunks = [
                ChunkStorageMetadata(torch.Size(b.offset), torch.Size(b.shape)) for b in boxes
            ]
            properties = TensorProperties(dtype=DTYPES[entry.dtype])
            tensors[name] = TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)
        return Metadata(tensors)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing: the index is at hand."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Keep the plan."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Keep the plans."""
        return plans

    def read_data(self, plan: LoadPlan, planner: Any) -> Future[None]:
        """Read what this rank needs, file by file."""
        files: dict[str, list[ReadItem]] = defaultdict(list)
        places = {
            MetadataIndex(name, box.offset): box.file
            for name, boxes in self._index.tensors.items()
            for box in boxes
        }
        for item in plan.items:
            files[places[item.storage_index]].append(item)
        for name, items in files.items():
            path = self._artifact.path / name
            try:
                with storage_errors(f"read {path}"), safe_open(path, framework="pt") as file:
                    for item in items:
                        self._read(file, item, planner)
            except SafetensorError as error:
                raise ArtifactError(f"{path} can't be read: {error}") from None
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @staticmethod
    def _read(file: Any, item: ReadItem, planner: Any) -> None:
        key = item.storage_index.fqn.partition("/")[2]
        target = planner.resolve_tensor(item)
        whole = file.get_slice(key)
        if list(item.lengths) == whole.get_shape():
            target.copy_(file.get_tensor(key))
            return
        ranges = zip(item.storage_offsets, item.lengths, strict=True)
        target.copy_(whole[tuple(slice(begin, begin + length) for begin, length in ranges)])

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Take none: the artifact is at hand."""
        return False
