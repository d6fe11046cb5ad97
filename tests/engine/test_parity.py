"""Parity reports of real engines: exact where serving is, wrong where weights differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minigpt.cli.main import run
from minigpt.compress.config import CompressConfig
from minigpt.compress.quantize import quantize
from minigpt.core.artifact import lineage, open_artifact
from minigpt.core.errors import ArtifactError, ConfigError, DataError
from minigpt.engine.config import ParityConfig
from minigpt.engine.parity import certify
from minigpt.evaluate.certificate import ParityReport, ParityRow, load_parity
from minigpt.evaluate.config import EvaluateConfig, GateConfig
from minigpt.evaluate.gate import Evidence
from minigpt.evaluate.run import evaluate
from minigpt.kernels import library

CONFIG = ParityConfig.model_validate(
    {
        "dtypes": ["float32", "bfloat16"],
        "max_tokens": 300,
        "context_length": 100,
        "decode_tokens": 8,
        "engine": {"device": "cpu", "threads": 1, "block_size": 16, "max_batched_tokens": 48},
    }
)


@pytest.fixture(scope="module")
def report(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certify(tiny_model, tmp_path_factory.mktemp("parity") / "report", CONFIG).path


@pytest.fixture(scope="module")
def int8(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "model"
    return quantize(tiny_model, out, CompressConfig()).path


def row(report: ParityReport, served: str, reference: str) -> ParityRow:
    (found,) = (
        r for r in report.rows if (r.served_dtype, r.reference_dtype) == (served, reference)
    )
    return found


def test_float32_serves_what_was_trained_and_bfloat16_nearly(
    report: Path, tiny_model: Path
) -> None:
    artifact = open_artifact(report, kind="report")
    found = load_parity(artifact)
    assert found.windows == 3 and found.context_length == 100
    exact = row(found, "float32", "float32")
    assert exact.runner == "torch"
    assert exact.prefill.tokens == 3 * 99 and exact.decode.tokens == 3 * 8
    for numbers in (exact.prefill, exact.decode):
        assert numbers.max_delta < 1e-3
        assert numbers.greedy_agreement == 1
    assert exact.prefill.mean_kl is not None and exact.prefill.mean_kl < 1e-6
    covered = library.loaded() is not None
    assert row(found, "bfloat16", "float32").runner == ("kernels" if covered else "torch")
    rounded = row(found, "bfloat16", "float32")
    assert exact.prefill.max_delta < rounded.prefill.p99_delta < 1
    assert 0.8 < rounded.prefill.greedy_agreement <= 1
    same = row(found, "bfloat16", "bfloat16")
    assert same.prefill.mean_kl is not None and rounded.prefill.mean_kl is not None
    assert exact.prefill.mean_kl < same.prefill.mean_kl < 0.1
    (parent,) = lineage(artifact).ancestors
    assert parent.parent.id == open_artifact(tiny_model, verify=False).id


def test_quantization_is_measured_against_what_it_was_made_from(
    int8: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = CONFIG.replace(dtypes=("float32",))
    own = row(load_parity(certify(int8, tmp_path / "own", config)), "float32", "float32")
    cost = certify(int8, tmp_path / "cost", config, reference=tiny_model)
    base = row(load_parity(cost), "float32", "float32")
    assert own.quantization == base.quantization == "int8"
    assert own.prefill.max_delta < 1e-3 < base.prefill.max_delta
    assert {p.id for p in cost.manifest.parents} == {
        open_artifact(path, verify=False).id for path in (int8, tiny_model)
    }


def test_other_weights_are_found_out(tiny_model: Path, tmp_path: Path) -> None:
    """The comparison can fail: a reference of other weights is far off."""
    import torch

    from minigpt.model.weights import load_model, save_model

    loaded = load_model(tiny_model)
    loaded.model.init_weights(torch.Generator().manual_seed(9))
    with torch.no_grad():
        loaded.model.output_weight.mul_(20)
    save_model(tmp_path / "other", loaded.model, loaded.config, tokenizer_dir=tiny_model)
    config = CONFIG.replace(dtypes=("float32",))
    made = certify(tiny_model, tmp_path / "report", config, reference=tmp_path / "other")
    found = row(load_parity(made), "float32", "float32")
    assert found.prefill.mean_kl is not None and found.prefill.mean_kl > 0.5
    assert found.prefill.greedy_agreement < 0.5


def test_a_gate_can_require_parity(
    report: Path, int8: Path, tiny_model: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    dataset, parity = open_artifact(tiny_dataset), open_artifact(report)
    config = EvaluateConfig(
        max_documents=2, device="cpu", dtype="float32", compressors=False, bootstrap_samples=100
    )

    def verdict(name: str, limit: float, *, given: bool) -> str:
        thresholds = {"parity/float32/float32/p99_delta": {"max": limit}}
        gate = GateConfig.model_validate({"min_documents": 1, "thresholds": thresholds})
        made = evaluate(
            tiny_model, dataset, tmp_path / name, config, gate=gate,
            parity=parity if given else None,
        )  # fmt: skip
        found = Evidence.load(made.path).report.verdict
        assert found is not None
        return found.verdict

    assert verdict("a", 1e-3, given=True) == "pass"
    assert verdict("b", 0.0, given=True) == "fail"
    assert verdict("c", 1e-3, given=False) == "insufficient"
    with pytest.raises(ArtifactError, match="is the parity of model"):
        evaluate(int8, dataset, tmp_path / "d", config, parity=parity)


@pytest.mark.skipif(library.loaded() is None, reason="no kernels here")
def test_caches_are_certified_by_name_and_required_by_a_gate(
    tiny_model: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    config = CONFIG.replace(
        dtypes=("bfloat16",), kv_cache_dtypes=("auto", "bfloat16", "float32", "int8")
    )
    parity = certify(tiny_model, tmp_path / "parity", config)
    found = load_parity(parity)
    places = [f"parity/bfloat16{kv}" for kv in ("", "-kv-float32", "-kv-int8")]
    references = ("float32", "bfloat16")
    assert [row.place for row in found.rows] == [f"{p}/{r}" for p in places for r in references]
    assert [row.kv_dtype for row in found.rows[::2]] == ["bfloat16", "float32", "int8"]
    assert {row.runner for row in found.rows} == {"kernels"}
    kl = {row.kv_dtype: row.prefill.mean_kl or 0.0 for row in found.rows[::2]}
    assert 0 < kl["float32"] < 1.2 * kl["bfloat16"] and kl["bfloat16"] < kl["int8"] < 0.1
    int8 = found.rows[4].prefill
    assert int8.greedy_agreement > 0.9 and int8.max_delta < 1

    required = {"dtype": "bfloat16", "kv_cache_dtype": "int8", "runner": "kernels"}
    rule = {**required, "thresholds": {"max_delta": {"max": int8.max_delta / 2}}}
    gate = GateConfig.model_validate({"min_documents": 1, "require_parity": [rule]})
    measured = EvaluateConfig(
        max_documents=2, device="cpu", dtype="float32", compressors=False, bootstrap_samples=100
    )
    made = evaluate(
        tiny_model, open_artifact(tiny_dataset), tmp_path / "report", measured, gate=gate,
        parity=parity,
    )  # fmt: skip
    assert made.manifest.metrics["verdict"] == "fail"
    expected = f"parity/bfloat16-kv-int8/float32/max_delta is {int8.max_delta:.6g}, must be at most"
    assert made.manifest.metrics["broken_rules"].startswith(expected)


def test_a_cache_that_torch_lacks_is_not_certified(tiny_model: Path, tmp_path: Path) -> None:
    config = CONFIG.replace(dtypes=("float32",), kv_cache_dtypes=("int8",))
    with pytest.raises(ConfigError, match="kv_cache_dtype = int8 beside dtype = float32"):
        certify(tiny_model, tmp_path / "report", config)
    assert not (tmp_path / "report").exists()


def test_a_text_that_is_too_short_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("short")
    with pytest.raises(DataError, match="windows of 6 tokens"):
        certify(tiny_model, tmp_path / "report", CONFIG, text=text)


def test_the_command(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dtype=float32", "--set=max_tokens=60", "--set=engine.threads=1"]
    command = ["parity", str(tiny_model), *options, "--out"]
    assert run([*command, str(tmp_path / "a"), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["rows"]
    assert found["prefill"]["greedy_agreement"] == 1
    assert run([*command, str(tmp_path / "b")]) == 0
    assert "100.00%" in capsys.readouterr().out
    assert run([*command, str(tmp_path / "b")]) == 2


@pytest.mark.skipif(library.loaded() is None, reason="no kernels here")
def test_integer_formats_are_certified_by_name(tiny_model: Path, tmp_path: Path) -> None:
    """Int4 served by the kernels is what its own forward pass says, as near as bf16 is."""
    int4 = quantize(tiny_model, tmp_path / "int4", CompressConfig(method="int4")).path
    config = CONFIG.replace(dtypes=("bfloat16",), engine=CONFIG.engine.replace(activation_bits=16))
    eight = config.replace(engine=config.engine.replace(activation_bits=8))
    plain, w4a16, w4a8 = (
        row(load_parity(certify(model, tmp_path / name, settings)), "bfloat16", "float32")
        for name, model, settings in (
            ("plain", tiny_model, config),
            ("w4a16", int4, config),
            ("w4a8", int4, eight),
        )
    )
    assert (plain.quantization, plain.activation_bits) == ("none", None)
    assert (w4a16.quantization, w4a16.activation_bits) == ("int4", 16)
    assert (w4a8.quantization, w4a8.activation_bits) == ("int4", 8)
    assert w4a16.runner == w4a8.runner == "kernels"
    assert plain.prefill.mean_kl and w4a16.prefill.mean_kl and w4a8.prefill.mean_kl
    assert w4a16.prefill.mean_kl < 1.5 * plain.prefill.mean_kl < w4a8.prefill.mean_kl
    assert w4a16.decode.greedy_agreement > 0.8
