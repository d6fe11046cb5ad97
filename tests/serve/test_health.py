from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from minigpt.api.requests import EngineStats
from minigpt.core.clock import ManualClock
from minigpt.serve.health import ProgressMonitor, StepTimePredictor


def stats(step: int, prefill: int = 0, seconds: float = 0.01) -> EngineStats:
    return EngineStats(
        step=step, running=1, waiting=0, kv_blocks_used=1, kv_blocks_total=8, prompt_tokens=0,
        generation_tokens=0, preemptions=0, last_step_seconds=seconds,
        last_step_prefill_tokens=prefill, last_step_decode_tokens=1,
    )  # fmt: skip


def monitor(clock: ManualClock) -> ProgressMonitor:
    return ProgressMonitor(
        clock, factor=10, floor_seconds=2, first_step_seconds=60, max_step_tokens=1000
    )


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
    # 5 ms a token: a full step of 1,000 prefill tokens is predicted to take 5 s.
    for step in range(1, 40):
        tokens = step % 2 * 100
        watched.step_finished(stats(step, prefill=tokens, seconds=0.01 + 0.005 * tokens))
    clock.advance(40)
    assert watched.overdue_seconds() == 0
    clock.advance(20)
    assert watched.overdue_seconds() > 0


def test_a_new_engine_starts_its_steps_anew() -> None:
    watched = monitor(ManualClock())
    watched.step_finished(stats(50))
    watched.reset()
    assert watched.step_finished(stats(1))


@given(
    overhead=st.floats(1e-4, 1.0),
    rate=st.floats(0, 1e-2),
    tokens=st.lists(st.integers(0, 4096), min_size=2, max_size=60),
    wanted=st.integers(0, 8192),
)
def test_prediction_is_exact_on_a_line(
    overhead: float, rate: float, tokens: list[int], wanted: int
) -> None:
    predictor = StepTimePredictor()
    for count in tokens:
        predictor.observe(count, overhead + rate * count)
    line = overhead + rate * (wanted if len(set(tokens)) > 1 else tokens[0])
    predicted = predictor.predict(wanted)
    assert predicted >= line * (1 - 1e-3) - 1e-4
    longest = max(overhead + rate * count for count in tokens)
    assert predicted <= max(line, longest) * (1 + 1e-3) + 1e-4


def test_prediction_forgets() -> None:
    predictor = StepTimePredictor()
    rng = random.Random(0)
    for seconds in (5.0, 0.01):
        for _ in range(1000):
            predictor.observe(rng.randrange(100), seconds)
    assert predictor.predict(100) < 0.05
