"""Losses that are not finite or jump: told from healthy ones, and what is done about them.

Pure: a step's verdict depends on its loss, its gradient's norm and the losses before it, so all
ranks that see the same numbers judge alike, and a resumed run judges as the unbroken one did.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from enum import Enum, IntEnum
from typing import NamedTuple

from minigpt.train.config import RecoveryConfig

_SIGMA_PER_MAD = 1.4826
"""Of a normal distribution."""
_LEAST_RELATIVE_SIGMA = 0.01


class Verdict(IntEnum):
    """What a step's numbers say; the ranks' vote is the largest of theirs."""

    HEALTHY = 0
    SPIKE = 1
    NOT_FINITE = 2


class Action(Enum):
    """What to do with a step before its update."""

    ACCEPT = "accept"
    RETRY = "retry"
    """Compute the same step once more: a passing fault leaves no trace in the result."""
    SKIP = "skip"
    """Count the step, leave the weights."""
    ROLL_BACK = "roll back"
    """Go back to the last good checkpoint and never use the data since the first bad step."""
    STOP = "stop"


def spike_threshold(losses: Sequence[float], sigmas: float) -> float:
    """Return the loss above which a step is a spike: median + sigmas x 1.4826 MAD.

    Neither moves much while less than half of the losses are outliers. The spread counts as at
    least 1 % of the median, so that a flat curve is not all spikes.
    """
    center = statistics.median(losses)
    spread = _SIGMA_PER_MAD * statistics.median(abs(loss - center) for loss in losses)
    return center + sigmas * max(spread, _LEAST_RELATIVE_SIGMA * abs(center))


class AnomalyDetector:
    """Judges losses against a window of the healthy ones before."""

    def __init__(self, config: RecoveryConfig, history: Iterable[float] = ()) -> None:
        """Begin with the losses of the steps already done, oldest first."""
        self._config = config
        self._window: deque[float] = deque(maxlen=config.spike_window)
        for loss in history:
            self.accept(loss)

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """Judge a step; changes nothing."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return Verdict.NOT_FINITE
        sigmas = self._config.spike_sigmas
        full = len(self._window) == self._window.maxlen
        if sigmas is not None and full and loss > spike_threshold(tuple(self._window), sigmas):
            return Verdict.SPIKE
        return Verdict.HEALTHY

    def accept(self, loss: float) -> None:
        """Add the loss of a step that was done; one that is not finite is left out."""
        if math.isfinite(loss):
            self._window.append(loss)


class Strikes(NamedTuple):
    """What a run has had of anomalies; part of its state."""

    retried: bool = False
    """The step at hand was computed before."""
    in_a_row: int = 0
    """Skipped steps since the last healthy one."""
    rollbacks: int = 0
    """In this run."""


def decide(verdict: Verdict, strikes: Strikes, config: RecoveryConfig) -> tuple[Action, Strikes]:
    """Return what to do with a step of this verdict, and the strikes after it.

    Retry once, then skip; after `max_skips` skipped steps in a row roll back; after
    `max_rollbacks` of those stop.
    """
    if verdict is Verdict.HEALTHY:
        return Action.ACCEPT, Strikes(rollbacks=strikes.rollbacks)
    if config.on_anomaly == "stop":
        if verdict is Verdict.SPIKE:
            return Action.ACCEPT, strikes
        return Action.STOP, strikes
    if not strikes.retried:
        return Action.RETRY, strikes._replace(retried=True)
    if strikes.in_a_row < config.max_skips:
        return Action.SKIP, Strikes(False, strikes.in_a_row + 1, strikes.rollbacks)
    if strikes.rollbacks < config.max_rollbacks:
        return Action.ROLL_BACK, Strikes(rollbacks=strikes.rollbacks + 1)
    return Action.STOP, strikes
