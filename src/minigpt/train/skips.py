"""Data that a run never uses again: `skips.jsonl`, and the order of what is left.

Each line says which samples of the loader's global order were judged harmful, at which step and
why. The run's own order is the global one with those samples left out, so that it stays a pure
function of the position and of this record, which is part of the run's lineage.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from minigpt.train.metrics import append_line, read_metrics

SKIPS_FILE = "skips.jsonl"


class Skip(NamedTuple):
    """A range of samples left out."""

    first_sample: int
    samples: int


class SkipList:
    """The ranges that a run leaves out, in order and disjoint."""

    def __init__(self, skips: Iterable[Skip] = ()) -> None:
        self.ranges: list[Skip] = []
        self.records = 0
        """Lines of the record: ranges that touch are one range."""
        for skip in sorted(skips):
            self.records += 1
            if self.ranges and skip.first_sample <= sum(self.ranges[-1]):
                before = self.ranges.pop()
                end = max(sum(before), sum(skip))
                self.ranges.append(Skip(before.first_sample, end - before.first_sample))
            else:
                self.ranges.append(skip)

    @property
    def samples(self) -> int:
        """How many samples are left out."""
        return sum(skip.samples for skip in self.ranges)

    def sample_at(self, position: int) -> int:
        """Return the sample at a position of the run's own order."""
        sample = position
        for skip in self.ranges:
            if sample < skip.first_sample:
                break
            sample += skip.samples
        return sample


def read_skips(run_dir: Path) -> SkipList:
    """Read a run's record; an empty list where it has none."""
    lines = read_metrics(run_dir / SKIPS_FILE)
    return SkipList(Skip(line["first_sample"], line["samples"]) for line in lines)


def record_skip(run_dir: Path, skip: Skip, *, step: int, reason: str) -> None:
    """Add a range to a run's record, for good.

    Raises:
        StorageError: It could not be written.
    """
    append_line(run_dir / SKIPS_FILE, {"step": step, **skip._asdict(), "reason": reason})
