from __future__ import annotations

import pytest

from minigpt.api.requests import EngineStats
from minigpt.core.clock import ManualClock
from minigpt.serve.health import ProgressMonitor


def stats(step: int, seconds: float = 0.01, largest: float = 0.0) -> EngineStats:
    return EngineStats(
        step=step, running=1, waiting=0, kv_blocks_used=1, kv_blocks_total=8, prompt_tokens=0,
        generation_tokens=0, preemptions=0, last_step_seconds=seconds,
        last_step_prefill_tokens=0, last_step_decode_tokens=1, largest_step_seconds=largest,
    )  # fmt: skip


def monitor(clock: ManualClock) -> ProgressMonitor:
    return ProgressMonitor(clock, factor=10, floor_seconds=2, first_step_seconds=60)


def test_idle_is_never_overdue() -> None:
    clock = ManualClock()
    watched = monitor(clock)
    clock.advance(1e6)
    assert watched.overdue_seconds() == 0
    watched.work_began()
    watched.work_ended()
    clock.advance(1e6)
    assert watched.overdue_seconds() == 0


def test_the_first_step_has_its_own_limit() -> None:
    clock = ManualClock()
    watched = monitor(clock)
    watched.work_began()
    clock.advance(59)
    assert watched.overdue_seconds() == 0
    clock.advance(2)
    assert watched.overdue_seconds() == 1


def test_a_step_without_end_is_overdue_and_one_that_ends_clears_it() -> None:
    clock = ManualClock()
    watched = monitor(clock)
    watched.work_began()
    assert watched.step_finished(stats(1))
    clock.advance(5)
    assert watched.overdue_seconds() == 3
    # Stats without a new step, as after an abort, are no progress.
    assert not watched.step_finished(stats(1))
    assert watched.overdue_seconds() == 3
    assert watched.step_finished(stats(2))
    assert watched.overdue_seconds() == 0


def test_a_long_prefill_is_not_dead() -> None:
    clock = ManualClock()
    watched = monitor(clock)
    watched.work_began()
    watched.step_finished(stats(1, seconds=0.01, largest=5.0))
    clock.advance(40)
    assert watched.overdue_seconds() == 0
    clock.advance(20)
    assert watched.overdue_seconds() > 0


def test_a_new_engine_starts_its_steps_anew() -> None:
    watched = monitor(ManualClock())
    watched.step_finished(stats(50))
    watched.reset()
    assert watched.step_finished(stats(1))


def test_slow_steps_are_forgotten() -> None:
    clock = ManualClock()
    watched = monitor(clock)
    watched.work_began()
    watched.step_finished(stats(1, seconds=30.0))
    assert watched.allowed_seconds() == 300
    for step in range(2, 1000):
        watched.step_finished(stats(step, seconds=0.3))
    assert watched.allowed_seconds() == pytest.approx(3)
