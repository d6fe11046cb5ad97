"""Tensors that only some ranks have, as of pipeline stages and spread experts, brought together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def union_over(tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """Return all tensors that any rank of a group has, by name; every rank must call it.

    A name that several ranks have is one tensor, the same on all of them.

    Args:
        tensors: This rank's; returned as they are, not copied.
        group: None is this rank alone.
    """
    if group is None:
        return dict(tensors)
    described = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    everywhere: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [
        {} for _ in range(dist.get_world_size(group))
    ]
    dist.all_gather_object(everywhere, described, group=group)
    device = next(iter(tensors.values())).device
    union: dict[str, Tensor] = {}
    for owner, names in enumerate(everywhere):
        for name, (shape, dtype) in names.items():
            if name in union:
                continue
            tensor = tensors.get(name)
            if all(name in others for others in everywhere):
                assert tensor is not None
            else:
                if tensor is None:
                    tensor = torch.empty(shape, dtype=dtype, device=device)
                dist.broadcast(tensor, group_src=owner, group=group)
            union[name] = tensor
    return union
