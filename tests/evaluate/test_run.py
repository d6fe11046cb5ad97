from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt.core.artifact import Artifact, open_artifact
from minigpt.core.config import from_mapping
from minigpt.core.errors import ArtifactError, ConfigError, DataError, ModelError
from minigpt.data.shards import TokenDataset
from minigpt.data.tokenizer_build import train_bpe
from minigpt.engine.engine import Engine
from minigpt.evaluate.config import EvaluateConfig, GateConfig
from minigpt.evaluate.gate import Evidence
from minigpt.evaluate.report import document_hash
from minigpt.evaluate.run import evaluate
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.model.weights import load_model, save_model

CONFIG = EvaluateConfig(bootstrap_samples=200, dtype="float32")


@pytest.fixture(scope="module")
def dataset(tiny_dataset: Path) -> Artifact:
    return open_artifact(tiny_dataset, kind="dataset")


@pytest.fixture(scope="module")
def report(tiny_model: Path, dataset: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report"
    return evaluate(tiny_model, dataset, path, CONFIG).path


def test_report_holds_numbers_lineage_and_scores(
    report: Path, tiny_model: Path, dataset: Artifact
) -> None:
    found = Evidence.load(report)
    split = TokenDataset.open(dataset.path, "val")
    model = open_artifact(tiny_model)
    assert found.source is not None
    assert {p.id for p in found.source.manifest.parents} == {model.id, dataset.id}
    assert found.report.model.id == model.id
    assert found.report.documents == split.num_documents
    assert found.report.bytes == split.num_bytes == found.scores.bytes.sum()
    bits = found.report.metrics["bits_per_byte"]
    expected = found.scores.nll_nats.sum() / math.log(2) / split.num_bytes
    assert bits.estimate == pytest.approx(expected)
    assert bits.low is not None and bits.high is not None
    assert bits.low < bits.estimate < bits.high
    # A byte tokenizer: a token is a byte.
    perplexity = found.report.metrics["perplexity"].estimate
    assert math.log2(perplexity) == pytest.approx(bits.estimate)
    gzip = found.report.metrics["gzip_bits_per_byte"].estimate
    assert found.report.metrics["bits_over_gzip"].estimate == pytest.approx(bits.estimate / gzip)
    assert found.source.manifest.metrics["bits_per_byte"] == pytest.approx(expected)


def test_equal_evaluations_find_equal_scores(
    report: Path, tiny_model: Path, dataset: Artifact, tmp_path: Path
) -> None:
    again = Evidence.load(evaluate(tiny_model, dataset, tmp_path / "again", CONFIG).path)
    first = Evidence.load(report)
    assert np.array_equal(first.scores.nll_nats, again.scores.nll_nats)
    assert first.report == again.report


def test_auto_runs_as_the_engine_serves(
    report: Path, tiny_model: Path, dataset: Artifact, tmp_path: Path
) -> None:
    config = CONFIG.replace(dtype="auto", max_documents=3)
    found = Evidence.load(evaluate(tiny_model, dataset, tmp_path / "auto", config).path)
    engine = Engine.load(tiny_model)
    assert (found.report.dtype, found.report.device) == (engine.config.dtype, engine.config.device)
    exact = Evidence.load(report)
    _, ours, theirs = np.intersect1d(
        found.scores.documents, exact.scores.documents, return_indices=True
    )
    # bfloat16 has 8 bits of mantissa; the sums over a document agree far better than that.
    assert found.scores.nll_nats[ours] == pytest.approx(exact.scores.nll_nats[theirs], rel=5e-3)


def test_fewer_documents_are_a_seeded_choice(
    report: Path, tiny_model: Path, dataset: Artifact, tmp_path: Path
) -> None:
    config = CONFIG.replace(max_documents=5, context_length=64)
    some = Evidence.load(evaluate(tiny_model, dataset, tmp_path / "some", config).path)
    assert len(some.scores.documents) == 5
    assert set(some.scores.documents) < set(Evidence.load(report).scores.documents)
    assert some.report.context_length == 64


def test_gate_and_baseline_end_in_the_report(
    report: Path, tiny_model: Path, dataset: Artifact, tmp_path: Path
) -> None:
    gate = from_mapping(
        GateConfig,
        {
            "min_documents": 5,
            "thresholds": {"bits_per_byte": {"max": 1.0}},
            "regressions": {"bits_per_byte": {"relative": 0.0}},
        },
    )
    baseline = Evidence.load(report)
    judged = evaluate(
        tiny_model, dataset, tmp_path / "judged", CONFIG, gate=gate, baseline=baseline
    )
    verdict = Evidence.load(judged.path).report.verdict
    assert verdict is not None
    # Random weights are above one bit a byte, and exactly as good as themselves.
    assert [rule.verdict for rule in verdict.rules] == ["fail", "pass"]
    assert verdict.rules[1].value == 0.0
    assert judged.manifest.metrics["verdict"] == verdict.verdict == "fail"
    assert baseline.source is not None and verdict.baseline_id == baseline.source.id


def test_a_model_with_its_own_tokenizer_reads_the_texts_anew(
    dataset: Artifact, tmp_path: Path
) -> None:
    """Bits per byte compare across vocabularies: the bytes are the documents'."""
    split = TokenDataset.open(dataset.path, "val")
    texts = [bytes(split.document(i)[1:].astype(np.uint8)) for i in range(split.num_documents)]
    tokenizer = train_bpe((text.decode() for text in texts), vocab_size=300)
    tokenizer.copy_to(tmp_path)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, num_layers=1, hidden_size=16, num_heads=2,
        num_kv_heads=2, head_dim=8, intermediate_size=32, context_length=32,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = Decoder(config)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    # A bare directory, as one downloaded: no manifest.
    save_model(tmp_path / "hf", model, config, tokenizer_dir=tmp_path)
    found = Evidence.load(evaluate(tmp_path / "hf", dataset, tmp_path / "report", CONFIG).path)
    assert found.source is not None
    assert [parent.kind for parent in found.source.manifest.parents] == ["dataset"]
    assert found.report.model.id == load_model(tmp_path / "hf").id
    assert found.report.bytes == split.num_bytes
    assert list(found.scores.documents) == [document_hash(text) for text in texts]
    tokens = sum(len(tokenizer.encode(text.decode())) for text in texts)
    assert found.report.tokens == tokens < split.num_bytes
    bits = found.report.metrics["bits_per_byte"].estimate
    assert bits == pytest.approx(tokens * math.log2(tokenizer.vocab_size) / split.num_bytes)


def test_weights_that_are_not_numbers_are_reported_and_pass_no_gate(
    tiny_model: Path, dataset: Artifact, tmp_path: Path
) -> None:
    loaded = load_model(tiny_model)
    state = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    state["model.norm.weight"][0] = math.nan
    save_model(tmp_path / "broken", state, loaded.config, tokenizer_dir=tiny_model)
    gate = from_mapping(
        GateConfig, {"min_documents": 1, "thresholds": {"bits_per_byte": {"max": 99}}}
    )
    found = evaluate(tmp_path / "broken", dataset, tmp_path / "report", CONFIG, gate=gate)
    read = Evidence.load(found.path).report
    assert found.manifest.metrics["verdict"] == "insufficient"
    assert "bits_per_byte" not in read.metrics and "not a finite number" in read.notes[0]


def test_bad_input_is_refused_and_leaves_nothing(
    tiny_model: Path, dataset: Artifact, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        evaluate(tmp_path / "nowhere", dataset, out, CONFIG)
    with pytest.raises(ConfigError, match=r"context_length = 513.*512"):
        evaluate(tiny_model, dataset, out, CONFIG.replace(context_length=513))
    flipped = tmp_path / "flipped"
    shutil.copytree(tiny_model, flipped)
    weights = flipped / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.safetensors is corrupt"):
        evaluate(flipped, dataset, out, CONFIG)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(ArtifactError, match="exists"):
        evaluate(tiny_model, dataset, out, CONFIG)


def test_dataset_without_held_out_documents_is_refused(
    tiny_model: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    from minigpt.data.config import DataConfig
    from minigpt.data.prepare import prepare

    (tmp_path / "a.txt").write_text("Some text that is long enough to be kept. " * 20)
    config = from_mapping(
        DataConfig,
        {
            "source": {"kind": "text", "paths": [str(tmp_path / "a.txt")]},
            "tokenizer": {"kind": "bytes"},
            "val_fraction": 0.0,
        },
    )
    empty = prepare(config, tmp_path / "data")
    with pytest.raises(DataError, match="no held-out text"):
        evaluate(tiny_model, empty, tmp_path / "report", CONFIG)


def test_samples_are_written_one_a_line(
    tiny_model: Path, dataset: Artifact, tmp_path: Path
) -> None:
    """English prose is no Python: the report says so and has no rate."""
    config = CONFIG.replace(samples=2, max_documents=4)
    found = evaluate(tiny_model, dataset, tmp_path / "prose", config)
    read = Evidence.load(found.path).report
    assert "parse_rate" not in read.metrics
    assert "0 of 2 completions" in read.notes[0]
    assert not (found.path / "samples.jsonl").exists()
    assert json.loads((found.path / "report.json").read_text())["documents"] == 4
