from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from minigpt.model.attention import CausalAttention


def by_definition(
    query: Tensor, key: Tensor, value: Tensor, documents: Tensor, window: int | None
) -> Tensor:
    """Attention one query and one head at a time."""
    output = torch.zeros_like(query)
    batch, length, heads, width = query.shape
    group = heads // key.shape[2]
    for b in range(batch):
        for t in range(length):
            first = 0 if window is None else max(0, t - window + 1)
            seen = [s for s in range(first, t + 1) if documents[b, s] == documents[b, t]]
            for h in range(heads):
                scores = key[b, seen, h // group] @ query[b, t, h] / math.sqrt(width)
                output[b, t, h] = scores.softmax(0) @ value[b, seen, h // group]
    return output


@pytest.mark.parametrize("window", [None, 1, 3, 12, 40])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_the_definition(window: int | None, packed: bool, kv_heads: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 12, 4, 8)
    key, value = torch.randn(2, 2, 12, kv_heads, 8)
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] + [1] * 3 + [2] * 8])
    attention = CausalAttention(documents if packed else None, window)
    expected = by_definition(
        query, key, value, documents if packed else torch.zeros_like(documents), window
    )
    torch.testing.assert_close(attention(0, query, key, value), expected)


def test_one_object_serves_lengths_on_both_sides_of_the_window() -> None:
    torch.manual_seed(0)
    attention = CausalAttention(sliding_window=4)
    for length in (3, 6, 4):
        query, key, value = torch.randn(3, 1, length, 2, 8)
        expected = by_definition(query, key, value, torch.zeros(1, length), 4)
        torch.testing.assert_close(attention(0, query, key, value), expected)
