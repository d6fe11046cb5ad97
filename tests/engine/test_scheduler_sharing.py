"""Prefixes, forks and failures: what sequences have in common, and must not."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.engine.scheduling import (
    carry_out,
    check_batch,
    make_scheduler,
    make_sequence,
    run_to_end,
)

from minigpt.api.requests import Request, SamplingParams
from minigpt.engine.fairness import FairQueue
from minigpt.engine.sequence import Sequence

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
        self.scheduler = make_scheduler(
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
        check_batch(scheduler, batch, decoding)
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


def _forked(prompt: int, n: int, output: int) -> list[Sequence]:
    request = Request(
        id="r", prompt_token_ids=list(range(prompt)), n=n,
        sampling=SamplingParams(max_tokens=output),
    )  # fmt: skip
    return [Sequence.from_request(request, index, index, seed=0) for index in range(n)]


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("prompt", [1, 2, 4, 5, 23, 24])
def test_answers_to_one_prompt_compute_it_once(prompt: int, prefix_cache: bool) -> None:
    scheduler = make_scheduler(64, 8, 10, prefix_cache=prefix_cache)
    for sequence in _forked(prompt, 5, 6):
        scheduler.add(sequence)
    batches = run_to_end(scheduler)
    prefill = sum(batch.num_tokens - batch.num_decode_tokens for batch in batches)
    assert prefill == prompt + 4, "the others compute their last token alone"
    assert scheduler.num_prefix_queries == 5 * prompt
    assert scheduler.num_prefix_hits == 4 * (prompt - 1)
    copies = [pair for batch in batches for pair in batch.copies]
    assert len(copies) == (4 if (prompt - 1) % 4 else 0), "only a block that is written to"


def test_forks_share_memory() -> None:
    scheduler = make_scheduler(64, 8, 64)
    for sequence in _forked(40, 4, 3):
        scheduler.add(sequence)
    carry_out(scheduler, scheduler.schedule())
    scheduler.schedule()
    assert len(scheduler.running) == 4
    assert scheduler.blocks.num_used == 9 + 3 + 2  # full ones; copies; the first one's and its next


def test_a_finished_answer_is_found_by_the_next_turn() -> None:
    scheduler = make_scheduler(64, 8, 64)
    first = make_sequence(0, 21, 10)
    scheduler.add(first)
    run_to_end(scheduler)
    turn = make_sequence(1, 1, 4)
    turn.token_ids[:] = [*first.token_ids, 7, 7, 7]
    turn.num_prompt_tokens = len(turn.token_ids)
    scheduler.add(turn)
    (chunk,) = scheduler.schedule().chunks
    assert chunk.start == 28  # of 30 computed tokens the full blocks
    assert scheduler.num_prefix_hits == 28


def test_all_of_a_prompt_but_its_last_block_is_found() -> None:
    scheduler = make_scheduler(64, 8, 64)
    for arrival in range(2):
        sequence = make_sequence(0, 16, 1)
        sequence.arrival = arrival
        scheduler.add(sequence)
        chunks = [chunk for batch in run_to_end(scheduler) for chunk in batch.chunks]
        assert [(chunk.start, chunk.stop) for chunk in chunks] == [(12 * arrival, 16)]


def test_prompts_that_arrive_together_compute_what_they_share_once() -> None:
    scheduler = make_scheduler(128, 16, 16)
    for arrival in range(8):
        sequence = make_sequence(arrival, 1, 4)
        sequence.token_ids[:] = [*range(40), 100 + arrival]
        sequence.num_prompt_tokens = 41
        scheduler.add(sequence)
    batches = run_to_end(scheduler)
    assert sum(b.num_tokens - b.num_decode_tokens for b in batches) == 40 + 8


def test_the_weights_of_a_sequence_decide_what_it_finds() -> None:
    scheduler = make_scheduler(64, 8, 64)
    for arrival, root in enumerate([b"old", b"new"]):
        sequence = make_sequence(0, 30, 1)
        sequence.arrival, sequence.prefix_root = arrival, root
        scheduler.add(sequence)
        run_to_end(scheduler)
    assert scheduler.num_prefix_hits == 0
