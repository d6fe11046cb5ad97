"""Which tokens each step computes: continuous batching under one token budget; no torch here.

Rules, in this order, for each step:
1. Every running sequence that only lacks its next token (decode) gets one token.
2. Running sequences in the midst of prefill share what is left of the budget, oldest first.
3. Waiting sequences are admitted, oldest first, while sequences, budget and blocks last.

A sequence takes the blocks of all its known tokens when admitted, and one more whenever decode
fills the last. If none is free the youngest running sequence is preempted: its blocks are
released and it waits, before all younger ones, to be computed anew. So running sequences are
always older than waiting ones, the oldest always moves, and nobody starves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from minigpt.core.errors import RequestError
from minigpt.engine.blocks import BlockManager
from minigpt.engine.sequence import Sequence, SequenceStatus


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens start .. start + length - 1 of one sequence."""

    sequence: Sequence
    start: int
    length: int
    samples: bool
    """Whether these are its last known tokens, so that the next one is sampled."""

    @property
    def stop(self) -> int:
        """One past the last token."""
        return self.start + self.length

    @property
    def is_decode(self) -> bool:
        """Whether this computes the newest generated token alone."""
        return self.length == 1 and self.samples and self.start >= self.sequence.num_prompt_tokens


@dataclass(slots=True)
class Batch:
    """One step's work."""

    chunks: list[Chunk] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens to compute."""
        return sum(chunk.length for chunk in self.chunks)

    @property
    def num_decode_tokens(self) -> int:
        """Tokens of running streams, each of which yields the next one."""
        return sum(chunk.is_decode for chunk in self.chunks)


class Scheduler:
    """Decides; whoever carries out a batch reports back with `advance`.

    Args:
        blocks: The KV cache's blocks.
        max_num_seqs: Most running sequences.
        max_batched_tokens: Token budget of a step, at least `max_num_seqs`.
    """

    def __init__(self, blocks: BlockManager, max_num_seqs: int, max_batched_tokens: int) -> None:
        assert 1 <= max_num_seqs <= max_batched_tokens, (max_num_seqs, max_batched_tokens)
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.waiting or self.running)

    def check_fits(self, num_cached_tokens: int) -> None:
        """Refuse a sequence that would not fit the cache even if alone in it.

        Raises:
            RequestError: It needs more blocks than there are.
        """
        needed = self.blocks.blocks_for(num_cached_tokens)
        if needed > self.blocks.num_blocks:
            capacity = self.blocks.num_blocks * self.blocks.block_size
            raise RequestError(
                f"prompt and max_tokens need {num_cached_tokens} tokens of KV cache, "
                f"it holds {capacity}",
                param="max_tokens",
                code="context_length_exceeded",
                remedy="shorten the prompt or lower max_tokens",
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that `check_fits` accepts; its arrival is the highest so far."""
        assert sequence.status is SequenceStatus.WAITING
        assert not self.waiting or self.waiting[-1].arrival < sequence.arrival
        self.waiting.append(sequence)

    def schedule(self) -> Batch:
        """Choose the next step's work and take the blocks for it.

        Its chunks must be reported with `advance`, or their sequences finished, before the next
        call. It is empty only if
        nothing is unfinished.
        """
        batch = Batch()
        budget = self.max_batched_tokens - self._schedule_decode(batch)
        for sequence in self.running:
            if budget and sequence.num_remaining > 1:
                budget -= self._add_chunk(batch, sequence, budget)
        while budget and self._admit_next():
            budget -= self._add_chunk(batch, self.running[-1], budget)
        return batch

    def advance(self, chunks: Iterable[Chunk]) -> None:
        """Record that the tokens of a batch's chunks are in the cache."""
        for chunk in chunks:
            assert chunk.sequence.status is SequenceStatus.RUNNING
            chunk.sequence.num_computed = chunk.stop

    def finish(self, sequence: Sequence) -> None:
        """Remove a sequence at whatever stage it is and release its blocks."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        self._release(sequence)
        sequence.status = SequenceStatus.FINISHED

    def check(self) -> None:
        """Assert the invariants of queues and blocks."""
        sequences = [*self.running, *self.waiting]
        assert all(a.arrival < b.arrival for a, b in pairwise(sequences)), "order of arrival"
        assert len(self.running) <= self.max_num_seqs
        for sequence in self.running:
            assert sequence.status is SequenceStatus.RUNNING
            assert sequence.num_computed < sequence.num_tokens
            capacity = len(sequence.block_table) * self.blocks.block_size
            assert sequence.num_computed <= capacity, "computed tokens without a block"
        for sequence in self.waiting:
            assert sequence.status is SequenceStatus.WAITING
            assert sequence.num_computed == 0
            assert not sequence.block_table
        self.blocks.check(sequence.block_table for sequence in self.running)

    def _schedule_decode(self, batch: Batch) -> int:
        scheduled = 0
        for sequence in tuple(self.running):
            # A sequence may have been preempted for the sake of an older one in this very loop.
            if sequence.status is not SequenceStatus.RUNNING or sequence.num_remaining != 1:
                continue
            if self._grow(sequence, batch):
                scheduled += self._add_chunk(batch, sequence, 1)
        return scheduled

    def _grow(self, sequence: Sequence, batch: Batch) -> bool:
        """Give a sequence the block for its next token; False if it was preempted itself."""
        missing = self.blocks.blocks_for(sequence.num_tokens) - len(sequence.block_table)
        while missing > self.blocks.num_free:
            youngest = self.running[-1]
            self._preempt(youngest)
            batch.preempted.append(youngest)
            if youngest is sequence:
                return False
        sequence.block_table += self.blocks.allocate(max(missing, 0))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.status = SequenceStatus.WAITING
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _admit_next(self) -> bool:
        if not self.waiting or len(self.running) >= self.max_num_seqs:
            return False
        sequence = self.waiting[0]
        needed = self.blocks.blocks_for(sequence.num_tokens)
        # One block in reserve for each running sequence: they will soon fill their last one, and
        # whom we admit without it we would preempt next (or have preempted in this very step).
        if needed + len(self.running) > self.blocks.num_free:
            return False
        self.waiting.popleft()
        sequence.block_table = self.blocks.allocate(needed)
        sequence.status = SequenceStatus.RUNNING
        self.running.append(sequence)
        return True

    def _add_chunk(self, batch: Batch, sequence: Sequence, budget: int) -> int:
        length = min(sequence.num_remaining, budget)
        samples = length == sequence.num_remaining
        batch.chunks.append(Chunk(sequence, sequence.num_computed, length, samples))
        return length

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0
