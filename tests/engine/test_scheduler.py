from __future__ import annotations

import itertools
from collections import defaultdict, deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from minigpt.api.requests import Request, SamplingParams
from minigpt.core.errors import RequestError
from minigpt.engine.blocks import BlockManager
from minigpt.engine.cost_model import Pacer, StepWork
from minigpt.engine.fairness import FairQueue
from minigpt.engine.scheduler import Batch, Scheduler
from minigpt.engine.sequence import Sequence, SequenceStatus


def _sequence(
    arrival: int, prompt: int, output: int, *, priority: int = 0, tenant: str = ""
) -> Sequence:
    """A prompt that shares no block with another one's."""
    sampling = SamplingParams(max_tokens=output)
    request = Request(
        id=str(arrival), prompt_token_ids=[1000 + arrival, *range(1, prompt)], sampling=sampling,
        priority=priority, tenant=tenant,
    )  # fmt: skip
    return Sequence.from_request(request, 0, arrival, seed=0)


def _scheduler(
    num_blocks: int, max_num_seqs: int, budget: int, block_size: int = 4, **options: Any
) -> Scheduler:
    return Scheduler(BlockManager(num_blocks, block_size), max_num_seqs, budget, **options)


def _carry_out(scheduler: Scheduler, batch: Batch) -> list[Sequence]:
    """Do what the engine does with a batch, and return who finished."""
    scheduler.advance(batch.chunks)
    finished = []
    for chunk in batch.chunks:
        sequence = chunk.sequence
        assert chunk.samples == (chunk.stop == sequence.num_tokens)
        if chunk.samples:
            sequence.token_ids.append(0)
            if sequence.num_output_tokens == sequence.sampling.max_tokens:
                scheduler.finish(sequence)
                finished.append(sequence)
    return finished


