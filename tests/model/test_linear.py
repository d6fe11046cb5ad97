from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minigpt.core.errors import ModelError
from minigpt.model.linear import (
    Int4Linear,
    Int8Embedding,
    Int8Linear,
    dequantize_groups,
    int8_linear,
    pack_nibbles,
    quantize_groups,
    quantize_module,
    quantize_rows,
    unpack_nibbles,
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


@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 3),
    group_size=st.sampled_from([32, 64, 128]),
    magnitude=st.floats(1e-20, 1e20),
    shift=st.floats(-2, 2),
    seed=st.integers(0, 1000),
)
def test_int4_errs_no_more_than_the_steps_of_each_groups_range(
    rows: int, groups: int, group_size: int, magnitude: float, shift: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, groups * group_size, generator=generator) + shift) * magnitude
    codes, scale, zero = quantize_groups(weight, group_size)
    assert codes.dtype == zero.dtype == torch.uint8 and max(codes.max(), zero.max()) <= 15
    assert scale.shape == zero.shape == (rows, groups)
    parts = weight.view(rows, groups, group_size).double()
    span = parts.amax(2).clamp(min=0) - parts.amin(2).clamp(max=0)
    found = (codes.view(parts.shape).double() - zero[..., None]) * scale[..., None].double()
    # By the whole range alone: half a step, one more where the zero point's rounding cuts off,
    # and a step that is bf16's nearest.
    worst = (found - parts).square().mean(2).sqrt()
    assert (worst <= span / 15 * (0.5 + 0.06)).all()


def test_cutting_off_the_largest_errs_less_than_the_whole_range() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    for group_size in (32, 64, 128):
        parts = weight.view(64, -1, group_size)
        low, high = parts.amin(2, keepdim=True), parts.amax(2, keepdim=True)
        scale = (high - low) / 15
        zero = (-low / scale).round()
        plain = ((parts / scale).round() + zero).clamp(0, 15).sub(zero) * scale
        codes, scales, zeros = quantize_groups(weight, group_size)
        found = dequantize_groups(pack_nibbles(codes), scales, zeros, torch.float32)
        error = (found - weight).square().mean()
        assert error < 0.96 * (plain - parts).square().mean()


def test_a_group_of_zeros_and_one_of_a_single_value_are_exact() -> None:
    weight = torch.cat([torch.zeros(1, 32), torch.full((1, 32), -0.75)], 1)
    codes, scale, zero = quantize_groups(weight, 32)
    assert scale[0, 0] == 1
    found = dequantize_groups(pack_nibbles(codes), scale, zero, torch.float32)
    torch.testing.assert_close(found, weight, rtol=2**-8, atol=0)


@given(rows=st.integers(0, 5), pairs=st.integers(0, 40), seed=st.integers(0, 1000))
def test_nibbles_are_unpacked_as_they_were_packed(rows: int, pairs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, 2 * pairs), dtype=torch.uint8, generator=generator)
    packed = pack_nibbles(codes)
    assert packed.shape == (rows, pairs) and packed.dtype == torch.uint8
    assert torch.equal(unpack_nibbles(packed), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bias", [False, True])
def test_int4_equals_a_linear_layer_with_the_dequantized_weight(
    dtype: torch.dtype, group_size: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 50, bias=bias)
    layer = Int4Linear.from_linear(linear, group_size).to(dtype)
    exact = layer.dequantized().double()
    inputs = torch.randn(2, 3, 256, dtype=dtype)
    reference = nn.functional.linear(inputs.double(), exact)
    if layer.bias is not None:
        reference = reference + layer.bias.double()
    found = layer(inputs)
    assert found.dtype == dtype and found.shape == (2, 3, 50)
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    assert (found.double() - reference).abs().max() <= tolerance * reference.abs().max()
    monkeypatch.setattr("minigpt.model.linear._BLOCK_ELEMENTS", 256 * 7)
    torch.testing.assert_close(layer(inputs), found)


def test_int4_groups_that_there_are_not_are_refused() -> None:
    for group_size in (16, 96):
        with pytest.raises(ModelError, match=f"int4 groups of {group_size} of 96 inputs"):
            Int4Linear(96, 8, group_size)
    with pytest.raises(ModelError, match="whole groups of 32, 64, 128"):
        Int4Linear(96, 8, 64)


def test_int4_leaves_embedding_head_and_parts_of_groups_at_int8() -> None:
    module = nn.ModuleDict(
        {
            "embed_tokens": nn.Embedding(8, 64),
            "lm_head": nn.Linear(64, 8),
            "block": nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64), nn.LayerNorm(64)),
        }
    )
    quantize_module(module, 64)
    kinds = {name: type(child) for name, child in module.named_modules()}
    assert kinds["embed_tokens"] is Int8Embedding and kinds["lm_head"] is Int8Linear
    assert kinds["block.0"] is Int4Linear and kinds["block.1"] is Int8Linear
    assert kinds["block.2"] is nn.LayerNorm
