"""Attention by matrix products against torch's own, values and gradients."""

import pytest
import torch

from minigpt.model.attention import CausalAttention
from minigpt.train.attention import MatmulAttention


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_equals_the_reference_with_documents(window: int | None, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(kv_heads)
    batch, length, heads, width = 2, 11, 4, 6
    documents = torch.tensor([[0] * 5 + [1] * 6, [0, 1] + [2] * 9], dtype=torch.int32)
    shapes = [(batch, length, h, width) for h in (heads, kv_heads, kv_heads)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    output_grad = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    results = []
    for attention in (
        MatmulAttention(documents, window),
        CausalAttention(documents, window),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = attention(0, *leaves)
        gradients = torch.autograd.grad(output, leaves, output_grad)
        results.append((output, *gradients))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


def test_bfloat16_stays_as_close_as_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(2, 64, 2, 32, generator=generator, dtype=torch.float64) for _ in range(3)]
    documents = torch.zeros(2, 64, dtype=torch.int32)
    truth = CausalAttention(documents)(0, *exact)
    rounded = [tensor.bfloat16() for tensor in exact]
    ours = MatmulAttention(documents)(0, *rounded)
    assert ours.dtype == torch.bfloat16
    assert (ours - truth).abs().max() < 0.03
