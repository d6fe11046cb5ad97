from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt.train.goodput import CATEGORIES, Goodput, cost, read_goodput
from minigpt.train.progress import PHASES

Line = dict[str, object]


class Timeline:
    """Writes events as a run would, with every second accounted for."""

    def __init__(self) -> None:
        self.events: list[Line] = []
        self.now = 1000.0
        self.phases: dict[str, float] = {}

    def begin(self, step: int) -> None:
        self.phases = dict.fromkeys(PHASES, 0.0)
        self.events.append({"kind": "session", "step": step, "ranks": 2, "time": self.now})

    def spend(self, phase: str, seconds: float) -> None:
        self.phases[phase] += seconds
        self.now += seconds

    def mark(self, kind: str, step: int, **more: object) -> None:
        line = {"kind": kind, "step": step, "seconds": 1.0, "phases": dict(self.phases), **more}
        self.events.append(line)

    def end(self, step: int, status: str) -> None:
        line = {"kind": "session_end", "step": step, "status": status, "time": self.now}
        self.events.append({**line, "phases": dict(self.phases)})

    def ledger(self) -> Goodput:
        ledger = read_goodput(self.events)
        assert ledger is not None
        return ledger


def test_lost_work_is_what_was_done_after_the_save_that_was_resumed_from() -> None:
    run = Timeline()
    run.begin(0)
    run.spend("start", 5)
    run.spend("forward", 10)
    run.spend("save", 2)
    run.mark("checkpoint", 10)
    run.spend("forward", 7)
    run.spend("reduce", 1)
    run.end(17, "killed")
    run.now += 3
    run.begin(10)
    run.spend("start", 4)
    run.spend("backward", 20)
    run.end(30, "finished")
    ledger = run.ledger()
    expected = {
        "compute": 30.0,
        "checkpoint": 2.0,
        "startup": 5.0,
        "restart": 7.0,
        "lost_work": 8.0,
    }
    assert {name: value for name, value in ledger.seconds.items() if value} == expected
    assert ledger.wall_seconds == 52 and ledger.unaccounted == 0
    assert ledger.goodput == pytest.approx(30 / 52)
    assert (ledger.failures, ledger.sessions, ledger.ranks) == (1, 2, 2)
    assert ledger.device_hours == pytest.approx(2 * 49 / 3600)


def test_a_rollback_and_a_resume_from_an_older_save_lose_across_sessions() -> None:
    run = Timeline()
    run.begin(0)
    run.spend("forward", 1)
    run.mark("checkpoint", 1)
    run.spend("forward", 2)
    run.mark("rollback", 3, to=1)
    run.spend("forward", 4)
    run.mark("checkpoint", 5)
    run.spend("forward", 8)
    run.end(13, "interrupted")
    run.now += 100  # a pause that was asked for
    run.begin(5)
    run.spend("forward", 16)
    run.end(20, "killed")
    run.begin(1)  # the save of step 5 was corrupt
    run.spend("forward", 32)
    run.end(50, "finished")
    ledger = run.ledger()
    assert ledger.seconds["compute"] == 1 + 32
    assert ledger.seconds["lost_work"] == 2 + 4 + 8 + 16
    assert ledger.paused_seconds == 100 and ledger.unaccounted == pytest.approx(0)


phase_times = st.lists(st.tuples(st.sampled_from(PHASES), st.floats(0, 100)), max_size=20)


@given(st.lists(st.tuples(phase_times, st.sampled_from(["killed", "interrupted"])), min_size=1))
def test_the_categories_add_up_to_the_wall_clock(
    sessions: list[tuple[list[tuple[str, float]], str]],
) -> None:
    run, saved = Timeline(), 0
    for number, (spent, status) in enumerate(sessions):
        run.now += 1.5
        run.begin(saved)
        for index, (phase, seconds) in enumerate(spent):
            run.spend(phase, seconds)
            if phase == "save":
                saved = 1000 * number + index + 1
                run.mark("checkpoint", saved)
        run.end(saved, status)
    ledger = run.ledger()
    assert sum(ledger.seconds.values()) == pytest.approx(ledger.wall_seconds, abs=1e-6)
    assert set(ledger.seconds) == set(CATEGORIES) and min(ledger.seconds.values()) >= 0


def test_cost_by_token_and_by_bit() -> None:
    run = Timeline()
    run.begin(0)
    run.spend("forward", 3600)
    run.end(1, "finished")
    priced = cost(run.ledger(), 4.0, 2_000_000, [2.0, 1.5, 1.6])
    assert priced.total == pytest.approx(8.0)
    assert priced.per_million_tokens == pytest.approx(4.0)
    assert priced.per_bit_per_byte == pytest.approx(16.0)
    assert cost(run.ledger(), 4.0, 1, [2.0]).per_bit_per_byte is None


def test_a_run_without_a_session_has_no_ledger() -> None:
    assert read_goodput([{"kind": "validation", "step": 1}]) is None
