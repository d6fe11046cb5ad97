from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.evaluate import bootstrap
from minigpt.evaluate.bootstrap import paired_difference, rate_interval, ratio_interval


def lognormal_documents(
    generator: np.random.Generator, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Documents of very different lengths whose rate varies from one to the next."""
    lengths = generator.lognormal(6, 1, count).round() + 1
    return lengths * generator.gamma(20, 0.1, count), lengths


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    # The ratio of expectations is 2, as length and rate are independent.
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        interval = ratio_interval(*lognormal_documents(generator, 80), samples=400, seed=trial)
        covered += interval.low <= 2.0 <= interval.high
    # Percentile intervals of ratios at this size run a few points below 95 %.
    assert 0.88 <= covered / 300 <= 0.98


def test_paired_intervals_cover_and_are_narrower() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        numerators, lengths = lognormal_documents(generator, 80)
        # The same documents, 0.02 worse on average, with a little noise of its own.
        worse = numerators + lengths * generator.normal(0.02, 0.02, 80)
        found = paired_difference(
            (worse, lengths), (numerators, lengths), samples=400, seed=trial
        ).absolute
        covered += found.low <= 0.02 <= found.high
    assert 0.87 <= covered / 200 <= 0.99
    alone = ratio_interval(numerators, lengths)
    assert found.high - found.low < (alone.high - alone.low) / 5


documents = st.lists(st.tuples(st.floats(0, 1e4), st.floats(1, 1e4)), min_size=2, max_size=40).map(
    lambda pairs: np.array(pairs).T
)


@settings(max_examples=50, deadline=None)
@given(documents, st.integers(0, 5))
def test_ratio_properties(columns: np.ndarray, seed: int) -> None:
    numerators, denominators = columns
    found = ratio_interval(numerators, denominators, samples=200, seed=seed)
    assert found.estimate == pytest.approx(numerators.sum() / denominators.sum())
    slack = 1e-9 * (1 + (numerators / denominators).max())
    assert (numerators / denominators).min() - slack <= found.low <= found.high
    assert found.high <= (numerators / denominators).max() + slack
    assert found == ratio_interval(numerators, denominators, samples=200, seed=seed)
    doubled = ratio_interval(2 * numerators, denominators, samples=200, seed=seed)
    assert doubled == pytest.approx(2 * np.array(found))


@settings(max_examples=50, deadline=None)
@given(documents, st.integers(0, 5))
def test_difference_is_antisymmetric_and_zero_to_itself(columns: np.ndarray, seed: int) -> None:
    numerators, denominators = columns
    a, b = (numerators, denominators), (numerators[::-1].copy(), denominators)
    forth = paired_difference(a, b, samples=200, seed=seed).absolute
    back = paired_difference(b, a, samples=200, seed=seed).absolute
    assert (forth.estimate, forth.low, forth.high) == pytest.approx(
        (-back.estimate, -back.high, -back.low), abs=1e-9
    )
    assert paired_difference(a, a, samples=200, seed=seed).absolute == (0.0, 0.0, 0.0)


def test_transform_keeps_order_and_matches_exp() -> None:
    numerators, denominators = np.array([3.0, 5.0, 9.0]), np.array([2.0, 3.0, 4.0])
    plain = ratio_interval(numerators, denominators, seed=3)
    exponential = ratio_interval(numerators, denominators, transform=np.exp, seed=3)
    assert exponential.estimate == pytest.approx(math.exp(plain.estimate))
    # A percentile is interpolated after the transform, so the bounds agree only nearly.
    assert exponential.low == pytest.approx(math.exp(plain.low), rel=1e-3)


def test_one_document_has_no_interval() -> None:
    found = ratio_interval(np.array([3.0]), np.array([2.0]))
    assert found.estimate == 1.5
    assert math.isnan(found.low) and math.isnan(found.high)


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    numerators, denominators = lognormal_documents(np.random.default_rng(2), 30)
    whole = ratio_interval(numerators, denominators, samples=100)
    monkeypatch.setattr(bootstrap, "_MAX_WEIGHTS", 7 * 30)
    parts = ratio_interval(numerators, denominators, samples=100)
    assert parts == pytest.approx(np.array(whole))


@given(st.integers(1, 500), st.data())
def test_wilson_contains_the_rate_and_mirrors(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    found = rate_interval(successes, trials)
    mirrored = rate_interval(trials - successes, trials)
    assert 0 <= found.low <= found.estimate <= found.high <= 1
    assert found.low < found.high
    assert (found.low, found.high) == pytest.approx((1 - mirrored.high, 1 - mirrored.low))


def test_wilson_value() -> None:
    # Agresti and Coull 1998, and R's prop.test(0, 10, correct=FALSE): 0 to 0.2775.
    assert rate_interval(0, 10).high == pytest.approx(0.2775, abs=1e-4)
    assert math.isnan(rate_interval(0, 0).estimate)
