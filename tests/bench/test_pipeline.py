from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
from bench.pipeline import bubble, draw, play


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 2), (2, 8), (4, 4), (4, 12), (8, 16)])
def test_the_counted_bubbles_are_the_formulas(ranks: int, micro_batches: int) -> None:
    expected = Fraction(ranks - 1, micro_batches)
    assert bubble(play("gpipe", ranks, micro_batches, 1)) == expected
    assert bubble(play("1f1b", ranks, micro_batches, 1)) == expected
    assert bubble(play("interleaved", ranks, micro_batches, 2)) == expected / 2
    assert bubble(play("zero-bubble", ranks, micro_batches, 1)) < expected


def test_every_rank_does_all_its_work_in_turn() -> None:
    slots = play("zero-bubble", 4, 8, 2)
    for row in slots:
        kinds = sorted(slot.kind for slot in row)
        assert {kinds.count(kind) for kind in "FI"} <= {16, 16 - kinds.count("B")}
        assert sum(slot.stop - slot.start for slot in row) == 8 * 3
        assert all(a.stop <= b.start for a, b in pairwise(row))
    assert draw(slots, 2).count("\n") == 3
