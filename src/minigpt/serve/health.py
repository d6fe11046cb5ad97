"""Health by progress: an engine is stalled when work exists and no step ends in time.

"In time" is a multiple of the step time predicted from the steps seen so far, so that neither a
long prefill counts as dead nor a hung engine as busy.
"""

from __future__ import annotations

from minigpt.api.requests import EngineStats
from minigpt.core.clock import Clock

_DECAY = 0.98


class StepTimePredictor:
    """Learns step time = overhead + rate * prefill tokens, by least squares that forget."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._tokens = 0.0
        self._seconds = 0.0
        self._tokens_squared = 0.0
        self._product = 0.0
        self._recent_longest = 0.0

    @property
    def has_data(self) -> bool:
        """Whether any step was seen."""
        return self._weight > 0

    def observe(self, prefill_tokens: int, seconds: float) -> None:
        """Learn from one finished step."""
        self._weight = self._weight * _DECAY + 1
        self._tokens = self._tokens * _DECAY + prefill_tokens
        self._seconds = self._seconds * _DECAY + seconds
        self._tokens_squared = self._tokens_squared * _DECAY + prefill_tokens**2
        self._product = self._product * _DECAY + prefill_tokens * seconds
        self._recent_longest = max(self._recent_longest * _DECAY, seconds)

    def predict(self, prefill_tokens: int) -> float:
        """Return the seconds of a step with that much prefill; not less than recent ones took."""
        assert self.has_data
        mean_tokens = self._tokens / self._weight
        mean_seconds = self._seconds / self._weight
        variance = self._tokens_squared / self._weight - mean_tokens**2
        covariance = self._product / self._weight - mean_tokens * mean_seconds
        rate = max(covariance / variance, 0.0) if variance > 1e-9 else 0.0
        predicted = mean_seconds + rate * (prefill_tokens - mean_tokens)
        return max(predicted, self._recent_longest)


class ProgressMonitor:
    """Tells whether the engine moves. Fed by the engine client; holds no thread or task.

    Args:
        clock: Monotonic time.
        factor: How many times the predicted step time a step may take.
        floor_seconds: What a step may always take.
        first_step_seconds: What the first step may take, before any was measured.
        max_step_tokens: Most prefill tokens in a step.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        factor: float,
        floor_seconds: float,
        first_step_seconds: float,
        max_step_tokens: int,
    ) -> None:
        self._clock = clock
        self._factor = factor
        self._floor_seconds = floor_seconds
        self._first_step_seconds = first_step_seconds
        self._max_step_tokens = max_step_tokens
        self._predictor = StepTimePredictor()
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
        self._predictor.observe(stats.last_step_prefill_tokens, stats.last_step_seconds)
        if self._work_since is not None:
            self._work_since = self._clock.monotonic()
        return True

    def allowed_seconds(self) -> float:
        """Return how long the running step may take before it counts as stalled."""
        if not self._predictor.has_data:
            return max(self._first_step_seconds, self._floor_seconds)
        predicted = self._predictor.predict(self._max_step_tokens)
        return max(self._floor_seconds, self._factor * predicted)

    def overdue_seconds(self) -> float:
        """Return for how long the running step has been overdue; 0 where all is well."""
        if self._work_since is None:
            return 0.0
        waited = self._clock.monotonic() - self._work_since
        return max(0.0, waited - self.allowed_seconds())
