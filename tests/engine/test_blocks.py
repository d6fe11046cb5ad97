from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from minigpt.engine.blocks import BlockManager

NUM_BLOCKS = 12


class BlockMachine(RuleBasedStateMachine):
    """Tables come, grow, share, are cached and go; the manager's books always match them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(NUM_BLOCKS, 4)
        self.tables: list[list[int]] = []
        self.content: dict[int, bytes] = {}
        """What each block was last cached as, until it was handed out anew or forgotten."""

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.blocks.num_free))
        unknown = [b for b in range(NUM_BLOCKS) if b not in self.content and not self._held(b)]
        table = self.blocks.allocate(count)
        evicted = [block for block in table if block in self.content]
        assert len(evicted) == max(0, count - len(unknown)), "evicted while others were free"
        for block in evicted:
            assert not self.blocks.find([self.content.pop(block)])
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        prefix = table[: data.draw(st.integers(0, len(table)))]
        self.blocks.share(prefix)
        self.tables.append(prefix)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), digest=st.sampled_from([bytes([n]) for n in range(8)]))
    def cache(self, data: st.DataObject, digest: bytes) -> None:
        table = data.draw(st.sampled_from([table for table in self.tables if table]))
        block = data.draw(st.sampled_from(table))
        if block not in self.content:
            self.blocks.cache(block, digest)
            if digest not in self.content.values():
                self.content[block] = digest

    @rule(digests=st.lists(st.sampled_from([bytes([n]) for n in range(8)]), unique=True))
    def find_and_share(self, digests: list[bytes]) -> None:
        expected = []
        known = {digest: block for block, digest in self.content.items()}
        for digest in digests:
            if digest not in known:
                break
            expected.append(known[digest])
        found = self.blocks.find(digests)
        assert found == expected
        assert self.blocks.num_unused(found) == sum(not self._held(block) for block in found)
        self.blocks.share(found)
        self.tables.append(found)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.blocks.forget(table)
        for block in table:
            self.content.pop(block, None)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.blocks.release(table)

    @invariant()
    def books_match(self) -> None:
        self.blocks.check(self.tables)
        in_use = {block for table in self.tables for block in table}
        assert self.blocks.num_used == len(in_use)
        assert self.blocks.num_free == NUM_BLOCKS - len(in_use)
        for block, digest in self.content.items():
            assert self.blocks.find([digest]) == [block]

    def _held(self, block: int) -> bool:
        return any(block in table for table in self.tables)


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_refuses_misuse() -> None:
    blocks = BlockManager(2, 4)
    held = blocks.allocate(1)
    with pytest.raises(AssertionError):
        blocks.allocate(2)
    blocks.release(held)
    with pytest.raises(AssertionError):
        blocks.release(held)
    with pytest.raises(AssertionError):
        blocks.share(held)
    with pytest.raises(AssertionError):
        blocks.cache(held[0], b"a")


def test_check_finds_leaks_and_double_use() -> None:
    blocks = BlockManager(4, 4)
    table = blocks.allocate(2)
    blocks.check([table])
    with pytest.raises(AssertionError):
        blocks.check([])
    with pytest.raises(AssertionError):
        blocks.check([table, table])


def test_check_finds_a_digest_that_leads_elsewhere() -> None:
    blocks = BlockManager(4, 4)
    table = blocks.allocate(2)
    blocks.cache(table[0], b"a")
    blocks.check([table])
    blocks._cached[b"a"] = table[1]
    with pytest.raises(AssertionError, match="digests"):
        blocks.check([table])


def test_evicted_is_what_went_unused_for_longest_and_of_a_prefix_its_end() -> None:
    blocks = BlockManager(5, 4)
    first, second = blocks.allocate(3), blocks.allocate(2)
    for block in (*first, *second):
        blocks.cache(block, bytes([block]))
    blocks.release(first)
    blocks.release(second)
    blocks.share(blocks.find([bytes([first[0]])]))  # used again, so it outlives the second
    blocks.release(first[:1])
    expected = [first[2], first[1], second[1], second[0], first[0]]
    assert [blocks.allocate(1)[0] for _ in range(5)] == expected


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert BlockManager(1, 4).blocks_for(tokens) == blocks
