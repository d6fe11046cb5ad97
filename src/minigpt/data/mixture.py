"""Which source a sample comes from: a closed form, exact at any position.

The order is cut into stages of constant integer counts. Within a stage a block of `sum(counts)`
samples repeats, which takes exactly that many from each source, spread evenly: each source's
samples are jobs that must fall into windows one ideal interval wide, dealt out by earliest
deadline, which for one processor always succeeds (Baruah et al., "Proportionate progress",
1996). So the number of samples that a source has given stays less than one from its ideal
share, and finding any sample's source costs a search among the stages and a division.
"""

from __future__ import annotations

import heapq
import math
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from minigpt.core.errors import ConfigError
from minigpt.data.config import MixtureConfig, MixtureSource

_MOST_BLOCK = 4096
"""Samples a block at most: finer weights are rounded to parts of so many."""

Counts = tuple[int, ...]


class Stage(NamedTuple):
    """A part of the order with constant shares."""

    first: int
    """Its first sample."""
    counts: Counts
    """Samples a block from each source."""


class Place(NamedTuple):
    """Where samples come from; arrays of the samples' shape."""

    sources: npt.NDArray[np.int64]
    """Number of the source."""
    indices: npt.NDArray[np.int64]
    """How many samples the source has given before."""


class Mixture:
    """Deals the samples of the global order out to the sources.

    Example:
        mixture = Mixture([Stage(0, (3, 1)), Stage(1000, (1, 1))])
        mixture.place(np.arange(8)).sources  # [0, 0, 1, 0, ...]
    """

    def __init__(self, stages: list[Stage]) -> None:
        """Sum up what each stage takes from each source.

        Args:
            stages: Ascending, the first at sample 0; the last goes on for ever. No stage's
                counts are all zero.
        """
        assert stages and stages[0].first == 0
        self.stages = stages
        self._firsts = np.array([stage.first for stage in stages], np.int64)
        counts = np.array([stage.counts for stage in stages], np.int64)
        taken = np.zeros_like(counts)  # by the stages before each; a ramp's are one block each
        taken[1:] = counts[:-1]
        for number in np.flatnonzero(np.diff(self._firsts) != counts[:-1].sum(axis=1)) + 1:
            before, following = stages[number - 1 : number + 1]
            taken[number] = _taken(before.counts, following.first - before.first)
        self._totals = np.cumsum(taken, axis=0)

    def place(self, samples: npt.NDArray[np.int64]) -> Place:
        """Return source and number within the source of samples, (count,) each."""
        sources, indices = np.empty_like(samples), np.empty_like(samples)
        stage_of = np.searchsorted(self._firsts, samples, side="right") - 1
        for number in np.unique(stage_of):
            here = stage_of == number
            stage = self.stages[number]
            order, ranks = _block(stage.counts)
            blocks, offsets = np.divmod(samples[here] - stage.first, len(order))
            chosen = order[offsets]
            earlier = blocks * np.array(stage.counts, np.int64)[chosen]
            sources[here] = chosen
            indices[here] = self._totals[number][chosen] + earlier + ranks[offsets]
        return Place(sources, indices)

    def counts(self, samples: int) -> npt.NDArray[np.int64]:
        """Return how many of the first `samples` samples each source gives, (sources,)."""
        number = int(np.searchsorted(self._firsts, samples, side="right")) - 1
        stage = self.stages[number]
        totals: npt.NDArray[np.int64] = self._totals[number]
        return totals + _taken(stage.counts, samples - stage.first)


