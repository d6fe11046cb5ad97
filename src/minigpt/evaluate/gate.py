"""The gate: thresholds and allowed regressions in, pass, fail or insufficient out.

Three verdicts, because a number that is missing, not a number, or too uncertain to tell is
neither good nor bad, and must never pass. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from minigpt.core.artifact import Artifact, open_artifact
from minigpt.core.config import load_config
from minigpt.evaluate.certificate import ParityReport
from minigpt.evaluate.config import GateConfig, Regression, RequiredParity, Threshold, metric_info
from minigpt.evaluate.pairing import Resampling, paired_change
from minigpt.evaluate.report import (
    Measured,
    Outcome,
    Report,
    RuleResult,
    Scores,
    Verdict,
    load_report,
    load_scores,
)

_DEFAULT_RESAMPLING = Resampling()


@dataclass(frozen=True)
class Evidence:
    """A report with the scores behind it; `source` is None for one not yet written."""

    report: Report
    scores: Scores
    source: Artifact | None = None

    @classmethod
    def load(cls, uri: str | Path) -> Evidence:
        """Open and verify a report artifact.

        Raises:
            ArtifactError: No evaluation report there, or a corrupt one.
        """
        artifact = open_artifact(uri, kind="report")
        return cls(load_report(artifact), load_scores(artifact), artifact)


def load_gate(path: str | Path) -> GateConfig:
    """Read a gate's YAML file.

    Raises:
        ConfigError: A key or metric is unknown (the nearest is named) or a value breaks its rule.
    """
    return load_config(GateConfig, path)


def judge(
    gate: GateConfig,
    evidence: Evidence,
    baseline: Evidence | None = None,
    resampling: Resampling = _DEFAULT_RESAMPLING,
    *,
    parity: ParityReport | None = None,
) -> Verdict:
    """Apply every rule of a gate.

    Args:
        gate: The rules.
        evidence: The model that is judged.
        baseline: What regressions are measured against, None where there is none yet.
        resampling: Behind the intervals of paired differences.
        parity: What is certified of serving this model.
    """
    rules = list(_thresholds(gate, evidence.report))
    for required in gate.require_parity:
        rules += _judge_parity(gate, required, parity)
    if baseline is not None or gate.without_baseline == "insufficient":
        for metric, allowed in gate.regressions.items():
            change = None
            if baseline is not None:
                change = _worsening(
                    metric, allowed, evidence, baseline, gate.min_documents, resampling
                )
            rules.append(_judge_regression(gate, metric, allowed, change))
    if evidence.report.documents < gate.min_documents:
        reason = f"{evidence.report.documents} documents, the gate asks for {gate.min_documents}"
        rules = [rule.replace(verdict="insufficient", reason=reason) for rule in rules]
    source = baseline.source if baseline else None
    return Verdict(
        verdict=_overall([rule.verdict for rule in rules]),
        rules=tuple(rules),
        documents=evidence.report.documents,
        baseline_id=source.id if source else None,
        baseline_uri=source.uri if source else None,
    )


class _Change(NamedTuple):
    """How much worse a metric is than the baseline's (negative is better)."""

    worsening: Measured | None
    baseline: float | None
    problem: str = ""


def _overall(verdicts: list[Outcome]) -> Outcome:
    """A fail outweighs a lack of evidence; no rule at all proves nothing."""
    if "fail" in verdicts:
        return "fail"
    return "pass" if verdicts and "insufficient" not in verdicts else "insufficient"


def _thresholds(gate: GateConfig, report: Report) -> Iterator[RuleResult]:
    for metric, threshold in gate.thresholds.items():
        yield from _bounded(gate, metric, threshold, report.metrics.get(metric))


def _bounded(
    gate: GateConfig, metric: str, threshold: Threshold, value: Measured | None, problem: str = ""
) -> Iterator[RuleResult]:
    low, high = threshold.min, threshold.max
    if high is not None:
        yield _rule(gate, metric, f"at most {high:g}", value, high, problem=problem)
    if low is not None:
        yield _rule(gate, metric, f"at least {low:g}", value, low, -1, problem=problem)


