from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minigpt.train.objective import IGNORED_TARGET, cross_entropy_sum
from minigpt.train.token_likelihood import token_nll


def _inputs(dtype: torch.dtype, tokens: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 16, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(0, 50, (tokens,), generator=generator)
    targets[::5] = IGNORED_TARGET
    return hidden, weight, targets


@pytest.mark.parametrize("chunk_tokens", [1, 8, 37, 1000])
def test_loss_and_gradients_equal_the_plain_ones(chunk_tokens: int) -> None:
    hidden, weight, targets = _inputs(torch.float64)
    loss = cross_entropy_sum(hidden, weight, targets, chunk_tokens=chunk_tokens)
    found = torch.autograd.grad(3 * loss, [hidden, weight])
    plain = F.cross_entropy(
        hidden @ weight.T, targets, reduction="sum", ignore_index=IGNORED_TARGET
    )
    expected = torch.autograd.grad(3 * plain, [hidden, weight])
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = cross_entropy_sum(hidden, weight, torch.tensor([0, 0]), chunk_tokens=1)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 2000.0
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all()


def test_bfloat16_products_come_close() -> None:
    hidden, weight, targets = _inputs(torch.float32, tokens=512)
    exact = cross_entropy_sum(hidden, weight, targets, chunk_tokens=64)
    exact_grads = torch.autograd.grad(exact, [hidden, weight])
    rough = cross_entropy_sum(hidden, weight, targets, chunk_tokens=64, dtype=torch.bfloat16)
    rough_grads = torch.autograd.grad(rough, [hidden, weight])
    torch.testing.assert_close(rough, exact, rtol=1e-2, atol=0)
    for found, expected in zip(rough_grads, exact_grads, strict=True):
        assert found.dtype == torch.float32
        assert float((found - expected).norm() / expected.norm()) < 0.02


def test_without_gradients_none_are_formed() -> None:
    hidden, weight, targets = _inputs(torch.float32)
    with torch.no_grad():
        loss = cross_entropy_sum(hidden, weight, targets, chunk_tokens=8)
    assert not loss.requires_grad


class _LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in itertools.chain([result], result if isinstance(result, tuple) else ()):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def test_full_logits_never_exist_forward_or_backward() -> None:
    tokens, vocab, width, chunk = 512, 1000, 8, 16
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,))
    with _LargestTensor() as watch:  # type: ignore[no-untyped-call]
        cross_entropy_sum(hidden, weight, targets, chunk_tokens=chunk).backward()  # type: ignore[no-untyped-call]
    assert watch.numel <= max(chunk * vocab, vocab * width, tokens * width)


@pytest.mark.parametrize("chunk_tokens", [1, 8, 37, 1000])
def test_token_likelihoods_and_their_gradients_equal_the_plain_ones(chunk_tokens: int) -> None:
    hidden, weight, targets = _inputs(torch.float64)
    weights = torch.linspace(-2, 3, len(targets), dtype=torch.float64)
    found = token_nll(hidden, weight, targets, chunk_tokens=chunk_tokens)
    plain = F.cross_entropy(
        hidden @ weight.T, targets, reduction="none", ignore_index=IGNORED_TARGET
    )
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-10)
    pairs = zip(
        torch.autograd.grad((weights * found).sum(), [hidden, weight]),
        torch.autograd.grad((weights * plain).sum(), [hidden, weight]),
        strict=True,
    )
    for left, right in pairs:
        torch.testing.assert_close(left, right, rtol=0, atol=1e-10)


@pytest.mark.parametrize("frozen_weight", [True, False])
def test_a_frozen_projection_gets_no_gradient(frozen_weight: bool) -> None:
    hidden, weight, targets = _inputs(torch.float64)
    weight.requires_grad_(not frozen_weight)
    cross_entropy_sum(hidden, weight, targets, chunk_tokens=8).backward()  # type: ignore[no-untyped-call]
    token_nll(hidden, weight, targets, chunk_tokens=8).sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None and (weight.grad is None) == frozen_weight


def test_token_likelihoods_never_hold_the_full_logits() -> None:
    tokens, vocab, width, chunk = 512, 1000, 8, 16
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,))
    with _LargestTensor() as watch:  # type: ignore[no-untyped-call]
        token_nll(hidden, weight, targets, chunk_tokens=chunk).sum().backward()  # type: ignore[no-untyped-call]
    assert watch.numel <= max(chunk * vocab, vocab * width, tokens * width)
