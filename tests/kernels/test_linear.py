"""Products with packed weights against torch, at every level that runs here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minigpt.core.errors import ModelError
from minigpt.kernels import library
from minigpt.kernels.linear import (
    PackedWeight,
    WeightKind,
    linear,
    pack_bfloat16,
    pack_int4,
    pack_int8,
    reference_linear,
    unpack,
)
from minigpt.model.linear import quantize_groups, quantize_rows

# Outputs and inputs: less than a panel or a group, whole ones, whole ones and a rest.
SHAPES = [(1, 2), (7, 33), (64, 128), (100, 96), (130, 200), (192, 768)]
# One row, each size of tile and sizes between, several tiles.
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 25]
CASES = [("bf16", 16), ("int8", 16), ("int8", 8), ("int4", 16), ("int4", 8), ("int4 zero", 16)]


def made(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def packed(kind: str, out_features: int, in_features: int, bias: bool = True) -> PackedWeight:
    generator = made(out_features + in_features)
    weight = torch.randn(out_features, in_features, generator=generator).bfloat16()
    added = torch.randn(out_features, generator=generator) if bias else None
    if kind == "bf16":
        return pack_bfloat16(weight, added)
    if kind == "int8":
        return pack_int8(*quantize_rows(weight), added)
    codes, scale, _ = quantize_groups(weight, 32)
    zero = torch.randint(0, 16, scale.shape, generator=generator, dtype=torch.uint8)
    return pack_int4(codes, scale, zero if kind == "int4 zero" else None, added)


def inputs(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=made(seed)).bfloat16()


@pytest.mark.parametrize(("kind", "bits"), CASES)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_the_product_is_the_reference(
    level: str, kind: str, bits: int, out_features: int, in_features: int
) -> None:
    if kind.startswith("int4"):
        in_features = -(-in_features // 32) * 32
    weight = packed(kind, out_features, in_features)
    for rows in ROWS:
        given = inputs(rows, in_features, seed=rows)
        error = linear(given, weight, bits, dtype=torch.float32) - reference_linear(
            given, weight, bits
        )
        # Both round sums of fp32: in proportion to the magnitudes that were added.
        added = given.float().abs() @ unpack(weight).abs().T
        assert (error.abs() <= 1e-6 * added + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_and_outputs_have_either_dtype(level: str, dtype: torch.dtype) -> None:
    weight = packed("bf16", 100, 96)
    given = inputs(3, 96).to(dtype)
    found = linear(given.view(3, 1, 96), weight)
    assert found.dtype == dtype and found.shape == (3, 1, 100)
    wide = linear(given, weight, dtype=torch.float32)
    assert torch.equal(found.view(3, 100), wide.to(dtype))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_groups(level: str, group: int) -> None:
    weight = torch.randn(70, 256, generator=made(group))
    codes, scale, zero = quantize_groups(weight, group)
    kept = pack_int4(codes, scale, zero)
    steps = codes.float() - zero.float().repeat_interleave(group, 1)
    expected = steps * scale.float().repeat_interleave(group, 1)
    assert torch.equal(unpack(kept), expected)
    given = inputs(5, 256)
    found = linear(given, kept, dtype=torch.float32)
    torch.testing.assert_close(found, reference_linear(given, kept, 16), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4", "int4 zero"])
def test_a_packed_weight_can_be_read_back(kind: str) -> None:
    weight = torch.randn(100, 96, generator=made(1)).bfloat16()
    found = unpack(packed(kind, 100, 96))
    assert found.shape == weight.shape
    if kind == "bf16":
        again = torch.randn(100, 96, generator=made(196)).bfloat16()
        assert torch.equal(found, again.float())


def test_the_library_packs_what_torch_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    if library.loaded() is None:
        pytest.skip("no kernels here")
    with_library = [packed(kind, 130, 224) for kind in ("bf16", "int8", "int4")]
    monkeypatch.setattr(library, "loaded", lambda: None)
    for kept in with_library:
        name = {WeightKind.BFLOAT16: "bf16", WeightKind.INT8: "int8", WeightKind.INT4: "int4"}
        assert torch.equal(kept.data, packed(name[kept.kind], 130, 224).data)


def test_without_the_library_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed("int8", 100, 96)
    given = inputs(3, 96)
    monkeypatch.setattr(library, "loaded", lambda: None)
    found = linear(given, weight)
    assert torch.equal(found, reference_linear(given, weight, 16).bfloat16())


@pytest.mark.parametrize("bits", [8, 16])
def test_sixteen_bits_of_input_cost_less_than_bf16_does(level: str, bits: int) -> None:
    """Rounding inputs to 16 bits moves an output less than rounding it to bf16; 8 bits do not."""
    weight = torch.randn(256, 1024, generator=made(0)).bfloat16()
    kept = pack_int8(*quantize_rows(weight))
    given = inputs(4, 1024)
    exact = given.double() @ unpack(kept).double().T
    error = (linear(given, kept, bits, dtype=torch.float32) - exact).norm() / exact.norm()
    rounding = (exact.bfloat16() - exact).norm() / exact.norm()
    assert error < (0.02 * rounding if bits == 16 else 10 * rounding)


@pytest.mark.parametrize(("kind", "bits"), CASES)
@pytest.mark.usefixtures("threads", "level")
@given(
    rows=st.integers(1, 64), count=st.integers(1, 4), place=st.floats(0, 1), seed=st.integers(0, 9)
)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_row_alone_has_the_same_bits(
    kind: str, bits: int, rows: int, count: int, place: float, seed: int
) -> None:
    weight = packed(kind, 200, 96)
    given = inputs(rows, 96, seed)
    torch.set_num_threads(count)
    together = linear(given, weight, bits)
    row = min(rows - 1, int(place * rows))
    torch.set_num_threads(1)
    alone = linear(given[row : row + 1], weight, bits)
    assert torch.equal(together[row], alone[0])


@pytest.mark.parametrize(("kind", "bits"), CASES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_stays_alone(level: str, kind: str, bits: int, bad: float) -> None:
    weight = packed(kind, 100, 96)
    given = inputs(5, 96)
    expected = linear(given, weight, bits)
    given[2, 50] = bad
    found = linear(given, weight, bits)
    assert not found[2].isfinite().any()
    others = [0, 1, 3, 4]
    assert torch.equal(found[others], expected[others])


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e34])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_extreme_inputs(level: str, kind: str, value: float) -> None:
    weight = packed(kind, 64, 64, bias=False)
    given = torch.full((2, 64), value)
    found = linear(given, weight)
    expected = reference_linear(given, weight, 16)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_all_codes_of_int8_and_int4(level: str) -> None:
    """The largest codes and inputs of either sign, whose partial sums are the largest."""
    for code in (-127, 127):
        weight = torch.full((64, 256), code, dtype=torch.int8)
        kept = pack_int8(weight, torch.ones(64))
        for sign in (-1.0, 1.0):
            found = linear(torch.full((3, 256), sign), kept)
            torch.testing.assert_close(found, torch.full((3, 64), sign * code * 256.0))
    for code in (0, 15):
        codes = torch.full((64, 256), code, dtype=torch.uint8)
        kept = pack_int4(codes, torch.ones(64, 2).bfloat16(), None)
        found = linear(torch.full((3, 256), -1.0), kept)
        torch.testing.assert_close(found, torch.full((3, 64), -(code - 8) * 256.0))


def test_groups_of_another_size_are_refused() -> None:
    codes = torch.zeros(4, 48, dtype=torch.uint8)
    with pytest.raises(ModelError, match=r"int4 groups of 48 / 2 inputs \(groups of 32, 64 or 128"):
        pack_int4(codes, torch.ones(4, 2), None)
