"""One evaluation: an artifact's bytes in, a report artifact out.

The model is loaded from its verified files, exactly those that will be served, never taken from
the memory of whoever made it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minigpt.core.artifact import Artifact, create_artifact, is_artifact, open_artifact
from minigpt.core.errors import ArtifactError, ConfigError, DataError
from minigpt.core.machine import describe_machine
from minigpt.core.manifest import hash_file
from minigpt.core.storage import is_remote
from minigpt.core.telemetry import progress
from minigpt.data.shards import TokenDataset
from minigpt.data.tokenizer import TOKENIZER_FILE, Tokenizer
from minigpt.evaluate.certificate import ParityReport, load_parity
from minigpt.evaluate.code_samples import CodeSample, complete_code
from minigpt.evaluate.config import EvaluateConfig, GateConfig
from minigpt.evaluate.gate import Evidence, judge
from minigpt.evaluate.likelihood import score_documents
from minigpt.evaluate.measures import (
    compressor_metrics,
    likelihood_metrics,
    resampling,
    sample_metrics,
)
from minigpt.evaluate.report import (
    REPORT_FILE,
    SAMPLES_FILE,
    SCORES_FILE,
    Measured,
    Report,
    Scores,
    Subject,
    document_hash,
)
from minigpt.evaluate.tasks import check_task_files, run_tasks
from minigpt.model.weights import LoadedModel, check_vocab, load_model


@dataclass(frozen=True)
class HeldOut:
    """The documents to score, in the model's own tokens."""

    tokens: list[np.ndarray]
    """Each with its leading context token."""
    texts: list[bytes]


@dataclass(frozen=True)
class Measurement:
    """Everything an evaluation finds, before it is judged and written."""

    source: Artifact | None
    """The model, where it is an artifact."""
    path: Path
    """The model's local directory."""
    report: Report
    scores: Scores
    samples: list[CodeSample]


def evaluate(
    model: str | Path,
    dataset: Artifact,
    destination: str | Path,
    config: EvaluateConfig,
    *,
    gate: GateConfig | None = None,
    baseline: Evidence | None = None,
    parity: Artifact | None = None,
) -> Artifact:
    """Measure a model on a dataset's held-out documents and write the report.

    Args:
        model: A model artifact, or a bare Hugging Face directory.
        dataset: Whose `val` split is scored. Where its tokenizer is not the model's, its texts
            are encoded anew.
        destination: Where the report artifact goes; nothing may be there.
        config: What to measure.
        gate: Rules to judge the report by; the verdict becomes part of it.
        baseline: What the gate's regressions are measured against.
        parity: A parity report of this model, whose numbers become metrics too.

    Returns:
        The report; its parents are the model (where it is an artifact), the dataset and the
        parity report.

    Raises:
        DataError: No held-out documents.
        ModelError: No model, or no tokenizer that fits it.
        ArtifactError: A corrupt artifact, a parity report of another model, or something at
            `destination`.
    """
    check_free(destination)
    found = measure(model, dataset, config)
    report = found.report
    certificate = None if parity is None else _certificate(parity, report)
    if certificate is not None:
        report = report.replace(metrics=report.metrics | certificate.metrics())
    provenance = {"evaluate": config.model_dump(mode="json")}
    if gate is not None:
        evidence, intervals = Evidence(report, found.scores), resampling(config)
        verdict = judge(gate, evidence, baseline, intervals, parity=certificate)
        report = report.replace(verdict=verdict)
        provenance["gate"] = gate.model_dump(mode="json")
    parents = [each for each in (found.source, dataset, parity) if each is not None]
    with create_artifact(destination, kind="report", parents=parents, config=provenance) as draft:
        text = json.dumps(report.model_dump(mode="json"), indent=1) + "\n"
        (draft.path / REPORT_FILE).write_text(text, encoding="utf-8")
        found.scores.save(draft.path / SCORES_FILE)
        if found.samples:
            lines = "".join(json.dumps(sample._asdict()) + "\n" for sample in found.samples)
            (draft.path / SAMPLES_FILE).write_text(lines, encoding="utf-8")
        draft.metrics = {name: value.estimate for name, value in report.metrics.items()}
        draft.metrics["documents"] = report.documents
        if report.verdict is not None:
            draft.metrics["verdict"] = report.verdict.verdict
            if report.verdict.verdict != "pass":
                draft.metrics["broken_rules"] = report.verdict.broken()
    assert draft.artifact is not None
    return draft.artifact


def check_free(destination: str | Path) -> None:
    """Refuse a destination that is taken now, and not after an hour of scoring.

    Raises:
        ArtifactError: Something is there.
    """
    if not is_remote(destination) and Path(destination).exists():
        raise ArtifactError(
            f"{destination} exists, and artifacts are never changed",
            remedy="choose another path or remove it",
        )


