from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minigpt.model.linear import (
    Int8Embedding,
    Int8Linear,
    int8_linear,
    quantize_module,
    quantize_rows,
)


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    magnitude=st.floats(1e-20, 1e20),
    seed=st.integers(0, 1000),
)
def test_rounding_error_is_at_most_half_a_step_of_each_row(
    rows: int, columns: int, magnitude: float, seed: int
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * magnitude
    rounded, scale = quantize_rows(weight)
    error = (rounded.double() * scale.double()[:, None] - weight.double()).abs()
    # The scale itself is rounded to bf16 (2^-9 at most), which may cut a row's largest values.
    largest = weight.abs().amax(1).double()
    bound = torch.maximum(scale.double() * 0.5001, largest * 2**-8)
    assert (error.amax(1) <= bound).all()
    assert rounded.abs().max() <= 127


def test_a_row_of_zeros_stays_zero() -> None:
    rounded, scale = quantize_rows(torch.zeros(2, 4))
    assert not rounded.any()
    assert torch.equal(scale, torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4, 12, 13, 64])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_a_linear_layer_with_the_dequantized_weight(
    dtype: torch.dtype, rows: int, bias: bool
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 200, bias=bias).to(dtype)
    layer = Int8Linear.from_linear(linear)
    inputs = torch.randn(1, rows, 96, dtype=dtype)
    reference = nn.functional.linear(inputs.double(), layer.weight.double())
    reference = reference * layer.scale.double()
    if linear.bias is not None:
        reference = reference + linear.bias.double()
    found = layer(inputs)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    assert (found.double() - reference).abs().max() <= tolerance * reference.abs().max()
    torch.testing.assert_close(
        layer.dequantized().float(), linear.weight.detach().float(), rtol=0, atol=1e-3
    )


def test_large_weights_in_blocks_equal_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight, scale = quantize_rows(torch.randn(50, 16))
    inputs = torch.randn(20, 16)
    whole = int8_linear(inputs, weight, scale, None)
    monkeypatch.setattr("minigpt.model.linear._BLOCK_ELEMENTS", 16 * 7)
    torch.testing.assert_close(int8_linear(inputs, weight, scale, None), whole)


def test_every_dtype_sees_the_same_weights() -> None:
    layer = Int8Linear.from_linear(nn.Linear(64, 64))
    exact = layer.dequantized()
    assert torch.equal(layer.scale.bfloat16().float(), layer.scale)
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.int8
    assert torch.equal(layer.weight.float() * layer.scale.float()[:, None], exact)


def test_embedding_rows_are_the_channels_of_its_projection() -> None:
    torch.manual_seed(0)
    embedding = Int8Embedding.from_embedding(nn.Embedding(30, 16))
    hidden = torch.randn(2, 3, 16)
    tokens = torch.arange(30)
    torch.testing.assert_close(embedding.project(hidden), hidden @ embedding(tokens).T)
    assert torch.equal(embedding(tokens), embedding.dequantized())


def test_quantize_module_leaves_norms_and_positions() -> None:
    module = nn.ModuleDict(
        {
            "embed_tokens": nn.Embedding(8, 4),
            "embed_positions": nn.Embedding(8, 4),
            "block": nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)),
        }
    )
    quantize_module(module)
    kinds = {name: type(child) for name, child in module.named_modules()}
    assert kinds["embed_tokens"] is Int8Embedding
    assert kinds["embed_positions"] is nn.Embedding
    assert kinds["block.0"] is nn.LayerNorm
    assert kinds["block.1"] is Int8Linear
