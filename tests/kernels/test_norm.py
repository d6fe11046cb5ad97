"""Norms against torch, at every level that runs here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minigpt.kernels import ops, reference

DTYPES = [torch.float32, torch.bfloat16]
# One unit in the last place: fp32 sums differ in order, results are rounded once.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7}


def operands(rows: int, width: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    inputs, residual = torch.randn(2, rows, width, generator=made).to(dtype)
    return inputs, residual, (torch.rand(width, generator=made) + 0.5).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 16, 31, 768, 1024])
def test_rms_norm_is_the_reference(level: str, dtype: torch.dtype, width: int) -> None:
    inputs, _, weight = operands(5, width, dtype, seed=width)
    expected = reference.rms_norm(inputs, None, weight, 1e-5)
    found = ops.rms_norm(inputs, None, weight, 1e-5)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 31, 768])
def test_a_residual_is_added_first(level: str, dtype: torch.dtype, width: int) -> None:
    inputs, residual, weight = operands(5, width, dtype, seed=width)
    kept = residual.clone()
    expected = reference.rms_norm(inputs, kept, weight, 1e-5)
    found = ops.rms_norm(inputs, residual, weight, 1e-5)
    assert torch.equal(residual, kept)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_is_torchs(dtype: torch.dtype) -> None:
    inputs, _, weight = operands(5, 64, dtype, seed=0)
    expected = F.rms_norm(inputs, (64,), weight, 1e-5)
    found = reference.rms_norm(inputs, None, weight, 1e-5)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=1e-6)


def test_numbers_that_are_not_finite_stay_so(level: str) -> None:
    inputs, _, weight = operands(3, 40, torch.bfloat16, seed=0)
    inputs[1, 3] = float("nan")
    found = ops.rms_norm(inputs, None, weight, 1e-5)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


@pytest.mark.usefixtures("threads", "level")
@given(rows=st.integers(1, 200), count=st.integers(1, 4), seed=st.integers(0, 9))
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_row_alone_has_the_same_bits(rows: int, count: int, seed: int) -> None:
    inputs, _, weight = operands(rows, 200, torch.bfloat16, seed)
    torch.set_num_threads(count)
    together = ops.rms_norm(inputs, None, weight, 1e-5)
    row = seed * rows // 10
    alone = ops.rms_norm(inputs[row : row + 1], None, weight, 1e-5)
    assert torch.equal(together[row], alone[0])


def test_other_operands_take_the_reference() -> None:
    inputs = torch.randn(4, 6, dtype=torch.float64)
    weight = torch.ones(6, dtype=torch.float64)
    assert ops.rms_norm(inputs, None, weight, 1e-5).dtype == torch.float64
    sliced = torch.randn(6, 4).T
    expected = reference.rms_norm(sliced, None, weight.float(), 1e-5)
    assert torch.equal(ops.rms_norm(sliced, None, weight.float(), 1e-5), expected)
