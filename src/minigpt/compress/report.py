"""What compression gained and what it cost: size, bits per byte and decode speed, both measured.

Fewer bits are not faster until measured, so the report says plainly where they are slower.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from minigpt.compress.config import CompressConfig
from minigpt.compress.speed import compare_decode_speed
from minigpt.core.artifact import Artifact, create_artifact
from minigpt.core.config import Config
from minigpt.core.errors import ModelError
from minigpt.data.shards import TokenDataset
from minigpt.data.tokenizer import Tokenizer
from minigpt.engine.config import EngineConfig, SpeculativeConfig
from minigpt.engine.engine import Engine
from minigpt.evaluate.config import EvaluateConfig
from minigpt.evaluate.measures import resampling
from minigpt.evaluate.pairing import paired_change
from minigpt.evaluate.report import Measured
from minigpt.evaluate.run import Measurement, check_free, measure
from minigpt.model.weights import load_model

COMPRESSION_FILE = "compression.json"
_PROMPT_TOKENS = 32

BASIS = {
    "disk_bytes": "measured: sizes of all the files",
    "weight_bytes": "measured: sizes of the weight files",
    "resident_weight_bytes": "counted: tensors as loaded; not the memory of a process",
    "bits_per_byte": "measured: on the held-out documents",
    "decode_tokens_per_second": "measured: through the engine on this machine, in turns",
}
"""How each number came to be; none is an estimate."""


class Spread(Config):
    """Repeated timings, or the ratios of paired ones."""

    median: float
    low: float
    """The smallest."""
    high: float
    """The largest."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        return cls(median=statistics.median(values), low=min(values), high=max(values))


class Side(Config):
    """One of the two models."""

    id: str
    uri: str
    disk_bytes: int
    weight_bytes: int
    resident_weight_bytes: int
    bits_per_byte: Measured
    decode_tokens_per_second: Spread


class CompressionReport(Config):
    """The content of `compression.json`."""

    method: str
    group_size: int | None = None
    """Of int4."""
    device: str
    dtype: Literal["float32", "bfloat16"]
    """Type of the activations, and of the weights that are not compressed, in both."""
    threads: int
    runners: tuple[str, str] = ("torch", "torch")
    """What multiplied in the timings, `kernels` or `torch`, before and after."""
    batch: int
    documents: int
    before: Side
    after: Side
    bits_per_byte_change: Measured
    """After minus before, on the same documents."""
    bits_per_byte_relative_change: Measured
    speedup: Spread
    """Decode speed after over before, by pairs of neighbouring timings."""
    worth_it: bool = False
    """Whether every pair of timings was faster: what is not is not worth its error here."""
    speedup_with_8_bit_activations: Spread | None = None
    """As `speedup`, served with engine.activation_bits=8; null where the kernels don't serve. What
    that rounds away is not in `after`."""
    basis: dict[str, str] = BASIS


class _Files(NamedTuple):
    disk_bytes: int
    weight_bytes: int


def compression_report(
    before: str | Path,
    after: Artifact,
    dataset: Artifact,
    destination: str | Path,
    config: CompressConfig,
) -> Artifact:
    """Measure a model and its compressed form side by side and write the report.

    Args:
        before: The original: an artifact or a bare Hugging Face directory.
        after: The compressed model.
        dataset: Whose held-out documents both are scored on.
        destination: Where the report artifact goes; nothing may be there.
        config: What to measure and how precisely.

    Returns:
        A report artifact that holds `compression.json`; its parents are both models (where they
        are artifacts) and the dataset.

    Raises:
        MinigptError: As `evaluate` and the engine's loading.
    """
    check_free(destination)
    config = config.settled()
    engine_config = EngineConfig(
        dtype=config.dtype,
        max_num_seqs=config.speed_batch,
        # Every step then yields as many tokens.
        speculative=SpeculativeConfig(method="none"),
    )
    engines = [Engine.load(path, engine_config) for path in (before, after.path)]
    settled = engines[0].config
    assert settled.dtype != "auto" and settled.threads != "auto" and settled.device != "auto"
    speeds = _decode_speeds(engines, after.path, dataset, config)
    runners = engines[0].runner_name, engines[1].runner_name
    rounded_speedup = _speedup_of_rounding(engines, after.path, dataset, config, engine_config)
    del engines
    scoring = EvaluateConfig(
        device=settled.device, dtype=settled.dtype, compressors=False,
        max_documents=config.max_documents, seed=config.seed,
        bootstrap_samples=config.bootstrap_samples, confidence=config.confidence,
    )  # fmt: skip
    old, new = measure(before, dataset, scoring), measure(after.path, dataset, scoring)
    change = paired_change("bits_per_byte", new.scores, old.scores, resampling(scoring))
    assert change is not None
    speedup = _speedup(speeds)
    report = CompressionReport(
        method=config.method,
        group_size=None if config.group_size == "auto" else config.group_size,
        device=settled.device,
        dtype=settled.dtype,
        threads=settled.threads,
        runners=runners,
        batch=config.speed_batch,
        documents=new.report.documents,
        before=_side(old, settled.dtype, speeds[0]),
        after=_side(new, settled.dtype, speeds[1]),
        bits_per_byte_change=Measured.of(change.difference.absolute),
        bits_per_byte_relative_change=Measured.of(change.difference.relative),
        speedup=speedup,
        worth_it=is_faster(speedup),
        speedup_with_8_bit_activations=rounded_speedup,
    )
    parents = [parent for parent in (old.source, after, dataset) if parent is not None]
    with create_artifact(destination, kind="report", parents=parents, config=config) as draft:
        text = json.dumps(report.model_dump(mode="json"), indent=1) + "\n"
        (draft.path / COMPRESSION_FILE).write_text(text, encoding="utf-8")
        draft.metrics = _headline(report)
    assert draft.artifact is not None
    return draft.artifact


