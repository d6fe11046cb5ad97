"""The scheduler with drafted tokens, right and wrong ones."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Sequence as SequenceOf

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.scheduling import check_batch, make_sequence

from minigpt.engine.batch import Batch, Chunk
from minigpt.engine.blocks import BlockManager
from minigpt.engine.config import SpeculativeConfig
from minigpt.engine.cost_model import StepCostModel, StepWork
from minigpt.engine.prefix_cache import extend_hashes
from minigpt.engine.scheduler import Scheduler
from minigpt.engine.sequence import Sequence, SequenceStatus
from minigpt.engine.speculative import Speculator

BLOCK = 4


class AnyDrafts(Speculator):
    """Drafts any number of 0s and 1s: what the real one could choose, and more."""

    def __init__(self, chance: random.Random, most: int) -> None:
        super().__init__(SpeculativeConfig(), StepCostModel())
        self._chance = chance
        self._most = most

    def choose(
        self, sequences: SequenceOf[Sequence], work: StepWork, budget: int
    ) -> dict[int, tuple[int, ...]]:
        chosen = {}
        for row, sequence in enumerate(sequences):
            left = sequence.sampling.max_tokens - sequence.num_output_tokens - 1
            length = self._chance.randint(0, max(0, min(self._most, left, budget)))
            if length:
                chosen[row] = tuple(self._chance.randrange(2) for _ in range(length))
                budget -= length
        return chosen


def _make(chance: random.Random, num_blocks: int, seqs: int, budget: int, most: int) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, BLOCK), seqs, budget, speculator=AnyDrafts(chance, most)
    )


def _carry_out(
    scheduler: Scheduler, batch: Batch, chance: random.Random, written: dict[int, list[int | None]]
) -> list[Sequence]:
    """Do what the engine does, writing tokens where it writes keys and values."""
    for source, destination in batch.copies:
        written[destination] = list(written[source])
    finished = []
    for chunk in batch.chunks:
        sequence, tokens = chunk.sequence, chunk.token_ids
        for place, token in zip(range(chunk.start, chunk.stop), tokens, strict=True):
            block = sequence.block_table[place // BLOCK]
            written.setdefault(block, [None] * BLOCK)[place % BLOCK] = token
        accepted = chance.randint(0, len(chunk.drafted))
        scheduler.advance([chunk.with_drafts(chunk.drafted[:accepted])])
        if chunk.samples:
            sequence.token_ids += [*chunk.drafted[:accepted], chance.randrange(2)]
            if sequence.num_output_tokens >= sequence.sampling.max_tokens:
                scheduler.finish(sequence)
                finished.append(sequence)
    return finished


def _check_cache(scheduler: Scheduler, written: dict[int, list[int | None]]) -> None:
    """What is found by a sequence's digests holds exactly its tokens, and nothing refused."""
    for sequence in scheduler.running:
        assert sequence.num_remaining >= 1
        held = [written[b] for b in sequence.block_table[: -(-sequence.num_computed // BLOCK)]]
        flat = [token for block in held for token in block]
        assert flat[: sequence.num_computed] == sequence.token_ids[: sequence.num_computed]
        hashes: list[bytes] = []
        extend_hashes(hashes, sequence.prefix_root, sequence.token_ids, BLOCK)
        count = len(sequence.block_hashes)
        assert sequence.block_hashes == hashes[:count], "a digest of tokens that are not its own"
        for number, block in enumerate(scheduler.blocks.find(hashes)):
            expected = sequence.token_ids[number * BLOCK : (number + 1) * BLOCK]
            assert written[block] == expected, "a cached block holds other tokens"


@given(
    seed=st.integers(0, 2**32),
    lengths=st.lists(st.tuples(st.integers(1, 24), st.integers(1, 30)), min_size=1, max_size=10),
    num_blocks=st.integers(14, 20),
    seqs=st.integers(1, 5),
    extra_budget=st.integers(0, 12),
    most=st.integers(1, 9),
)
@settings(max_examples=250, deadline=None)
def test_random_load(
    seed: int,
    lengths: list[tuple[int, int]],
    num_blocks: int,
    seqs: int,
    extra_budget: int,
    most: int,
) -> None:
    """Any drafts, right or wrong, aborts, a tiny cache: all finish, nothing leaks or mixes."""
    chance = random.Random(seed)
    scheduler = _make(chance, num_blocks, seqs, seqs + extra_budget, most)
    arrivals, order = deque(lengths), itertools.count()
    alive: list[Sequence] = []
    written: dict[int, list[int | None]] = {}
    for _ in range(2 * sum(prompt + output + 2 for prompt, output in lengths) + 10):
        while arrivals and not (scheduler.has_work and chance.random() < 0.5):
            sequence = make_sequence(next(order), *arrivals.popleft())
            scheduler.check_fits(sequence.most_cached_tokens)
            scheduler.add(sequence)
            alive.append(sequence)
        if alive and chance.random() < 0.05:
            scheduler.finish(alive.pop(chance.randrange(len(alive))))
        decoding = [s for s in scheduler.running if s.num_remaining == 1]
        oldest = min(alive, key=lambda s: s.arrival, default=None)
        progress = oldest.num_computed if oldest else 0
        batch = scheduler.schedule()
        scheduler.check()
        check_batch(scheduler, batch, decoding)
        for chunk in batch.chunks:
            assert chunk.stop <= chunk.sequence.most_cached_tokens
        done = _carry_out(scheduler, batch, chance, written)
        scheduler.check()
        _check_cache(scheduler, written)
        if oldest is not None and oldest not in done:
            assert oldest.num_computed > progress, "the oldest did not move"
        alive = [s for s in alive if s.status is not SequenceStatus.FINISHED]
        if not alive and not arrivals:
            break
    assert not scheduler.has_work
    assert not arrivals
    assert scheduler.blocks.num_used == 0


def test_drafts_preempt_nobody_and_leave_each_stream_a_block() -> None:
    chance = random.Random(0)
    scheduler = _make(chance, 16, 4, 64, most=30)
    for arrival in range(3):
        scheduler.add(make_sequence(arrival, 8, 12))
    written: dict[int, list[int | None]] = {}
    drafted = 0
    while scheduler.has_work:
        before = scheduler.blocks.num_free
        batch = scheduler.schedule()
        if any(chunk.drafted for chunk in batch.chunks):
            drafted += 1
            taken = before - scheduler.blocks.num_free
            mandatory = sum(
                -(-chunk.sequence.num_tokens // BLOCK)
                > -(-(chunk.sequence.num_tokens - 1) // BLOCK)
                for chunk in batch.chunks
            )
            assert taken <= mandatory or scheduler.blocks.num_free >= len(scheduler.running)
        _carry_out(scheduler, batch, chance, written)
    assert drafted
    assert scheduler.num_preemptions == 0


def test_prefill_goes_before_drafts() -> None:
    chance = random.Random(1)
    scheduler = _make(chance, 64, 4, 16, most=9)
    scheduler.add(make_sequence(0, 4, 100))
    written: dict[int, list[int | None]] = {}
    _carry_out(scheduler, scheduler.schedule(), chance, written)
    scheduler.add(make_sequence(1, 60, 2))
    for _ in range(4):
        batch = scheduler.schedule()
        assert [(c.sequence.arrival, c.length) for c in batch.chunks] == [(0, 1), (1, 15)]
        _carry_out(scheduler, batch, chance, written)


def test_a_chunk_without_its_drafts() -> None:
    sequence = make_sequence(0, 6, 9)
    sequence.token_ids.append(7)
    chunk = Chunk(sequence, 6, 4, samples=True, drafted=(8, 9, 10))
    assert chunk.is_decode
    assert (chunk.stop, chunk.num_logits, chunk.token_ids) == (10, 4, [7, 8, 9, 10])
    right = chunk.with_drafts((8,))
    assert (right.stop, right.num_logits, right.token_ids) == (8, 2, [7, 8])
    assert Batch([chunk]).work == StepWork(decode_rows=1, decode_context=10, drafted_tokens=3)
