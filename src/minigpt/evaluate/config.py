"""How a model is measured, and the limits that a gate sets. No torch."""

from __future__ import annotations

import difflib
from typing import Literal, NamedTuple, Self

from pydantic import Field, model_validator

from minigpt.core.config import Auto, Config


class MetricInfo(NamedTuple):
    """What a metric of a report means."""

    better: Literal["lower", "higher"]
    meaning: str


METRICS: dict[str, MetricInfo] = {
    "bits_per_byte": MetricInfo("lower", "bits the model needs for a byte of held-out text"),
    "perplexity": MetricInfo("lower", "exp of the mean NLL of a token; depends on the tokenizer"),
    "nll_per_token": MetricInfo("lower", "mean NLL of a token in nats"),
    "gzip_bits_per_byte": MetricInfo("lower", "gzip at level 9 on the same bytes"),
    "xz_bits_per_byte": MetricInfo("lower", "xz at level 9 on the same bytes"),
    "bits_over_gzip": MetricInfo("lower", "bits per byte over gzip's; below 1 beats gzip"),
    "bits_over_xz": MetricInfo("lower", "bits per byte over xz's; below 1 beats xz"),
    "parse_rate": MetricInfo("higher", "share of code completions that ast.parse accepts"),
    "parse_rate_reference": MetricInfo("higher", "the same rate for the true continuations"),
}
"""The metrics of every report; tasks add `task/<task>/<metric>`, a parity report
`parity/<served>/<reference dtype>/<number>`; served is the dtype, and `-kv-` and the KV cache's
where that is another."""

_TASK_PREFIX = "task/"
_PARITY_PREFIX = "parity/"
_LOWER_IS_BETTER = ("perplexity", "bits_per_byte", "nll", "loss", "error", "wer", "ter")


def metric_info(name: str) -> MetricInfo:
    """Return what a metric means.

    Raises:
        ValueError: No report has a metric of this name; the message names the nearest.
    """
    if name in METRICS:
        return METRICS[name]
    if name.startswith(_TASK_PREFIX) and name.count("/") >= 2:
        lower = any(word in name.rsplit("/", 1)[1] for word in _LOWER_IS_BETTER)
        return MetricInfo("lower" if lower else "higher", "a task's score by lm-eval")
    if name.startswith(_PARITY_PREFIX) and name.count("/") == 3:
        agreement = name.endswith("agreement")
        return MetricInfo("higher" if agreement else "lower", "serving against training")
    nearest = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.5)
    hint = (
        f"did you mean {nearest[0]!r}?"
        if nearest
        else f"known metrics: {', '.join(METRICS)}, task/<task>/<metric>, "
        "parity/<served>/<reference>/<number>"
    )
    raise ValueError(f"unknown metric {name!r}: {hint}")


class EvaluateConfig(Config):
    """What to measure and how precisely."""

    max_documents: int | None = Field(default=None, ge=1)
    """Score at most this many held-out documents, drawn with the seed; null is all."""
    context_length: int | Auto = "auto"
    """Tokens the model sees at once; auto is the model's own limit."""
    batch_tokens: int = Field(default=8192, ge=1)
    """Tokens in a forward pass, padding included; bounds memory."""
    device: Auto | Literal["cpu", "cuda"] = "auto"
    """Where to run the model; auto is cuda where there is one."""
    dtype: Auto | Literal["float32", "bfloat16"] = "auto"
    """Type to run the model in; auto is what the engine serves in here: bfloat16 where the
    hardware multiplies it."""
    bootstrap_samples: int = Field(default=2000, ge=100)
    """Resamples behind each interval."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Two-sided coverage of the intervals."""
    seed: int = Field(default=0, ge=0)
    """Draws documents, resamples and completions; equal seeds give equal reports."""
    compressors: bool = True
    """Compress the same bytes with gzip and xz too."""
    samples: int = Field(default=0, ge=0)
    """Code completions to parse; 0 measures no parse rate."""
    sample_prompt_lines: int = Field(default=12, ge=1)
    """A completion's prompt is this many first lines of a held-out document."""
    sample_tokens: int = Field(default=128, ge=1)
    """Most tokens in a completion; the context limits it too."""
    sample_temperature: float = Field(default=0.8, ge=0)
    """0 is greedy."""
    tasks: tuple[str, ...] = ()
    """lm-eval task files (YAML) whose data are local files."""
    task_limit: int | None = Field(default=None, ge=1)
    """Use at most this many examples of each task; null is all."""


