"""Judging ranks by their beacons: who hangs, who lags, who went another way. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minigpt.train.config import RecoveryConfig
from minigpt.train.progress import COMPUTING, PHASES, WAITING, Beacon


@dataclass(frozen=True)
class Hang:
    """No rank has moved for too long."""

    ranks: tuple[int, ...]
    """The ranks at fault; all of them where each waits for the others."""
    reason: str
    """What makes them the ones."""
    seconds: float
    """Since anyone moved."""


class HangDetector:
    """Tells a hang from a long phase, by the time that such phases have taken before."""

    def __init__(self, config: RecoveryConfig) -> None:
        self._config = config
        self._longest: dict[str, float] = {}
        self._last: dict[int, Beacon] = {}

    def check(
        self, beacons: Mapping[int, Beacon], now: float, states: Mapping[int, str]
    ) -> Hang | None:
        """Look at all ranks' beacons once more.

        Args:
            beacons: By rank.
            now: `time.monotonic()`.
            states: Process states by rank as `/proc` gives them; "T" is stopped.
        """
        if not beacons:
            return None
        for rank, beacon in beacons.items():
            self._learn(self._last.get(rank), beacon)
        self._last = dict(beacons)
        idle = now - max(beacon.entered for beacon in beacons.values())
        if idle <= max(self._limit(beacon.phase) for beacon in beacons.values()):
            return None
        ranks, reason = culprits(beacons, states)
        return Hang(ranks, reason, idle)

    def _learn(self, before: Beacon | None, beacon: Beacon) -> None:
        """Remember how long the phase took that has ended since the last look."""
        if before is not None and before.pid == beacon.pid and beacon.entered > before.entered:
            took = beacon.seconds[before.phase] - before.seconds[before.phase]
            self._longest[before.phase] = max(self._longest.get(before.phase, 0.0), took)

    def _limit(self, phase: str) -> float:
        if phase == "start":
            return self._config.start_seconds
        usual = self._config.hang_factor * self._longest.get(phase, 0.0)
        return max(self._config.hang_seconds, usual)


def culprits(
    beacons: Mapping[int, Beacon], states: Mapping[int, str]
) -> tuple[tuple[int, ...], str]:
    """Name the ranks at fault in a hang, and why it is they.

    In this order: processes that are stopped; ranks that wait in no collective; ranks whose
    beacon is behind the others'; else all.
    """
    stopped = tuple(rank for rank in sorted(beacons) if states.get(rank, "") in ("T", "t"))
    if stopped:
        return stopped, "stopped by a signal"
    working = tuple(rank for rank, beacon in sorted(beacons.items()) if beacon.phase not in WAITING)
    if working and len(working) < len(beacons):
        return working, "not waiting in a collective while the others are"
    places = {rank: _place(beacon) for rank, beacon in sorted(beacons.items())}
    last = min(places.values())
    behind = tuple(rank for rank, place in places.items() if place == last)
    if len(behind) < len(beacons):
        return behind, "behind the others"
    return behind, "all ranks are at the same place"


def _place(beacon: Beacon) -> tuple[int, int, int]:
    return beacon.step, beacon.micro_batch, PHASES.index(beacon.phase)


def compute_seconds(seconds: Mapping[str, float]) -> float:
    """Return the time a rank has computed, collectives left out."""
    return sum(seconds[phase] for phase in COMPUTING)


def find_stragglers(seconds: Sequence[float], ratio: float) -> list[int]:
    """Return the ranks that computed more than `ratio` times as long as the others' median."""
    if len(seconds) < 2:
        return []
    others = [[*seconds[:rank], *seconds[rank + 1 :]] for rank in range(len(seconds))]
    return [r for r, own in enumerate(seconds) if own > ratio * statistics.median(others[r])]


def find_divergent(checksums: Sequence[int], replicas: Sequence[object]) -> list[int]:
    """Return the ranks whose weights differ from most of their replicas.

    Args:
        checksums: One a rank.
        replicas: By rank, what all ranks that must hold equal weights have in common.

    Returns:
        The minority's ranks, or every rank of a group without a majority.
    """
    divergent: list[int] = []
    for replica in dict.fromkeys(replicas):
        ranks = [rank for rank, key in enumerate(replicas) if key == replica]
        counts = Counter(checksums[rank] for rank in ranks).most_common()
        if len(counts) == 1:
            continue
        majority = counts[0][0] if counts[0][1] > counts[1][1] else None
        divergent += [rank for rank in ranks if checksums[rank] != majority]
    return sorted(divergent)
