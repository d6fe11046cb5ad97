from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from minigpt.train.config import RecoveryConfig
from minigpt.train.progress import PHASES, Beacon
from minigpt.train.watchdog import (
    HangDetector,
    culprits,
    find_divergent,
    find_stragglers,
)

CONFIG = RecoveryConfig(hang_seconds=10, hang_factor=5, start_seconds=100)


def _beacon(
    phase: str, *, step: int = 7, micro: int = 0, entered: float = 0.0, **spent: float
) -> Beacon:
    seconds = dict.fromkeys(PHASES, 0.0) | spent
    return Beacon(1, step, micro, phase, entered, 0.0, seconds)


def test_the_rank_that_waits_in_no_collective_is_named() -> None:
    beacons = {0: _beacon("reduce"), 1: _beacon("backward"), 2: _beacon("reduce")}
    assert culprits(beacons, {})[0] == (1,)


def test_a_stopped_process_is_named_whatever_it_was_doing() -> None:
    beacons = {0: _beacon("forward"), 1: _beacon("reduce")}
    ranks, reason = culprits(beacons, {0: "R", 1: "T"})
    assert ranks == (1,) and "stopped" in reason


def test_the_rank_behind_is_named_where_all_wait() -> None:
    beacons = {
        0: _beacon("reduce", step=8),
        1: _beacon("vote", step=7),
        2: _beacon("reduce", step=8),
    }
    assert culprits(beacons, {})[0] == (1,)
    same = {rank: _beacon("reduce") for rank in range(3)}
    assert culprits(same, {})[0] == (0, 1, 2)


def test_a_hang_is_told_from_a_phase_that_usually_takes_long() -> None:
    detector = HangDetector(CONFIG)
    both = {0: _beacon("save", entered=0.0), 1: _beacon("vote", entered=0.0)}
    assert detector.check(both, 5.0, {}) is None
    moved = {0: _beacon("data", entered=8.0, save=8.0), 1: _beacon("vote", entered=0.0)}
    assert detector.check(moved, 9.0, {}) is None
    again = {0: _beacon("save", step=9, entered=20.0, save=8.0), 1: _beacon("vote", entered=19.0)}
    assert detector.check(again, 50.0, {}) is None  # 30 s: less than 5 times 8 s
    hang = detector.check(again, 61.0, {})
    assert hang is not None and hang.ranks == (0,) and hang.seconds == 41.0


def test_one_rank_that_moves_is_progress() -> None:
    detector = HangDetector(CONFIG)
    for now in range(0, 100, 5):
        beacons = {0: _beacon("reduce"), 1: _beacon("forward", entered=float(now))}
        assert detector.check(beacons, now + 1.0, {}) is None


def test_the_start_may_take_longer() -> None:
    detector = HangDetector(CONFIG)
    beacons = {0: _beacon("start"), 1: _beacon("vote")}
    assert detector.check(beacons, 99.0, {}) is None
    assert detector.check(beacons, 101.0, {}) is not None


@given(st.lists(st.floats(0.9, 1.1), min_size=2, max_size=16), st.data())
def test_a_straggler_is_named_and_nobody_else(seconds: list[float], data: st.DataObject) -> None:
    assert find_stragglers(seconds, 1.5) == []
    slow = data.draw(st.integers(0, len(seconds) - 1))
    seconds[slow] = 3.0
    assert find_stragglers(seconds, 1.5) == [slow]


def test_one_rank_is_never_a_straggler() -> None:
    assert find_stragglers([5.0], 1.5) == []


@given(st.integers(3, 9), st.data())
def test_the_odd_replica_is_named(ranks: int, data: st.DataObject) -> None:
    odd = data.draw(st.integers(0, ranks - 1))
    sums = [5] * ranks
    assert find_divergent(sums, ["all"] * ranks) == []
    sums[odd] = 6
    assert find_divergent(sums, ["all"] * ranks) == [odd]


def test_shards_are_compared_with_their_own_replicas_only() -> None:
    assert find_divergent([1, 2, 1, 2], ["a", "b", "a", "b"]) == []
    assert find_divergent([1, 2, 1, 3], ["a", "b", "a", "b"]) == [1, 3]  # nobody can tell which