def _check_batch(scheduler: Scheduler, batch: Batch, decoding: list[Sequence]) -> None:
    assert batch.num_tokens <= scheduler.max_batched_tokens
    scheduled = {id(chunk.sequence) for chunk in batch.chunks}
    assert len(scheduled) == len(batch.chunks), "a sequence is scheduled twice"
    preempted = {id(sequence) for sequence in batch.preempted}
    assert not scheduled & preempted
    for sequence in decoding:
        assert id(sequence) in scheduled | preempted, "decode was starved"
    block_size = scheduler.blocks.block_size
    slots: set[int] = set()
    for chunk in batch.chunks:
        assert chunk.sequence.status is SequenceStatus.RUNNING
        assert chunk.start == chunk.sequence.num_computed
        table = chunk.sequence.block_table
        assert chunk.stop <= len(table) * block_size
        new = {
            table[t // block_size] * block_size + t % block_size
            for t in range(chunk.start, chunk.stop)
        }
        assert not slots & new, "two sequences write to one slot"
        slots |= new


@given(
    data=st.data(),
    num_blocks=st.integers(3, 14),
    max_num_seqs=st.integers(1, 5),
    extra_budget=st.integers(0, 9),
)
@settings(max_examples=300, deadline=None)
def test_random_load(
    data: st.DataObject, num_blocks: int, max_num_seqs: int, extra_budget: int
) -> None:
    """Arrivals, aborts, any lengths, a tiny cache: everything finishes and nothing leaks."""
    scheduler = _scheduler(num_blocks, max_num_seqs, max_num_seqs + extra_budget)
    capacity = num_blocks * 4
    lengths = st.tuples(st.integers(1, capacity), st.integers(1, capacity)).filter(
        lambda pair: sum(pair) - 1 <= capacity
    )
    requests: list[tuple[int, int]] = data.draw(st.lists(lengths, min_size=1, max_size=12))
    arrivals = deque(requests)
    alive: list[Sequence] = []
    finished: list[Sequence] = []
    order = itertools.count()
    total = len(arrivals)
    # The oldest sequence moves in each step, so that this many steps are always enough.
    limit = 2 * sum(prompt + output + 2 for prompt, output in arrivals) + 10
    for _ in range(limit):
        while arrivals and not (scheduler.has_work and data.draw(st.booleans())):
            prompt, output = arrivals.popleft()
            sequence = _sequence(next(order), prompt, output)
            scheduler.check_fits(sequence.most_cached_tokens)
            scheduler.add(sequence)
            alive.append(sequence)
        if alive and data.draw(st.integers(0, 9)) == 0:
            victim = alive.pop(data.draw(st.integers(0, len(alive) - 1)))
            scheduler.finish(victim)
            finished.append(victim)
        decoding = [s for s in scheduler.running if s.num_remaining == 1]
        oldest = min(alive, key=lambda s: s.arrival, default=None)
        progress = oldest.num_computed if oldest else 0
        batch = scheduler.schedule()
        scheduler.check()
        _check_batch(scheduler, batch, decoding)
        assert bool(batch.chunks) == bool(alive), "work but an empty batch"
        done = _carry_out(scheduler, batch)
        if oldest is not None and oldest not in done:
            assert oldest.num_computed > progress, "the oldest did not move"
        finished += done
        alive = [s for s in alive if s not in done]
        if not alive and not arrivals:
            break
    assert len(finished) == total
    assert all(s.status is SequenceStatus.FINISHED for s in finished)
    assert not scheduler.has_work
    assert scheduler.blocks.num_used == 0
    scheduler.check()


def test_decode_comes_before_prefill_and_shares_its_budget() -> None:
    scheduler = _scheduler(64, 4, 8)
    for arrival in range(2):
        scheduler.add(_sequence(arrival, 3, 20))
    _carry_out(scheduler, scheduler.schedule())
    scheduler.add(_sequence(2, 100, 4))
    for step in range(16):
        batch = scheduler.schedule()
        assert batch.num_decode_tokens == 2
        assert [chunk.length for chunk in batch.chunks] == [1, 1, 6]
        assert batch.chunks[2].start == 6 * step
        _carry_out(scheduler, batch)


def test_a_prompt_of_one_token_is_prefill() -> None:
    scheduler = _scheduler(4, 2, 4)
    scheduler.add(_sequence(0, 1, 2))
    batch = scheduler.schedule()
    assert batch.num_decode_tokens == 0
    _carry_out(scheduler, batch)
    assert scheduler.schedule().num_decode_tokens == 1


def test_first_come_first_served() -> None:
    """A short request does not overtake a long one that waits for blocks."""
    scheduler = _scheduler(8, 4, 64)
    scheduler.add(_sequence(0, 16, 8))
    _carry_out(scheduler, scheduler.schedule())
    scheduler.add(_sequence(1, 20, 2))
    scheduler.add(_sequence(2, 1, 1))
    for _ in range(3):
        batch = scheduler.schedule()
        assert [chunk.sequence.arrival for chunk in batch.chunks] == [0]
        _carry_out(scheduler, batch)


def test_the_youngest_is_preempted_and_computed_anew() -> None:
    scheduler = _scheduler(5, 2, 16)
    old, young = _sequence(0, 7, 9), _sequence(1, 4, 8)
    scheduler.add(old)
    scheduler.add(young)
    preempted = []
    while young.num_output_tokens < 8:
        batch = scheduler.schedule()
        preempted += batch.preempted
        _carry_out(scheduler, batch)
    assert preempted == [young]
    assert old.status is SequenceStatus.FINISHED
    assert young.status is SequenceStatus.FINISHED
    assert scheduler.num_preemptions == 1


def test_nobody_is_admitted_only_to_be_preempted_next() -> None:
    """The running sequence is about to need a block: the last ones are not given away."""
    scheduler = _scheduler(4, 2, 16)
    old, young = _sequence(0, 4, 8), _sequence(1, 12, 2)
    scheduler.add(old)
    scheduler.add(young)
    while scheduler.has_work:
        _carry_out(scheduler, scheduler.schedule())
    assert scheduler.num_preemptions == 0


def test_what_can_never_fit_is_refused() -> None:
    scheduler = _scheduler(4, 2, 8)
    scheduler.check_fits(16)
    with pytest.raises(RequestError, match="need 17 tokens of KV cache, it holds 16"):
        scheduler.check_fits(17)


Content = tuple[bytes, tuple[int, ...]]


class SchedulerMachine(RuleBasedStateMachine):
    """A whole engine without a model: the cache's slots say what was computed into them.

    Few distinct prompts and tokens, so that prefixes are shared, forked and evicted all the time;
    what a token attends to must be its own sequence's tokens, wherever they came from.
    """

    def __init__(self) -> None:
        super().__init__()
        self.slots: dict[int, Content] = {}
        self.alive: list[Sequence] = []
        self.arrivals = itertools.count()
        self.requests = itertools.count()
        self.make(prefix_cache=True)

    def make(self, prefix_cache: bool) -> None:
        queue = FairQueue({"b": 3.0})
        self.scheduler = _scheduler(
            9, 4, 7, queue=queue, prefix_cache=prefix_cache, priority_step_tokens=20
        )

    @precondition(lambda self: not self.slots and not self.alive)
    @rule()
    def without_prefix_cache(self) -> None:
        self.make(prefix_cache=False)

    @rule(
        shared=st.integers(0, 16), suffix=st.lists(st.integers(1, 2), max_size=3),
        output=st.integers(1, 14), n=st.sampled_from([1, 1, 1, 2, 4]),
        priority=st.integers(-2, 2), tenant=st.sampled_from(["a", "b"]),
        root=st.sampled_from([b"x", b"x", b"y"]), reads=st.sampled_from([True, True, False]),
    )  # fmt: skip
    def arrive(
        self, shared: int, suffix: list[int], output: int, n: int, priority: int, tenant: str,
        root: bytes, reads: bool,
    ) -> None:  # fmt: skip
        request = Request(
            id=str(next(self.requests)), prompt_token_ids=[5] + [9] * shared + suffix, n=n,
            priority=priority, tenant=tenant, sampling=SamplingParams(max_tokens=output),
        )  # fmt: skip
        for index in range(n):
            sequence = Sequence.from_request(request, index, next(self.arrivals), 0, root)
            sequence.reads_cache = reads
            self.scheduler.check_fits(sequence.most_cached_tokens)
            self.scheduler.add(sequence)
            self.alive.append(sequence)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = self.alive.pop(data.draw(st.integers(0, len(self.alive) - 1)))
        self.scheduler.finish(sequence)
        assert not sequence.block_table

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.scheduler.running))
        others = {b for s in self.scheduler.running if s is not sequence for b in s.block_table}
        zeroed = self.scheduler.poison(sequence)
        assert not others & set(zeroed), "zeroed what others read"
        assert set(zeroed) | others >= set(sequence.block_table)
        for block in zeroed:
            for slot in range(4 * block, 4 * block + 4):
                self.slots.pop(slot, None)
        self.scheduler.finish(sequence)
        self.alive.remove(sequence)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.one_step()

    def one_step(self) -> None:
        scheduler = self.scheduler
        decoding = [s for s in scheduler.running if s.num_remaining == 1]
        batch = scheduler.schedule()
        scheduler.check()
        _check_batch(scheduler, batch, decoding)
        assert bool(batch.chunks) == bool(self.alive), "work but an empty batch"
        if not batch.chunks:
            return
        moves = {id(chunk.sequence) for chunk in batch.chunks}
        assert id(scheduler.running[0]) in moves, "the most urgent did not move"
        for source, destination in batch.copies:
            for offset in range(4):
                self.slots.pop(4 * destination + offset, None)
                if 4 * source + offset in self.slots:
                    self.slots[4 * destination + offset] = self.slots[4 * source + offset]
        for chunk in batch.chunks:
            for position in range(chunk.start, chunk.stop):
                self.slots[self.slot(chunk.sequence, position)] = _content(chunk.sequence, position)
        for sequence in scheduler.running:
            computed = {id(c.sequence): c.stop for c in batch.chunks}
            for position in range(computed.get(id(sequence), sequence.num_computed)):
                found = self.slots.get(self.slot(sequence, position))
                assert found == _content(sequence, position), "another sequence's tokens"
        scheduler.advance(batch.chunks)
        for chunk in batch.chunks:
            sequence = chunk.sequence
            assert chunk.samples == (chunk.stop == sequence.num_tokens)
            if chunk.samples:
                sequence.token_ids.append(1 + (sum(sequence.token_ids) + sequence.index) % 2)
                if sequence.num_output_tokens == sequence.sampling.max_tokens:
                    scheduler.finish(sequence)
                    self.alive.remove(sequence)

    @invariant()
    def books_match(self) -> None:
        self.scheduler.check()
        assert {id(s) for s in self.alive} == {
            id(s) for s in (*self.scheduler.running, *self.scheduler.queue)
        }
        assert self.scheduler.num_prefix_hits <= self.scheduler.num_prefix_queries

    def teardown(self) -> None:
        for _ in range(40 * (len(self.alive) + 1)):
            self.one_step()
        assert not self.alive, "starved"
        assert not self.scheduler.has_work
        assert self.scheduler.blocks.num_used == 0
        self.scheduler.check()

    def slot(self, sequence: Sequence, position: int) -> int:
        return 4 * sequence.block_table[position // 4] + position % 4


def _content(sequence: Sequence, position: int) -> Content:
    return sequence.prefix_root, tuple(sequence.token_ids[: position + 1])


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)


