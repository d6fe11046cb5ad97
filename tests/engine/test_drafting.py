from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt.engine.drafting import Acceptance, NgramIndex


def _look_up(tokens: list[int], count: int, least: int, most: int) -> tuple[int, ...]:
    """The definition: of the last 8 places where `least` agree, the longest, then the latest."""
    places = [
        place
        for place in range(len(tokens) - 1, least - 1, -1)
        if tokens[place - least : place] == tokens[len(tokens) - least :]
    ][:8]

    def agreement(place: int) -> int:
        agree = least
        while agree < min(most, place) and tokens[place - 1 - agree] == tokens[-1 - agree]:
            agree += 1
        return agree

    if not places or len(tokens) < least:
        return ()
    place = max(places, key=lambda place: (agreement(place), place))
    drafted = list(tokens)
    for i in range(count):
        drafted.append(drafted[place + i])
    return tuple(drafted[len(tokens) :])


@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    steps=st.lists(st.integers(1, 9), max_size=8),
    least=st.integers(1, 3),
    further=st.integers(0, 4),
    count=st.integers(1, 6),
)
def test_the_index_equals_a_search(
    tokens: list[int], steps: list[int], least: int, further: int, count: int
) -> None:
    """However the tokens come in, what is drafted is what a search of all of them finds."""
    index = NgramIndex(least, least + further)
    known = 1
    for step in (0, *steps):
        known = min(known + step, len(tokens))
        so_far = tokens[:known]
        expected = _look_up(so_far, count, least, least + further)
        assert index.propose(so_far, count) == expected


def test_the_place_where_more_agrees_is_preferred_to_the_latest() -> None:
    tokens = [1, 2, 3, 10, 9, 2, 3, 20, 1, 2, 3]
    assert NgramIndex(2, 8).propose(tokens, 1) == (10,)
    assert NgramIndex(2, 2).propose(tokens, 1) == (20,)


def test_repetition_is_taken_to_go_on() -> None:
    assert NgramIndex(2, 4).propose([5, 7, 8, 7, 8], 5) == (7, 8, 7, 8, 7)


class _Counting(list[int]):
    reads = 0

    def __getitem__(self, key: Any) -> Any:
        self.reads += 1
        return super().__getitem__(key)


def test_a_further_token_costs_the_same_in_a_long_sequence() -> None:
    chance = random.Random(0)
    tokens = _Counting(chance.randrange(3) for _ in range(20_000))
    index = NgramIndex(2, 8)
    index.propose(tokens, 4)
    before = tokens.reads
    for _ in range(10):
        tokens.append(chance.randrange(3))
        index.propose(tokens, 4)
    assert tokens.reads - before < 10 * 150


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), max_size=60), st.floats(0, 1))
def test_a_rate_is_a_share(history: list[tuple[int, int]], prior: float) -> None:
    acceptance = Acceptance()
    assert acceptance.rate(prior) == pytest.approx(prior)
    for drafted, accepted in history:
        acceptance.observe(drafted, min(drafted, accepted))
        assert 0 <= acceptance.rate(prior) <= 1


def test_a_rate_follows_what_happens() -> None:
    acceptance = Acceptance()
    for _ in range(30):
        acceptance.observe(4, 4)
    assert acceptance.rate(0.0) > 0.9
    for _ in range(30):
        acceptance.observe(1, 0)
    assert acceptance.rate(1.0) < 0.3
    for _ in range(40):
        acceptance.observe(4, 2)  # of three that were looked at, two were right
    assert acceptance.rate(0.5) == pytest.approx(2 / 3, abs=0.02)
