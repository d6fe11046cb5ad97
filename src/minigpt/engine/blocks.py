"""The KV cache's blocks: who holds which, and which content can be used again; no torch here."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockManager:
    """Hands out the cache's fixed blocks and takes them back.

    A block has as many references as block tables name it. At zero it is free: a block whose
    content is known by a digest (`cache`) keeps it and can be found and shared again until it is
    evicted; the others are handed out first, of them the one freed last, whose memory is warm.
    Evicted is the cached block that went unused for longest, of one sequence the last ones
    first: a prefix without its beginning is of no use.

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
        """Without references or digest."""
        self.num_untouched = num_blocks
        """Blocks that were never taken: their memory was never written."""
        self._idle: OrderedDict[int, None] = OrderedDict()
        """With a digest but without references, unused for longest first."""
        self._references = [0] * num_blocks
        self._digests: dict[int, bytes] = {}
        self._cached: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, cached or not."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Blocks that at least one block table names."""
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, each with one reference; there must be as many."""
        assert 0 <= count <= self.num_free, f"{count} of {self.num_free} free blocks"
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        self.num_untouched = min(self.num_untouched, len(self._free))
        for block in blocks:
            self._references[block] = 1
        return blocks

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest cached prefix of `digests`; they are not taken."""
        blocks = []
        for digest in digests:
            block = self._cached.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_references(self, block: int) -> int:
        """Return how many block tables name a block."""
        return self._references[block]

    def num_unused(self, blocks: Iterable[int]) -> int:
        """Return how many of `blocks` nobody holds: sharing them takes as many free ones."""
        return sum(self._references[block] == 0 for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to each of `blocks`, which are in use or cached."""
        for block in blocks:
            if self._references[block] == 0:
                assert block in self._idle, f"block {block} is free"
                del self._idle[block]
            self._references[block] += 1

    def cache(self, block: int, digest: bytes) -> None:
        """Let a block in use be found by `digest`, unless another one already is."""
        assert self._references[block] > 0, f"block {block} is free"
        if digest not in self._cached:
            assert block not in self._digests, f"block {block} is cached as something else"
            self._cached[digest] = block
            self._digests[block] = digest

    def forget(self, blocks: Iterable[int]) -> None:
        """Let nobody find `blocks`, which are in use, any more."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is free"
            digest = self._digests.pop(block, None)
            if digest is not None:
                del self._cached[digest]

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each block of a table; those without any become free."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} is free"
            self._references[block] -= 1
            if self._references[block]:
                continue
            if block in self._digests:
                self._idle[block] = None
            else:
                self._free.append(block)

    def check(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Assert that references, free blocks, digests and all the block tables agree."""
        named = Counter(block for table in block_tables for block in table)
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & self._idle.keys(), "a block is free and cached"
        assert not free & self._digests.keys(), "a free block has a digest"
        assert self._idle.keys() <= self._digests.keys(), "a cached block lacks its digest"
        assert self.num_untouched <= len(free), "a block that was taken counts as untouched"
        assert len(free) + len(self._idle) + len(named) == self.num_blocks, "a block is lost"
        assert sum(self._references) == sum(named.values()), "references without a table"
        for block, references in named.items():
            assert references == self._references[block], (
                f"block {block}: {self._references[block]} references, {references} tables"
            )
        found = {block: digest for digest, block in self._cached.items()}
        assert found == self._digests, "digests do not lead to their blocks"

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._cached[self._digests.pop(block)]
        return block
