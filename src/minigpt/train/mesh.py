"""The processes of a run, laid out on named axes, and what may not be laid out so.

Axes, outermost first: pp, dp, fsdp, ep, cp, tp. Neighbours on the last axis have neighbouring
ranks, so that what talks most (tp) is closest. A run of one process has no process group.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from minigpt.core.errors import ConfigError
from minigpt.model.config import ModelConfig
from minigpt.train.config import MeshConfig

AXES = ("pp", "dp", "fsdp", "ep", "cp", "tp")
DATA_AXES = ("dp", "fsdp", "ep")
"""Axes over which the micro-batches of a global batch are dealt out."""
LOSS_AXES = (*DATA_AXES, "cp")
"""Axes over which the loss is a sum: different rows, or different parts of the same rows."""
_WORLD_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Mesh:
    """This process's place among the axes, and the process groups along them."""

    def __init__(self, config: MeshConfig, device_type: str = "cpu") -> None:
        """Lay the mesh over the world, whose process group exists where `config.size` > 1.

        Creates process groups: every rank must do so at the same point.

        Args:
            config: Sizes of the axes; their product is the world size.
            device_type: "cpu" or "cuda", where tensors to be exchanged are.
        """
        self.config = config
        self.device_type = device_type
        self._sizes = {axis: int(getattr(config, axis)) for axis in AXES}
        self._mesh: DeviceMesh | None = None
        self._groups: dict[tuple[str, ...], dist.ProcessGroup] = {}
        present = self._present(AXES)
        if present:
            shape = tuple(self._sizes[axis] for axis in present)
            self._mesh = init_device_mesh(device_type, shape, mesh_dim_names=present)
            # Here, where all ranks are at the same point; later a group might be made by one only.
            self.group(*DATA_AXES)
            self.group(*LOSS_AXES)
            self.group(*(axis for axis in LOSS_AXES if axis != "ep"))
            self.group(*AXES)

    @property
    def is_single(self) -> bool:
        """Whether the run is one process, without any group."""
        return self._mesh is None

    @property
    def data_size(self) -> int:
        """How many ranks see different micro-batches."""
        return self.size(*DATA_AXES)

    @property
    def data_rank(self) -> int:
        """Which of `data_size` blocks of micro-batches is this process's."""
        return self.rank(*DATA_AXES)

    def size(self, *axes: str) -> int:
        """Return the number of ranks along one axis, or along several together."""
        product = 1
        for axis in axes:
            product *= self._sizes[axis]
        return product

    def rank(self, *axes: str) -> int:
        """Return this process's coordinate along axes, the last one counting fastest."""
        rank = 0
        for axis in axes:
            coordinate = 0
            if self._mesh is not None and self._sizes[axis] > 1:
                coordinate = self._mesh.get_local_rank(axis)
            rank = rank * self._sizes[axis] + coordinate
        return rank

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        """Return the group of ranks along axes (in mesh order), None where it is this one alone.

        A group over several axes is made at the first call, by every rank at the same point.
        """
        present = self._present(axes)
        if self._mesh is None or not present:
            return None
        if present not in self._groups:
            submesh = self._mesh[present] if len(present) < self._mesh.ndim else self._mesh
            flat = submesh if len(present) == 1 else submesh._flatten("_".join(present))
            self._groups[present] = flat.get_group()
        return self._groups[present]

    def submesh(self, *axes: str) -> DeviceMesh | None:
        """Return the device mesh of those axes that have more than one rank, None without any."""
        present = self._present(axes)
        if self._mesh is None or not present:
            return None
        return self._mesh if len(present) == self._mesh.ndim else self._mesh[present]

    def sum(self, tensor: Tensor, *axes: str) -> Tensor:
        """Add up a tensor over the ranks along axes, in place, and return it."""
        group = self.group(*axes)
        if group is not None:
            dist.all_reduce(tensor, group=group)
        return tensor

    def micro_batches(self, count: int) -> range:
        """Return which of a global batch's `count` micro-batches this process's data rank takes."""
        share = count // self.data_size
        return range(self.data_rank * share, (self.data_rank + 1) * share)

    def _present(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(axis for axis in axes if self._sizes[axis] > 1)


@contextmanager
def open_mesh(
    config: MeshConfig, device_type: str, *, timeout: timedelta = timedelta(minutes=10)
) -> Iterator[Mesh]:
    """Join the processes that torchrun started and lay out the mesh; leave them at the end.

    Where the launcher has joined them already, as Ray Train does, its process group is used.

    Args:
        config: Sizes of the axes.
        device_type: "cpu" (gloo) or "cuda" (nccl, and gloo for what is on the CPU).
        timeout: After which a collective that some rank does not join fails.

    Raises:
        ConfigError: The processes are not those that the mesh needs.
    """
    check_world(config, os.environ)
    if config.size == 1 or dist.is_initialized():  # a launcher's group is the launcher's to end
        yield Mesh(config, device_type)
        return
    backend = "gloo"
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    joined = dist.rendezvous("env://", timeout=timeout)  # type: ignore[attr-defined]
    store, rank, size = next(joined)
    # torchrun keeps one store over its restarts (torch 2.13): without a prefix of its own an
    # attempt may find the addresses of dead ranks there, and wait for them for good.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt-{attempt}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield Mesh(config, device_type)
    finally:
        dist.destroy_process_group()


def check_world(config: MeshConfig, environment: Mapping[str, str]) -> None:
    """Compare the mesh with what torchrun's variables say of the processes.

    Raises:
        ConfigError: There are more or fewer processes than places, or variables are missing.
    """
    size = config.size
    command = f"torchrun --nproc-per-node {size} -m minigpt train ..."
    if "WORLD_SIZE" not in environment:
        if size == 1:
            return
        raise ConfigError(
            f"the mesh {describe(config)} needs {size} processes, but this one is alone: "
            "WORLD_SIZE is not set",
            remedy=f"start it as {command}",
        )
    world = int(environment["WORLD_SIZE"])
    if world != size:
        raise ConfigError(
            f"the mesh {describe(config)} needs {size} processes, but WORLD_SIZE = {world}",
            remedy=f"start it as {command}, or choose sizes whose product is {world}, "
            f"as --set mesh.dp={world}",
        )
    missing = [name for name in _WORLD_VARIABLES if name not in environment]
    if size > 1 and missing:
        raise ConfigError(
            f"the mesh {describe(config)} needs {', '.join(missing)} in the environment",
            remedy=f"start it as {command}, which sets them",
        )


def describe(config: MeshConfig) -> str:
    """Render a mesh's axes, as `dp=2 x tp=2`."""
    sizes = {axis: getattr(config, axis) for axis in AXES}
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "dp=1"


def check_model(
    config: MeshConfig, model: ModelConfig, *, micro_batches: int, sequence_length: int
) -> None:
    """Refuse a mesh over which this model and batch can't be spread.

    Args:
        config: Sizes of the axes.
        model: The architecture.
        micro_batches: Of a global batch, M.
        sequence_length: Tokens in a row.

    Raises:
        ConfigError: Naming the axis, what it would have to divide, and a remedy.
    """
    tp, cp, ep = config.tp, config.cp, config.ep
    divided = ["num_heads", "num_kv_heads", "vocab_size"]
    if not model.num_experts:  # experts are whole on each tp rank
        divided.append("intermediate_size")
    for name in divided:
        _require_multiple(f"model.{name}", getattr(model, name), "mesh.tp", tp)
    # Tensor parallel ranks keep the residual stream cut along the sequence.
    _require_multiple("batch.sequence_length", sequence_length, "mesh.tp x mesh.cp", tp * cp)
    # Each context parallel rank takes a piece from the front and its mirror image from the back.
    if cp > 1:
        _require_multiple("batch.sequence_length", sequence_length, "2 x mesh.cp", 2 * cp)
    experts = model.num_experts
    if ep > 1 and not experts:
        raise ConfigError(
            f"mesh.ep = {ep}, but the model has no experts to spread",
            remedy="use mesh.dp or mesh.fsdp, or set model.num_experts",
        )
    if ep > 1:
        _require_multiple("model.num_experts", experts, "mesh.ep", ep)
    stages = config.pp * config.virtual_stages
    if model.num_layers < stages:
        raise ConfigError(
            f"model.num_layers = {model.num_layers} is fewer than mesh.pp x mesh.virtual_stages "
            f"= {stages}: every pipeline stage needs a layer",
            remedy="lower mesh.pp, or use more layers",
        )
    data = config.data_size
    _require_multiple(
        "micro-batches of a step (batch.tokens_per_step / sequence_length / micro_batch_size)",
        micro_batches,
        "data ranks (mesh.dp x fsdp x ep)",
        data,
    )


def _require_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        raise ConfigError(
            f"{name} = {value} is not a multiple of {divisor_name} = {divisor}",
            remedy=f"choose sizes that divide {value}, or change it",
        )
