from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats  # type: ignore[import-untyped]

from minigpt.core.reliability import (
    daly_interval,
    effective_share,
    failure_rate,
    reliability,
    young_interval,
)

hours = st.floats(1e-2, 1e6)


@settings(deadline=None)  # the first example waits for scipy
@given(st.integers(1, 2000), hours, st.sampled_from([0.8, 0.95, 0.99]))
def test_the_interval_is_scipys(failures: int, exposure: float, confidence: float) -> None:
    rate = failure_rate(failures, exposure, confidence)
    tail = (1 - confidence) / 2
    assert rate.lower == pytest.approx(stats.chi2.ppf(tail, 2 * failures) / 2 / exposure, rel=1e-9)
    upper = stats.chi2.ppf(1 - tail, 2 * failures + 2) / 2 / exposure
    assert rate.upper == pytest.approx(upper, rel=1e-9)
    assert rate.lower < rate.estimate < rate.upper


@given(hours)
def test_without_a_failure_the_bound_is_three_over_the_exposure(exposure: float) -> None:
    rate = failure_rate(0, exposure)
    assert rate.estimate == rate.lower == 0
    assert rate.upper == pytest.approx(2.9957 / exposure, rel=1e-4)
    assert rate.mtbf_hours == pytest.approx(exposure / 2.9957, rel=1e-4)


def test_llama_3s_interruptions() -> None:
    rate = failure_rate(466, 54 * 24)
    assert 1 / rate.estimate == pytest.approx(2.78, abs=0.01)
    assert failure_rate(419, 54 * 24).estimate == pytest.approx(1 / 3.1, rel=0.01)  # unexpected
    assert rate.upper / rate.lower < 1.25


@given(st.floats(0, 10), st.floats(0, 100), st.floats(0, 100))
def test_reliability_has_no_memory(rate: float, first: float, second: float) -> None:
    both = reliability(rate, first + second)
    assert both == pytest.approx(reliability(rate, first) * reliability(rate, second), abs=1e-12)


@given(st.floats(1e-3, 100), st.floats(1e4, 1e7))
def test_young_and_daly_agree_where_saves_are_short(save: float, mtbf: float) -> None:
    assert daly_interval(save, mtbf) == pytest.approx(young_interval(save, mtbf), rel=0.1)


@given(st.floats(1.0, 3000), st.floats(3600, 1e6))
def test_daly_is_near_the_optimum_of_the_exact_model(save: float, mtbf: float) -> None:
    def cost(interval: float) -> float:
        return 1 / effective_share(interval, save, mtbf)

    best = optimize.minimize_scalar(
        lambda log: cost(math.exp(log)), bounds=(math.log(save / 100), math.log(10 * mtbf))
    )
    assert cost(daly_interval(save, mtbf)) <= 1.03 * cost(math.exp(best.x))


@given(st.floats(1.0, 3000), st.floats(1.0, 3000), st.floats(0, 3000), st.floats(3600, 1e6))
def test_the_share_left_is_that_of_renewals(
    interval: float, save: float, restart: float, mtbf: float
) -> None:
    """A cycle, begun anew at each failure and after each restart that no failure cut short."""
    cycle, rate = interval + save, 1 / mtbf
    restarting = mtbf * math.expm1(rate * restart)  # until one restart was not cut short
    failed = mtbf - cycle * math.exp(-rate * cycle) / -math.expm1(-rate * cycle)  # given it did
    failures = math.expm1(rate * cycle)
    expected = interval / (cycle + failures * (failed + restarting))
    assert effective_share(interval, save, mtbf, restart) == pytest.approx(expected, rel=1e-6)


def test_without_failures_only_saves_cost() -> None:
    assert effective_share(90.0, 10.0, math.inf, 1000.0) == 0.9


def test_a_save_longer_than_twice_the_mtbf_caps_the_interval() -> None:
    assert daly_interval(100.0, 40.0) == 40.0


@pytest.mark.parametrize(("save", "share"), [(60, 0.906), (10, 0.959), (1, 0.987)])
def test_the_published_table(save: float, share: float) -> None:
    mtbf = 3.1 * 3600
    assert effective_share(young_interval(save, mtbf), save, mtbf) == pytest.approx(
        share, abs=0.011
    )


def test_the_figures_of_llama_3s_mtbf() -> None:
    """A save of 60 s pays every 19 minutes."""
    mtbf = 3.1 * 3600
    best = daly_interval(60, mtbf)
    assert 18 < best / 60 < 20
    effective = effective_share(best, 60, mtbf)
    assert 0.89 < effective < 0.91
    assert all(effective_share(best * k, 60, mtbf) < effective for k in (0.7, 1.4))
