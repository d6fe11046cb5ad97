"""The weights of a checkpoint alone, as a model artifact (a Hugging Face directory)."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from minigpt.core.artifact import Artifact, create_artifact, open_artifact
from minigpt.core.errors import ArtifactError, ModelError
from minigpt.core.manifest import Parent
from minigpt.core.storage import storage_errors
from minigpt.model import lora
from minigpt.model.config import LoraConfig, ModelConfig
from minigpt.model.draft_heads import NAME as HEADS
from minigpt.model.hf import config_from_hf
from minigpt.model.hf_write import config_to_hf
from minigpt.model.weights import CONFIG, LoadedModel, load_model, save_model, tokenizer_files
from minigpt.train.checkpoint import MODEL_DIRECTORY
from minigpt.train.checkpoint_load import load_tensors
from minigpt.train.config import TrainConfig
from minigpt.train.world import World


def model_files(
    config: ModelConfig, tokenizer_dir: Path, recipe: TrainConfig | None = None
) -> dict[str, bytes]:
    """Return what a checkpoint needs so that its weights can be exported: names and contents.

    Args:
        config: The model's.
        tokenizer_dir: With the tokenizer's files.
        recipe: The run's, which says what adapters its checkpoints hold; None is none.
    """
    files = {CONFIG: (json.dumps(config_to_hf(config), indent=2) + "\n").encode()}
    if recipe is not None and recipe.lora.rank:
        base = str(recipe.initialize_from)
        files[lora.CONFIG] = lora.render_config(recipe.lora, base).encode()
    with storage_errors(f"read {tokenizer_dir}"):
        return files | {path.name: path.read_bytes() for path in tokenizer_files(tokenizer_dir)}


def export_weights(
    checkpoint: str | Path, destination: str | Path, *, base: str | None = None
) -> Artifact:
    """Write a checkpoint's weights as a model artifact; the run may go on meanwhile.

    A checkpoint of adapters gives the plain model that has them merged, in float32.

    Args:
        checkpoint: A checkpoint's directory or URL, of any number of ranks.
        destination: A path or URL at which nothing may exist yet.
        base: Where the model is that adapters were trained on; None is where the run found it.

    Raises:
        ArtifactError: No checkpoint there, or one without a model's configuration, or a file is
            missing or corrupt; or the base model is not the one that the adapters are for.
        ModelError: The base model can't be read.
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
    if all(name.startswith(f"{HEADS}.") for name in weights):
        raise ArtifactError(
            f"{source.uri} holds draft heads alone, which are no model",
            remedy="finish the run: its draft_heads directory is what a server takes",
        )
    parents: list[Artifact | Parent] = [source]
    if (files / lora.CONFIG).is_file():
        adapters, recorded = lora.load_adapter_config(files)
        loaded = _load_base(source, base or recorded)
        parents += [parent for parent in source.manifest.parents if parent.id == loaded.id]
        weights = _merge(loaded, adapters, weights)
    with create_artifact(
        destination, kind="model", parents=parents, config=source.manifest.config
    ) as draft:
        save_model(draft.path, weights, config, tokenizer_dir=files)
        draft.metrics = dict(source.manifest.metrics)
    assert draft.artifact is not None
    return draft.artifact


def _load_base(source: Artifact, base: str) -> LoadedModel:
    try:
        loaded = load_model(base, dtype="float32")
    except (ArtifactError, ModelError) as error:
        raise ModelError(
            f"{source.uri} holds adapters alone, and their base model can't be read: {error}",
            remedy="say where it is: --base PATH",
        ) from None
    origins = {parent.id for parent in source.manifest.parents if parent.kind == "model"}
    if origins and loaded.id not in origins:
        raise ArtifactError(
            f"{source.uri} holds adapters for another model than {base} ({loaded.id[:12]})",
            remedy="give the model that the run was initialized from: --base PATH",
        )
    return loaded


def _merge(base: LoadedModel, config: LoraConfig, adapters: dict[str, Tensor]) -> dict[str, Tensor]:
    lora.Adapter(config, adapters, str(base.path)).apply(base.model)
    return lora.merged_state(base.model)