def _run_to_end(scheduler: Scheduler) -> list[Batch]:
    batches = []
    while scheduler.has_work:
        batches.append(scheduler.schedule())
        _carry_out(scheduler, batches[-1])
    scheduler.check()
    return batches


def _forked(prompt: int, n: int, output: int) -> list[Sequence]:
    request = Request(
        id="r", prompt_token_ids=list(range(prompt)), n=n,
        sampling=SamplingParams(max_tokens=output),
    )  # fmt: skip
    return [Sequence.from_request(request, index, index, seed=0) for index in range(n)]


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("prompt", [1, 2, 4, 5, 23, 24])
def test_answers_to_one_prompt_compute_it_once(prompt: int, prefix_cache: bool) -> None:
    scheduler = _scheduler(64, 8, 10, prefix_cache=prefix_cache)
    for sequence in _forked(prompt, 5, 6):
        scheduler.add(sequence)
    batches = _run_to_end(scheduler)
    prefill = sum(batch.num_tokens - batch.num_decode_tokens for batch in batches)
    assert prefill == prompt + 4, "the others compute their last token alone"
    assert scheduler.num_prefix_queries == 5 * prompt
    assert scheduler.num_prefix_hits == 4 * (prompt - 1)
    copies = [pair for batch in batches for pair in batch.copies]
    assert len(copies) == (4 if (prompt - 1) % 4 else 0), "only a block that is written to"


