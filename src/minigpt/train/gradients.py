"""Gradients of a spread-out model: completed, summed over ranks, measured and clipped.

A parameter is a plain tensor, the same on all ranks, or a DTensor, of which this rank holds a
shard along some axes and a copy along others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from minigpt.train.mesh import AXES, Mesh

_CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s


def complete_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give each DTensor's gradient the layout of its parameter.

    A parameter that is replicated along tp, as a norm's weight, has seen a part of the sequence
    only: its gradient is a partial sum until the ranks have added theirs.
    """
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
            parameter.grad = gradient.redistribute(placements=parameter.placements)


Cuts = Mapping[nn.Parameter, tuple[str, ...]]
"""Axes along which ranks hold different plain parameters in one place, as experts along ep."""


def sum_gradients(
    parameters: Iterable[nn.Parameter], mesh: Mesh, axes: Sequence[str], cuts: Cuts
) -> None:
    """Add up gradients over the ranks along axes, one message for each kind of gradient.

    A parameter that is cut along one of the axes, as experts are along ep, holds something else
    on each of its ranks and is summed along the others only.

    Args:
        parameters: With completed gradients.
        mesh: The ranks.
        axes: In mesh order.
        cuts: Of parameters that are no DTensors and yet differ between ranks.
    """
    kinds: dict[tuple[tuple[str, ...], torch.dtype], list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            cut = cut_axes(parameter, cuts)
            over = tuple(axis for axis in axes if axis not in cut)
            kinds[over, parameter.grad.dtype].append(local(parameter.grad))
    for (over, _), gradients in kinds.items():
        if mesh.size(*over) == 1:
            continue
        flat = mesh.sum(torch.cat([gradient.reshape(-1) for gradient in gradients]), *over)
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return what this rank holds of each gradient, sharing its memory."""
    return [local(p.grad) for p in parameters if p.grad is not None]


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, and a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_norm(parameters: Sequence[nn.Parameter], mesh: Mesh, cuts: Cuts) -> Tensor:
    """Return the norm of the whole gradient, the same number on every rank.

    Shards are added up along the axes they are cut on, and pipeline stages along pp; what is
    replicated counts once.

    Args:
        parameters: This rank's, with completed gradients.
        mesh: The ranks.
        cuts: Of parameters that are no DTensors and yet differ between ranks.
    """
    by_axes: dict[tuple[str, ...], list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            by_axes[cut_axes(parameter, cuts)].append(local(parameter.grad))
    if mesh.size("pp") == 1 and list(by_axes) == [()]:
        return torch.nn.utils.get_total_norm(by_axes[()])
    total = torch.zeros((), device=mesh.device_type, dtype=torch.float64)
    for axes in sorted(by_axes):  # one order on all ranks of a stage, which join every sum
        square = torch.nn.utils.get_total_norm(by_axes[axes]).double() ** 2
        total += mesh.sum(square, *axes)
    return mesh.sum(total, "pp").sqrt()


def clip_gradients(parameters: Sequence[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scale gradients by limit / norm where the norm is larger; as torch's function rounds."""
    gradients = local_gradients(parameters)
    coefficient = torch.clamp(limit / (norm + _CLIP_EPSILON), max=1.0)
    torch._foreach_mul_(gradients, coefficient.to(gradients[0]))


def cut_axes(parameter: nn.Parameter, cuts: Cuts) -> tuple[str, ...]:
    """Name the axes along which ranks hold different parts of a parameter, in mesh order."""
    found = set(cuts.get(parameter, ()))
    if isinstance(parameter, DTensor):
        names = parameter.device_mesh.mesh_dim_names
        assert names is not None
        pairs = zip(names, parameter.placements, strict=True)
        found |= {name for name, placement in pairs if not placement.is_replicate()}
    return tuple(axis for axis in AXES if axis in found)
