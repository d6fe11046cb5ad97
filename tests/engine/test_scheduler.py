from __future__ import annotations

import itertools
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.api.requests import Request, SamplingParams
from minigpt.core.errors import RequestError
from minigpt.engine.blocks import BlockManager
from minigpt.engine.scheduler import Batch, Scheduler
from minigpt.engine.sequence import Sequence, SequenceStatus


def _sequence(arrival: int, prompt: int, output: int) -> Sequence:
    sampling = SamplingParams(max_tokens=output)
    request = Request(
        id=str(arrival), prompt_token_ids=list(range(1, prompt + 1)), sampling=sampling
    )
    return Sequence.from_request(request, 0, arrival, seed=0)


def _scheduler(num_blocks: int, max_num_seqs: int, budget: int, block_size: int = 4) -> Scheduler:
    return Scheduler(BlockManager(num_blocks, block_size), max_num_seqs, budget)


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
