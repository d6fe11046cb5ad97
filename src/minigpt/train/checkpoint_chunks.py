"""What of a state this rank holds: boxes of logical tensors, as distributed checkpoints see them.

A `Chunk` is a rank's part on the host with its place in the whole. It has the two methods that
`torch.distributed.checkpoint`'s planners ask of an object, so that staged parts need neither the
device nor the mesh of the tensors they were copied from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from minigpt.core.errors import ArtifactError, StorageError
from minigpt.core.manifest import TensorEntry
from minigpt.train.tensor_hash import Sums, fingerprint, partial_sums
from minigpt.train.world import World

State = Mapping[str, Tensor]
"""Tensors by name; a DTensor is sharded, any other tensor whole and alike on its ranks."""


@dataclass(frozen=True)
class Chunk:
    """A box of a logical tensor."""

    data: Tensor
    """On the host, contiguous."""
    shape: torch.Size
    """Of the whole tensor."""
    offset: torch.Size
    """Where `data` begins in it."""

    @property
    def is_counted(self) -> bool:
        """Whether there is anything to store: not for an empty part of a tensor that is not."""
        return self.data.numel() > 0 or 0 in self.shape

    def size(self) -> torch.Size:
        """Return the whole tensor's shape."""
        return self.shape

    def sums(self) -> Sums:
        """Return the part's share in the tensor's hash."""
        return partial_sums(self.data, self.shape, self.offset)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(self.offset, self.data.shape)] if self.is_counted else []

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.data.dtype)
        return [
            WriteItem(
                MetadataIndex(name, self.offset),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]


class SavePlanner(DefaultSavePlanner):
    """Plans the saving of chunks: each box once, spread over the ranks that hold it."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return a chunk's data."""
        data: Tensor = self.state_dict[index.fqn].data
        return data


class LoadPlanner(DefaultLoadPlanner):
    """Plans the filling of chunks from stored boxes, however those are cut."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Keep what the plan is made from."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return a chunk's data."""
        data: Tensor = self.state_dict[index.fqn].data
        return data


class Stage:
    """Copies of states on the host, in buffers (pinned for a GPU) that the next copy uses again."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, state: State) -> dict[str, Chunk]:
        """Copy a state; its tensors may change as soon as this returns.

        The chunks are good until the next call.
        """
        chunks = {}
        on_gpu = False
        for name, tensor in state.items():
            local, offset = _local_part(name, tensor)
            on_gpu |= local.is_cuda
            buffer = self._buffers.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (local.shape, local.dtype):
                buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
                self._buffers[name] = buffer
            buffer.copy_(local, non_blocking=True)
            chunks[name] = Chunk(buffer, tensor.shape, offset)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return chunks


def view(state: State) -> dict[str, Chunk]:
    """Return a state's chunks without copies where it is on the host."""
    chunks = {}
    for name, tensor in state.items():
        local, offset = _local_part(name, tensor)
        chunks[name] = Chunk(local.cpu().contiguous(), tensor.shape, offset)
    return chunks


def empty_like(layout: Tensor | None, dtype: torch.dtype, shape: Sequence[int]) -> Chunk:
    """Make a chunk to load into: the part that this rank holds of `layout`, or all of `shape`."""
    if layout is None:
        return Chunk(torch.empty(tuple(shape), dtype=dtype), torch.Size(shape), _origin(shape))
    local, offset = _local_part("", layout)
    return Chunk(torch.empty(local.shape, dtype=dtype), layout.shape, offset)


def as_tensor(chunk: Chunk, layout: Tensor | None) -> Tensor:
    """Return a loaded chunk as a tensor laid out like `layout`."""
    if not isinstance(layout, DTensor):
        return chunk.data
    tensor: Tensor = DTensor.from_local(
        chunk.data,
        layout.device_mesh,
        layout.placements,
        run_check=False,
        shape=layout.shape,
        stride=layout.stride(),
    )
    return tensor


def verify(chunks: Mapping[str, Chunk], expected: Mapping[str, TensorEntry], world: World) -> None:
    """Compare loaded tensors, as all ranks together hold them, with their hashes.

    Raises:
        ArtifactError: Values differ from the saved ones, or between ranks that hold the same
            part; on every rank alike.
    """
    local = {
        name: (tuple(chunk.offset), tuple(chunk.data.shape), chunk.sums())
        for name, chunk in chunks.items()
        if chunk.is_counted
    }
    boxes: dict[str, dict[tuple[Any, Any], Sums]] = {}
    for held in world.gather(local):
        for name, (offset, shape, sums) in held.items():
            if boxes.setdefault(name, {}).setdefault((offset, shape), sums) != sums:
                raise ArtifactError(f"{name} was not loaded alike on all ranks")
    for name, parts in boxes.items():
        entry = expected[name]
        held_elements = sum(prod(shape) for _, shape in parts)
        assert held_elements == prod(entry.shape), f"the ranks hold {name} in part or twice"
        if fingerprint(entry.dtype, entry.shape, parts.values()) != entry.fingerprint:
            raise ArtifactError(f"{name} was loaded with other values than were saved")


def _local_part(name: str, tensor: Tensor) -> tuple[Tensor, torch.Size]:
    """Return what this rank holds of a tensor, and where it begins.

    Raises:
        StorageError: The part is no box of the whole.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach(), _origin(tensor.shape)
    if any(placement.is_partial() for placement in tensor.placements):
        raise StorageError(f"{name} can't be saved: it is a sum that is not reduced yet")
    local: Tensor = tensor.to_local().detach()
    (box,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    if local.shape != box.sizes:
        raise StorageError(
            f"{name} can't be saved: this rank holds {tuple(local.shape)} of it, its placement "
            f"{tensor.placements} says {tuple(box.sizes)}",
            remedy="choose mesh sizes that divide the tensor",
        )
    return local, box.offsets


def _origin(shape: Sequence[int]) -> torch.Size:
    return torch.Size([0] * len(shape))