def _judge_parity(
    gate: GateConfig, required: RequiredParity, parity: ParityReport | None
) -> Iterator[RuleResult]:
    """Judge one way of serving; numbers of any other prove nothing of it."""
    row, problem = None, "there is no parity report: run `minigpt parity`, give it as --parity"
    if parity is not None:
        row = parity.find(required)
        found = "; ".join(dict.fromkeys(row.served_by for row in parity.rows))
        problem = f"required is {required.served_by}, against {required.reference_dtype}; " + (
            f"certified is {found}"
        )
    numbers = {} if row is None else row.numbers()
    for name, threshold in required.thresholds.items():
        value = Measured(estimate=numbers[name]) if name in numbers else None
        yield from _bounded(gate, f"{required.place}/{name}", threshold, value, problem)


def _judge_regression(
    gate: GateConfig, metric: str, allowed: Regression, change: _Change | None
) -> RuleResult:
    limit = allowed.relative if allowed.relative is not None else allowed.absolute
    assert limit is not None
    amount = f"{100 * limit:g} %" if allowed.relative is not None else f"{limit:g}"
    rule = f"at most {amount} worse than the baseline"
    if change is None:
        change = _Change(None, None, "there is no baseline to compare with")
    judged = _rule(gate, metric, rule, change.worsening, limit, problem=change.problem)
    return judged.replace(baseline=change.baseline)


def _rule(
    gate: GateConfig,
    metric: str,
    rule: str,
    value: Measured | None,
    limit: float,
    sign: int = 1,
    problem: str = "",
) -> RuleResult:
    """Judge `sign * value <= sign * limit` by the interval, or the estimate if so configured."""
    if value is None or not math.isfinite(value.estimate):
        reason = problem or "the report has no such number"
        return RuleResult(
            metric=metric, rule=rule, verdict="insufficient", reason=reason, limit=limit
        )
    low, high = value.low, value.high
    if gate.evidence == "estimate" or low is None or high is None:
        kept = sign * value.estimate <= sign * limit
        verdict: Outcome = "pass" if kept else "fail"
        reason = "by the estimate"
    else:
        best, worst = sorted((sign * low, sign * high))
        if worst <= sign * limit:
            verdict, reason = "pass", "by the whole interval"
        elif best > sign * limit:
            verdict, reason = "fail", "by the whole interval"
        else:
            verdict, reason = "insufficient", "the interval straddles the limit: score more"
    return RuleResult(
        metric=metric, rule=rule, verdict=verdict, reason=reason,
        value=value.estimate, low=low, high=high, limit=limit,
    )  # fmt: skip


def _worsening(
    metric: str,
    allowed: Regression,
    new: Evidence,
    old: Evidence,
    min_documents: int,
    resampling: Resampling,
) -> _Change:
    value, reference = new.report.metrics.get(metric), old.report.metrics.get(metric)
    if value is None or reference is None:
        whose = "this report" if value is None else "the baseline"
        return _Change(None, reference.estimate if reference else None, f"{whose} lacks the metric")
    sign = 1.0 if metric_info(metric).better == "lower" else -1.0
    relative = allowed.relative is not None
    if relative and reference.estimate == 0:
        return _Change(None, 0.0, "the baseline is 0: a relative change is undefined")
    change = paired_change(metric, new.scores, old.scores, resampling)
    if change is None:
        return _Change(_unpaired(value, reference, sign, relative), reference.estimate)
    if change.shared < min(min_documents, change.documents):
        problem = f"the baseline was measured on other documents: {change.shared} are shared"
        return _Change(None, reference.estimate, problem)
    chosen = change.difference.relative if relative else change.difference.absolute
    return _Change(Measured.of(chosen).scaled(sign), reference.estimate)


def _unpaired(value: Measured, reference: Measured, sign: float, relative: bool) -> Measured:
    """Compare two intervals as independent normal ones: wider than a paired comparison."""
    scale = sign / abs(reference.estimate) if relative else sign
    difference = value.estimate - reference.estimate
    if None in (value.low, value.high, reference.low, reference.high):
        return Measured(estimate=difference * scale)
    margin = math.hypot(_half_width(value), _half_width(reference))
    return Measured(estimate=difference, low=difference - margin, high=difference + margin).scaled(
        scale
    )


def _half_width(value: Measured) -> float:
    assert value.low is not None and value.high is not None
    return (value.high - value.low) / 2
