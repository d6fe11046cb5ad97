"""Closed forms that the simulation is checked against: communication, checkpoint interval, loss."""

from __future__ import annotations

import math


def ring_all_reduce_seconds(
    ranks: int, size: float, bandwidth: float, latency: float = 0.0
) -> float:
    """Return the time of a ring all-reduce: 2 (N-1)/N S/bandwidth + 2 (N-1) latency.

    Args:
        ranks: N, participants.
        size: S, bytes of the buffer on each.
        bandwidth: Bytes per second of each link.
        latency: Seconds a message.
    """
    return 2 * (ranks - 1) / ranks * size / bandwidth + 2 * (ranks - 1) * latency


def daly_interval(stall: float, mtbf: float) -> float:
    """Return the work between two checkpoints that loses least time, in seconds.

    Daly, "A higher order estimate of the optimum checkpoint interval", FGCS 2006, equation 37;
    its first term is Young's sqrt(2 stall mtbf), CACM 1974.

    Args:
        stall: Seconds that training stands still for a save.
        mtbf: Mean seconds between failures of the whole cluster.
    """
    if stall >= 2 * mtbf:
        return mtbf
    ratio = stall / (2 * mtbf)
    return math.sqrt(2 * stall * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall


def effective_time(interval: float, stall: float, downtime: float, mtbf: float) -> float:
    """Return the expected share of the wall clock that is work which is kept.

    Daly 2006, equation 20: failures are exponential, may fall into a save and into the downtime
    after another.

    Args:
        interval: Seconds of work between two saves.
        stall: Seconds that training stands still for a save.
        downtime: Seconds from a failure until training goes on.
        mtbf: Mean seconds between failures of the whole cluster.
    """
    if mtbf == math.inf:
        return interval / (interval + stall)
    cycle = (interval + stall) / mtbf
    return interval / (mtbf * math.exp(downtime / mtbf) * math.expm1(cycle))
