"""int8 weight-only quantization, round to nearest: the method that needs no calibration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minigpt.compress.config import CompressConfig
from minigpt.core.artifact import Artifact, create_artifact, is_artifact, open_artifact
from minigpt.core.errors import ModelError
from minigpt.core.storage import is_remote
from minigpt.data.tokenizer import TOKENIZER_FILE
from minigpt.model.linear import Int8Embedding, Int8Linear, quantize_module
from minigpt.model.weights import load_model, save_model


def quantize_int8(
    model: str | Path, destination: str | Path, config: CompressConfig | None = None
) -> Artifact:
    """Round a model's matrices to int8 and write the result as a model artifact.

    Args:
        model: A model artifact, which becomes the parent, or a bare Hugging Face directory.
        destination: Where the new artifact goes. What an interrupted command already made there,
            of the same model by the same method, is returned as it is.
        config: Recorded in the manifest.

    Raises:
        ModelError: No model there, or it is int8 already.
        ArtifactError: A corrupt artifact, or something else at `destination`.
        StorageError: Full disk, no permission; nothing is left behind.
    """
    loaded = load_model(model)
    if any(isinstance(m, Int8Linear | Int8Embedding) for m in loaded.model.modules()):
        raise ModelError(f"{model} is int8 already", remedy="compress the model it was made from")
    is_own = is_remote(model) or is_artifact(model)
    parents = [open_artifact(model, kind="model", verify=False)] if is_own else []
    method = (config or CompressConfig()).method
    if made := _made_before(destination, parents, method):
        return made
    quantize_module(loaded.model)
    has_tokenizer = (loaded.path / TOKENIZER_FILE).is_file()
    recorded = {"compress": (config or CompressConfig()).model_dump(mode="json")}
    with create_artifact(destination, kind="model", parents=parents, config=recorded) as draft:
        save_model(draft.path, loaded.model, loaded.config, loaded.path if has_tokenizer else None)
    assert draft.artifact is not None
    return draft.artifact


def _made_before(
    destination: str | Path, parents: Sequence[Artifact], method: str
) -> Artifact | None:
    if is_remote(destination) or not is_artifact(destination):
        return None
    found = open_artifact(destination)
    ids = [parent.id for parent in found.manifest.parents]
    how = found.manifest.config.get("compress", {}).get("method")
    same = bool(parents) and ids == [parent.id for parent in parents] and how == method
    return found if same else None