def test_forks_share_memory() -> None:
    scheduler = _scheduler(64, 8, 64)
    for sequence in _forked(40, 4, 3):
        scheduler.add(sequence)
    _carry_out(scheduler, scheduler.schedule())
    scheduler.schedule()
    assert len(scheduler.running) == 4
    assert scheduler.blocks.num_used == 9 + 3 + 2  # full ones; copies; the first one's and its next


def test_a_finished_answer_is_found_by_the_next_turn() -> None:
    scheduler = _scheduler(64, 8, 64)
    first = _sequence(0, 21, 10)
    scheduler.add(first)
    _run_to_end(scheduler)
    turn = _sequence(1, 1, 4)
    turn.token_ids[:] = [*first.token_ids, 7, 7, 7]
    turn.num_prompt_tokens = len(turn.token_ids)
    scheduler.add(turn)
    (chunk,) = scheduler.schedule().chunks
    assert chunk.start == 28  # of 30 computed tokens the full blocks
    assert scheduler.num_prefix_hits == 28


def test_all_of_a_prompt_but_its_last_block_is_found() -> None:
    scheduler = _scheduler(64, 8, 64)
    for arrival in range(2):
        sequence = _sequence(0, 16, 1)
        sequence.arrival = arrival
        scheduler.add(sequence)
        chunks = [chunk for batch in _run_to_end(scheduler) for chunk in batch.chunks]
        assert [(chunk.start, chunk.stop) for chunk in chunks] == [(12 * arrival, 16)]


