"""The KV cache's blocks: who holds which, by reference count; no torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class BlockManager:
    """Hands out the cache's fixed blocks and takes them back.

    A block has as many references as block tables name it; it is free at zero. The block freed
    last is handed out first: its memory is warm, and what was never used need not be touched.

    Args:
        num_blocks: Blocks in the cache.
        block_size: Tokens in a block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0, num_blocks
        assert block_size > 0, block_size
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(reversed(range(num_blocks)))
        self._references = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that at least one block table names."""
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, each with one reference; there must be as many."""
        assert 0 <= count <= self.num_free, f"{count} of {self.num_free} free blocks"
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to each of `blocks`, which are in use."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is free"
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop a reference to each of `blocks`; those without any become free."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is free"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)

    def check(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Assert that references, the free list and all the block tables agree."""
        named = Counter(block for table in block_tables for block in table)
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        for block, references in enumerate(self._references):
            assert references == named[block], f"block {block}: {references} != {named[block]}"
            assert (references == 0) == (block in free), f"block {block} is lost or free in use"