def build_mixture(config: MixtureConfig, *, samples_per_step: int, sequence_length: int) -> Mixture:
    """Turn weights over steps or tokens into stages of the sample order.

    A ramp of n samples becomes about sqrt(n) stages of sqrt(n) samples, each of which makes up
    for what rounding the one before left over.

    Args:
        config: The weights.
        samples_per_step: Rows in a global batch.
        sequence_length: Tokens in a row.

    Raises:
        ConfigError: All weights are zero somewhere.
    """
    by_steps = config.schedule_unit == "steps"
    points = sorted({0, *(point.at for source in config.mixture for point in source.schedule)})
    firsts = [at * samples_per_step if by_steps else at // sequence_length for at in points]
    stages: list[Stage] = []
    for i, (at, first) in enumerate(zip(points, firsts, strict=True)):
        weights = [_weight(source, at) for source in config.mixture]
        is_last = i + 1 == len(points)
        end = None if is_last else firsts[i + 1]
        if end is not None and end <= first:  # points closer than a row
            continue
        ends = weights if is_last else [_ramp_end(s, at, points[i + 1]) for s in config.mixture]
        if not any(weights) or not any(ends):
            raise ConfigError(
                f"all weights of the mixture are zero at {config.schedule_unit[:-1]} {at}",
                remedy="give a source a weight above 0 there",
            )
        if ends == weights:
            stages.append(Stage(first, shares_to_counts(weights)))
        else:
            assert end is not None
            stages += _ramp(first, end, weights, ends)
    return Mixture(stages)


def shares_to_counts(weights: list[Fraction]) -> Counts:
    """Return whole numbers in the proportion of `weights`, as small as possible.

    Where they would sum up to more than a block, they are rounded to one, and no positive
    weight to zero.
    """
    common = math.lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * common) for weight in weights]
    divisor = math.gcd(*whole)
    whole = [count // divisor for count in whole]
    if sum(whole) <= _MOST_BLOCK:
        return tuple(whole)
    least = [int(weight > 0) for weight in weights]
    left = _MOST_BLOCK - sum(least)
    total = sum(weights)
    ideal = [
        float(weight / total * _MOST_BLOCK) - low
        for weight, low in zip(weights, least, strict=True)
    ]
    return tuple(a + b for a, b in zip(least, _apportion(ideal, left), strict=True))


def _apportion(ideal: list[float], total: int) -> list[int]:
    """Round to whole numbers >= 0 that sum up to `total`, by largest remainder."""
    positive = [max(0.0, value) for value in ideal]
    scale = total / sum(positive) if sum(positive) > 0 else 0.0
    positive = [value * scale for value in positive]
    floors = [int(value) for value in positive]
    by_remainder = sorted(range(len(ideal)), key=lambda i: (floors[i] - positive[i], i))
    for i in by_remainder[: total - sum(floors)]:
        floors[i] += 1
    return floors


def _ramp(first: int, end: int, begin: list[Fraction], final: list[Fraction]) -> list[Stage]:
    size = min(_MOST_BLOCK, max(1, math.isqrt(end - first)))
    stages = []
    owed = [0.0] * len(begin)
    for start in range(first, end, size):
        length = min(size, end - start)
        middle = (start + length / 2 - first) / (end - first)
        weights = [
            float(a) + (float(b) - float(a)) * middle for a, b in zip(begin, final, strict=True)
        ]
        ideal = [w / sum(weights) * length + o for w, o in zip(weights, owed, strict=True)]
        counts = _apportion(ideal, length)
        owed = [wanted - given for wanted, given in zip(ideal, counts, strict=True)]
        stages.append(Stage(start, tuple(counts)))
    return stages


def _weight(source: MixtureSource, at: int) -> Fraction:
    """Return the weight from point `at` on."""
    reached, weight = 0, Fraction(str(source.weight))
    for point in source.schedule:
        target = Fraction(str(point.weight))
        if point.at <= at:
            reached, weight = point.at, target
        elif point.ramp:
            return weight + (target - weight) * Fraction(at - reached, point.at - reached)
        else:
            break
    return weight


def _ramp_end(source: MixtureSource, at: int, following: int) -> Fraction:
    """Return the weight that is reached just before `following`, the next point of any source."""
    ahead = next((point for point in source.schedule if point.at > at), None)
    if ahead is None or not ahead.ramp:
        return _weight(source, at)
    return _weight(source, following)


@lru_cache(maxsize=256)
def _block(counts: Counts) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the source of each sample of a block, and its number among that source's."""
    size = sum(counts)
    jobs = sorted(
        (number * size // count, -(-(number + 1) * size // count), source, number)
        for source, count in enumerate(counts)
        for number in range(count)
    )
    order, ranks = np.empty(size, np.int64), np.empty(size, np.int64)
    waiting: list[tuple[int, int, int]] = []
    released = 0
    for slot in range(size):
        while released < size and jobs[released][0] <= slot:
            heapq.heappush(waiting, jobs[released][1:])
            released += 1
        deadline, source, number = heapq.heappop(waiting)
        assert slot < deadline
        order[slot], ranks[slot] = source, number
    return order, ranks


def _taken(counts: Counts, samples: int) -> npt.NDArray[np.int64]:
    """Return how much the first `samples` samples of a stage take from each source."""
    blocks, rest = divmod(samples, sum(counts))
    whole = blocks * np.array(counts, np.int64)
    return whole + np.bincount(_block(counts)[0][:rest], minlength=len(counts))
