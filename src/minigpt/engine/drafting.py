"""What one sequence may go on with, and how often that was right; no torch here.

Prompt look-up (Saxena 2023; Yang et al. 2023, arXiv 2304.04487): where the last n tokens were
seen before, what followed them then is drafted. Copied passages, code and lists repeat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

_MEMORY = 0.9
"""Weight of the past at each verification: half of what counts is from the last 7."""
_PRIOR_TRIALS = 2.0
"""Verified tokens that the experience with other sequences weighs."""
_PLACES = 8
"""Earlier places that are compared: a bound on the time that this takes."""


class NgramIndex:
    """Where a growing sequence said the same before; O(1) a token.

    Args:
        min_ngram: Fewest tokens that must agree.
        max_ngram: Most tokens that are compared. Of the last few places the one where most agree
            wins, of equals the latest.
    """

    def __init__(self, min_ngram: int, max_ngram: int) -> None:
        assert 1 <= min_ngram <= max_ngram, (min_ngram, max_ngram)
        self._min_ngram = min_ngram
        self._max_ngram = max_ngram
        self._latest: dict[tuple[int, ...], int] = {}
        """What follows the latest occurrence of each n-gram: its place."""
        self._earlier = [0] * min_ngram
        """By place: where the same n-gram was followed before that; 0 is nowhere."""

    def propose(self, token_ids: Sequence[int], count: int) -> tuple[int, ...]:
        """Return the `count` tokens that followed the last ones before, or none.

        Args:
            token_ids: All tokens; those of earlier calls never change.
            count: How many are wanted. Where fewer followed, the sequence repeats itself, and
                is taken to go on so.
        """
        n = self._min_ngram
        for place in range(len(self._earlier), len(token_ids)):
            ngram = tuple(token_ids[place - n : place])
            self._earlier.append(self._latest.get(ngram, 0))
            self._latest[ngram] = place
        place = self._best(token_ids)
        period = len(token_ids) - place
        return tuple(token_ids[place + i % period] for i in range(count)) if place else ()

    def _best(self, token_ids: Sequence[int]) -> int:
        best, most = 0, 0
        place = self._latest.get(tuple(token_ids[-self._min_ngram :]), 0)
        for _ in range(_PLACES):
            if not place or most == self._max_ngram:
                break
            agree = self._min_ngram
            longest = min(self._max_ngram, place)
            while agree < longest and token_ids[-1 - agree] == token_ids[place - 1 - agree]:
                agree += 1
            if agree > most:
                best, most = place, agree
            place = self._earlier[place]
        return best


class Acceptance:
    """The share of drafted tokens that were right, of those whose predecessors were.

    Args:
        memory: Weight of the past at each verification.
    """

    def __init__(self, memory: float = _MEMORY) -> None:
        self._memory = memory
        self._trials = 0.0
        self._accepted = 0.0

    def observe(self, drafted: int, accepted: int) -> None:
        """Learn that of so many drafted tokens the first `accepted` were right."""
        assert 0 <= accepted <= drafted
        trials = accepted + (accepted < drafted)
        self._trials = self._trials * self._memory + trials
        self._accepted = self._accepted * self._memory + accepted

    def rate(self, prior: float) -> float:
        """Return the estimate; without any evidence it is `prior`."""
        return (self._accepted + prior * _PRIOR_TRIALS) / (self._trials + _PRIOR_TRIALS)


@dataclass(slots=True)
class Drafting:
    """What is remembered of the drafts of one sequence."""

    allowed: bool = True
    """Whether it may be drafted for at all."""
    ngrams: NgramIndex | None = None
    """Made when first needed."""
    acceptance: Acceptance = field(default_factory=Acceptance)
    num_passed_over: int = 0
    """Steps since it last had a draft, of those that could have drafted."""
