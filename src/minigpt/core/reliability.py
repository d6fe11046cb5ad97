"""How often a run fails, how often it should therefore save, and what share of time is left.

Failures are a Poisson process of rate lambda. What was observed (k failures in T hours) bounds
lambda by exact chi-square quantiles; plans use the upper bound. The best interval between saves
follows Young (CACM 1974) and Daly's higher-order estimate (FGCS 22, 2006).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

_BISECTIONS = 200


class FailureRate(NamedTuple):
    """Failures an hour, with an exact confidence interval."""

    failures: int
    hours: float
    """Exposure: time during which a failure would have been seen."""
    estimate: float
    """k / T."""
    lower: float
    upper: float
    """Never 0: without a failure it is the one-sided bound, 3.0 / T at 95 %."""

    @property
    def mtbf_hours(self) -> float:
        """The mean time between failures to plan with: that of the upper bound."""
        return 1 / self.upper


def failure_rate(failures: int, hours: float, confidence: float = 0.95) -> FailureRate:
    """Bound the rate of a Poisson process (Garwood 1936).

    Two-sided: chi2(a/2, 2k) / 2T to chi2(1 - a/2, 2k + 2) / 2T with a = 1 - confidence. With no
    failure at all the lower bound is 0 and the upper one is one-sided, -ln(a) / T.

    Args:
        failures: Failures seen, k.
        hours: Exposure T, above 0.
        confidence: Between 0 and 1.
    """
    assert failures >= 0 and hours > 0 and 0 < confidence < 1
    tail = 1 - confidence
    if failures == 0:
        return FailureRate(0, hours, 0.0, 0.0, -math.log(tail) / hours)
    # chi2(p, 2k) / 2 is the mean at which a Poisson variable stays below k with chance 1 - p.
    lower = _solve(lambda mean: _poisson_cdf(failures - 1, mean) - (1 - tail / 2), failures)
    upper = _solve(lambda mean: _poisson_cdf(failures, mean) - tail / 2, failures)
    return FailureRate(failures, hours, failures / hours, lower / hours, upper / hours)


def reliability(rate_per_hour: float, hours: float) -> float:
    """Return R(t), the chance of no failure within `hours` at a constant rate."""
    assert rate_per_hour >= 0 and hours >= 0
    return math.exp(-rate_per_hour * hours)


def young_interval(save_seconds: float, mtbf_seconds: float) -> float:
    """Return Young's interval between saves, sqrt(2 delta M), in seconds."""
    assert save_seconds >= 0 and mtbf_seconds > 0
    return math.sqrt(2 * save_seconds * mtbf_seconds)


def daly_interval(save_seconds: float, mtbf_seconds: float) -> float:
    """Return Daly's interval of computing between saves, seconds (equation 37).

    sqrt(2 delta M) (1 + sqrt(delta / 2M) / 3 + (delta / 2M) / 9) - delta for delta < 2M, else M.
    Equals Young's where a save is short against the time between failures.
    """
    young = young_interval(save_seconds, mtbf_seconds)
    if save_seconds >= 2 * mtbf_seconds:
        return mtbf_seconds
    share = save_seconds / (2 * mtbf_seconds)
    return young * (1 + math.sqrt(share) / 3 + share / 9) - save_seconds


def effective_share(
    interval_seconds: float, save_seconds: float, mtbf_seconds: float, restart_seconds: float = 0
) -> float:
    """Return the expected share of the wall clock that is work which is kept.

    Daly's equation 20, tau / (M e^(R / M) (e^((tau + delta) / M) - 1)): failures may fall into a
    save and into the restart after another.

    Args:
        interval_seconds: tau, work between two saves.
        save_seconds: delta, for which training stands still for a save.
        mtbf_seconds: M, mean time between failures; may be infinite.
        restart_seconds: R, from a failure until training goes on.
    """
    assert interval_seconds > 0 and mtbf_seconds > 0
    if mtbf_seconds == math.inf:
        return interval_seconds / (interval_seconds + save_seconds)
    cycle = (interval_seconds + save_seconds) / mtbf_seconds
    restarted = mtbf_seconds * math.exp(restart_seconds / mtbf_seconds)
    return interval_seconds / (restarted * math.expm1(cycle))


def _poisson_cdf(count: int, mean: float) -> float:
    """Return P(X <= count) for a Poisson variable."""
    if mean == 0:
        return 1.0
    log_mean = math.log(mean)
    terms = (math.exp(i * log_mean - mean - math.lgamma(i + 1)) for i in range(count + 1))
    return math.fsum(terms)


def _solve(falling: Callable[[float], float], start: float) -> float:
    """Return the root of a falling function on (0, inf) by bisection."""
    low, high = 0.0, max(1.0, float(start))
    while falling(high) > 0:
        low, high = high, 2 * high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2
