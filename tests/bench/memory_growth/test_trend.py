from __future__ import annotations

import random

import pytest
from bench.memory_growth.trend import fit
from hypothesis import given, settings
from hypothesis import strategies as st

REQUESTS = list(range(200, 12_200, 200))


@given(
    slope=st.floats(-1e6, 1e6), start=st.floats(0, 1e9), seed=st.integers(0, 2**32 - 1)
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_a_line_with_a_quarter_of_outliers_keeps_its_slope(
    slope: float, start: float, seed: int
) -> None:
    chance = random.Random(seed)
    values = [start + slope * at / 1000 for at in REQUESTS]
    for place in chance.sample(range(len(values)), len(values) // 4):
        values[place] += chance.choice((-1, 1)) * chance.uniform(1, 1e4)
    trend = fit(REQUESTS, values)
    assert trend.low <= trend.slope <= trend.high
    assert trend.slope == pytest.approx(slope, abs=2e3, rel=1e-3)


def test_noise_without_growth_is_seldom_called_growth() -> None:
    chance = random.Random(0)
    found = [fit(REQUESTS, [chance.gauss(6e7, 1e5) for _ in REQUESTS]) for _ in range(400)]
    missed = sum(not trend.low <= 0 <= trend.high for trend in found)
    assert 5 <= missed <= 40  # 20 expected of an interval of 95 %
    assert sum(trend.verdict(0) == "GROWS" for trend in found) <= 25


def test_a_small_object_a_request_is_seen_through_noise() -> None:
    chance = random.Random(1)
    values = [6e7 + 64 * at + chance.gauss(0, 1e5) for at in REQUESTS]
    trend = fit(REQUESTS, values)
    assert trend.verdict(8 * 1024) == "GROWS"
    assert trend.low < 64_000 < trend.high


def test_shrinking_is_no_growth() -> None:
    assert fit(REQUESTS, [6e7 - at for at in REQUESTS]).verdict(0) == "no growth"


def test_two_samples_are_no_trend() -> None:
    with pytest.raises(ValueError, match="2 samples: a trend takes at least 3"):
        fit([1, 2], [1.0, 2.0])
