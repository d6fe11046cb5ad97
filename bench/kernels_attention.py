"""Attention over the paged cache: the kernels beside torch's operators, and bytes read a second.

Each case is timed with both in turn, over a ring of layers large enough that the processor's
cache does not hold them all. The step's own preparation (masks, gathered block ids, schedule)
is left out for torch, as it is made once for all layers, and within for the kernels.

Formulas: GB/s = bytes of keys and values that the rows see, each once / median seconds.

Run it as `python -m bench.kernels_attention`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch

from bench.harness import environment, print_environment, print_table, write_results
from minigpt.api.requests import Request
from minigpt.engine.batch import Chunk
from minigpt.engine.paged_attention import KVCache, PagedAttention
from minigpt.engine.sequence import Sequence
from minigpt.kernels import attention
from minigpt.kernels.cache_format import CacheFormat
from minigpt.kernels.kv_layout import KVLayout
from minigpt.model.config import ModelConfig

BLOCK_SIZE, HEAD_DIM = 16, 64
HEADS = {"124M": (12, 12), "429M": (16, 8)}
# Sequences, tokens cached, latest rows queried.
CASES = [(1, 128, 1), (1, 512, 1), (1, 2048, 1), (16, 512, 1), (1, 256, 256), (1, 2048, 256)]
RING_BYTES = 512 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    described = environment()
    print_environment(described)
    rows = [measure(shape, *case, arguments.repeats) for shape in HEADS for case in CASES]
    print_table(
        ("shape, sequences x cached, rows", "torch us", "bf16 us", "int8 us", "bf16 GB/s"),
        [
            (f"{row['shape']} {row['sequences']} x {row['cached']}, {row['rows']}",
             *(f"{row[k]:.0f}" for k in ("torch", "bfloat16", "int8")), f"{row['rate']:.1f}")
            for row in rows
        ],
    )  # fmt: skip
    settings = vars(arguments)
    write_results(
        "kernels_attention", {"environment": described, "settings": settings, "rows": rows}
    )


def measure(shape: str, count: int, cached: int, rows: int, repeats: int) -> dict[str, object]:
    """Return median microseconds by implementation, and the bfloat16 kernel's GB/s."""
    heads, kv_heads = HEADS[shape]
    chunks = make_chunks(count, cached, rows)
    read = 2 * count * cached * kv_heads * HEAD_DIM * 2
    layers = max(1, min(64, RING_BYTES // read))
    query = torch.randn(count * rows, heads, HEAD_DIM).bfloat16()
    calls = {
        "torch": torch_call(chunks, query, kv_heads, layers),
        "bfloat16": kernel_call("bfloat16", chunks, query, kv_heads, layers),
        "int8": kernel_call("int8", chunks, query, kv_heads, layers),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in itertools.islice(itertools.cycle(calls.items()), repeats * len(calls)):
        begin = time.perf_counter()
        call()
        times[name].append(1e6 * (time.perf_counter() - begin))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "shape": shape, "sequences": count, "cached": cached, "rows": rows, **medians,
        "rate": read / medians["bfloat16"] / 1e3,
    }  # fmt: skip


def make_chunks(count: int, cached: int, rows: int) -> list[Chunk]:
    blocks = itertools.count()
    chunks = []
    for number in range(count):
        request = Request(id=str(number), prompt_token_ids=[0] * cached)
        sequence = Sequence.from_request(request, 0, number, seed=0)
        sequence.block_table = list(itertools.islice(blocks, -(-cached // BLOCK_SIZE)))
        chunks.append(Chunk(sequence, cached - rows, rows, False))
    return chunks


def torch_call(
    chunks: list[Chunk], query: torch.Tensor, kv_heads: int, layers: int
) -> Callable[[], object]:
    config = ModelConfig(
        vocab_size=2, num_layers=layers, hidden_size=64, num_heads=query.shape[1],
        num_kv_heads=kv_heads, head_dim=HEAD_DIM, intermediate_size=64, context_length=4096,
    )  # fmt: skip
    num_blocks = sum(len(chunk.sequence.block_table) for chunk in chunks)
    cache = KVCache(
        config, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )  # fmt: skip
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
    attend = PagedAttention(cache, chunks, None)
    key, value = torch.randn(2, 1, query.shape[0], kv_heads, HEAD_DIM).bfloat16()
    ring = itertools.cycle(range(layers))
    return lambda: attend(next(ring), query[None], key, value)


def kernel_call(
    format: CacheFormat, chunks: list[Chunk], query: torch.Tensor, kv_heads: int, layers: int
) -> Callable[[], object]:
    layout = KVLayout(format, BLOCK_SIZE, kv_heads, HEAD_DIM)
    blocks = [block for chunk in chunks for block in chunk.sequence.block_table]
    slots = torch.arange(len(blocks) * BLOCK_SIZE)
    caches = [layout.allocate(len(blocks)) for _ in range(layers)]
    for cache in caches:
        layout.write(cache, slots, *torch.randn(2, slots.shape[0], kv_heads, HEAD_DIM))
    rows, table, described = 0, 0, []
    for chunk in chunks:
        described.append((rows, chunk.length, chunk.start, table))
        rows, table = rows + chunk.length, table + len(chunk.sequence.block_table)
    described_chunks = torch.tensor(described, dtype=torch.int32)
    tables = torch.tensor(blocks, dtype=torch.int32)
    ring = itertools.cycle(caches)
    return lambda: attention.paged_attention(query, next(ring), described_chunks, tables, layout)


if __name__ == "__main__":
    main()
