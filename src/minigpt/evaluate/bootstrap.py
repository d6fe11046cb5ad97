"""Confidence intervals that resample whole documents, as a document's tokens are not independent.

Percentile bootstrap of a ratio of sums (Efron and Tibshirani, An Introduction to the Bootstrap,
1993, chapter 13); Wilson's score interval for rates (Wilson 1927). No torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Transform = Callable[[Any], Any]

_MAX_WEIGHTS = 1 << 23
"""Resampling weights held at once (64 MB)."""


class Interval(NamedTuple):
    """An estimate and the interval that covers the truth with the asked confidence.

    `low` and `high` are NaN where the data can't tell (fewer than two documents).
    """

    estimate: float
    low: float
    high: float


class PairedDifference(NamedTuple):
    """How much larger a ratio is in `a` than in `b` on the same documents."""

    absolute: Interval
    """a - b."""
    relative: Interval
    """a / b - 1."""


def ratio_interval(
    numerators: Floats,
    denominators: Floats,
    *,
    transform: Transform | None = None,
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Estimate sum(numerators) / sum(denominators) with an interval over documents.

    Args:
        numerators: One number a document (documents,), for example its NLL.
        denominators: One number a document (documents,), for example its bytes.
        transform: Applied to each ratio, for example `np.exp` for a perplexity.
        samples: Bootstrap resamples.
        confidence: Two-sided coverage, between 0 and 1.
        seed: Equal seeds give equal intervals.
    """
    columns = np.stack([numerators, denominators], axis=1).astype(np.float64)
    totals = columns.sum(axis=0)
    sums = _resampled_sums(columns, samples, seed)
    transform = transform or _identity
    estimate = transform(_divide(totals[0], totals[1]))
    return _percentiles(estimate, transform(_divide(sums[:, 0], sums[:, 1])), confidence)


def paired_difference(
    a: tuple[Floats, Floats],
    b: tuple[Floats, Floats],
    *,
    transform: Transform | None = None,
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Compare two ratios of sums over the same documents, resampling both alike.

    Args:
        a: Numerators and denominators (documents,) of the one.
        b: Those of the other, in the same order of documents.
        transform: Applied to each ratio before they are compared.
        samples: Bootstrap resamples.
        confidence: Two-sided coverage, between 0 and 1.
        seed: Equal seeds give equal intervals.
    """
    assert len(a[0]) == len(b[0]), (len(a[0]), len(b[0]))
    columns = np.stack([*a, *b], axis=1).astype(np.float64)
    totals = columns.sum(axis=0)
    sums = _resampled_sums(columns, samples, seed)
    transform = transform or _identity
    estimate_a, estimate_b = (transform(_divide(totals[i], totals[i + 1])) for i in (0, 2))
    ratios_a, ratios_b = (transform(_divide(sums[:, i], sums[:, i + 1])) for i in (0, 2))
    return PairedDifference(
        absolute=_percentiles(estimate_a - estimate_b, ratios_a - ratios_b, confidence),
        relative=_percentiles(
            _divide(estimate_a, estimate_b) - 1, _divide(ratios_a, ratios_b) - 1, confidence
        ),
    )


def rate_interval(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
    """Estimate a rate with Wilson's interval, which stays honest at 0 and at 1."""
    assert 0 <= successes <= trials, (successes, trials)
    if trials == 0:
        return Interval(math.nan, math.nan, math.nan)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / trials
    scale = 1 + z * z / trials
    center = (rate + z * z / (2 * trials)) / scale
    margin = z / scale * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    return Interval(
        rate, max(0.0, min(rate, center - margin)), min(1.0, max(rate, center + margin))
    )


def _resampled_sums(columns: Floats, samples: int, seed: int) -> Floats:
    """Return the column sums (samples, columns) of documents drawn with replacement."""
    documents = len(columns)
    if documents < 2:
        return np.full((1, columns.shape[1]), np.nan)
    generator = np.random.default_rng(seed)
    even = np.full(documents, 1 / documents)
    block = max(1, _MAX_WEIGHTS // documents)
    parts = [
        # How often each document is drawn is multinomial, so a resample is one matrix row.
        generator.multinomial(documents, even, size=min(block, samples - start)) @ columns
        for start in range(0, samples, block)
    ]
    return np.concatenate(parts)


def _identity(ratio: Any) -> Any:
    return ratio


def _percentiles(estimate: float, resampled: Floats, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(float(estimate), float(low), float(high))


def _divide(numerator: Any, denominator: Any) -> Any:
    """Divide with NaN where the denominator is 0: an empty resample says nothing."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(denominator == 0, np.nan, np.divide(numerator, denominator))
