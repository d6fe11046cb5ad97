"""The scheduling policy over random traces, and each of its rules by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.cluster.config import PolicyConfig, TeamConfig
from minigpt.cluster.policy import Plan, RunningJob, WaitingJob, make_plan
from minigpt.cluster.resources import Resources
from minigpt.cluster.timeline import Gang, Node, Placement

NODES = [Node("a", Resources(4000, 64, 4)), Node("b", Resources(4000, 64, 4))]
SMALL = Resources(1000, 8, 1)
TOTAL = Resources(8000, 128, 8)


def gang(workers: int = 1, seconds: float = 100, team: str = "t", **options: bool) -> Gang:
    return Gang(team, workers, SMALL, seconds, **options)


def waiting(id: int, gang: Gang, priority: int = 0, waited: float = 0) -> WaitingJob:
    return WaitingJob(id, gang, priority, submitted_at=float(id), waited=waited)


def running(id: int, gang: Gang, placement: Placement, **values: object) -> RunningJob:
    defaults: dict[str, object] = {
        "level": 0,
        "ends_by": 1000.0,
        "evictable": True,
        "grace_seconds": 10.0,
        "unsaved_seconds": 50.0,
    }
    return RunningJob(id, gang, placement, **(defaults | values))  # type: ignore[arg-type]


def plan(
    waits: Sequence[WaitingJob],
    runs: Sequence[RunningJob] = (),
    teams: dict[str, TeamConfig] | None = None,
    usage: dict[str, float] | None = None,
    **policy: object,
) -> Plan:
    knobs = PolicyConfig.model_validate(policy)
    return make_plan(0.0, NODES, waits, runs, usage or {}, teams or {}, knobs)


def started(plan: Plan) -> list[int]:
    return [start.job for start in plan.starts]


# By hand.


def test_a_gang_starts_whole_or_not_at_all() -> None:
    made = plan([waiting(1, gang(9)), waiting(2, gang(8))])
    assert made.impossible == [1]
    assert [len(start.placement) for start in made.starts] == [8]
    assert Counter(made.starts[0].placement) == {"a": 4, "b": 4}


def test_packing_takes_the_tightest_node_and_strict_packing_only_one() -> None:
    busy = running(1, gang(3), ("a", "a", "a"))
    assert plan([waiting(2, gang(1))], [busy]).starts[0].placement == ("a",)
    assert plan([waiting(2, gang(4))], [busy]).starts[0].placement == ("b",) * 4
    spread = plan([waiting(2, gang(5))], [busy])
    assert Counter(spread.starts[0].placement) == {"b": 4, "a": 1}
    strict = waiting(3, gang(5, strict_pack=True))
    assert plan([strict], [busy]).impossible == [3]


def test_back_fill_takes_what_the_head_does_not_need_in_time() -> None:
    busy = running(1, gang(4), ("a",) * 4, ends_by=50.0, evictable=False)
    head = waiting(2, gang(8))
    short, long = waiting(3, gang(1, seconds=50)), waiting(4, gang(1, seconds=51))
    made = plan([head, short, long], [busy])
    assert started(made) == [3]
    assert made.reservations[0].job == 2 and made.reservations[0].at == 50.0


def test_quota_limits_a_team_and_no_other() -> None:
    teams = {"t": TeamConfig(gpus=2)}
    waits = [waiting(i, gang(1)) for i in range(4)] + [waiting(9, gang(1, team="u"))]
    assert started(plan(waits, teams=teams)) == [0, 9, 1]  # in turn, as `u` had nothing yet
    assert plan([waiting(1, gang(3))], teams=teams).impossible == [1]


def test_a_team_over_its_quota_keeps_room_for_its_own_head_but_blocks_nobody() -> None:
    teams = {"t": TeamConfig(gpus=4)}
    busy = running(1, gang(2), ("a", "a"), ends_by=50.0, evictable=False)
    waits = [waiting(2, gang(4)), waiting(3, gang(1)), waiting(4, gang(2, team="u"))]
    assert started(plan(waits, [busy], teams)) == [4]


def test_priority_then_share_then_age() -> None:
    usage = {"heavy": 0.5, "light": 0.1}
    waits = [
        waiting(1, gang(4, team="heavy")),
        waiting(2, gang(4, team="light")),
        waiting(3, gang(4, team="heavy"), priority=1),
    ]
    assert started(plan(waits, usage=usage)) == [3, 2]
    weighted = {"heavy": TeamConfig(weight=100)}
    assert started(plan(waits, usage=usage, teams=weighted)) == [3, 1]


def test_waiting_raises_the_level() -> None:
    waits = [waiting(1, gang(8), priority=0, waited=301), waiting(2, gang(8), priority=3)]
    assert started(plan(waits, ageing_seconds=100)) == [1]
    assert started(plan(waits, ageing_seconds=200)) == [2]


def test_victims_are_those_that_lose_least() -> None:
    runs = [
        running(1, gang(4), ("a",) * 4, unsaved_seconds=500.0),
        running(2, gang(4), ("b",) * 4, unsaved_seconds=20.0),
    ]
    made = plan([waiting(3, gang(4), priority=1)], runs)
    assert [(e.job, e.beneficiary, e.after_seconds) for e in made.evictions] == [(2, 3, 0.0)]


def test_a_job_that_is_soon_safe_is_waited_for() -> None:
    runs = [
        running(1, gang(4), ("a",) * 4, unsaved_seconds=500.0, safe_in=30.0),
        running(2, gang(4), ("b",) * 4, unsaved_seconds=20.0),
    ]
    made = plan([waiting(3, gang(4), priority=1)], runs, patience_seconds=60)
    assert [(e.job, e.after_seconds) for e in made.evictions] == [(1, 30.0)]
    made = plan([waiting(3, gang(4), priority=1)], runs, patience_seconds=10)
    assert [(e.job, e.after_seconds) for e in made.evictions] == [(2, 0.0)]


def test_no_eviction_that_is_pointless() -> None:
    urgent = waiting(3, gang(8), priority=5)
    pinned = running(1, gang(1), ("a",), evictable=False)
    other = running(2, gang(1), ("b",))
    assert not plan([urgent], [pinned, other]).evictions  # it would not make room enough
    equal = running(1, gang(8), ("a",) * 4 + ("b",) * 4, level=5)
    assert not plan([urgent], [equal]).evictions  # not of a lower level
    ending = running(1, gang(8), ("a",) * 4 + ("b",) * 4, ends_by=8.0)
    assert not plan([urgent], [ending]).evictions  # it ends before its grace period would
    stopping = running(1, gang(8), ("a",) * 4 + ("b",) * 4, stopping=True)
    assert not plan([urgent], [stopping]).evictions
    assert not plan([urgent], [replace(equal, level=0)], preemption=False).evictions


def test_room_beside_the_victims_is_kept_for_the_head() -> None:
    victim = running(1, gang(4), ("b",) * 4)
    made = plan([waiting(2, gang(8), priority=1), waiting(3, gang(1, seconds=60))], [victim])
    assert [e.job for e in made.evictions] == [1]
    assert started(made) == []  # a 60 s job on `a` would outlast the grace period


# Random traces.


@dataclass
class Job:
    """A job of a trace and what became of it."""

    id: int
    gang: Gang
    priority: int
    arrives: float
    left: float
    """Seconds of work, less than its limit."""
    evictable: bool
    waited: float = 0.0
    queued_at: float = 0.0
    began: list[float] = field(default_factory=list)
    ended: float | None = None


@dataclass
class Live:
    """A start of a job that has its nodes."""

    placement: Placement
    level: int
    began: float
    ends: float
    evicted: bool = False


GRACE = 5.0


class Cluster:
    """Plays a trace against the policy and checks, at every event, what must always hold."""

    def __init__(
        self, jobs: Sequence[Job], teams: dict[str, TeamConfig], policy: PolicyConfig
    ) -> None:
        self.now = 0.0
        self.jobs = {job.id: job for job in jobs}
        self.teams, self.policy = teams, policy
        self.coming = sorted(jobs, key=lambda job: (job.arrives, job.id))
        self.queue: list[int] = []
        self.live: dict[int, Live] = {}
        self.impossible: set[int] = set()
        self.plans: list[tuple[float, Plan]] = []
        self.used: dict[str, float] = {}

    def play(self) -> None:
        for _ in range(60 * len(self.jobs) + 60):
            self._arrive()
            self._schedule()
            self._check()
            moments = [live.ends for live in self.live.values()]
            moments += [job.arrives for job in self.coming[:1]]
            if not moments:
                break
            self._pass(max(min(moments), self.now))
        assert not self.live and not self.coming
        assert set(self.queue) == self.impossible, "a job waits though nothing else is there"
        for job in self.jobs.values():
            assert (job.ended is not None) != (job.id in self.impossible), job

    def _pass(self, until: float) -> None:
        for id, live in self.live.items():
            team = self.jobs[id].gang.team
            share = self.jobs[id].gang.total.share_of(TOTAL)
            self.used[team] = self.used.get(team, 0.0) + share * (until - self.now) / 1e4
            assert live.ends >= until
        self.now = until
        for id in [id for id, live in self.live.items() if live.ends <= until]:
            live, job = self.live.pop(id), self.jobs[id]
            if live.evicted:
                job.left -= until - live.began  # it saved its work within the grace period
                job.queued_at = until
                self.queue.append(id)
            else:
                job.ended = until

    def _arrive(self) -> None:
        while self.coming and self.coming[0].arrives <= self.now:
            job = self.coming.pop(0)
            job.queued_at = self.now
            self.queue.append(job.id)

    def _schedule(self) -> None:
        waits = [
            WaitingJob(j.id, j.gang, j.priority, j.arrives, j.waited + self.now - j.queued_at)
            for j in (self.jobs[id] for id in self.queue)
        ]
        runs = [
            RunningJob(
                id=id,
                gang=self.jobs[id].gang,
                placement=live.placement,
                level=live.level,
                ends_by=live.ends if live.evicted else live.began + self.jobs[id].gang.seconds,
                evictable=self.jobs[id].evictable,
                grace_seconds=GRACE,
                unsaved_seconds=self.now - live.began,
                stopping=live.evicted,
            )
            for id, live in self.live.items()
        ]
        made = make_plan(self.now, NODES, waits, runs, self.used, self.teams, self.policy)
        self.plans.append((self.now, made))
        self.impossible |= set(made.impossible)
        for start in made.starts:
            job = self.jobs[start.job]
            self.queue.remove(job.id)
            job.waited += self.now - job.queued_at
            job.began.append(self.now)
            assert len(start.placement) == job.gang.workers, "a partial gang"
            assert not job.gang.strict_pack or len(set(start.placement)) == 1
            ends = self.now + max(job.left, 0.1)
            self.live[job.id] = Live(start.placement, start.level, self.now, ends)
        for eviction in made.evictions:
            live = self.live[eviction.job]
            assert self.jobs[eviction.job].evictable and not live.evicted
            assert live.level < self.jobs[eviction.beneficiary].priority
            if live.ends > self.now + GRACE:
                live.ends, live.evicted = self.now + GRACE, True

    def _check(self) -> None:
        of_node: dict[str, Resources] = {}
        of_team: dict[str, Resources] = {}
        for id, live in self.live.items():
            gang = self.jobs[id].gang
            for name in live.placement:
                of_node[name] = of_node.get(name, Resources.zero()) + gang.per_worker
            of_team[gang.team] = of_team.get(gang.team, Resources.zero()) + gang.total
        for node in NODES:
            assert of_node.get(node.name, Resources.zero()).fits_in(node.total), "capacity"
        for team, amount in of_team.items():
            if team in self.teams:
                assert amount.fits_in(self.teams[team].quota()), "quota"


amounts = st.builds(
    Resources, st.integers(0, 5).map(lambda n: n * 1000), st.integers(1, 70), st.integers(0, 4)
)


@st.composite
def traces(draw: st.DrawFn, *, teams: Sequence[str], priorities: int) -> list[Job]:
    jobs = []
    for id in range(draw(st.integers(1, 25))):
        limit = draw(st.integers(1, 400))
        jobs.append(
            Job(
                id=id,
                gang=Gang(
                    draw(st.sampled_from(teams)),
                    draw(st.integers(1, 9)),
                    draw(amounts),
                    float(limit) + GRACE,
                    draw(st.booleans()),
                ),
                priority=draw(st.integers(0, priorities)),
                arrives=float(draw(st.integers(0, 600))),
                left=limit * draw(st.floats(0.05, 1.0)),
                evictable=draw(st.booleans()),
            )
        )
    return jobs


QUOTAS = {"x": TeamConfig(gpus=3, weight=2), "y": TeamConfig(cpus=5, memory_gib=60 / 2**30)}


@settings(max_examples=80, deadline=None)
@given(
    traces(teams=["x", "y", "z"], priorities=4),
    st.integers(1, 10),
    st.sampled_from([20.0, 300.0, 1e6]),
)
def test_capacity_quota_gangs_and_no_job_lost(
    jobs: list[Job], reservations: int, ageing: float
) -> None:
    policy = PolicyConfig(reservations=reservations, ageing_seconds=ageing)
    Cluster(jobs, QUOTAS, policy).play()


@settings(max_examples=80, deadline=None)
@given(traces(teams=["t"], priorities=0), st.integers(1, 10))
def test_back_fill_never_delays_the_head(jobs: list[Job], reservations: int) -> None:
    """In a first-come queue the head's promised start only ever moves nearer."""
    policy = PolicyConfig(reservations=reservations, ageing_seconds=1e9, preemption=False)
    cluster = Cluster(jobs, {}, policy)
    cluster.play()
    promised: dict[int, float] = {}
    for _, made in cluster.plans:
        if made.reservations:
            head = made.reservations[0]
            assert head.at <= promised.get(head.job, head.at) + 1e-6
            promised[head.job] = head.at
    for id, at in promised.items():
        assert cluster.jobs[id].began[0] <= at + 1e-6


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 8), st.integers(1, 60), st.integers(0, 3)),
        min_size=25,
        max_size=40,
    ),
    st.booleans(),
)
def test_nothing_starves(stream: list[tuple[int, int, int]], preemption: bool) -> None:
    """A job as large as the cluster, of the lowest priority, gets its turn in a stream of others.

    After (highest priority + 1) x ageing nobody who comes anew is before it; then those that are
    there and what runs, at most the work that arrived until then, is all that it can wait for.
    """
    ageing = 10.0
    big = Job(0, gang(8, seconds=65), 0, 0.5, 60.0, evictable=True)
    jobs = [big]
    for id, (workers, seconds, priority) in enumerate(stream, start=1):
        jobs.append(
            Job(id, gang(workers, seconds + GRACE), priority, id * 2.0, float(seconds), True)
        )
    policy = PolicyConfig(ageing_seconds=ageing, preemption=preemption)
    cluster = Cluster(jobs, {}, policy)
    cluster.play()
    before = [job for job in jobs[1:] if job.arrives <= 4 * ageing]
    bound = 4 * ageing + sum(job.gang.seconds for job in before) + 65
    assert big.began[0] <= bound


def test_the_share_follows_the_weights() -> None:
    """Two teams that always have jobs waiting: machine time in the ratio of their weights."""
    jobs = [
        Job(id, gang(2, seconds=10, team="xy"[id % 2]), 0, 0.0, 10.0, False) for id in range(240)
    ]
    teams = {"x": TeamConfig(weight=3), "y": TeamConfig(weight=1)}
    policy = PolicyConfig(ageing_seconds=1e9)
    cluster = Cluster(jobs, teams, policy)
    cluster.play()
    first = [job for job in jobs if job.ended is not None and job.ended <= 200]
    counts = Counter(job.gang.team for job in first)
    assert 2.5 < counts["x"] / counts["y"] < 3.5