def test_prompts_that_arrive_together_compute_what_they_share_once() -> None:
    scheduler = _scheduler(128, 16, 16)
    for arrival in range(8):
        sequence = _sequence(arrival, 1, 4)
        sequence.token_ids[:] = [*range(40), 100 + arrival]
        sequence.num_prompt_tokens = 41
        scheduler.add(sequence)
    batches = _run_to_end(scheduler)
    assert sum(b.num_tokens - b.num_decode_tokens for b in batches) == 40 + 8


def test_the_weights_of_a_sequence_decide_what_it_finds() -> None:
    scheduler = _scheduler(64, 8, 64)
    for arrival, root in enumerate([b"old", b"new"]):
        sequence = _sequence(0, 30, 1)
        sequence.arrival, sequence.prefix_root = arrival, root
        scheduler.add(sequence)
        _run_to_end(scheduler)
    assert scheduler.num_prefix_hits == 0


Q = 50
"""Computed tokens that weigh as much as a priority."""


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_who_may_overtake_whom(data: st.DataObject) -> None:
    """Within a tenant only the more urgent, between tenants only whoever was served less."""
    queue = FairQueue({"b": 2.0})
    scheduler = _scheduler(16, 3, 8, queue=queue, priority_step_tokens=Q)
    marks: dict[str, int] = {}
    computed, alive, longest = 0, 0, (16, 12)
    lengths = st.tuples(st.integers(1, longest[0]), st.integers(1, longest[1]))
    for arrival in range(data.draw(st.integers(5, 25))):
        prompt, output = data.draw(lengths)
        scheduler.add(
            _sequence(
                arrival, prompt, output, priority=data.draw(st.integers(0, 2)),
                tenant=data.draw(st.sampled_from(["a", "b"])),
            )
        )  # fmt: skip
        marks[str(arrival)] = computed
        alive += 1
        for _ in range(data.draw(st.integers(0, 4))):
            fresh = [s for s in scheduler.queue if s.num_cached_tokens is None]
            batch = scheduler.schedule()
            admitted = [s for s in fresh if s.num_cached_tokens is not None]
            waiting = [s for s in scheduler.queue if s.num_cached_tokens is None]
            for w, s in itertools.product(waiting, admitted):
                if w.tenant == s.tenant and w.arrival < s.arrival:
                    ahead = w.priority - s.priority
                    assert ahead > 0, "overtaken by one that is not more urgent"
                    assert marks[s.request_id] - marks[w.request_id] <= ahead * Q
            served = {s.tenant: queue.served(s.tenant) for s in scheduler.queue}
            if len(served) == 2:
                most, least = sorted(served, key=lambda t: served[t], reverse=True)
                weight = {"a": 1.0, "b": 2.0}[most]
                lead = (longest[0] + 2 * scheduler.max_num_seqs * longest[1]) / weight
                assert served[most] - served[least] <= lead
            computed += batch.num_tokens
            alive -= len(_carry_out(scheduler, batch))
    while scheduler.has_work:
        alive -= len(_carry_out(scheduler, scheduler.schedule()))
    assert alive == 0


def test_tenants_are_served_in_proportion_to_their_weights() -> None:
    """However many requests the greedy one sends, and however long they are."""
    queue = FairQueue({"paying": 3.0})
    scheduler = _scheduler(256, 4, 16, queue=queue)
    arrivals = itertools.count()
    for _ in range(60):
        scheduler.add(_sequence(next(arrivals), 30, 20, tenant="greedy"))
        scheduler.add(_sequence(next(arrivals), 8, 4, tenant="paying"))
    served: dict[str, float] = defaultdict(float)
    for _ in range(400):
        scheduler.add(_sequence(next(arrivals), 8, 4, tenant="paying"))
        batch = scheduler.schedule()
        for chunk in batch.chunks:
            served[chunk.sequence.tenant] += chunk.length - chunk.is_decode + 2 * chunk.samples
        _carry_out(scheduler, batch)
        assert {s.tenant for s in scheduler.queue} == {"greedy", "paying"}
    assert served["paying"] / served["greedy"] == pytest.approx(3, rel=0.1)


