"""Weight-only quantization, int8 and int4: methods that need no calibration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minigpt.compress.config import CompressConfig
from minigpt.core.artifact import Artifact, create_artifact, is_artifact, open_artifact
from minigpt.core.errors import ModelError
from minigpt.core.storage import is_remote
from minigpt.data.tokenizer import TOKENIZER_FILE
from minigpt.model.linear import Int4Linear, Int8Embedding, Int8Linear, quantize_module
from minigpt.model.weights import load_model, save_model


def quantize(
    model: str | Path, destination: str | Path, config: CompressConfig | None = None
) -> Artifact:
    """Round a model's matrices by the config's method and write the result as a model artifact.

    Args:
        model: A model artifact, which becomes the parent, or a bare Hugging Face directory.
        destination: Where the new artifact goes. What an interrupted command already made there,
            of the same model by the same method, is returned as it is.
        config: Recorded in the manifest, with its group size settled.

    Raises:
        ModelError: No model there, it is quantized already, or none of its layers has whole
            groups of inputs.
        ArtifactError: A corrupt artifact, or something else at `destination`.
        StorageError: Full disk, no permission; nothing is left behind.
    """
    config = (config or CompressConfig()).settled()
    loaded = load_model(model)
    kinds = {type(module) for module in loaded.model.modules()}
    if kinds & {Int4Linear, Int8Linear, Int8Embedding}:
        bits = "int4" if Int4Linear in kinds else "int8"
        raise ModelError(f"{model} is {bits} already", remedy="compress the model it was made from")
    is_own = is_remote(model) or is_artifact(model)
    parents = [open_artifact(model, kind="model", verify=False)] if is_own else []
    if made := _made_before(destination, parents, config):
        return made
    group_size = None if config.group_size == "auto" else config.group_size
    quantize_module(loaded.model, group_size)
    if group_size and not any(isinstance(m, Int4Linear) for m in loaded.model.modules()):
        raise ModelError(
            f"{model}: no layer's inputs are whole groups of {group_size}",
            remedy="lower group_size, or set method=int8",
        )
    has_tokenizer = (loaded.path / TOKENIZER_FILE).is_file()
    recorded = {"compress": config.model_dump(mode="json")}
    with create_artifact(destination, kind="model", parents=parents, config=recorded) as draft:
        save_model(draft.path, loaded.model, loaded.config, loaded.path if has_tokenizer else None)
    assert draft.artifact is not None
    return draft.artifact


def _made_before(
    destination: str | Path, parents: Sequence[Artifact], config: CompressConfig
) -> Artifact | None:
    if is_remote(destination) or not is_artifact(destination):
        return None
    found = open_artifact(destination)
    ids = [parent.id for parent in found.manifest.parents]
    recorded = found.manifest.config.get("compress", {})
    how = recorded.get("method"), recorded.get("group_size", "auto")
    same = bool(parents) and ids == [parent.id for parent in parents]
    return found if same and how == (config.method, config.group_size) else None
