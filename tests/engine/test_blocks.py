from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from minigpt.engine.blocks import BlockManager


class BlockMachine(RuleBasedStateMachine):
    """Tables come, grow, share blocks and go; the manager's books always match them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(12, 4)
        self.tables: list[list[int]] = []

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.blocks.num_free))
        self.tables.append(self.blocks.allocate(count))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        prefix = table[: data.draw(st.integers(0, len(table)))]
        self.blocks.share(prefix)
        self.tables.append(prefix)

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
        assert self.blocks.num_free == 12 - len(in_use)


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


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


def test_check_finds_leaks_and_double_use() -> None:
    blocks = BlockManager(4, 4)
    table = blocks.allocate(2)
    blocks.check([table])
    with pytest.raises(AssertionError):
        blocks.check([])
    with pytest.raises(AssertionError):
        blocks.check([table, table])


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert BlockManager(1, 4).blocks_for(tokens) == blocks
