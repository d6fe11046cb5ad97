"""A report's metrics as ratios of sums over documents, to be resampled and compared in pairs."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from minigpt.evaluate.bootstrap import (
    Floats,
    Interval,
    PairedDifference,
    Transform,
    paired_difference,
    ratio_interval,
)
from minigpt.evaluate.report import Scores


class Resampling(NamedTuple):
    """How the bootstrap draws; the fields are `EvaluateConfig`'s."""

    samples: int = 2000
    confidence: float = 0.95
    seed: int = 0


class Series(NamedTuple):
    """transform(sum of numerators / sum of denominators), each (documents,)."""

    documents: np.ndarray
    """Hashes of the documents' texts."""
    numerators: Floats
    denominators: Floats
    transform: Transform | None = None

    def interval(self, resampling: Resampling) -> Interval:
        """Estimate the metric."""
        return ratio_interval(
            self.numerators,
            self.denominators,
            transform=self.transform,
            **resampling._asdict(),
        )


class PairedChange(NamedTuple):
    """How a metric differs between two reports on the documents that both scored."""

    difference: PairedDifference
    shared: int
    """Documents that both scored; with none the difference is NaN."""
    documents: int
    """Documents that the newer one scored."""


def series(metric: str, scores: Scores) -> Series | None:
    """Return a metric's parts by document, None for a metric that has none."""
    if metric == "bits_per_byte":
        bits = scores.nll_nats / math.log(2)
        return Series(scores.documents, bits, scores.bytes.astype(np.float64))
    if metric in ("nll_per_token", "perplexity"):
        transform = np.exp if metric == "perplexity" else None
        tokens = scores.tokens.astype(np.float64)
        return Series(scores.documents, scores.nll_nats, tokens, transform)
    if metric == "parse_rate":
        accepted = scores.sample_accepted.astype(np.float64)
        return Series(scores.sample_documents, accepted, np.ones_like(accepted))
    return None


def paired_change(
    metric: str, new: Scores, old: Scores, resampling: Resampling
) -> PairedChange | None:
    """Compare a metric, new minus old, document by document; None for one without parts."""
    ours, theirs = series(metric, new), series(metric, old)
    if ours is None or theirs is None:
        return None
    shared, at_ours, at_theirs = np.intersect1d(
        ours.documents, theirs.documents, return_indices=True
    )
    difference = paired_difference(
        (ours.numerators[at_ours], ours.denominators[at_ours]),
        (theirs.numerators[at_theirs], theirs.denominators[at_theirs]),
        transform=ours.transform,
        **resampling._asdict(),
    )
    return PairedChange(difference, len(shared), len(ours.documents))