class Threshold(Config):
    """Bounds that a metric must keep."""

    min: float | None = None
    """The metric must be at least this."""
    max: float | None = None
    """The metric must be at most this."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("bounded by min, by max or by both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"passable, but min = {self.min} is above max = {self.max}")
        return self


class Regression(Config):
    """How much worse than the baseline a metric may be."""

    relative: float | None = Field(default=None, ge=0)
    """As a share of the baseline's value: 0.01 allows 1 % worse."""
    absolute: float | None = Field(default=None, ge=0)
    """In the metric's own unit."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.relative is None) == (self.absolute is None):
            raise ValueError("either relative or absolute: exactly one of the two")
        return self


ParityNumber = Literal[
    "max_delta", "p99_delta", "mean_kl", "greedy_agreement",
    "decode_max_delta", "decode_p99_delta", "decode_greedy_agreement",
]  # fmt: skip


def parity_place(dtype: str, kv_dtype: str, reference_dtype: str) -> str:
    """Return what the metrics of a way of serving begin with."""
    served = dtype if kv_dtype == dtype else f"{dtype}-kv-{kv_dtype}"
    return f"{_PARITY_PREFIX}{served}/{reference_dtype}"


def describe_serving(dtype: str, kv_dtype: str, runner: str, activation_bits: int) -> str:
    """Say in words how a model is served."""
    rounding = "" if activation_bits == 16 else f", {activation_bits}-bit activations"
    return f"{dtype}, KV cache {kv_dtype}{rounding}, by {runner}"


class RequiredParity(Config):
    """A way of serving that must be certified by `minigpt parity`, and how near it must be."""

    dtype: Literal["float32", "bfloat16"]
    """What it is served in."""
    runner: Literal["kernels", "torch"]
    """What must have multiplied."""
    kv_cache_dtype: Auto | Literal["float32", "bfloat16", "int8"] = "auto"
    """What keys and values are kept in; auto is `dtype`."""
    activation_bits: Literal[8, 16] = 16
    """To what the inputs of integer weights are rounded."""
    reference_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the plain forward pass that it is compared with."""
    thresholds: dict[ParityNumber, Threshold] = Field(min_length=1)
    """By number: {min: ..., max: ...}."""

    @property
    def place(self) -> str:
        """As `ParityRow.place`."""
        return parity_place(self.dtype, self._kv_dtype, self.reference_dtype)

    @property
    def served_by(self) -> str:
        """As `ParityRow.served_by`."""
        return describe_serving(self.dtype, self._kv_dtype, self.runner, self.activation_bits)

    @property
    def _kv_dtype(self) -> str:
        return self.dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype


class GateConfig(Config):
    """Thresholds and allowed regressions; every rule must pass for the verdict `pass`."""

    min_documents: int = Field(default=20, ge=1)
    """With fewer documents the verdict is `insufficient`, whatever the numbers."""
    evidence: Literal["interval", "estimate"] = "interval"
    """interval: the whole confidence interval must keep the limit, and one that straddles it is
    insufficient evidence; estimate: the point estimate alone decides."""
    thresholds: dict[str, Threshold] = Field(default_factory=dict)
    """By metric: {min: ..., max: ...}."""
    regressions: dict[str, Regression] = Field(default_factory=dict)
    """By metric: {relative: ...} or {absolute: ...} against the baseline."""
    require_parity: tuple[RequiredParity, ...] = ()
    """Ways of serving that a parity report of these very weights must certify."""
    baseline: str | None = None
    """What regressions are measured against: a report, or a name in the registry."""
    without_baseline: Literal["insufficient", "skip"] = "insufficient"
    """What regressions count for while the registry holds no baseline yet; skip lets a first
    model pass on its thresholds."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.thresholds or self.regressions or self.require_parity):
            raise ValueError(
                "a gate without thresholds, regressions and require_parity would pass anything"
            )
        for name in (*self.thresholds, *self.regressions):
            metric_info(name)
        return self
