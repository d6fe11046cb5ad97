"""What an evaluation leaves: the numbers, and the scores of each document behind them.

A report artifact holds `report.json` (a `Report`), `scores.npz` (a `Scores`) and, where code
was completed, `samples.jsonl`. No torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from minigpt.core.artifact import Artifact
from minigpt.core.config import Config, from_mapping
from minigpt.core.errors import ArtifactError
from minigpt.evaluate.bootstrap import Interval

REPORT_FILE = "report.json"
SCORES_FILE = "scores.npz"
SAMPLES_FILE = "samples.jsonl"

Outcome = Literal["pass", "fail", "insufficient"]
ReportFile = TypeVar("ReportFile", bound=Config)


class Measured(Config):
    """A metric's value; the interval is null where the metric has none."""

    estimate: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, interval: Interval) -> Measured:
        """Wrap an interval; bounds that the data can't give become null."""
        low, high = (
            bound if math.isfinite(bound) else None for bound in (interval.low, interval.high)
        )
        return cls(estimate=interval.estimate, low=low, high=high)

    def scaled(self, factor: float) -> Measured:
        """Return value and interval times `factor`, which may be negative."""
        bounds = [b * factor for b in (self.low, self.high) if b is not None]
        low, high = (min(bounds), max(bounds)) if len(bounds) == 2 else (None, None)
        return Measured(estimate=self.estimate * factor, low=low, high=high)


class RuleResult(Config):
    """One rule of a gate with the numbers that decided it."""

    metric: str
    rule: str
    """For people, for example `at most 2.5`."""
    verdict: Outcome
    reason: str
    value: float | None = None
    """What was compared with the limit: the metric, or how much worse it is."""
    low: float | None = None
    high: float | None = None
    limit: float
    baseline: float | None = None
    """The baseline's value, for a regression."""

    def describe(self) -> str:
        """Say in a line what was found and what it must be."""
        found = "unknown" if self.value is None else f"{self.value:.6g}"
        return f"{self.metric} is {found}, must be {self.rule}: {self.verdict}, {self.reason}"


class Verdict(Config):
    """A gate's judgement: `pass` only where every rule passes."""

    verdict: Outcome
    rules: tuple[RuleResult, ...]
    documents: int
    baseline_id: str | None = None
    """The report that regressions were measured against."""
    baseline_uri: str | None = None

    def broken(self) -> str:
        """Describe the rules that did not pass, those that failed first."""
        rules = sorted(self.rules, key=lambda rule: rule.verdict != "fail")
        return "; ".join(rule.describe() for rule in rules if rule.verdict != "pass")


class Subject(Config):
    """What was evaluated, or on what."""

    id: str
    uri: str


class Report(Config):
    """The content of `report.json`."""

    model: Subject
    dataset: Subject
    documents: int
    tokens: int
    bytes: int
    context_length: int
    device: str
    dtype: str
    """What the model ran in."""
    metrics: dict[str, Measured]
    verdict: Verdict | None = None
    notes: tuple[str, ...] = Field(default=())
    """What a reader must know of the numbers."""


@dataclass(frozen=True)
class Scores:
    """Arrays with a place for each document, so that reports can be compared in pairs."""

    documents: NDArray[np.uint64]
    """Hashes of the documents' texts (documents,): the same text under any tokenizer."""
    nll_nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    bytes: NDArray[np.int64]
    sample_documents: NDArray[np.uint64]
    """Hashes of the documents that were completed (samples,)."""
    sample_accepted: NDArray[np.bool_]

    def save(self, path: Path) -> None:
        """Write an `.npz` file."""
        np.savez_compressed(path, **self.__dict__)


def document_hash(text: bytes) -> int:
    """Return 64 bits that stand for a document's text."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def load_report(artifact: Artifact) -> Report:
    """Read a report artifact's numbers; raises as `read_report`."""
    return read_report(artifact, REPORT_FILE, Report, "evaluation report", "minigpt evaluate")


def read_report(
    artifact: Artifact, name: str, schema: type[ReportFile], kind: str, command: str
) -> ReportFile:
    """Read the file of a report artifact that says what kind of report it is.

    Args:
        artifact: Of kind report.
        name: The file's.
        schema: What it holds.
        kind: What such a report is called, for errors.
        command: What makes one, for errors.

    Raises:
        ArtifactError: It is a report of something else, or corrupt.
    """
    path = artifact.path / name
    try:
        tree: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(
            f"{artifact.uri} is no {kind}: {name} is missing",
            remedy=f"give a report that `{command}` made",
        ) from None
    except ValueError as error:
        raise ArtifactError(f"{path} is corrupt: {error}") from None
    return from_mapping(schema, tree, origin=str(path))


def load_scores(artifact: Artifact) -> Scores:
    """Read a report artifact's scores of each document.

    Raises:
        ArtifactError: They are missing or corrupt.
    """
    path = artifact.path / SCORES_FILE
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Scores(**{name: arrays[name] for name in Scores.__dataclass_fields__})
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path} can't be read: {error}") from None