def measure(model: str | Path, dataset: Artifact, config: EvaluateConfig) -> Measurement:
    """Load a model from its verified files and score it; arguments and errors as `evaluate`."""
    check_task_files(config.tasks)
    device, dtype = _numerics(config)
    loaded = load_model(model, dtype=dtype, device=device)
    is_own = is_remote(model) or is_artifact(model)
    source = open_artifact(model, kind="model", verify=False) if is_own else None
    context_length = _context_length(loaded, config)
    tokenizer, held_out = _held_out(loaded, dataset, config)
    samples: list[CodeSample] = []
    if config.samples:
        samples = complete_code(loaded.model, tokenizer, held_out.texts, config)
    scores = _score(loaded, tokenizer, held_out, config, context_length, samples)
    metrics = likelihood_metrics(scores, config)
    if config.compressors:
        metrics |= compressor_metrics(held_out.texts, metrics)
    metrics |= sample_metrics(samples, config)
    if config.tasks:
        metrics |= run_tasks(loaded, tokenizer, config, context_length)
    report = Report(
        model=Subject(id=loaded.id, uri=source.uri if source else str(loaded.path.absolute())),
        dataset=Subject(id=dataset.id, uri=dataset.uri),
        documents=len(scores.documents),
        tokens=int(scores.tokens.sum()),
        bytes=int(scores.bytes.sum()),
        context_length=context_length,
        device=device,
        dtype=dtype,
        metrics=metrics,
        notes=tuple(_notes(config, metrics, len(samples))),
    )
    return Measurement(source, loaded.path, report, scores, samples)


def _certificate(parity: Artifact, report: Report) -> ParityReport:
    certificate = load_parity(parity)
    if certificate.model.id != report.model.id:
        raise ArtifactError(
            f"{parity.uri} is the parity of model {certificate.model.id[:12]}, not of "
            f"{report.model.id[:12]}",
            remedy="run `minigpt parity` on the model that is evaluated",
        )
    return certificate


def _numerics(config: EvaluateConfig) -> tuple[str, str]:
    """Settle device and dtype, by the rule of the engine, so that they are those of serving."""
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ConfigError("device = cuda: this machine has none", remedy="set device=cpu")
    device, dtype = config.device, config.dtype
    if device == "auto":
        device = "cuda" if has_gpu else "cpu"
    if dtype == "auto":
        is_fast = device == "cuda" or describe_machine().fast_bfloat16
        dtype = "bfloat16" if is_fast else "float32"
    return device, dtype


def _held_out(
    loaded: LoadedModel, dataset: Artifact, config: EvaluateConfig
) -> tuple[Tokenizer, HeldOut]:
    """Return the model's tokenizer and the chosen documents in its tokens."""
    split = TokenDataset.open(dataset.path, "val")
    own = loaded.path / TOKENIZER_FILE
    is_same = not own.is_file() or hash_file(own) == hash_file(split.tokenizer_dir / TOKENIZER_FILE)
    stored = Tokenizer.load(split.tokenizer_dir)
    tokenizer = stored if is_same else Tokenizer.load(loaded.path)
    check_vocab(loaded.config, tokenizer.vocab_size)
    chosen = np.arange(split.num_documents)
    if config.max_documents is not None and config.max_documents < len(chosen):
        generator = np.random.default_rng(config.seed)
        chosen = np.sort(generator.choice(chosen, config.max_documents, replace=False))
    tokens = [split.document(int(index)) for index in chosen]
    texts = [stored.decode_bytes(document) for document in tokens]
    if not is_same:
        tokens = [_encode(tokenizer, text) for text in texts]
    if not any(texts):
        raise DataError(
            f"dataset {dataset.uri} holds no held-out text",
            remedy="prepare it with a larger val_fraction",
        )
    return tokenizer, HeldOut(tokens, texts)


def _encode(tokenizer: Tokenizer, text: bytes) -> np.ndarray:
    start = tokenizer.bos_token_id
    if start is None:
        start = tokenizer.eos_token_id
    if start is None:
        raise DataError(
            "the model's tokenizer names no token to begin a text with",
            remedy="name bos_token or eos_token in its tokenizer_config.json",
        )
    return np.array([start, *tokenizer.encode_bytes(text)])


def _context_length(loaded: LoadedModel, config: EvaluateConfig) -> int:
    limit = loaded.config.context_length
    if config.context_length == "auto":
        return limit
    if not 1 <= config.context_length <= limit:
        raise ConfigError(
            f"context_length = {config.context_length}: must be between 1 and the model's {limit}"
        )
    return config.context_length


def _score(
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    held_out: HeldOut,
    config: EvaluateConfig,
    context_length: int,
    samples: Sequence[CodeSample],
) -> Scores:
    total = sum(len(document) - 1 for document in held_out.tokens)
    with progress("scoring tokens", total=total) as bar:
        found = score_documents(
            loaded.model,
            held_out.tokens,
            tokenizer.byte_lengths(),
            context_length=context_length,
            batch_tokens=config.batch_tokens,
            progress=bar,
        )
    return Scores(
        documents=np.array([document_hash(text) for text in held_out.texts], dtype=np.uint64),
        nll_nats=np.array([score.nll_nats for score in found]),
        tokens=np.array([score.tokens for score in found]),
        # The texts' own lengths: a tokenizer that adds a space, say, must not gain by it.
        bytes=np.array([len(text) for text in held_out.texts]),
        sample_documents=np.array(
            [document_hash(held_out.texts[sample.document]) for sample in samples], dtype=np.uint64
        ),
        sample_accepted=np.array([sample.accepted for sample in samples], dtype=bool),
    )


def _notes(config: EvaluateConfig, metrics: Mapping[str, Measured], samples: int) -> Iterator[str]:
    if "bits_per_byte" not in metrics:
        yield "the model's likelihood is not a finite number: its weights are broken"
    if samples < config.samples:
        yield (
            f"{samples} of {config.samples} completions: no more held-out documents are Python "
            f"of over {config.sample_prompt_lines} lines"
        )
