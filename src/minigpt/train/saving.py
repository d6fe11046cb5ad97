"""When a run saves, and how: at once or in the background.

It saves at steps that its config names, by the clock where failures teach it, and soon again
after a save that failed.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from minigpt.core.artifact import Artifact
from minigpt.core.clock import Clock
from minigpt.core.errors import ConfigError, StorageError
from minigpt.core.manifest import Parent
from minigpt.core.reliability import daly_interval, failure_rate
from minigpt.core.telemetry import get_logger
from minigpt.model.lora import trained_state
from minigpt.train.build import Build
from minigpt.train.checkpoint import PendingSave, TrainState
from minigpt.train.config import TrainConfig
from minigpt.train.context import Member, Outputs
from minigpt.train.reporter import Reporter
from minigpt.train.sessions import History

_LEAST_HOURS = 1e-3
_RETRY_SECONDS = 1.0
_MOST_RETRY_SECONDS = 60.0


class SaveSchedule:
    """Knows the last save, and when the next is due. The same on all ranks but for the clock.

    `begun_step` is the last step whose save was begun, `saved_step` the last that is safe.
    """

    def __init__(self, config: TrainConfig, history: History, clock: Clock) -> None:
        """Begin at step 0; see `went_back`."""
        assert isinstance(config.checkpoint.every, int) and isinstance(config.steps, int)
        self.saved_step = self.begun_step = 0
        self.seconds = history.save_seconds
        """Duration of the last save; None before the first."""
        self.missed = 0
        """Saves that failed since the last one that did not."""
        self._missed_at = 0.0
        self._retry_at = math.inf
        self._every, self._steps = config.checkpoint.every, config.steps
        self._recovery = config.recovery
        self._history = history
        self._clock = clock
        self._began = self._begun_at = clock.monotonic()

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
        """Tell whether a failed save should be made up for by now, or the interval that the
        failures of processes so far suggest has passed.
        """
        return self._clock.monotonic() > min(self._retry_at, self._begun_at + self.interval())

    def interval(self) -> float:
        """Return Daly's interval in seconds, by the upper bound of the failure rate.

        Infinite where it is not asked for, or nothing is known of a save's duration.
        """
        if not self._recovery.adapt_interval or self.seconds is None:
            return math.inf
        hours = self._history.hours + (self._clock.monotonic() - self._began) / 3600
        rate = failure_rate(self._history.failures, max(_LEAST_HOURS, hours))
        return daly_interval(self.seconds, 3600 * rate.mtbf_hours)

    def begun(self, step: int) -> None:
        """Note that a save is under way."""
        self.begun_step, self._retry_at = step, math.inf
        self._begun_at = self._clock.monotonic()

    def saved(self, step: int, seconds: float) -> None:
        """Note a save and how long it took (the slowest rank's time)."""
        self.saved_step, self.seconds, self.missed = step, seconds, 0

    def failed(self) -> None:
        """Note a save that failed. It is tried again after a pause that doubles each time."""
        now = self._clock.monotonic()
        if self.missed == 0:
            self._missed_at = now
        self._retry_at = now + min(_MOST_RETRY_SECONDS, _RETRY_SECONDS * 2**self.missed)
        self.missed += 1

    def seconds_since_miss(self) -> float:
        """Return how long it is since the first of the `missed` saves failed."""
        return self._clock.monotonic() - self._missed_at

    def went_back(self, step: int) -> None:
        """Note that the run stands at a step that is saved, or at 0."""
        self.saved_step = self.begun_step = step

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


class Saver:
    """Saves a run's state; every rank makes the same calls."""

    def __init__(
        self,
        config: TrainConfig,
        parts: Build,
        outputs: Outputs,
        member: Member,
        report: Reporter,
        parents: Sequence[Artifact | Parent],
        changing: threading.Lock,
        clock: Clock,
    ) -> None:
        """Prepare to save a resolved config's run.

        Args:
            config: The run's.
            parts: Whose weights and optimizer are saved.
            outputs: Where.
            member: This process as one of the ranks.
            report: Told of each save.
            parents: What the checkpoints come from.
            changing: Held while parameters or position change, or are written down.
            clock: For durations.
        """
        self.schedule = SaveSchedule(config, member.history, clock)
        self._config = config
        self._parts = parts
        self._out = outputs
        self._world = member.world
        self._progress = member.progress
        self._report = report
        self._parents = parents
        self._changing = changing
        self._clock = clock
        self._pending: PendingSave | None = None
        self._pending_phases: Mapping[str, float] = {}

    @property
    def is_ready(self) -> bool:
        """Whether a save in the background has ended and `finish` would not wait."""
        return self._pending is not None and self._pending.done

    def save(self, state: TrainState) -> None:
        """Save and wait for the end of it; every rank writes its part.

        Raises:
            StorageError: It could not be saved; raised on every rank.
        """
        self.finish(state)
        self._progress.enter("save")
        begin, phases = self._clock.monotonic(), self._progress.seconds()
        with self._changing:
            self._out.store.save(_with_best(state), **self._contents())
            note_best(state)
            self.schedule.begun(state.step)
        seconds = self._clock.monotonic() - begin
        (milliseconds,) = self._world.vote(round(1000 * seconds))
        self._note(state.step, milliseconds / 1000, seconds, phases)

    def begin(self, state: TrainState) -> None:
        """Save what is now, while training goes on.

        Raises:
            StorageError: It could not even be begun.
        """
        self.finish(state)
        self._progress.enter("save")
        self._pending_phases = self._progress.seconds()
        with self._changing:
            self._pending = self._out.store.save_async(_with_best(state), **self._contents())
            self.schedule.begun(state.step)

    def finish(self, state: TrainState) -> None:
        """Wait for the save in the background, if there is one, and take note of its end."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        self._progress.enter("save")
        try:
            pending.result()
        except StorageError as error:
            self.missed(pending.step, error)
            return
        with self._changing:
            state.best_step = pending.state.best_step
            state.best_bits_per_byte = pending.state.best_bits_per_byte
        seconds = self._out.store.save_seconds[-1]
        self._note(pending.step, seconds, pending.stall_seconds, self._pending_phases)

    def save_as_it_is(self, state: TrainState) -> None:
        """Save from another thread, which holds the lock, what the main thread stands at."""
        if state.step == self.schedule.begun_step:
            self._out.store.wait()
        elif state.step > 0:
            self._out.store.save(_with_best(state), **self._contents())

    def missed(self, step: int, error: StorageError) -> None:
        """Record that a save failed; the run goes on."""
        self.schedule.failed()
        self._report.event("save_missed", step, reason=str(error))
        get_logger("train").warning(
            "checkpoint not saved; training goes on and tries again soon",
            step=step,
            reason=str(error),
            last_good_step=self.schedule.saved_step,
        )

    def _note(self, step: int, seconds: float, stall: float, phases: Mapping[str, float]) -> None:
        missed, since = self.schedule.missed, self.schedule.seconds_since_miss()
        self.schedule.saved(step, seconds)
        if missed:
            self._report.event("save_made_up", step, missed=missed, seconds=since)
        self._report.event(
            "checkpoint", step, seconds=seconds, stall_seconds=stall, phases=dict(phases)
        )
        if self._world.is_first:
            assert isinstance(self._config.checkpoint.every, int)
            self._report.saved(self._config.checkpoint.every, seconds)

    def _contents(self) -> dict[str, Any]:
        # First the lines, then the checkpoint that claims they are there. Rank 0 alone has lines,
        # but where there is no room for them no rank may begin to save.
        self._out.store.together(self._flush)
        return {
            "model": trained_state(self._parts.model),
            "optimizer": self._parts.optimizer.state_dict(),
            "parents": self._parents,
        }

    def _flush(self) -> None:
        self._out.metrics.flush()
        self._out.events.flush()


def note_best(state: TrainState) -> None:
    """Make a saved state's step the best one, where its validation says so."""
    value, best = state.validation.get("bits_per_byte"), state.best_bits_per_byte
    if value is None or state.validated_step != state.step:
        return
    if best is None or value < best:
        state.best_step, state.best_bits_per_byte = state.step, value


def _with_best(state: TrainState) -> TrainState:
    """Return a copy, since a save in the background keeps it while the run moves on."""
    copied = replace(state)
    note_best(copied)
    return copied
