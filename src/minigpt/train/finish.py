"""The end of a run: the model artifact and `final.json`."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from minigpt.core.artifact import Artifact, create_artifact, is_artifact, open_artifact
from minigpt.core.manifest import Parent
from minigpt.core.storage import write_atomic
from minigpt.model.decoder import Decoder
from minigpt.model.draft_heads import DraftHeadsConfig, draft_heads_of, save_draft_heads
from minigpt.model.lora import has_adapters, merged_state, save_adapter
from minigpt.model.weights import save_model
from minigpt.train.checkpoint import TrainState
from minigpt.train.config import TrainConfig
from minigpt.train.metrics import read_metrics

ADAPTER_DIRECTORY = "adapter"
MODEL_DIRECTORY = "model"
HEADS_DIRECTORY = "draft_heads"


def open_result(run_dir: Path, config: TrainConfig) -> Artifact:
    """Open what a finished run has made: a model, or draft heads for the one it began with.

    Raises:
        ArtifactError: Missing or corrupt.
    """
    if config.objective.kind == "draft-heads":
        return open_artifact(run_dir / HEADS_DIRECTORY, kind="draft-heads")
    return open_artifact(run_dir / MODEL_DIRECTORY, kind="model")


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash named tensors over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        array = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"{name}:{array.dtype}:{array.shape}:".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save_result(
    run_dir: Path,
    model: Decoder,
    config: TrainConfig,
    *,
    base: str | None,
    tokenizer_dir: Path,
    metrics: Mapping[str, Any],
    parents: Sequence[Artifact | Parent],
) -> Artifact:
    """Write what the run has made, or open what a killed end of the run already wrote.

    Adapters are written beside the model as an artifact of their own; the model has them merged,
    so that what is evaluated and served is a plain model. Draft heads are written alone: the
    model is the one that the run began with.

    Args:
        run_dir: The run's directory.
        model: Whole, on this rank.
        config: The run's.
        base: Id of the weights that it began with.
        tokenizer_dir: With the tokenizer's files.
        metrics: For the manifest.
        parents: What it was made from.
    """
    if config.objective.kind == "draft-heads":
        assert base is not None
        return _save_heads(run_dir / HEADS_DIRECTORY, model, config, base, metrics, parents)
    destination = run_dir / MODEL_DIRECTORY
    if is_artifact(destination):
        return open_artifact(destination, kind="model")
    if has_adapters(model):
        adapter = _save_adapter(run_dir / ADAPTER_DIRECTORY, model, config, parents)
        parents = [*parents, adapter]
    with create_artifact(destination, kind="model", parents=parents, config=config) as draft:
        save_model(draft.path, merged_state(model), model.config, tokenizer_dir)
        draft.metrics = dict(metrics)
    assert draft.artifact is not None
    return draft.artifact


def _save_heads(
    destination: Path,
    model: Decoder,
    config: TrainConfig,
    base: str,
    metrics: Mapping[str, Any],
    parents: Sequence[Artifact | Parent],
) -> Artifact:
    if is_artifact(destination):
        return open_artifact(destination, kind="draft-heads")
    described = DraftHeadsConfig(
        base=base,
        depth=config.objective.depth,
        hidden_size=model.config.hidden_size,
        norm_eps=model.config.norm_eps,
    )
    with create_artifact(destination, kind="draft-heads", parents=parents, config=config) as draft:
        save_draft_heads(draft.path, draft_heads_of(model), described)
        draft.metrics = dict(metrics)
    assert draft.artifact is not None
    return draft.artifact


def _save_adapter(
    destination: Path,
    model: Decoder,
    config: TrainConfig,
    parents: Sequence[Artifact | Parent],
) -> Artifact:
    if is_artifact(destination):
        return open_artifact(destination, kind="adapter")
    with create_artifact(destination, kind="adapter", parents=parents, config=config) as draft:
        save_adapter(draft.path, model, config.lora, base=str(config.initialize_from))
    assert draft.artifact is not None
    return draft.artifact


def write_final(
    path: Path,
    metrics_path: Path,
    state: TrainState,
    model: Decoder,
    artifact: Artifact,
    *,
    dataset_sha256: str,
) -> dict[str, Any]:
    """Write `final.json`, which makes the run finished, and return its content."""
    lines = list(read_metrics(metrics_path))
    hexes = [line["loss_hex"] for line in lines]
    # The median step: the first ones compile, and a save or a validation is no part of any.
    seconds = statistics.median(line["seconds"] for line in lines)
    final = {
        "steps": state.step,
        "tokens": state.tokens,
        "loss": lines[-1]["loss"],
        "loss_hex": hexes[-1],
        "losses": {
            "first": lines[0]["loss"],
            "lowest": min(line["loss"] for line in lines),
            "last": lines[-1]["loss"],
            "sha256": hashlib.sha256("\n".join(hexes).encode()).hexdigest(),
        },
        "bits_per_byte": state.validation.get("bits_per_byte"),
        "validation": state.validation,
        "best_step": state.best_step,
        "best_bits_per_byte": state.best_bits_per_byte,
        "weights_sha256": weights_sha256(merged_state(model)),
        "dataset_sha256": dataset_sha256,
        "parameters": model.config.parameter_counts().total,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "step_seconds": seconds,
        "tokens_per_second": state.tokens / state.step / seconds,
        "model": str(artifact.path),
        "model_id": artifact.id,
    }
    write_atomic(path, (json.dumps(final, indent=1) + "\n").encode())
    return final
