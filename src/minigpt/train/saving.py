"""When a run saves: at steps that its config names, and by the clock where failures teach it."""

from __future__ import annotations

import math

from minigpt.core.clock import Clock
from minigpt.core.errors import ConfigError
from minigpt.train.config import TrainConfig
from minigpt.train.reliability import daly_interval, failure_rate
from minigpt.train.sessions import History

_LEAST_HOURS = 1e-3


class SaveSchedule:
    """Knows the last save, and when the next is due. The same on all ranks but for the clock.

    `begun_step` is the last step whose save was begun, `saved_step` the last that is safe.
    """

    def __init__(self, config: TrainConfig, step: int, history: History, clock: Clock) -> None:
        """Begin after a step that is saved (or 0)."""
        assert isinstance(config.checkpoint.every, int) and isinstance(config.steps, int)
        self.saved_step = self.begun_step = step
        self.seconds = history.save_seconds
        """Duration of the last save; None before the first."""
        self._every, self._steps = config.checkpoint.every, config.steps
        self._recovery = config.recovery
        self._history = history
        self._clock = clock
        self._began = self._saved_at = clock.monotonic()

    def is_due(self, step: int) -> bool:
        """Tell whether the config asks for a save after `step`."""
        if step == 0 or step == self.begun_step:
            return False
        if self.must_be_timed():
            return True
        return step == self._steps or (self._every > 0 and step % self._every == 0)

    def must_be_timed(self) -> bool:
        """Tell whether a grace is given and no save has been timed yet."""
        return self.seconds is None and self._recovery.grace_seconds is not None

    def is_overdue(self) -> bool:
        """Tell whether the interval that the failures so far suggest has passed."""
        return self._clock.monotonic() - self._saved_at > self.interval()

    def interval(self) -> float:
        """Return Daly's interval in seconds, by the upper bound of the failure rate.

        Infinite where it is not asked for, or nothing is known of a save's duration.
        """
        if not self._recovery.adapt_interval or self.seconds is None:
            return math.inf
        hours = self._history.hours + (self._clock.monotonic() - self._began) / 3600
        rate = failure_rate(self._history.failures, max(_LEAST_HOURS, hours))
        return daly_interval(self.seconds, 3600 * rate.mtbf_hours)

    def saved(self, step: int, seconds: float) -> None:
        """Note a save and how long it took (the slowest rank's time)."""
        self.saved_step, self.seconds = step, seconds
        self._saved_at = self._clock.monotonic()

    def check_grace(self) -> None:
        """Refuse a run that could not save within its grace.

        Raises:
            ConfigError: A save, as measured, takes longer.
        """
        grace = self._recovery.grace_seconds
        if grace is not None and self.seconds is not None and self.seconds > grace:
            raise ConfigError(
                f"a save takes {self.seconds:.1f} s as measured, longer than "
                f"recovery.grace_seconds = {grace:g}: a preemption would lose work",
                remedy="use faster storage or more ranks to save with, or ask for a longer grace",
            )
