from __future__ import annotations

import time
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from minigpt.engine.shaping import TokenCounts


@given(
    prompt=st.lists(st.integers(0, 500), max_size=300),
    generated=st.lists(st.integers(0, 500), max_size=400),
)
def test_counts_are_those_of_a_recount(prompt: list[int], generated: list[int]) -> None:
    counts = TokenCounts(prompt)
    for token in generated:
        counts.add(token)
    expected = dict.fromkeys(prompt, 0) | Counter(generated)
    assert dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True)) == expected
    assert len(counts.ids) == len(set(prompt) | set(generated))


def test_the_cost_of_a_token_does_not_grow_with_the_history() -> None:
    counts = TokenCounts()

    def seconds() -> float:
        began = time.perf_counter()
        for token in range(20_000):
            counts.add(token % 1000)
        return time.perf_counter() - began

    first = min(seconds() for _ in range(3))
    for _ in range(5):
        seconds()
    assert min(seconds() for _ in range(3)) < 5 * first
