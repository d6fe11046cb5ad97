"""Health by progress: an engine is stalled when work exists and no step ends in time.

"In time" is a multiple of what the engine predicts that its largest step takes, and of what
recent steps took, so that neither a long prefill counts as dead nor a hung engine as busy.
"""

from __future__ import annotations

from minigpt.api.requests import EngineStats
from minigpt.core.clock import Clock

_DECAY = 0.98
"""Of the longest recent step's duration, at each step."""


class ProgressMonitor:
    """Tells whether the engine moves. Fed by the engine client; holds no thread or task.

    Args:
        clock: Monotonic time.
        factor: How many times the predicted step time a step may take.
        floor_seconds: What a step may always take.
        first_step_seconds: What the first step may take, before any was measured.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        factor: float,
        floor_seconds: float,
        first_step_seconds: float,
    ) -> None:
        self._clock = clock
        self._factor = factor
        self._floor_seconds = floor_seconds
        self._first_step_seconds = first_step_seconds
        self._predicted = 0.0
        self._longest = 0.0
        self._steps = 0
        self._work_since: float | None = None

    def reset(self) -> None:
        """Start over with a new engine process; what was learnt of step times stays."""
        self._steps = 0
        self._work_since = None

    def work_began(self) -> None:
        """Note that the engine has work, having had none before."""
        self._work_since = self._clock.monotonic()

    def work_ended(self) -> None:
        """Note that nothing is in flight."""
        self._work_since = None

    def step_finished(self, stats: EngineStats) -> bool:
        """Learn from the engine's stats; return whether a step ended since the last ones."""
        if stats.step <= self._steps:
            return False
        self._steps = stats.step
        self._predicted = stats.largest_step_seconds
        self._longest = max(self._longest * _DECAY, stats.last_step_seconds)
        if self._work_since is not None:
            self._work_since = self._clock.monotonic()
        return True

    def allowed_seconds(self) -> float:
        """Return how long the running step may take before it counts as stalled."""
        if not self._longest:
            return max(self._first_step_seconds, self._floor_seconds)
        return max(self._floor_seconds, self._factor * max(self._predicted, self._longest))

    def overdue_seconds(self) -> float:
        """Return for how long the running step has been overdue; 0 where all is well."""
        if self._work_since is None:
            return 0.0
        waited = self._clock.monotonic() - self._work_since
        return max(0.0, waited - self.allowed_seconds())
