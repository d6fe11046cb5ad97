"""Which tokens each step computes: continuous batching under one token budget; no torch here.

Rules, in this order, for each step:
1. Every running sequence that only lacks its next token (decode) gets one token.
2. What is left of the budget, as far as the running streams' inter-token target bears it
   (`cost_model`), goes to prefill: running prefills and those who wait (`fairness`), the more
   urgent first; who waits is admitted while sequences, budget and blocks last.
3. What is left then goes to drafted tokens (`speculative`), as far as they are worth their time
   and blocks are free that nobody else is about to need.

A sequence takes the blocks of all its known tokens when admitted, those that the prefix cache
holds shared, and one more whenever decode fills the last. If none is free the least urgent
running sequence is preempted: its blocks are released and it waits, to be computed anew as far
as they are no longer cached by then.

Urgency is priority_step_tokens x priority + the tokens that the engine had computed at arrival.
It never changes, and that is why nobody starves:
- A tenant's sequence of priority p is overtaken only by those of its sequences that have a
  priority q < p and arrived before the engine had computed (p - q) x priority_step_tokens more.
- While two tenants wait, none gets ahead by more weighted tokens than its last admitted prompt
  and the answers that it has running: it is admitted only while it is the one served least.
- Nobody is admitted past one who does not fit: memory becomes free for it. Passed over is only
  who begins with what a more urgent running sequence is about to have computed, until it has.
- The most urgent running sequence is never preempted, and moves in each step.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise, takewhile

from minigpt.core.errors import RequestError
from minigpt.engine.batch import Batch, Chunk
from minigpt.engine.blocks import BlockManager
from minigpt.engine.cost_model import Pacer
from minigpt.engine.fairness import FairQueue
from minigpt.engine.prefix_cache import extend_hashes
from minigpt.engine.sequence import Sequence, SequenceStatus
from minigpt.engine.speculative import Speculator


@dataclass(frozen=True, slots=True)
class _Prefix:
    """The tokens of a waiting sequence that need not be computed."""

    blocks: list[int]
    """Full blocks, to be shared."""
    copied: int | None
    """The block after them, valid in part and still written to: to be copied."""
    num_tokens: int


class Scheduler:
    """Decides; whoever carries out a batch reports back with `advance`.

    Args:
        blocks: The KV cache's blocks.
        max_num_seqs: Most running sequences.
        max_batched_tokens: Token budget of a step, at least `max_num_seqs`.
        queue: Who waits; None treats all tenants alike.
        pacer: Bounds prefill beside running streams; whoever measures steps tells its model.
        speculator: Drafts tokens; None drafts none.
        prefix_cache: Whether finished blocks are kept for sequences with the same beginning.
        priority_step_tokens: Tokens computed by the engine that weigh as much as a priority.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_num_seqs: int,
        max_batched_tokens: int,
        *,
        queue: FairQueue | None = None,
        pacer: Pacer | None = None,
        speculator: Speculator | None = None,
        prefix_cache: bool = True,
        priority_step_tokens: int = 100_000,
    ) -> None:
        assert 1 <= max_num_seqs <= max_batched_tokens, (max_num_seqs, max_batched_tokens)
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        self.queue = FairQueue() if queue is None else queue
        self.running: list[Sequence] = []
        """The most urgent first."""
        self.num_preemptions = 0
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0
        self._pacer = Pacer() if pacer is None else pacer
        self._speculator = speculator
        self._prefix_cache = prefix_cache
        self._priority_step_tokens = priority_step_tokens
        self._num_computed_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.running or self.queue)

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
        delay = self._priority_step_tokens * sequence.priority
        sequence.urgency = self._num_computed_tokens + delay
        self.queue.arrive(sequence)

    def schedule(self) -> Batch:
        """Choose the next step's work and take the blocks for it.

        Its copies are made and then its chunks computed; these must be reported with `advance`,
        or their sequences finished, before the next call. It is empty only if nothing is
        unfinished.
        """
        batch = Batch()
        budget = self.max_batched_tokens - self._schedule_decode(batch)
        budget -= self._schedule_prefill(batch, budget)
        if self._speculator is not None:
            self._draft(batch, self._speculator, budget)
        return batch

    def advance(self, chunks: Iterable[Chunk]) -> None:
        """Record that the tokens of a batch's chunks are in the cache.

        Args:
            chunks: Of drafted tokens they have only those left that were right.
        """
        block_size = self.blocks.block_size
        for chunk in chunks:
            sequence = chunk.sequence
            assert sequence.status is SequenceStatus.RUNNING
            sequence.num_computed = chunk.stop
            self._num_computed_tokens += chunk.length
            if chunk.samples:
                self.queue.charge(sequence.tenant, output_tokens=chunk.num_logits)
                # What refused drafts took, but for the block that the next token goes to.
                needed = self.blocks.blocks_for(chunk.stop + 1)
                self.blocks.release(sequence.block_table[needed:])
                del sequence.block_table[needed:]
            filled = range(chunk.start // block_size, chunk.stop // block_size)
            if self._prefix_cache and filled:
                self._hash(sequence, chunk.drafted)
                for index in filled:
                    self.blocks.cache(sequence.block_table[index], sequence.block_hashes[index])

    def finish(self, sequence: Sequence) -> None:
        """Remove a sequence at whatever stage it is and release its blocks."""
        assert sequence.status is not SequenceStatus.FINISHED
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        else:
            self.queue.remove(sequence)
        self._release(sequence)
        sequence.status = SequenceStatus.FINISHED
        self.queue.leave(sequence)

    def poison(self, sequence: Sequence) -> list[int]:
        """Take what a sequence that failed has computed out of the cache.

        Returns:
            Those of its blocks that nobody else holds: to be zeroed before it is finished.
        """
        self.blocks.forget(sequence.block_table)
        return [block for block in sequence.block_table if self.blocks.num_references(block) == 1]

    def check(self) -> None:
        """Assert the invariants of queue, running sequences and blocks."""
        assert all(a.order < b.order for a, b in pairwise(self.running)), "order of running"
        assert len(self.running) <= self.max_num_seqs
        block_size = self.blocks.block_size
        for sequence in self.running:
            assert sequence.status is SequenceStatus.RUNNING
            assert sequence.num_computed < sequence.num_tokens
            capacity = len(sequence.block_table) * block_size
            assert sequence.num_computed <= capacity, "computed tokens without a block"
            written = sequence.block_table[sequence.num_computed // block_size :]
            assert all(self.blocks.num_references(block) == 1 for block in written), (
                "a block that is written to is shared"
            )
        for sequence in self.queue:
            assert sequence.num_computed == 0
            assert not sequence.block_table
        self.queue.check(self.running)
        self.blocks.check(sequence.block_table for sequence in self.running)

    def preempt(self, sequence: Sequence) -> None:
        """Let a running sequence wait, to be computed anew."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.status = SequenceStatus.WAITING
        self.queue.push(sequence)
        self.num_preemptions += 1

    def _schedule_decode(self, batch: Batch) -> int:
        scheduled = 0
        for sequence in tuple(self.running):
            # It may have been preempted for the sake of a more urgent one in this very loop.
            if sequence.status is not SequenceStatus.RUNNING or sequence.num_remaining != 1:
                continue
            if self._grow(sequence, batch):
                scheduled += self._add_chunk(batch, sequence, 1)
        return scheduled

    def _schedule_prefill(self, batch: Batch, budget: int) -> int:
        prefills = deque(sequence for sequence in self.running if sequence.num_remaining > 1)
        if not prefills and not self.queue:
            return 0
        scheduled = 0
        pace = self._pacer.begin(batch.work)
        while scheduled < budget and not pace.is_spent:
            sequence = self._admit(batch, prefills[0] if prefills else None)
            if sequence is None:
                if not prefills:
                    break
                sequence = prefills.popleft()
            limit = min(budget - scheduled, sequence.num_remaining)
            taken = pace.take(sequence.num_computed, limit)
            scheduled += self._add_chunk(batch, sequence, taken)
        return scheduled

    def _draft(self, batch: Batch, speculator: Speculator, budget: int) -> None:
        """Add drafted tokens to decode chunks, which are the first ones."""
        decode = list(takewhile(lambda chunk: chunk.is_decode, batch.chunks))
        if not decode:
            return
        sequences = [chunk.sequence for chunk in decode]
        for row, drafted in speculator.choose(sequences, batch.work, budget).items():
            table = sequences[row].block_table
            # One block in reserve for each running sequence, as when one is admitted.
            spare = max(0, self.blocks.num_free - len(self.running))
            room = (len(table) + spare) * self.blocks.block_size - sequences[row].num_tokens
            chunk = decode[row].with_drafts(drafted[:room])
            missing = self.blocks.blocks_for(chunk.stop) - len(table)
            table += self.blocks.allocate(max(missing, 0))
            batch.chunks[row] = chunk

    def _grow(self, sequence: Sequence, batch: Batch) -> bool:
        """Give a sequence the block for its next token; False if it was preempted itself."""
        missing = self.blocks.blocks_for(sequence.num_tokens) - len(sequence.block_table)
        while missing > self.blocks.num_free:
            last = self.running[-1]
            self.preempt(last)
            batch.preempted.append(last)
            if last is sequence:
                return False
        sequence.block_table += self.blocks.allocate(max(missing, 0))
        return True

    def _admit(self, batch: Batch, prefill: Sequence | None) -> Sequence | None:
        """Admit the next waiting sequence, unless `prefill` is more urgent or it does not fit."""
        # A step that had to preempt admits nobody, least of all whom it preempted.
        if batch.preempted or not self.queue or len(self.running) >= self.max_num_seqs:
            return None
        pending = self._pending_hashes()
        # As many are passed over as could run: a bound on the time that this takes.
        for _, sequence in zip(range(self.max_num_seqs), self.queue.candidates(), strict=False):
            if prefill is not None and prefill.order < sequence.order:
                return None
            prefix = self._find_prefix(sequence, pending)
            if prefix is not None:
                return sequence if self._take_in(batch, sequence, prefix) else None
        return None

    def _find_prefix(self, sequence: Sequence, pending: dict[bytes, Sequence]) -> _Prefix | None:
        """Find what need not be computed; None if a more urgent one is computing more of it."""
        if not sequence.reads_cache:
            return _Prefix([], None, 0)
        block_size = self.blocks.block_size
        blocks: list[int] = []
        if self._prefix_cache:
            self._hash(sequence)
            # The last token is always computed: it yields the logits of the next.
            hashes = sequence.block_hashes[: (sequence.num_tokens - 1) // block_size]
            blocks = self.blocks.find(hashes)
            if len(blocks) < len(hashes):
                source = pending.get(hashes[len(blocks)])
                if source is not None and source.order < sequence.order:
                    return None
        found = len(blocks) * block_size
        siblings = [s for s in self.running if s.request_id == sequence.request_id]
        shared = sequence.num_prompt_tokens - 1
        if siblings and shared > found:
            source = max(siblings, key=lambda s: s.num_computed)
            if source.num_computed < shared:
                return None if source.order < sequence.order else _Prefix(blocks, None, found)
            full = shared // block_size
            copied = source.block_table[full] if shared % block_size else None
            return _Prefix(source.block_table[:full], copied, shared)
        return _Prefix(blocks, None, found)

    def _take_in(self, batch: Batch, sequence: Sequence, prefix: _Prefix) -> bool:
        """Give a waiting sequence its blocks and let it run; False if there are too few."""
        needed = self.blocks.blocks_for(sequence.num_tokens) - len(prefix.blocks)
        taken = needed + self.blocks.num_unused(prefix.blocks)
        # One block in reserve for each running sequence: they will soon fill their last one, and
        # whom we admit without it we would preempt next.
        if taken + len(self.running) > self.blocks.num_free:
            return False
        self.queue.remove(sequence)
        self.blocks.share(prefix.blocks)
        sequence.block_table = prefix.blocks + self.blocks.allocate(needed)
        if prefix.copied is not None:
            batch.copies.append((prefix.copied, sequence.block_table[len(prefix.blocks)]))
        sequence.num_computed = prefix.num_tokens
        sequence.status = SequenceStatus.RUNNING
        insort(self.running, sequence, key=lambda s: s.order)
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = prefix.num_tokens
            computed = sequence.num_prompt_tokens - prefix.num_tokens
            self.queue.charge(sequence.tenant, input_tokens=computed)
            self.num_prefix_queries += sequence.num_prompt_tokens
            self.num_prefix_hits += prefix.num_tokens
        return True

    def _pending_hashes(self) -> dict[bytes, Sequence]:
        """Return which running prefill is about to compute the block of which digest."""
        block_size = self.blocks.block_size
        return {
            digest: sequence
            for sequence in reversed(self.running)
            if sequence.num_remaining > 1
            for digest in sequence.block_hashes[sequence.num_computed // block_size :]
        }

    def _hash(self, sequence: Sequence, accepted: tuple[int, ...] = ()) -> None:
        """Bring the digests up to date; `accepted` follow the known tokens."""
        extend_hashes(
            sequence.block_hashes,
            sequence.prefix_root,
            [*sequence.token_ids, *accepted] if accepted else sequence.token_ids,
            self.blocks.block_size,
        )

    def _add_chunk(self, batch: Batch, sequence: Sequence, length: int) -> int:
        samples = length == sequence.num_remaining
        batch.chunks.append(Chunk(sequence, sequence.num_computed, length, samples))
        return length

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0
