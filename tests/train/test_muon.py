"""Muon by stacks against torch's own, matrix by matrix."""

import torch
from torch import nn

from minigpt.train.muon import Muon, orthogonalize

_SHAPES = [(24, 24), (24, 64), (64, 24), (24, 24), (8, 24)]


def _train(optimizer_type: type, steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(s, generator=generator)) for s in _SHAPES]
    optimizer = optimizer_type(parameters, lr=0.02, weight_decay=0.1, momentum=0.95)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def test_equals_torchs_muon() -> None:
    for ours, reference in zip(_train(Muon, 4), _train(torch.optim.Muon, 4), strict=True):
        # Both iterate in bfloat16, in other orders of rounding.
        torch.testing.assert_close(ours, reference, rtol=0.02, atol=2e-3)


def test_singular_values_come_near_one_and_vectors_stay() -> None:
    stack = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(1))
    result = orthogonalize(stack).float()
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.5 and values.max() < 1.3
    left, _, right = torch.linalg.svd(stack, full_matrices=False)
    cosine = torch.cosine_similarity((left @ right).flatten(1), result.flatten(1))
    assert cosine.min() > 0.97


def test_a_zero_gradient_changes_nothing_but_the_decay() -> None:
    parameter = nn.Parameter(torch.ones(4, 6))
    parameter.grad = torch.zeros(4, 6)
    Muon([parameter], lr=0.1, weight_decay=0.5, momentum=0.9).step()
    torch.testing.assert_close(parameter.detach(), torch.full((4, 6), 0.95))


def test_a_parameter_without_gradient_is_left_alone() -> None:
    parameter = nn.Parameter(torch.ones(4, 6))
    Muon([parameter], lr=0.1, weight_decay=0.5, momentum=0.9).step()
    assert torch.equal(parameter.detach(), torch.ones(4, 6))
