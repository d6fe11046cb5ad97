"""The weights of a checkpoint alone, as a model artifact (a Hugging Face directory)."""

from __future__ import annotations

import json
from pathlib import Path

from minigpt.core.artifact import Artifact, create_artifact, open_artifact
from minigpt.core.errors import ArtifactError
from minigpt.core.storage import storage_errors
from minigpt.model.config import ModelConfig
from minigpt.model.hf import config_from_hf
from minigpt.model.hf_write import config_to_hf
from minigpt.model.weights import CONFIG, save_model, tokenizer_files
from minigpt.train.checkpoint import MODEL_DIRECTORY
from minigpt.train.checkpoint_load import load_tensors
from minigpt.train.world import World


def model_files(config: ModelConfig, tokenizer_dir: Path) -> dict[str, bytes]:
    """Return what a checkpoint needs so that its weights can be exported: names and contents."""
    files = {CONFIG: (json.dumps(config_to_hf(config), indent=2) + "\n").encode()}
    with storage_errors(f"read {tokenizer_dir}"):
        return files | {path.name: path.read_bytes() for path in tokenizer_files(tokenizer_dir)}


def export_weights(checkpoint: str | Path, destination: str | Path) -> Artifact:
    """Write a checkpoint's weights as a model artifact; the run may go on meanwhile.

    Args:
        checkpoint: A checkpoint's directory or URL, of any number of ranks.
        destination: A path or URL at which nothing may exist yet.

    Raises:
        ArtifactError: No checkpoint there, or one without a model's configuration, or a file is
            missing or corrupt.
    """
    source = open_artifact(checkpoint, kind="checkpoint")
    files = source.path / MODEL_DIRECTORY
    try:
        config = config_from_hf(json.loads((files / CONFIG).read_bytes()))
    except FileNotFoundError:
        raise ArtifactError(
            f"{source.uri} has no {MODEL_DIRECTORY}/{CONFIG}: it is not known what model it is",
            remedy="export a checkpoint that `minigpt train` wrote",
        ) from None
    weights = load_tensors(source, None, World(), ["model"])["model"]
    with create_artifact(
        destination, kind="model", parents=[source], config=source.manifest.config
    ) as draft:
        save_model(draft.path, weights, config, tokenizer_dir=files)
        draft.metrics = dict(source.manifest.metrics)
    assert draft.artifact is not None
    return draft.artifact
