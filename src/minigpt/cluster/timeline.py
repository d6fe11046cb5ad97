"""What is taken of every node and quota from now on, and where and when a gang fits into it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from minigpt.cluster.resources import Resources

FOREVER = float("inf")


@dataclass(frozen=True)
class Node:
    """A machine that takes jobs."""

    name: str
    total: Resources


@dataclass(frozen=True)
class Gang:
    """Equal workers that run together for at most `seconds`."""

    team: str
    workers: int
    per_worker: Resources
    seconds: float
    strict_pack: bool = False
    """Whether one node must hold all of them."""

    @property
    def total(self) -> Resources:
        """What all workers take together."""
        return self.per_worker * self.workers


Placement = tuple[str, ...]
"""The node of each worker, by rank."""


@dataclass(frozen=True)
class _Use:
    key: int
    start: float
    end: float
    team: str
    total: Resources
    by_node: Mapping[str, Resources]


@dataclass(frozen=True)
class Timeline:
    """Uses of nodes over time, each ending when its job's time limit does.

    Capacity and a team's quota are treated alike: both are kept at every moment.
    """

    now: float
    nodes: Sequence[Node]
    quotas: Mapping[str, Resources]
    """By team; a team that is not in it has none."""
    _uses: list[_Use] = field(default_factory=list)

    def add(self, key: int, gang: Gang, placement: Placement, start: float, end: float) -> None:
        """Take what a gang needs from `start` to `end`."""
        by_node = {name: gang.per_worker * count for name, count in Counter(placement).items()}
        self._uses.append(_Use(key, start, end, gang.team, gang.total, by_node))

    def ending(self, keys: Iterable[int], end: float) -> Timeline:
        """Return a copy in which the uses of `keys` end no later than `end`."""
        chosen = set(keys)
        uses = [
            _Use(u.key, u.start, min(u.end, end), u.team, u.total, u.by_node)
            if u.key in chosen
            else u
            for u in self._uses
        ]
        return Timeline(self.now, self.nodes, self.quotas, uses)

    def earliest(self, gang: Gang) -> tuple[float, Placement] | None:
        """Return the first time from which a gang fits, and where; None if it never does.

        Room appears only when a use ends, so that no other moments need be tried.
        """
        moments = {self.now} | {use.end for use in self._uses if self.now < use.end < FOREVER}
        for start in sorted(moments):
            placement = self.place(gang, start)
            if placement is not None:
                return start, placement
        return None

    def place(self, gang: Gang, start: float) -> Placement | None:
        """Find nodes for the whole gang that are free from `start` to its end, or None."""
        end = start + gang.seconds
        overlapping = [use for use in self._uses if use.start < end and use.end > start]
        peaks, team_peak = self._peaks(overlapping, gang.team, start)
        quota = self.quotas.get(gang.team)
        if quota is not None and not (team_peak + gang.total).fits_in(quota):
            return None
        room = {
            node.name: min(
                gang.workers,
                gang.per_worker.times_in(node.total - peaks.get(node.name, Resources.zero())),
            )
            for node in self.nodes
        }
        return _fill(gang, room)

    def _peaks(
        self, uses: Sequence[_Use], team: str, start: float
    ) -> tuple[dict[str, Resources], Resources]:
        """Return the most that is in use at a time, for each node and for one team.

        Use rises only where one begins, so that `start` and those beginnings are all that counts.
        """
        peaks: dict[str, Resources] = {}
        team_peak = Resources.zero()
        for moment in {start} | {use.start for use in uses if use.start > start}:
            by_node: dict[str, Resources] = {}
            of_team = Resources.zero()
            for use in uses:
                if not use.start <= moment < use.end:
                    continue
                for name, amount in use.by_node.items():
                    by_node[name] = by_node.get(name, Resources.zero()) + amount
                if use.team == team:
                    of_team = of_team + use.total
            for name, amount in by_node.items():
                peaks[name] = peaks.get(name, Resources.zero()).maximum(amount)
            team_peak = team_peak.maximum(of_team)
        return peaks, team_peak


def _fill(gang: Gang, room: Mapping[str, int]) -> Placement | None:
    """Choose nodes: the tightest one that holds all workers, else as few as possible."""
    whole = sorted((count, name) for name, count in room.items() if count >= gang.workers)
    if whole:
        return (whole[0][1],) * gang.workers
    if gang.strict_pack or sum(room.values()) < gang.workers:
        return None
    placement: list[str] = []
    for name in sorted(room, key=lambda name: (-room[name], name)):
        placement += [name] * min(room[name], gang.workers - len(placement))
    return tuple(placement)
