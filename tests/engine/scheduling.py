"""A scheduler driven without a model, for its tests."""

from __future__ import annotations

from typing import Any

from minigpt.api.requests import Request, SamplingParams
from minigpt.engine.batch import Batch
from minigpt.engine.blocks import BlockManager
from minigpt.engine.scheduler import Scheduler
from minigpt.engine.sequence import Sequence, SequenceStatus


def make_sequence(
    arrival: int, prompt: int, output: int, *, priority: int = 0, tenant: str = ""
) -> Sequence:
    """A prompt that shares no block with another one's."""
    sampling = SamplingParams(max_tokens=output)
    request = Request(
        id=str(arrival), prompt_token_ids=[1000 + arrival, *range(1, prompt)], sampling=sampling,
        priority=priority, tenant=tenant,
    )  # fmt: skip
    return Sequence.from_request(request, 0, arrival, seed=0)


def make_scheduler(
    num_blocks: int, max_num_seqs: int, budget: int, block_size: int = 4, **options: Any
) -> Scheduler:
    return Scheduler(BlockManager(num_blocks, block_size), max_num_seqs, budget, **options)


def carry_out(scheduler: Scheduler, batch: Batch) -> list[Sequence]:
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


def check_batch(scheduler: Scheduler, batch: Batch, decoding: list[Sequence]) -> None:
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


def run_to_end(scheduler: Scheduler) -> list[Batch]:
    batches = []
    while scheduler.has_work:
        batches.append(scheduler.schedule())
        carry_out(scheduler, batches[-1])
    scheduler.check()
    return batches
