from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.core.config import from_mapping
from minigpt.core.errors import ConfigError
from minigpt.evaluate.certificate import Numbers, ParityReport, ParityRow
from minigpt.evaluate.config import EvaluateConfig, GateConfig
from minigpt.evaluate.gate import Evidence, judge, load_gate
from minigpt.evaluate.measures import likelihood_metrics
from minigpt.evaluate.report import Measured, Report, Scores, Subject, Verdict


def gate(**tree: object) -> GateConfig:
    return from_mapping(GateConfig, tree)


def evidence(
    bits: float = 2.0, *, documents: int = 60, noise: float = 0.1, seed: int = 0, offset: int = 0
) -> Evidence:
    """A model that needs about `bits` a byte, measured on the same documents for any `bits`."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(100, 2000, documents)
    rates = bits + generator.normal(0, noise, documents)
    rates += np.random.default_rng(seed).normal(0, noise / 50, documents)
    scores = Scores(
        documents=np.arange(offset, offset + documents, dtype=np.uint64),
        nll_nats=rates * sizes * math.log(2),
        tokens=sizes // 4,
        bytes=sizes,
        sample_documents=np.arange(offset, offset + documents, dtype=np.uint64),
        sample_accepted=generator.random(documents) < 0.5,
    )
    metrics = likelihood_metrics(scores, EvaluateConfig())
    metrics["gzip_bits_per_byte"] = Measured(estimate=3.0)
    metrics["task/t/acc"] = Measured(estimate=0.6, low=0.55, high=0.65)
    rate = float(scores.sample_accepted.mean())
    metrics["parse_rate"] = Measured(estimate=rate, low=rate - 0.1, high=rate + 0.1)
    report = Report(
        model=Subject(id="m", uri="m"), dataset=Subject(id="d", uri="d"), documents=documents,
        tokens=int(scores.tokens.sum()), bytes=int(sizes.sum()), context_length=64,
        device="cpu", dtype="float32",
        metrics=metrics,
    )  # fmt: skip
    return Evidence(report, scores)


def only(verdict: Verdict) -> tuple[str, str]:
    (rule,) = verdict.rules
    assert verdict.verdict == rule.verdict
    return rule.verdict, rule.reason


@pytest.mark.parametrize(
    ("limit", "expected"), [(2.5, "pass"), (1.5, "fail"), (2.001, "insufficient")]
)
def test_thresholds_are_judged_by_the_whole_interval(limit: float, expected: str) -> None:
    found = evidence()
    assert only(judge(gate(thresholds={"bits_per_byte": {"max": limit}}), found))[0] == expected
    mirrored = {1.5: "pass", 2.5: "fail", 2.001: "insufficient"}[limit]
    assert only(judge(gate(thresholds={"bits_per_byte": {"min": limit}}), found))[0] == mirrored


def test_evidence_estimate_decides_without_interval() -> None:
    found = evidence()
    value = found.report.metrics["bits_per_byte"].estimate
    for limit, expected in ((value + 1e-6, "pass"), (value - 1e-6, "fail")):
        rules = gate(evidence="estimate", thresholds={"bits_per_byte": {"max": limit}})
        assert only(judge(rules, found)) == (expected, "by the estimate")


def test_missing_metric_is_insufficient_and_outweighed_by_a_fail() -> None:
    missing = {"task/none/acc": {"min": 0.1}}
    assert only(judge(gate(thresholds=missing), evidence()))[0] == "insufficient"
    both = gate(thresholds={**missing, "bits_per_byte": {"max": 1.0}})
    assert judge(both, evidence()).verdict == "fail"
    good = gate(thresholds={**missing, "bits_per_byte": {"max": 9.0}})
    assert judge(good, evidence()).verdict == "insufficient"


def test_not_a_number_never_passes() -> None:
    found = evidence()
    broken = Scores(**{**found.scores.__dict__, "nll_nats": found.scores.nll_nats * math.nan})
    metrics = likelihood_metrics(broken, EvaluateConfig())
    assert metrics == {}
    report = found.report.replace(metrics=metrics)
    for bounds in ({"max": 1e9}, {"min": -1e9}):
        rules = gate(thresholds={"bits_per_byte": bounds})
        assert judge(rules, Evidence(report, broken)).verdict == "insufficient"


def test_too_few_documents_are_insufficient_whatever_the_numbers() -> None:
    rules = gate(min_documents=61, thresholds={"bits_per_byte": {"max": 9.0}})
    verdict, reason = only(judge(rules, evidence()))
    assert verdict == "insufficient" and "60 documents" in reason


@pytest.mark.parametrize("kind", ["relative", "absolute"])
@pytest.mark.parametrize(
    ("bits", "expected"), [(2.0, "pass"), (1.9, "pass"), (2.1, "fail"), (2.0201, "insufficient")]
)
def test_regressions_use_the_paired_difference(bits: float, expected: str, kind: str) -> None:
    allowed = {"relative": 0.01} if kind == "relative" else {"absolute": 0.02}
    rules = gate(regressions={"bits_per_byte": allowed, "perplexity": {"relative": 0.5}})
    found = judge(rules, evidence(bits, seed=1), evidence())
    rule = found.rules[0]
    assert rule.verdict == expected, rule
    assert rule.baseline == pytest.approx(2.0, abs=0.05)
    # Far narrower than the 0.05 of the interval of either model alone.
    assert rule.low is not None and rule.high is not None and rule.high - rule.low < 0.005
    if kind == "relative":
        assert rule.value == pytest.approx(bits / 2 - 1, abs=0.002)


def test_no_baseline() -> None:
    tree = {"regressions": {"bits_per_byte": {"relative": 0.1}}}
    verdict, reason = only(judge(gate(**tree), evidence()))
    assert verdict == "insufficient" and "no baseline" in reason
    # Skipping leaves no rule, and no rule proves nothing.
    skipping = judge(gate(**tree, without_baseline="skip"), evidence())
    assert skipping.verdict == "insufficient" and skipping.rules == ()
    first = gate(**tree, without_baseline="skip", thresholds={"bits_per_byte": {"max": 3}})
    assert judge(first, evidence()).verdict == "pass"
    worse = judge(first, evidence(2.5), evidence(2.0))
    assert worse.verdict == "fail" and len(worse.rules) == 2


def test_baseline_on_other_documents_is_insufficient() -> None:
    rules = gate(regressions={"bits_per_byte": {"relative": 0.1}})
    verdict, reason = only(judge(rules, evidence(), evidence(offset=50)))
    assert verdict == "insufficient" and "10 are shared" in reason
    assert judge(rules, evidence(), evidence(offset=20)).verdict == "pass"


def test_metrics_that_should_be_high_regress_downwards() -> None:
    rules = gate(regressions={"parse_rate": {"absolute": 0.05}, "task/t/acc": {"absolute": 0.05}})
    worse = evidence()
    worse.scores.sample_accepted[:] = False
    metrics = {**worse.report.metrics, "parse_rate": Measured(estimate=0.0),
               "task/t/acc": Measured(estimate=0.4, low=0.35, high=0.45)}  # fmt: skip
    found = judge(rules, Evidence(worse.report.replace(metrics=metrics), worse.scores), evidence())
    assert [rule.verdict for rule in found.rules] == ["fail", "fail"]
    back = judge(rules, evidence(), Evidence(worse.report.replace(metrics=metrics), worse.scores))
    assert [rule.verdict for rule in back.rules] == ["pass", "pass"]
    # Without documents to pair, two equal task scores leave twice the doubt.
    assert judge(rules, evidence(), evidence()).rules[1].verdict == "insufficient"


@settings(max_examples=40, deadline=None)
@given(st.floats(0.5, 4.0), st.floats(0.5, 4.0), st.floats(0.5, 4.0))
def test_a_stricter_limit_never_turns_a_verdict_better(a: float, b: float, bits: float) -> None:
    found = evidence(bits, documents=30)
    order = {"fail": 0, "insufficient": 1, "pass": 2}
    strict, lax = (
        judge(gate(thresholds={"bits_per_byte": {"max": limit}}), found).verdict
        for limit in sorted((a, b))
    )
    assert order[strict] <= order[lax]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("thresholds: {bit_per_byte: {max: 1}}", "did you mean 'bits_per_byte'"),
        ("thresholds: {bits_per_byte: {maxx: 1}}", "did you mean 'max'"),
        ("thresholds: {bits_per_byte: {}}", "bounded by min"),
        ("thresholds: {bits_per_byte: {min: 2, max: 1}}", "min = 2.0 is above max = 1.0"),
        ("thresholds: {bits_per_byte: {max: .nan}}", "finite number"),
        ("regressions: {bits_per_byte: {}}", "exactly one"),
        ("regressions: {bits_per_byte: {relative: 0.1, absolute: 1}}", "exactly one"),
        ("regressions: {bits_per_byte: {relative: -1}}", "greater than or equal to 0"),
        ("treshold: {}", "did you mean 'thresholds'"),
        ("{}", "would pass anything"),
    ],
)
def test_a_bad_gate_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_gate(path)
    assert "\n" not in str(error.value)


def test_the_gates_in_the_repository_are_valid() -> None:
    paths = sorted((Path(__file__).parents[2] / "gates").glob("*.yaml"))
    assert paths
    for path in paths:
        load_gate(path)


def certificate(**served: object) -> ParityReport:
    numbers = Numbers(
        tokens=99, max_delta=0.25, p99_delta=0.03, mean_kl=0.001, greedy_agreement=0.99
    )
    row: dict[str, object] = {
        "served_dtype": "bfloat16", "reference_dtype": "float32", "quantization": "none",
        "kv_dtype": "int8", "runner": "kernels", "prefill": numbers, "decode": numbers,
    }  # fmt: skip
    subject = Subject(id="m", uri="m")
    return ParityReport(
        model=subject, reference=subject, text="t", windows=1, context_length=100, device="cpu",
        threads=1, rows=(ParityRow.model_validate(row | served),),
    )  # fmt: skip


SERVED = {"dtype": "bfloat16", "kv_cache_dtype": "int8", "runner": "kernels"}


def parity_gate(limit: float = 0.05, number: str = "p99_delta", **changes: object) -> GateConfig:
    return gate(require_parity=[SERVED | {"thresholds": {number: {"max": limit}}} | changes])


def test_required_parity_holds_and_breaks_by_its_numbers() -> None:
    assert judge(parity_gate(), evidence(), parity=certificate()).verdict == "pass"
    broken = judge(parity_gate(0.2, "decode_max_delta"), evidence(), parity=certificate())
    assert broken.verdict == "fail"
    assert broken.broken() == (
        "parity/bfloat16-kv-int8/float32/decode_max_delta is 0.25, must be at most 0.2: fail, by "
        "the estimate"
    )
    agreement = {"greedy_agreement": {"min": 0.995}}
    assert judge(parity_gate(thresholds=agreement), evidence(), parity=certificate()).verdict == (
        "fail"
    )


def test_required_parity_without_a_certificate_is_not_passed() -> None:
    verdict, reason = only(judge(parity_gate(), evidence()))
    assert verdict == "insufficient" and "no parity report: run `minigpt parity`" in reason


@pytest.mark.parametrize(
    ("served", "found"),
    [
        ({"runner": "torch"}, "KV cache int8, by torch"),
        ({"kv_dtype": "bfloat16"}, "KV cache bfloat16, by kernels"),
        ({"served_dtype": "float32"}, "float32, KV cache int8"),
        ({"activation_bits": 8}, "KV cache int8, 8-bit activations, by kernels"),
        ({"reference_dtype": "bfloat16"}, "against float32"),
    ],
)
def test_parity_of_another_way_of_serving_proves_nothing(
    served: dict[str, object], found: str
) -> None:
    verdict, reason = only(judge(parity_gate(), evidence(), parity=certificate(**served)))
    assert verdict == "insufficient" and found in reason
    assert "required is bfloat16, KV cache int8, by kernels" in reason


def test_required_parity_names_its_numbers(tmp_path: Path) -> None:
    for text in ("[{dtype: bfloat16, runner: kernels, thresholds: {kl: {max: 1}}}]",
                 "[{dtype: bfloat16, thresholds: {mean_kl: {max: 1}}}]",
                 "[{dtype: bfloat16, runner: kernels, thresholds: {}}]"):  # fmt: skip
        (tmp_path / "gate.yaml").write_text(f"require_parity: {text}")
        with pytest.raises(ConfigError, match="require_parity"):
            load_gate(tmp_path / "gate.yaml")
