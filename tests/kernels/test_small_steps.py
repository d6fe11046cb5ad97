"""Activations, layer norm and the search for the largest logits, at every level that runs here."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minigpt.kernels import ops, reference

QUIET = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 64, 200, 4096])
def test_activations_are_the_reference(level: str, dtype: torch.dtype, width: int) -> None:
    made = torch.Generator().manual_seed(width)
    inputs = (torch.randn(3, 2 * width, generator=made) * 4).to(dtype)
    for kernel, measure in ((ops.silu_times, reference.silu_times), (ops.gelu, reference.gelu)):
        torch.testing.assert_close(
            kernel(inputs), measure(inputs), rtol=TOLERANCE[dtype], atol=1e-6
        )


def test_activations_far_out(level: str) -> None:
    far = torch.tensor([-1e30, -200, -87, -20, 0, 20, 87, 200, 1e30, math.nan])
    torch.testing.assert_close(ops.gelu(far), reference.gelu(far), equal_nan=True)
    gate_up = torch.cat((far, torch.ones(10)))
    found, expected = ops.silu_times(gate_up), reference.silu_times(gate_up)
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_exponentials_are_precise(level: str) -> None:
    """SiLU(gate) / gate is 1 / (1 + e^-gate): within a few units of the last place."""
    gate = torch.linspace(-80, 80, 20001)
    found = ops.silu_times(torch.cat((gate, torch.ones_like(gate)))).double()
    expected = gate.double() * torch.sigmoid(gate.double())
    assert ((found - expected).abs() / expected.abs().clamp(min=1e-30)).max() < 4e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 31, 768])
@pytest.mark.parametrize("biased", [False, True])
def test_layer_norm_is_the_reference(
    level: str, dtype: torch.dtype, width: int, biased: bool
) -> None:
    made = torch.Generator().manual_seed(width)
    inputs, residual = (torch.randn(2, 5, width, generator=made) + 3).to(dtype)
    weight, bias = torch.randn(2, width, generator=made).to(dtype)
    kept = residual.clone()
    expected = reference.layer_norm(inputs, kept, weight, bias if biased else None, 1e-5)
    found = ops.layer_norm(inputs, residual, weight, bias if biased else None, 1e-5)
    assert torch.equal(residual, kept)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=2e-5)


@pytest.mark.usefixtures("threads", "level")
@given(
    rows=st.integers(1, 4),
    width=st.integers(1, 3000),
    steps=st.sampled_from([2, 50, 10**6]),
    seed=st.integers(0, 99),
    threads=st.integers(1, 3),
)
@QUIET
def test_largest_and_top_are_the_reference(
    rows: int, width: int, steps: int, seed: int, threads: int
) -> None:
    """With few steps many logits are equal: the first of them counts."""
    torch.set_num_threads(threads)
    made = torch.Generator().manual_seed(seed)
    logits = torch.randint(-steps, steps, (rows, width), generator=made) * (20 / steps)
    best, log_sum = ops.largest(logits)
    expected_best, expected_sum = reference.largest(logits)
    assert torch.equal(best, expected_best)
    torch.testing.assert_close(log_sum, expected_sum, rtol=1e-5, atol=1e-5)
    count = min(width, 1 + seed % 40)
    values, places = ops.top(logits, count)
    expected_values, expected_places = reference.top(logits, count)
    assert torch.equal(values, expected_values) and torch.equal(places, expected_places)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_found(level: str, bad: float) -> None:
    logits = torch.randn(3, 1031)
    logits[1, 1030] = bad
    best, _ = ops.largest(logits)
    assert (best == -1).tolist() == [False, True, False]


def test_other_operands_take_the_reference() -> None:
    inputs = torch.randn(4, 6, dtype=torch.float64)
    assert ops.silu_times(inputs).dtype == torch.float64
    assert torch.equal(ops.largest(inputs)[0], inputs.argmax(-1))
    assert torch.equal(ops.top(inputs, 2)[1], inputs.topk(2).indices)