def is_faster(speedup: Spread) -> bool:
    """Tell whether every ratio of a spread says faster."""
    return speedup.low > 1


def describe_speed(speedup: Spread) -> str:
    """Say in words what a spread of ratios shows, and that what is not faster is not worth it."""
    if is_faster(speedup):
        return f"faster here: {speedup.median:.2f}x"
    if speedup.high < 1:
        return f"not worth it here: slower, {speedup.median:.2f}x"
    spread = f"{speedup.median:.2f}x ({speedup.low:.2f}-{speedup.high:.2f})"
    return f"not worth it here: no clear difference, {spread}"


def _decode_speeds(
    engines: Sequence[Engine], model: Path, dataset: Artifact, config: CompressConfig
) -> list[list[float]]:
    """Time the engines on the beginning of a held-out document."""
    split = TokenDataset.open(dataset.path, "val")
    text = Tokenizer.load(split.tokenizer_dir).decode(split.document(0))
    limit = engines[0].ready().context_length
    prompt = Tokenizer.load(model).encode(text, bos=True)[: min(_PROMPT_TOKENS, limit // 2)]
    return compare_decode_speed(
        engines,
        prompt,
        repeats=config.speed_repeats,
        tokens=min(config.speed_tokens, limit - len(prompt)),
        batch=config.speed_batch,
    )


def _speedup(speeds: Sequence[Sequence[float]]) -> Spread:
    return Spread.of([after / before for before, after in zip(*speeds, strict=True)])


def _speedup_of_rounding(
    engines: list[Engine],
    model: Path,
    dataset: Artifact,
    config: CompressConfig,
    engine_config: EngineConfig,
) -> Spread | None:
    """Time 8-bit activations in place of the second engine, whose memory they take over."""
    if engines.pop().activation_bits is None:
        return None
    engines.append(Engine.load(model, engine_config.replace(activation_bits=8)))
    return _speedup(_decode_speeds(engines, model, dataset, config))


def _side(found: Measurement, dtype: str, speeds: Sequence[float]) -> Side:
    if "bits_per_byte" not in found.report.metrics:
        raise ModelError(f"{found.path}: the model's likelihood is not a finite number")
    files = _files(found.path)
    state = load_model(found.path, dtype=dtype, verify=False).model.state_dict()
    return Side(
        id=found.report.model.id,
        uri=found.report.model.uri,
        disk_bytes=files.disk_bytes,
        weight_bytes=files.weight_bytes,
        resident_weight_bytes=sum(tensor.nbytes for tensor in state.values()),
        bits_per_byte=found.report.metrics["bits_per_byte"],
        decode_tokens_per_second=Spread.of(speeds),
    )


def _files(directory: Path) -> _Files:
    sizes = {path: path.stat().st_size for path in directory.rglob("*") if path.is_file()}
    weights = sum(size for path, size in sizes.items() if path.suffix == ".safetensors")
    return _Files(sum(sizes.values()), weights)


def _headline(report: CompressionReport) -> dict[str, Any]:
    """Return the numbers for the manifest."""
    metrics: dict[str, Any] = {}
    for name, side in (("before", report.before), ("after", report.after)):
        metrics[f"disk_bytes_{name}"] = side.disk_bytes
        metrics[f"resident_weight_bytes_{name}"] = side.resident_weight_bytes
        metrics[f"bits_per_byte_{name}"] = side.bits_per_byte.estimate
        metrics[f"decode_tokens_per_second_{name}"] = side.decode_tokens_per_second.median
    metrics["bits_per_byte_change"] = report.bits_per_byte_change.estimate
    metrics["speedup"] = report.speedup.median
    return metrics
