"""Which waiting jobs start where, and which running ones make room. No I/O, no clock of its own.

Order: levels of priority, each raised by waiting (ageing); on a level the team that has used
least for its weight (dominant share, decayed). Jobs at the head that don't fit get reservations
(conservative back-fill: Mu'alem and Feitelson, IEEE TPDS 2001); whatever starts must fit around
them. The first of them may evict running jobs that began at a lower level than its own priority,
those that lose least work first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from minigpt.cluster.config import PolicyConfig, TeamConfig
from minigpt.cluster.resources import Resources
from minigpt.cluster.timeline import Gang, Node, Placement, Timeline


@dataclass(frozen=True)
class WaitingJob:
    """A job in the queue."""

    id: int
    gang: Gang
    priority: int
    submitted_at: float
    waited: float
    """Seconds in the queue, over all attempts."""

    def level(self, ageing_seconds: float) -> int:
        """Return the priority with what waiting has added."""
        return self.priority + math.floor(self.waited / ageing_seconds)


@dataclass(frozen=True)
class RunningJob:
    """A job that has its nodes."""

    id: int
    gang: Gang
    placement: Placement
    level: int
    """The level that it started at; ageing protects it from being evicted again and again."""
    ends_by: float
    """When its time limit, or the grace period of a stop, ends at the latest."""
    evictable: bool
    grace_seconds: float
    unsaved_seconds: float
    """Work that an eviction now would lose."""
    safe_in: float | None = None
    """Seconds until an eviction would lose nothing, where the job says so."""
    stopping: bool = False


@dataclass(frozen=True)
class Start:
    """Start this job on these nodes now."""

    job: int
    placement: Placement
    level: int


@dataclass(frozen=True)
class Eviction:
    """Stop this job for another, after a wait that saves its work."""

    job: int
    beneficiary: int
    after_seconds: float


@dataclass(frozen=True)
class Reservation:
    """This job will start at this time at the latest, if nobody of a higher level comes."""

    job: int
    at: float


@dataclass(frozen=True)
class Plan:
    """What to do now."""

    starts: list[Start] = field(default_factory=list)
    evictions: list[Eviction] = field(default_factory=list)
    reservations: list[Reservation] = field(default_factory=list)
    impossible: list[int] = field(default_factory=list)
    """Jobs that no free cluster of these nodes, or no unused quota, could hold."""


def make_plan(
    now: float,
    nodes: Sequence[Node],
    waiting: Sequence[WaitingJob],
    running: Sequence[RunningJob],
    usage: Mapping[str, float],
    teams: Mapping[str, TeamConfig],
    policy: PolicyConfig,
) -> Plan:
    """Decide for this moment.

    Args:
        now: Seconds; the unit of all times here.
        nodes: Those that are up.
        waiting: The queue, in any order; without jobs that may not start yet.
        running: Every job that holds resources, stopping ones included.
        usage: Each team's past use: its average dominant share over the half-life.
        teams: Weights and quotas.
        policy: The knobs.
    """
    plan = Plan()
    timeline = Timeline(now, nodes, {name: team.quota() for name, team in teams.items()})
    for job in running:
        timeline.add(
            job.id, job.gang, job.placement, now, max(job.ends_by, math.nextafter(now, math.inf))
        )
    total = _sum(node.total for node in nodes)
    shares = dict(usage)
    for job in running:
        shares[job.gang.team] = shares.get(job.gang.team, 0) + job.gang.total.share_of(total)
    too_large: set[Gang] = set()  # for what is free now, which only shrinks from here
    for candidate in _in_order(waiting, shares, total, teams, policy):
        gang = candidate.gang
        placement = None if gang in too_large else timeline.place(gang, now)
        if placement is not None:
            plan.starts.append(
                Start(candidate.id, placement, candidate.level(policy.ageing_seconds))
            )
            timeline.add(candidate.id, gang, placement, now, now + gang.seconds)
            continue
        too_large.add(gang)
        if len(plan.reservations) >= policy.reservations:
            continue
        found = timeline.earliest(gang)
        if found is None:
            plan.impossible.append(candidate.id)
            continue
        if policy.preemption and not plan.reservations:
            victims = _choose_victims(timeline, candidate, running, total, found[0], policy)
            if victims:
                plan.evictions.extend(victims)
                timeline = _without(timeline, victims, running)
                found = timeline.earliest(gang) or found
        plan.reservations.append(Reservation(candidate.id, found[0]))
        timeline.add(candidate.id, gang, found[1], found[0], found[0] + gang.seconds)
    return plan


def _in_order(
    waiting: Sequence[WaitingJob],
    shares: dict[str, float],
    total: Resources,
    teams: Mapping[str, TeamConfig],
    policy: PolicyConfig,
) -> Iterator[WaitingJob]:
    """Yield the jobs; each one counts against its team before the next is chosen."""
    queues: dict[str, list[WaitingJob]] = {}

    def rank(job: WaitingJob) -> tuple[int, float, int]:
        return -job.level(policy.ageing_seconds), job.submitted_at, job.id

    for job in sorted(waiting, key=rank, reverse=True):
        queues.setdefault(job.gang.team, []).append(job)

    def turn(team: str) -> tuple[int, float, float, int]:
        level, submitted_at, job = rank(queues[team][-1])
        weight = teams.get(team, TeamConfig()).weight
        return level, shares.get(team, 0.0) / weight, submitted_at, job

    while queues:
        team = min(queues, key=turn)
        job = queues[team].pop()
        if not queues[team]:
            del queues[team]
        shares[team] = shares.get(team, 0) + job.gang.total.share_of(total)
        yield job


def _choose_victims(
    timeline: Timeline,
    job: WaitingJob,
    running: Sequence[RunningJob],
    total: Resources,
    natural_start: float,
    policy: PolicyConfig,
) -> list[Eviction]:
    """Return the cheapest evictions that let a job start now, none if they would not help."""

    def wait(victim: RunningJob) -> float:
        if victim.safe_in is None or victim.safe_in > policy.patience_seconds:
            return 0.0
        return victim.safe_in

    def cost(victim: RunningJob) -> tuple[float, int]:
        says_when = victim.safe_in is not None and victim.safe_in <= policy.patience_seconds
        lost = 0.0 if says_when else victim.unsaved_seconds
        return lost * victim.gang.total.share_of(total), -victim.id

    candidates = sorted(
        (r for r in running if r.evictable and not r.stopping and r.level < job.priority), key=cost
    )
    chosen: list[RunningJob] = []
    for victim in candidates:
        chosen.append(victim)
        if timeline.ending([v.id for v in chosen], timeline.now).place(job.gang, timeline.now):
            break
    else:
        return []
    for victim in sorted(chosen, key=cost, reverse=True):
        rest = [v for v in chosen if v is not victim]
        if timeline.ending([v.id for v in rest], timeline.now).place(job.gang, timeline.now):
            chosen = rest
    if natural_start <= timeline.now + max(wait(v) + v.grace_seconds for v in chosen):
        return []  # waiting takes no longer
    return [Eviction(v.id, job.id, wait(v)) for v in chosen]


def _without(
    timeline: Timeline, evictions: Sequence[Eviction], running: Sequence[RunningJob]
) -> Timeline:
    """Let evicted jobs end with their grace period."""
    by_id = {job.id: job for job in running}
    for eviction in evictions:
        end = timeline.now + eviction.after_seconds + by_id[eviction.job].grace_seconds
        timeline = timeline.ending([eviction.job], max(end, math.nextafter(timeline.now, math.inf)))
    return timeline


def _sum(amounts: Iterable[Resources]) -> Resources:
    total = Resources.zero()
    for amount in amounts:
        total = total + amount
    return total
