from __future__ import annotations

import itertools
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.scheduling import (
    carry_out,
    check_batch,
    make_scheduler,
    make_sequence,
)

from minigpt.core.errors import RequestError
from minigpt.engine.batch import Batch
from minigpt.engine.cost_model import Pacer, StepWork
from minigpt.engine.sequence import Sequence, SequenceStatus


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
    scheduler = make_scheduler(num_blocks, max_num_seqs, max_num_seqs + extra_budget)
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
            sequence = make_sequence(next(order), prompt, output)
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
        check_batch(scheduler, batch, decoding)
        assert bool(batch.chunks) == bool(alive), "work but an empty batch"
        done = carry_out(scheduler, batch)
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
    scheduler = make_scheduler(64, 4, 8)
    for arrival in range(2):
        scheduler.add(make_sequence(arrival, 3, 20))
    carry_out(scheduler, scheduler.schedule())
    scheduler.add(make_sequence(2, 100, 4))
    for step in range(16):
        batch = scheduler.schedule()
        assert batch.num_decode_tokens == 2
        assert [chunk.length for chunk in batch.chunks] == [1, 1, 6]
        assert batch.chunks[2].start == 6 * step
        carry_out(scheduler, batch)


def test_a_prompt_of_one_token_is_prefill() -> None:
    scheduler = make_scheduler(4, 2, 4)
    scheduler.add(make_sequence(0, 1, 2))
    batch = scheduler.schedule()
    assert batch.num_decode_tokens == 0
    carry_out(scheduler, batch)
    assert scheduler.schedule().num_decode_tokens == 1


def test_first_come_first_served() -> None:
    """A short request does not overtake a long one that waits for blocks."""
    scheduler = make_scheduler(8, 4, 64)
    scheduler.add(make_sequence(0, 16, 8))
    carry_out(scheduler, scheduler.schedule())
    scheduler.add(make_sequence(1, 20, 2))
    scheduler.add(make_sequence(2, 1, 1))
    for _ in range(3):
        batch = scheduler.schedule()
        assert [chunk.sequence.arrival for chunk in batch.chunks] == [0]
        carry_out(scheduler, batch)


def test_the_youngest_is_preempted_and_computed_anew() -> None:
    scheduler = make_scheduler(5, 2, 16)
    old, young = make_sequence(0, 7, 9), make_sequence(1, 4, 8)
    scheduler.add(old)
    scheduler.add(young)
    preempted = []
    while young.num_output_tokens < 8:
        batch = scheduler.schedule()
        preempted += batch.preempted
        carry_out(scheduler, batch)
    assert preempted == [young]
    assert old.status is SequenceStatus.FINISHED
    assert young.status is SequenceStatus.FINISHED
    assert scheduler.num_preemptions == 1


def test_nobody_is_admitted_only_to_be_preempted_next() -> None:
    """The running sequence is about to need a block: the last ones are not given away."""
    scheduler = make_scheduler(4, 2, 16)
    old, young = make_sequence(0, 4, 8), make_sequence(1, 12, 2)
    scheduler.add(old)
    scheduler.add(young)
    while scheduler.has_work:
        carry_out(scheduler, scheduler.schedule())
    assert scheduler.num_preemptions == 0


def test_what_can_never_fit_is_refused() -> None:
    scheduler = make_scheduler(4, 2, 8)
    scheduler.check_fits(16)
    with pytest.raises(RequestError, match="need 17 tokens of KV cache, it holds 16"):
        scheduler.check_fits(17)


def test_an_urgent_prompt_goes_ahead_of_one_that_is_being_computed() -> None:
    scheduler = make_scheduler(64, 4, 8)
    scheduler.add(make_sequence(0, 100, 2))
    carry_out(scheduler, scheduler.schedule())
    scheduler.add(make_sequence(1, 5, 2))
    assert [c.sequence.arrival for c in scheduler.schedule().chunks] == [0]
    scheduler.add(make_sequence(2, 5, 2, priority=-1))
    batch = scheduler.schedule()
    assert [(c.sequence.arrival, c.length) for c in batch.chunks] == [(2, 5), (0, 3)]


def test_chunks_keep_the_streams_target() -> None:
    """Beside a stream no longer step is planned than its target; alone the budget is filled."""
    pacer = Pacer(0.02)
    scheduler = make_scheduler(200, 4, 256, pacer=pacer)

    def seconds(work: StepWork) -> float:
        return 5e-3 + 2e-4 * work.prefill_tokens + 1e-3 * work.decode_rows

    def step() -> tuple[Batch, float]:
        batch = scheduler.schedule()
        took = seconds(batch.work)
        pacer.model.observe(batch.work, took)
        carry_out(scheduler, batch)
        return batch, took

    for arrival in range(2):
        scheduler.add(make_sequence(arrival, 20, 60))
        step()
    for _ in range(20):
        step()
    scheduler.add(make_sequence(2, 600, 2))
    beside = [step() for _ in range(9)]
    for batch, took in beside[2:]:
        assert took <= 0.021
        assert batch.work.prefill_tokens >= 50
    for sequence in tuple(scheduler.running):
        scheduler.finish(sequence)
    scheduler.add(make_sequence(3, 600, 2))
    assert step()[0].num_tokens == 256
