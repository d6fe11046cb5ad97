"""Expert parallel: the ranks of a group hold different experts and different data.

A layer sends each token's row to the ranks of its experts, which run them and send the results
back; gradients take the same way. For all other parameters, the router's included, the ranks are
data ranks. An expert's gradient is complete over the group as it is: it saw the group's tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minigpt.model.moe import Experts, MixtureOfExperts, Router, run_experts
from minigpt.train.mesh import LOSS_AXES, Mesh


def spread_experts(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Leave to each rank its block of every layer's experts, under the names they had.

    Args:
        model: Whose number of experts is a multiple of the group's size; changed in place.
        group: The ranks to spread them over.
    """
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.experts = ParallelExperts(module.experts, group)


def spread_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that this rank alone has among the ranks of its ep group."""
    spread = (module for module in model.modules() if isinstance(module, ParallelExperts))
    return {parameter for module in spread for parameter in module.parameters()}


def mixture_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of all routers and experts."""
    mixtures = (module for module in model.modules() if isinstance(module, MixtureOfExperts))
    return [parameter for mixture in mixtures for parameter in mixture.parameters()]


def balance_experts(model: nn.Module, rate: float, mesh: Mesh) -> None:
    """Move the routers' biases by the load of a whole step; every rank calls it after the step.

    Args:
        model: With routers, or without any.
        rate: By how much a bias moves, in units of probability.
        mesh: Whose tp ranks have counted their parts of the sequence, others their rows.
    """
    for module in model.modules():
        if isinstance(module, Router) and module.load is not None:
            module.balance(mesh.sum(mesh.sum(module.load, *LOSS_AXES), "tp"), rate)


class ParallelExperts(Experts):
    """This rank's experts; rows for the others go to their ranks and come back."""

    def __init__(self, experts: Experts, group: dist.ProcessGroup) -> None:
        rank, share = dist.get_rank(group), experts.num_experts // dist.get_world_size(group)
        own = (str(number) for number in range(rank * share, (rank + 1) * share))
        super().__init__({number: experts[number] for number in own}, experts.num_experts)
        self._group = group

    def run_sorted(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Run rows that are sorted by expert, (E,) `counts` of them each; same order out."""
        size = dist.get_world_size(self._group)
        arriving = torch.empty_like(counts)  # by sender, then by own expert
        dist.all_to_all_single(arriving, counts, group=self._group)
        by_sender = arriving.view(size, -1)
        sent, received = counts.view(size, -1).sum(1).tolist(), by_sender.sum(1).tolist()
        guests = _exchange(rows, sent, received, self._group)
        experts = torch.arange(len(self), device=rows.device).repeat(size)
        order = experts.repeat_interleave(arriving).argsort(stable=True)
        outputs = run_experts(self.values(), guests[order], by_sender.sum(0), skip_idle=False)
        return _exchange(outputs[order.argsort()], received, sent, self._group)


def _exchange(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    exchanged: Tensor = _Exchange.apply(rows, sent, received, group)  # type: ignore[no-untyped-call]
    return exchanged


class _Exchange(torch.autograd.Function):
    """Send `sent[r]` rows to rank r and receive `received[r]` from it; gradients go back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sizes = sent, received
        ctx.group = group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received = ctx.sizes
        return _all_to_all(gradient, received, sent, ctx.group), None, None, None


def _all_to_all(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    arrived = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived
