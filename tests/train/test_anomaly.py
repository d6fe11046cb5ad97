from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt.train.anomaly import (
    Action,
    AnomalyDetector,
    Strikes,
    Verdict,
    decide,
    spike_threshold,
)
from minigpt.train.config import RecoveryConfig

losses = st.lists(st.floats(0.01, 20), min_size=8, max_size=100)
CONFIG = RecoveryConfig(spike_window=16, spike_sigmas=10)


@given(losses, st.randoms(use_true_random=False))
def test_the_order_of_the_window_does_not_matter(values: list[float], random: object) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert spike_threshold(shuffled, 5) == spike_threshold(values, 5)


@given(losses, st.floats(0.1, 10))
def test_it_scales_with_the_losses(values: list[float], factor: float) -> None:
    scaled = spike_threshold([factor * value for value in values], 5)
    assert scaled == pytest.approx(factor * spike_threshold(values, 5), rel=1e-9)


@given(losses, st.floats(0, 50))
def test_it_lies_above_the_median_and_grows_with_the_sigmas(
    values: list[float], sigmas: float
) -> None:
    assert spike_threshold(values, sigmas + 1) > spike_threshold(values, sigmas)
    assert spike_threshold(values, 0) == pytest.approx(sorted(values)[len(values) // 2], abs=20)


@given(st.lists(st.floats(2.9, 3.1), min_size=21, max_size=60), st.floats(1e3, 1e9))
def test_a_third_of_outliers_does_not_hide_a_spike(values: list[float], outlier: float) -> None:
    polluted = [*values, *[outlier] * (len(values) // 3)]
    assert spike_threshold(polluted, 10) < 10


@given(st.floats(0.5, 10), st.integers(0, 3))
def test_a_flat_or_falling_curve_has_no_spike(level: float, slope: int) -> None:
    detector = AnomalyDetector(CONFIG)
    for step in range(100):
        loss = level + slope / (1 + step)
        assert detector.judge(loss, 1.0) is Verdict.HEALTHY
        detector.accept(loss)


def test_spikes_are_judged_only_against_a_full_window_and_never_enter_it() -> None:
    detector = AnomalyDetector(CONFIG, [3.0] * 15)
    assert detector.judge(100.0, 1.0) is Verdict.HEALTHY
    detector.accept(3.0)
    for _ in range(50):
        assert detector.judge(100.0, 1.0) is Verdict.SPIKE
    assert detector.judge(3.1, 1.0) is Verdict.HEALTHY


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)]
)
def test_what_is_not_finite_is_told_at_once(loss: float, norm: float) -> None:
    assert AnomalyDetector(CONFIG).judge(loss, norm) is Verdict.NOT_FINITE


def test_a_fault_that_passes_costs_a_retry_only() -> None:
    action, strikes = decide(Verdict.NOT_FINITE, Strikes(), CONFIG)
    assert action is Action.RETRY
    assert decide(Verdict.HEALTHY, strikes, CONFIG) == (Action.ACCEPT, Strikes())


def test_one_that_stays_is_skipped_then_rolled_back_then_fatal() -> None:
    actions, strikes = [], Strikes()
    for _ in range(100):
        action, strikes = decide(Verdict.NOT_FINITE, strikes, CONFIG)
        actions.append(action)
        if action is Action.STOP:
            break
    skip = [Action.RETRY, Action.SKIP] * CONFIG.max_skips
    assert actions == [*skip, Action.RETRY, Action.ROLL_BACK] * CONFIG.max_rollbacks + [
        *skip,
        Action.RETRY,
        Action.STOP,
    ]


def test_stop_stops_at_the_first_not_finite_and_ignores_spikes() -> None:
    config = RecoveryConfig(on_anomaly="stop")
    assert decide(Verdict.NOT_FINITE, Strikes(), config)[0] is Action.STOP
    assert decide(Verdict.SPIKE, Strikes(), config)[0] is Action.ACCEPT


@given(st.lists(st.sampled_from(Verdict), max_size=200))
def test_healthy_steps_are_always_taken_and_rollbacks_are_limited(verdicts: list[Verdict]) -> None:
    strikes, rollbacks = Strikes(), 0
    for verdict in verdicts:
        action, strikes = decide(verdict, strikes, CONFIG)
        assert (action is Action.ACCEPT) == (verdict is Verdict.HEALTHY)
        rollbacks += action is Action.ROLL_BACK
        assert strikes.in_a_row <= CONFIG.max_skips
    assert rollbacks == strikes.rollbacks <= CONFIG.max_rollbacks
