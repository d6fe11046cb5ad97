"""From scores to a report's metrics: ratios with intervals, beside what compressors make."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from minigpt.core.telemetry import progress
from minigpt.evaluate.baselines import compressor_bits_per_byte
from minigpt.evaluate.bootstrap import rate_interval
from minigpt.evaluate.code_samples import CodeSample
from minigpt.evaluate.config import EvaluateConfig
from minigpt.evaluate.pairing import Resampling, series
from minigpt.evaluate.report import Measured, Scores

Metrics = dict[str, Measured]


def likelihood_metrics(scores: Scores, config: EvaluateConfig) -> Metrics:
    """Return bits per byte, NLL per token and perplexity with bootstrap intervals.

    A metric that is not a finite number is left out, which no gate passes.
    """
    metrics = {}
    for name in ("bits_per_byte", "perplexity", "nll_per_token"):
        parts = series(name, scores)
        assert parts is not None, name
        with np.errstate(over="ignore"):
            interval = parts.interval(resampling(config))
        if math.isfinite(interval.estimate):
            metrics[name] = Measured.of(interval)
    return metrics


def resampling(config: EvaluateConfig) -> Resampling:
    """Return the part of the config that says how the bootstrap draws."""
    return Resampling(config.bootstrap_samples, config.confidence, config.seed)


def compressor_metrics(texts: Sequence[bytes], likelihood: Metrics) -> Metrics:
    """Return gzip's and xz's bits per byte, and the model's over each of them."""
    total = sum(map(len, texts))
    with progress("compressing with gzip and xz", total=total, unit="bytes") as bar:

        def read() -> Iterator[bytes]:
            for text in texts:
                yield text
                bar.advance(len(text))

        found = compressor_bits_per_byte(read(), total)
    metrics = {
        "gzip_bits_per_byte": Measured(estimate=found.gzip),
        "xz_bits_per_byte": Measured(estimate=found.xz),
    }
    if (model := likelihood.get("bits_per_byte")) is not None:
        metrics["bits_over_gzip"] = model.scaled(1 / found.gzip)
        metrics["bits_over_xz"] = model.scaled(1 / found.xz)
    return metrics


def sample_metrics(samples: Sequence[CodeSample], config: EvaluateConfig) -> Metrics:
    """Return the share of code completions that parse, and of the true continuations."""
    if not samples:
        return {}
    accepted = {
        "parse_rate": sum(sample.accepted for sample in samples),
        "parse_rate_reference": sum(sample.reference_accepted for sample in samples),
    }
    return {
        name: Measured.of(rate_interval(count, len(samples), confidence=config.confidence))
        for name, count in accepted.items()
    }
