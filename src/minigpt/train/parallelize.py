"""Spreads an ordinary decoder over a mesh: tensor parallel first, then sharded or replicated.

What comes out, a `Spread`, says how to call the model and how its gradients reach their sum over
the global batch. Sums, never means: the loss is divided by the global number of targets.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel

from minigpt.core.errors import ConfigError
from minigpt.model.decoder import Decoder
from minigpt.model.lora import adapter_config, add_adapters
from minigpt.train.config import MeshConfig
from minigpt.train.expert_parallel import mixture_parameters, spread_experts, spread_parameters
from minigpt.train.gather import union_over
from minigpt.train.gradients import Cuts, complete_gradients, sum_gradients
from minigpt.train.mesh import LOSS_AXES, Mesh
from minigpt.train.pipeline_parallel import Cut, Stage, cut_stages
from minigpt.train.tensor_parallel import apply_tensor_parallel

_POWER_SGD_RANK = 4
# torch compresses from the third backward pass on at the earliest: it rebuilds its buckets first.
_POWER_SGD_START = 10


@dataclass(frozen=True)
class Spread:
    """A model laid over a mesh."""

    model: Decoder | Stage
    """Its parameters are DTensors where they are sharded; of a pipeline, all this rank's layers."""
    mesh: Mesh
    call: Callable[..., Tensor]
    """Runs the forward pass: the model, or a wrapper of it."""
    divides_by: int = 1
    """What gradients come out divided by: torch's DDP forms means."""
    open_axes: tuple[str, ...] = ()
    """Axes over which gradients are still to be summed after the last backward pass."""
    cuts: Cuts = field(default_factory=dict)
    """Axes along which plain parameters differ between ranks."""
    cut: Cut | None = None
    """This rank's stages of a pipeline."""

    @property
    def counted(self) -> list[nn.Parameter]:
        """The parameters whose gradients count in the norm: a tied embedding's copy does not."""
        copy = None
        if self.cut is not None and not self.cut.held.is_first:
            copy = self.cut.held.model.embed_tokens
        copied = set() if copy is None else set(copy.parameters())
        return [parameter for parameter in self.model.parameters() if parameter not in copied]

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Surround a micro-batch's passes.

        Replicas exchange gradients in the last backward pass alone; shards in each one, since
        whole gradients, kept from one to the next, would take the memory that sharding saves.
        """
        if isinstance(self.call, DistributedDataParallel) and not is_last:
            return self.call.no_sync()
        return nullcontext()

    def finish_gradients(self) -> None:
        """Complete the gradients after the last backward pass; every rank must join."""
        if self.mesh.is_single:
            return
        parameters = list(self.model.parameters())
        complete_gradients(parameters)
        # Tensor parallel ranks route their own part of the sequence through whole experts.
        sum_gradients(mixture_parameters(self.model), self.mesh, ("tp",), self.cuts)
        sum_gradients(parameters, self.mesh, self.open_axes, self.cuts)


def alone(model: Decoder) -> Spread:
    """Return the spread of a model in one process."""
    return Spread(model, Mesh(MeshConfig()), model)


def spread(
    model: Decoder,
    mesh: Mesh,
    *,
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
) -> Spread:
    """Lay a model over a mesh, in place; with one process nothing happens.

    Sharding needs the same weights on every rank (seed them alike); DDP and tensor parallelism
    take those of their first rank.

    Args:
        model: Initialised, on the mesh's device.
        mesh: Of all ranks.
        dtype: Of matrix products. Layers under fsdp are gathered in it; gradients are summed
            in float32 at least.
        offload: Keep the shards, their gradients and the optimizer's state in CPU memory.

    Raises:
        ConfigError: The mesh asks for something that its backend can't do.
    """
    config = mesh.config
    tp, shards, experts = mesh.submesh("tp"), mesh.submesh("dp", "fsdp"), mesh.group("ep")
    if experts is not None:
        spread_experts(model, experts)
    if tp is not None:
        apply_tensor_parallel(model, tp)
    cut = cut_stages(model, mesh) if config.pp > 1 else None
    held = model if cut is None else cut.held
    open_axes: tuple[str, ...] = LOSS_AXES
    if config.fsdp > 1:
        assert shards is not None
        for part in [model] if cut is None else cut.stages:
            _shard(part, shards, config, dtype, offload)
        open_axes = tuple(axis for axis in LOSS_AXES if axis not in ("dp", "fsdp"))
    elif config.reduce == "tree":
        open_axes = ()  # the passes sum by themselves, see `train.passes`
    elif config.size == config.dp > 1:
        ddp = _data_parallel(model, mesh)
        return Spread(model, mesh, ddp, divides_by=config.dp)
    cuts = dict.fromkeys(spread_parameters(held), ("ep",))
    return Spread(held, mesh, held, open_axes=open_axes, cuts=cuts, cut=cut)


def _shard(
    model: Decoder | Stage,
    mesh: DeviceMesh,
    config: MeshConfig,
    dtype: torch.dtype,
    offload: bool,
) -> None:
    """Shard layer by layer, so that one layer's weights are gathered while another computes."""
    own = next(model.parameters()).dtype
    # Inputs are not cast: the residual stream stays as wide as in one process, autocast rules.
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=own, cast_forward_inputs=False)
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    # A split backward pass adds up a weight's gradients in the type that the weight is gathered in.
    splits_backward = config.pp > 1 and config.schedule == "zero-bubble"
    inner = whole if dtype == own or splits_backward else mixed
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    reshard = config.reshard == "zero3"
    for layer in model.model.layers.children():
        fully_shard(
            layer,
            mesh=mesh,
            reshard_after_forward=reshard,
            mp_policy=inner,
            offload_policy=policy,
        )
    # Embedding, head and last norm: the loss reads the head after the forward pass has ended.
    fully_shard(
        model, mesh=mesh, reshard_after_forward=False, mp_policy=whole, offload_policy=policy
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no sum with a factor built in.
            module.set_force_sum_reduction_for_comms(True)


def _data_parallel(model: Decoder, mesh: Mesh) -> DistributedDataParallel:
    config = mesh.config
    group = mesh.group("dp")
    with warnings.catch_warnings():  # the option's new name is not in torch 2.11
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        ddp = DistributedDataParallel(
            model, process_group=group, gradient_as_bucket_view=True, broadcast_buffers=False
        )
    hook = _compression(config.compress, mesh.device_type, group)
    if hook is not None:
        ddp.register_comm_hook(*hook)
    return ddp


def _compression(
    kind: str, device_type: str, group: dist.ProcessGroup | None
) -> tuple[Any, Callable[..., Any]] | None:
    """Return torch's state and hook for a kind of compression, None for none."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    if kind == "none":
        return None
    if kind == "fp16":
        return group, default_hooks.fp16_compress_hook
    if kind == "bf16":
        check_compression(kind, device_type)
        return group, default_hooks.bf16_compress_hook
    state = powerSGD_hook.PowerSGDState(
        group,
        matrix_approximation_rank=_POWER_SGD_RANK,
        start_powerSGD_iter=_POWER_SGD_START,
    )
    return state, powerSGD_hook.powerSGD_hook


def check_compression(kind: str, device_type: str) -> None:
    """Refuse what a device's backend can't send.

    Raises:
        ConfigError: bf16 without NCCL.
    """
    if kind == "bf16" and device_type != "cuda":
        raise ConfigError(
            "mesh.compress = bf16 needs NCCL, but this run is on the CPU over gloo, whose "
            "all-reduce has no bfloat16 in torch's hook",
            remedy="--set mesh.compress=fp16 or powersgd",
        )


def gathered(model: Decoder | Stage, mesh: Mesh) -> Decoder:
    """Return a plain copy of a spread-out model with all its weights; every rank must join.

    For validation, samples and the final model, whose code knows of one device. Takes the memory
    of the whole model on every rank for as long as it is kept.
    """
    with torch.device("meta"):
        copy = Decoder(model.config)
        adapters = adapter_config(model)
        if adapters is not None:
            add_adapters(copy, adapters, torch.Generator())
    weights = {name: _whole(tensor) for name, tensor in model.state_dict().items()}
    for axis in ("ep", "pp"):
        weights = union_over(weights, mesh.group(axis))
    copy.load_state_dict(weights, assign=True)
    rotary = copy.model.rotary
    if rotary is not None:
        rotary.reset(next(iter(weights.values())).device)
    return copy


def _whole(tensor: Tensor) -> Tensor:
    full = getattr(tensor.detach(), "full_tensor", None)
    return full() if full is not None else tensor.detach()
