"""When a save is due: by its step, by the clock, and soon again where one failed."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.core.clock import ManualClock
from minigpt.train.config import TrainConfig
from minigpt.train.saving import SaveSchedule
from minigpt.train.sessions import read_history

MOST_PAUSE = 60.0


def _schedule(clock: ManualClock, **recovery: Any) -> SaveSchedule:
    tree = {"data": "none", "steps": 100, "checkpoint": {"every": 10}, "recovery": recovery}
    return SaveSchedule(TrainConfig.model_validate(tree), read_history([]), clock)


def test_without_a_failure_the_clock_asks_for_nothing() -> None:
    clock = ManualClock()
    schedule = _schedule(clock)
    assert [step for step in range(101) if schedule.is_due(step)] == list(range(10, 101, 10))
    clock.advance(1e6)
    assert not schedule.is_overdue()


@given(misses=st.integers(1, 12), attempt=st.floats(0, 30))
@settings(deadline=None)
def test_a_failed_save_is_tried_again_after_growing_pauses_until_one_succeeds(
    misses: int, attempt: float
) -> None:
    clock = ManualClock()
    schedule = _schedule(clock)
    began = 0.0
    for number in range(misses):
        schedule.begun(number + 1)
        assert not schedule.is_overdue()  # one at a time
        clock.advance(attempt)
        assert not schedule.is_overdue()
        schedule.failed()
        began = clock.monotonic() if number == 0 else began
        pause = min(MOST_PAUSE, 2.0**number)
        clock.advance(0.99 * pause)
        assert not schedule.is_overdue()
        clock.advance(0.02 * pause)
        assert schedule.is_overdue()
    assert schedule.missed == misses and schedule.saved_step == 0
    assert schedule.seconds_since_miss() == clock.monotonic() - began
    schedule.begun(50)
    schedule.saved(50, 0.1)
    clock.advance(1e6)
    assert not schedule.is_overdue() and schedule.missed == 0 and schedule.saved_step == 50


def test_a_save_under_way_is_not_overdue_by_the_interval() -> None:
    clock = ManualClock()
    schedule = _schedule(clock, adapt_interval=True)
    schedule.begun(10)
    schedule.saved(10, 2.0)
    interval = schedule.interval()
    clock.advance(interval * 1.5)
    assert schedule.is_overdue()
    schedule.begun(20)
    assert not schedule.is_overdue()
