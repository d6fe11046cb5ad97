"""How fast something grows: a slope that outliers do not move, with its confidence interval.

Theil-Sen: the median of the slopes between all pairs of samples; its interval from the
distribution of Kendall's score where there is no trend (Sen 1968, Estimates of the regression
coefficient based on Kendall's tau).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Trend:
    """Growth in bytes per 1,000 requests."""

    slope: float
    low: float
    high: float
    """Ends of the interval of 95 %."""

    def verdict(self, tolerance: float) -> str:
        """Return `no growth`, or `GROWS` where even the interval's low end is above `tolerance`."""
        return "GROWS" if self.low > tolerance else "no growth"


def fit(requests: Sequence[int], values: Sequence[float]) -> Trend:
    """Fit the growth of `values`, in bytes, over the requests answered so far, all different.

    Raises:
        ValueError: Fewer than 3 samples: nothing could be said of their spread.
    """
    count = len(requests)
    if count < 3:
        raise ValueError(f"{count} samples: a trend takes at least 3")
    x, y = np.asarray(requests, dtype=float) / 1000, np.asarray(values, dtype=float)
    first, second = np.triu_indices(count, k=1)
    slopes = np.sort((y[second] - y[first]) / (x[second] - x[first]))
    deviation = math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    margin = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * deviation
    low = max(round((len(slopes) - margin) / 2), 0)
    high = min(round((len(slopes) + margin) / 2), len(slopes) - 1)
    return Trend(float(np.median(slopes)), float(slopes[low]), float(slopes[high]))
