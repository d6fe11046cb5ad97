from __future__ import annotations

import random

import pytest

from minigpt.core.clock import ManualClock
from minigpt.core.retry import Retry


def make_retry(clock: ManualClock, waits: list[float], **changes: float) -> Retry:
    def sleep(seconds: float) -> None:
        waits.append(seconds)
        clock.advance(seconds)

    return Retry(
        attempts=int(changes.get("attempts", 5)),
        first_seconds=1.0,
        most_seconds=4.0,
        sleep=sleep,
        jitter=random.Random(0),
    )


def test_waits_double_up_to_a_bound_and_scatter() -> None:
    clock, waits = ManualClock(), list[float]()
    calls = 0

    def action() -> str:
        nonlocal calls
        calls += 1
        if calls < 5:
            raise OSError("not yet")
        return "done"

    assert make_retry(clock, waits).run(action) == "done"
    assert len(waits) == 4
    for wait, bound in zip(waits, (1, 2, 4, 4), strict=True):
        assert bound / 2 <= wait <= bound
    assert clock.monotonic() == pytest.approx(sum(waits))
    assert waits[2] != waits[3]


def test_the_last_error_comes_through_and_permanent_ones_at_once() -> None:
    clock, waits = ManualClock(), list[float]()
    retry = make_retry(clock, waits, attempts=3)

    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(OSError, match="down"):
        retry.run(lambda: fail(OSError("down")))
    assert len(waits) == 2
    with pytest.raises(FileNotFoundError):
        retry.run(lambda: fail(FileNotFoundError()), permanent=(FileNotFoundError,))
    assert len(waits) == 2
