"""Muon with all matrices of a shape orthogonalised at once.

The rule is that of `torch.optim.Muon` (https://kellerjordan.github.io/posts/muon/, Nesterov
momentum, five Newton-Schulz iterations in bfloat16). That one takes the matrices singly: 15
small products and as many elementwise passes each, which for a small model cost a third of the
step. Stacked, they are 15 batched products for each shape in the model.

Of a sharded matrix (DTensor) each rank keeps its shard of the momentum; the update is gathered,
orthogonalised on every rank, and each rank applies its part.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from minigpt.train.gradients import local

# The quintic that the post derives: steep at 0, so that five iterations suffice, and bringing
# every singular value to within about 0.7 to 1.2 of 1.
_LINEAR, _CUBIC, _QUINTIC = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_EPSILON = 1e-7


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; for matrices only.

    State: `momentum_buffer` of each parameter.

    Args:
        params: Matrices (rows, columns).
        lr: Learning rate; the update is scaled by sqrt(max(1, rows / columns)).
        weight_decay: Decoupled decay, times the learning rate.
        momentum: Decay of the gradient's running mean.
    """

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, weight_decay: float, momentum: float
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        shapes = [p.shape for group in self.param_groups for p in group["params"]]
        assert all(len(shape) == 2 for shape in shapes), shapes

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            self._step_group(group)

    def _step_group(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        gradients = [local(p.grad) for p in parameters]
        buffers = [local(self._momentum_buffer(p)) for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        moved = torch._foreach_lerp(gradients, buffers, group["momentum"])
        values = [local(p) for p in parameters]
        torch._foreach_mul_(values, 1 - group["lr"] * group["weight_decay"])
        updates = [_gathered(u, p) for u, p in zip(moved, parameters, strict=True)]
        by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, update in enumerate(updates):
            rows, columns = update.shape
            by_shape[min(rows, columns), max(rows, columns)].append(index)
        for members in by_shape.values():
            stack = torch.stack([_wide(updates[index]) for index in members])
            for index, update in zip(members, orthogonalize(stack), strict=True):
                rows, columns = parameters[index].shape
                step = update.T if rows > columns else update
                scale = math.sqrt(max(1.0, rows / columns))
                part = _part(step, parameters[index])
                values[index].add_(part, alpha=-group["lr"] * scale)

    def _momentum_buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def orthogonalize(stack: Tensor) -> Tensor:
    """Bring the singular values of each matrix near 1 and keep its singular vectors.

    Args:
        stack: (N, rows, columns), rows <= columns.

    Returns:
        The same shape, in bfloat16.
    """
    matrices = stack.bfloat16()
    norms = torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=_EPSILON)
    matrices = matrices / norms
    for _ in range(_ITERATIONS):
        gram = matrices @ matrices.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=_CUBIC, alpha=_QUINTIC)
        matrices = torch.baddbmm(matrices, polynomial, matrices, beta=_LINEAR)
    return matrices


def _gathered(update: Tensor, parameter: Tensor) -> Tensor:
    """Return the whole of a sharded matrix's update; every rank of its mesh must join.

    Sent in bfloat16, in which it is orthogonalised anyway.
    """
    if not isinstance(parameter, DTensor):
        return update
    return DTensor.from_local(
        update.bfloat16(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    ).full_tensor()


def _part(update: Tensor, parameter: Tensor) -> Tensor:
    """Return this rank's shard of a whole update."""
    if not isinstance(parameter, DTensor):
        return update
    mesh, whole = parameter.device_mesh, [Replicate()] * parameter.device_mesh.ndim
    everywhere = DTensor.from_local(update.contiguous(), mesh, whole, run_check=False)
    return everywhere.redistribute(placements=parameter.placements).to_local()


def _wide(matrix: Tensor) -> Tensor:
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
