from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.api.requests import Request
from minigpt.engine.batch import Chunk
from minigpt.engine.blocks import BlockManager
from minigpt.engine.paged_attention import KVCache, PagedAttention
from minigpt.engine.sequence import Sequence
from minigpt.model.attention import CausalAttention
from minigpt.model.config import ModelConfig

ROOT = Path(__file__).parents[2]
HEADS, HEAD_DIM = 4, 8


def _cache(num_kv_heads: int, num_blocks: int, block_size: int, dtype: torch.dtype) -> KVCache:
    config = ModelConfig(
        vocab_size=2, num_layers=1, hidden_size=8, num_heads=HEADS, num_kv_heads=num_kv_heads,
        head_dim=HEAD_DIM, intermediate_size=8, context_length=512,
    )  # fmt: skip
    return KVCache(
        config,
        num_blocks=num_blocks,
        block_size=block_size,
        dtype=dtype,
        device=torch.device("cpu"),
    )


@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=6),
    chunk_sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    block_size=st.sampled_from([1, 4, 16]),
    num_kv_heads=st.sampled_from([1, 2, 4]),
    window=st.sampled_from([None, 1, 7, 64]),
)
@settings(max_examples=60, deadline=None)
def test_equals_attention_over_whole_sequences(
    lengths: list[int],
    chunk_sizes: list[int],
    block_size: int,
    num_kv_heads: int,
    window: int | None,
) -> None:
    """Any mixture of chunks and decode, in any blocks, gives what one full pass gives."""
    generator = torch.Generator().manual_seed(sum(lengths))
    inputs, expected, sequences = [], [], []
    needed = sum(-(-length // block_size) for length in lengths)
    blocks = BlockManager(needed, block_size)
    for number, length in enumerate(lengths):
        q = torch.randn(1, length, HEADS, HEAD_DIM, generator=generator)
        k, v = (
            torch.randn(1, length, num_kv_heads, HEAD_DIM, generator=generator) for _ in range(2)
        )
        inputs.append((q, k, v))
        expected.append(CausalAttention(sliding_window=window)(0, q, k, v))
        request = Request(id=str(number), prompt_token_ids=[0] * length)
        sequences.append(Sequence.from_request(request, 0, number, seed=0))
    for _ in range(max(-(-length // block_size) for length in lengths)):  # interleaved blocks
        for sequence in sequences:
            if len(sequence.block_table) * block_size < sequence.num_tokens:
                sequence.block_table += blocks.allocate(1)

    cache = _cache(num_kv_heads, needed, block_size, torch.float32)
    step = 0
    while any(s.num_remaining for s in sequences):
        chunks = []
        for number, sequence in enumerate(sequences):
            size = chunk_sizes[(step + number) % len(chunk_sizes)]
            if length := min(sequence.num_remaining, size):
                chunks.append(Chunk(sequence, sequence.num_computed, length, False))
        chunks.sort(key=lambda chunk: (chunk.length > 1, chunk.stop))
        parts = [
            [tensor[:, c.start : c.stop] for tensor in inputs[c.sequence.arrival]] for c in chunks
        ]
        query, key, value = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
        output = PagedAttention(cache, chunks, window)(0, query, key, value)
        wanted = [expected[c.sequence.arrival][:, c.start : c.stop] for c in chunks]
        torch.testing.assert_close(output, torch.cat(wanted, dim=1), atol=1e-5, rtol=1e-5)
        for chunk in chunks:
            chunk.sequence.num_computed = chunk.stop
        step += 1


def test_clear_removes_nans() -> None:
    cache = _cache(2, 4, 4, torch.bfloat16)
    nan = torch.full((1, 2, HEAD_DIM), float("nan"), dtype=torch.bfloat16)
    cache.write(0, torch.tensor([9]), nan, nan)
    assert cache.keys[0][2].isnan().any()
    cache.clear([2])
    assert not any(tensor.isnan().any() for tensor in (*cache.keys, *cache.values))


_CACHE_PROGRAM = """
import psutil, torch
from minigpt.engine.paged_attention import KVCache
from tests.engine.test_paged_attention import _cache
before = psutil.Process().memory_info().rss
cache = _cache(4, 1 << 20, 16, torch.float32)
assert sum(t.nbytes for t in (*cache.keys, *cache.values)) == 4 << 30
print(psutil.Process().memory_info().rss - before)
"""


def test_memory_is_taken_only_when_written() -> None:
    """In a process of its own: training in this one changes how memory is taken."""
    command = [sys.executable, "-c", _CACHE_PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 100 << 20
