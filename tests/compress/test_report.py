from __future__ import annotations

import json
from pathlib import Path

import pytest

from minigpt.compress.config import CompressConfig
from minigpt.compress.quantize import quantize
from minigpt.compress.report import (
    COMPRESSION_FILE,
    CompressionReport,
    Spread,
    compression_report,
    describe_speed,
)
from minigpt.core.artifact import open_artifact
from minigpt.core.config import from_mapping
from minigpt.core.errors import ArtifactError
from minigpt.evaluate.config import EvaluateConfig
from minigpt.evaluate.run import measure
from minigpt.kernels import library

CONFIG = CompressConfig(
    dtype="float32", speed_repeats=2, speed_tokens=4, speed_batch=2, bootstrap_samples=200,
    max_documents=12,
)  # fmt: skip


def test_report_compares_both_models(tiny_model: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    dataset = open_artifact(tiny_dataset)
    after = quantize(tiny_model, tmp_path / "int8")
    made = compression_report(tiny_model, after, dataset, tmp_path / "report", CONFIG)
    found = from_mapping(CompressionReport, json.loads((made.path / COMPRESSION_FILE).read_text()))
    before = open_artifact(tiny_model)
    assert {p.id for p in made.manifest.parents} == {before.id, after.id, dataset.id}
    assert (found.before.id, found.after.id) == (before.id, after.id)
    assert found.documents == 12 and found.batch == 2
    for side, path in ((found.before, tiny_model), (found.after, after.path)):
        assert side.disk_bytes == sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        assert side.weight_bytes == (path / "model.safetensors").stat().st_size
        speed = side.decode_tokens_per_second
        assert 0 < speed.low <= speed.median <= speed.high
    # Headers apart, what is on the disk is what is held.
    assert found.before.resident_weight_bytes == pytest.approx(found.before.weight_bytes, rel=0.02)
    assert found.after.resident_weight_bytes < 0.3 * found.before.resident_weight_bytes
    # The numbers are those of an evaluation.
    config = EvaluateConfig(dtype="float32", max_documents=12, bootstrap_samples=200)
    alone = measure(after.path, dataset, config).report.metrics["bits_per_byte"]
    assert found.after.bits_per_byte == alone
    change = found.bits_per_byte_change
    expected = found.after.bits_per_byte.estimate - found.before.bits_per_byte.estimate
    assert change.estimate == pytest.approx(expected)
    assert change.low is not None and change.high is not None and change.low <= change.estimate
    assert made.manifest.metrics["speedup"] == found.speedup.median
    assert found.worth_it == (found.speedup.low > 1)
    assert found.runners == ("torch", "torch") and found.speedup_with_8_bit_activations is None
    with pytest.raises(ArtifactError, match="exists"):
        compression_report(tiny_model, after, dataset, tmp_path / "report", CONFIG)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.7, 0.8, 0.9], "not worth it here: slower, 0.80x"),
        ([1.2, 1.3, 1.4], "faster here: 1.30x"),
        ([0.9, 1.1, 1.2], "not worth it here: no clear difference, 1.10x (0.90-1.20)"),
    ],
)
def test_slower_is_called_slower(values: list[float], said: str) -> None:
    assert describe_speed(Spread.of(values)) == said


@pytest.mark.skipif(library.loaded() is None, reason="no kernels here")
def test_speed_is_that_of_the_kernels_which_serve(
    tiny_model: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    config = CONFIG.replace(method="int4", dtype="bfloat16", speed_batch=1)
    after = quantize(tiny_model, tmp_path / "int4", config)
    dataset = open_artifact(tiny_dataset)
    made = compression_report(tiny_model, after, dataset, tmp_path / "report", config)
    found = from_mapping(CompressionReport, json.loads((made.path / COMPRESSION_FILE).read_text()))
    assert (found.method, found.group_size, found.batch) == ("int4", 32, 1)
    assert found.runners == ("kernels", "kernels")
    rounded = found.speedup_with_8_bit_activations
    assert rounded is not None and 0 < rounded.low <= rounded.median