def test_a_tenant_that_returns_has_no_credit() -> None:
    queue = FairQueue()
    scheduler = _scheduler(64, 1, 16, queue=queue)
    arrivals = itertools.count()
    for _ in range(20):
        scheduler.add(_sequence(next(arrivals), 8, 4, tenant="steady"))
    for _ in range(30):
        _carry_out(scheduler, scheduler.schedule())
    for _ in range(10):
        scheduler.add(_sequence(next(arrivals), 8, 4, tenant="late"))
    order: list[str] = []
    for _ in range(40):
        batch = scheduler.schedule()
        order += [chunk.sequence.tenant for chunk in batch.chunks if not chunk.is_decode]
        _carry_out(scheduler, batch)
    assert abs(order.count("late") - order.count("steady")) <= 1


def test_the_urgent_go_first_and_the_patient_are_not_starved() -> None:
    """Under an endless flood of more urgent ones the patient one starts within its bound."""
    scheduler = _scheduler(64, 1, 16, priority_step_tokens=Q)
    arrivals = itertools.count()
    scheduler.add(_sequence(next(arrivals), 8, 4, priority=0))
    _carry_out(scheduler, scheduler.schedule())
    patient = _sequence(next(arrivals), 8, 4, priority=4)
    scheduler.add(patient)
    computed = overtaken = 0
    while patient.num_cached_tokens is None:
        scheduler.add(_sequence(next(arrivals), 8, 4, priority=0))
        batch = scheduler.schedule()
        overtaken += batch.num_decode_tokens == 0
        computed += batch.num_tokens
        _carry_out(scheduler, batch)
    # Of those that arrived before 4 * Q tokens each one in turn was served first, 11 tokens each.
    assert overtaken >= 4
    flood_before_bound = 4 * Q / 11 * 4 + 5
    assert computed <= 11 * (flood_before_bound + 1)


def test_preempted_is_the_least_urgent() -> None:
    scheduler = _scheduler(8, 3, 24)
    patient = _sequence(0, 7, 14, priority=1)
    normal, later = _sequence(1, 7, 14), _sequence(2, 7, 14)
    for sequence in (patient, normal, later):
        scheduler.add(sequence)
    preempted = [s for batch in _run_to_end(scheduler) for s in batch.preempted]
    assert preempted
    assert preempted[0] is patient
    assert normal not in preempted


def test_an_urgent_prompt_goes_ahead_of_one_that_is_being_computed() -> None:
    scheduler = _scheduler(64, 4, 8)
    scheduler.add(_sequence(0, 100, 2))
    _carry_out(scheduler, scheduler.schedule())
    scheduler.add(_sequence(1, 5, 2))
    assert [c.sequence.arrival for c in scheduler.schedule().chunks] == [0]
    scheduler.add(_sequence(2, 5, 2, priority=-1))
    batch = scheduler.schedule()
    assert [(c.sequence.arrival, c.length) for c in batch.chunks] == [(2, 5), (0, 3)]


def test_chunks_keep_the_streams_target() -> None:
    """Beside a stream no longer step is planned than its target; alone the budget is filled."""
    pacer = Pacer(0.02)
    scheduler = _scheduler(200, 4, 256, pacer=pacer)

    def seconds(work: StepWork) -> float:
        return 5e-3 + 2e-4 * work.prefill_tokens + 1e-3 * work.decode_rows

    def step() -> tuple[Batch, float]:
        batch = scheduler.schedule()
        took = seconds(batch.work)
        pacer.model.observe(batch.work, took)
        _carry_out(scheduler, batch)
        return batch, took

    for arrival in range(2):
        scheduler.add(_sequence(arrival, 20, 60))
        step()
    for _ in range(20):
        step()
    scheduler.add(_sequence(2, 600, 2))
    beside = [step() for _ in range(9)]
    for batch, took in beside[2:]:
        assert took <= 0.021
        assert batch.work.prefill_tokens >= 50
    for sequence in tuple(scheduler.running):
        scheduler.finish(sequence)
    scheduler.add(_sequence(3, 600, 2))
    assert step()[0].num_tokens == 256
